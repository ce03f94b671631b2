"""Running a graph of layers and its way back: what `Sequential` and `Model` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer, penalized, without_input_gradient
from fastclstm.layers.container import parts, recall, recorded, told_of, without_penalties
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.masks import steps_mask
from fastclstm.layers.place import Place, refuse
from fastclstm.layers.symbolic import leaves, mapped
from fastclstm.models.graph import Graph, Slot, Step, filled, paired
from fastclstm.models.moving import engines, moved
from fastclstm.spec import Shape
from fastclstm.training.trainable import Trainable

Origins = dict[Slot, tuple[bool, np.dtype]]
"""Of what a layer took on a GPU network's way: whether it computed there, and the dtype before."""

Calls = list[tuple[list[tuple[Layer, Any]], Origins]]
"""What a training call keeps of each step."""


class Network(Trainable):
    """Layers in a graph: each step takes what inputs and steps before have returned.

    An array is let go when its last reader has run. On the way back the steps come in reverse order, the gradients of
    several readers, and those of several calls of one layer, are summed.
    """

    _symbolic_options: ClassVar[frozenset[str]] = frozenset({"mask", "lengths"})

    _graph: Graph

    def _run(
        self, place: Place, values: dict[Slot, Any], mask: np.ndarray | None, training: bool,
        check: Callable[[int, Any], None] | None = None,
    ) -> tuple[Any, Calls]:  # fmt: skip
        """Return the outputs for the inputs in `values`, which is emptied, and what a training call keeps.

        `check` is called with each step's number and x before it runs.
        """
        graph = self._graph
        if place.on_gpu:
            self._check_gpu()
        moves = place.on_gpu or "cuda" in engines(self)
        inputs = list(values.items())
        masks = {} if mask is None else dict.fromkeys(values, mask)
        calls: Calls = []
        penalties: dict[int, float] = {}
        for index, step in enumerate(graph.steps):
            layer, origins = step.layer, Origins()
            x = filled(step.x, values)
            if check is not None:
                check(index, x)
            with told_of(step.told):
                options = {name: filled(value, values) for name, value in step.options.items()}
                for slot in graph.released[index]:
                    del values[slot]
                if moves:
                    x, options = self._moved(step, x, options, place, training, origins)
                steps = next((masks[slot] for slot in leaves(step.x) if slot in masks), None)
                if steps is not None:
                    if "mask" not in options and any(masked(layer)):
                        options["mask"] = steps
                    if reverses(layer):
                        steps = np.flip(steps, time_axis(next(masked(layer)), steps.ndim == 2))
                made = layer(x, **{"training": training} | options)
                del x, options  # what only this layer has read is let go

                def keep(slot: Slot, array: Any, steps: Any = steps) -> None:
                    if slot in graph.read:
                        values[slot] = array
                        if steps is not None:
                            masks[slot] = steps

                paired(step.y, made, keep)
                del made
            if training:
                calls.append((recorded(layer), origins))
                for part in parts(layer) if step.name in graph.shared else ():
                    penalties[id(part)] = penalties.get(id(part), 0.0) + getattr(part, "_activity_penalty", 0.0)
        for part in parts(self) if penalties else ():
            if hasattr(part, "_activity_penalty"):
                part._activity_penalty = penalties.get(id(part), part._activity_penalty)
        return _own(filled(graph.outputs, values), [array for _, array in inputs]), calls

    def _moved(
        self, step: Step, x: Any, options: dict[str, Any], place: Place, training: bool, origins: Origins
    ) -> tuple[Any, dict[str, Any]]:
        """Return what a step is to take where that computes best, see `moving.moved`; tell `origins` of it."""

        def move(slot: Any, array: Any) -> Any:
            if not isinstance(slot, Slot):
                return array
            came = moved(step.layer, array, stays=place.on_gpu, first=slot in self._graph.inputs, training=training)
            origins[slot] = dispatch.on_gpu(came), array.dtype
            return came

        states = {name: value for name, value in options.items() if name not in ("mask", "lengths")}
        return _zipped(move, step.x, x), options | {n: _zipped(move, step.options[n], v) for n, v in states.items()}

    def _pull(self, calls: Calls, gradients: dict[Slot, Any]) -> dict[Slot, Any]:
        """Pull the gradients of outputs back to the inputs, and keep those of the parameters."""
        graph = self._graph
        sums: dict[tuple[int, str], Any] = {}
        reached = set[str]()

        def add(slot: Slot, gradient: Any) -> None:
            if gradient is not None:
                before = gradients.get(slot)
                gradients[slot] = gradient if before is None else _sum(before, gradient)

        for index in reversed(range(len(graph.steps))):
            step, (record, origins) = graph.steps[index], calls[index]
            dy = mapped(lambda leaf: gradients.pop(leaf, None) if isinstance(leaf, Slot) else None, step.y)
            if all(part is None for part in leaves(dy)):
                continue
            reached.add(step.name)
            shared = step.name in graph.shared
            with told_of(step.told), without_penalties(list(parts(step.layer))) if shared else nullcontext():
                recall(record)
                if not any(on_gpu for on_gpu, _ in origins.values()):
                    dy = mapped(dispatch.to_numpy, dy)
                first = not self.input_gradient and all(slot in graph.inputs for slot in leaves(step.x))
                with without_input_gradient(step.layer) if first else nullcontext():
                    dx, others = self._pull_step(index, dy)

                def back(slot: Slot, gradient: Any, origins: Origins = origins) -> None:
                    on_gpu, dtype = origins.get(slot, (False, None))
                    if on_gpu and gradient is not None and slot not in graph.inputs and gradient.dtype != dtype:
                        gradient = gradient.astype(dtype)
                    add(slot, gradient)

                if dx is not None:
                    paired(step.x, dx, back)
                for name, gradient in others.items():
                    paired(step.options.get(name), gradient, back)
                del dx, others
            owners = step.layer._owners()
            for name, gradient in step.layer._kept_gradients().items():
                key = id(owners[name][0]), owners[name][1]
                if gradient is None:  # it comes with a later call: see `remembered.Passage`
                    continue
                sums[key] = sums[key] + gradient if key in sums else gradient
        self._keep_sums(sums, reached)
        return gradients

    def _pull_step(self, index: int, dy: Any) -> tuple[Any, dict[str, Any]]:
        """Return the gradients of what a step has read."""
        step = self._graph.steps[index]
        return step.layer._pull_call(dy, step.options)

    def _keep_sums(self, sums: Mapping[tuple[int, str], Any], reached: set[str]) -> None:
        """Keep the gradients for `get_gradients`: with the penalties of shared layers, zeros where none came."""
        graph, owners = self._graph, self._owners()
        silent = {id(part) for name, layer in graph.layers.items() if name not in reached for part in parts(layer)}
        shared = {id(part) for step in graph.steps if step.name in graph.shared for part in parts(step.layer)}
        self._gradients = {}
        for name in self.trainable_parameters if self.store_gradients else ():
            owner, key = owners[name]
            gradient = sums.get((id(owner), key))
            if gradient is None and id(owner) in silent and owner.store_gradients:
                gradient = penalized(owner, key, np.zeros_like(owner._parameters[key]))
            elif gradient is not None and id(owner) in shared and id(owner) not in silent:
                gradient = penalized(owner, key, gradient)
            if gradient is not None:
                self._gradients[name] = gradient

    def _check_gpu(self) -> None:
        """Raise TypeError where a layer cannot take an x on a GPU, before anything is computed."""
        for step in self._graph.steps:
            with told_of(step.told):
                if type(step.layer)._knows_gpu is Layer._knows_gpu:
                    refuse(step.layer)

    def _steps(self, place: Place, mask: Any, lengths: Any, shape: Shape) -> np.ndarray | None:
        """Return the mask that mask or lengths describe for an x of `shape`."""
        if mask is None and lengths is None:
            return None
        op, lstm = type(self).__name__, next(masked(self), None)
        if lstm is None:
            raise ValueError(f"{op}: mask and lengths are for ConvLSTM2D layers and the like, and there is none")
        if mask is not None and lengths is not None:
            raise ValueError(f"{op}: give mask or lengths, not both")
        if mask is not None:
            return place.read("mask", mask) if dispatch.on_gpu(mask) else dispatch.as_numpy(op, "mask", mask)
        if len(shape) - lstm._rank not in (2, 3):
            raise ValueError(f"{op}: lengths need an x (batch, time, …) of frames, got {len(shape)}D {shape}")
        batched = len(shape) == lstm._rank + 3
        time = time_axis(lstm, batched)
        valid = steps_mask(None, lengths, (shape[1 - time] if batched else 1, shape[time]))
        assert valid is not None
        return valid if time else valid.T if batched else valid[0]


def masked(layer: Layer) -> Iterator[ConvRecurrent]:
    """Yield the layers within that get a mask."""
    if isinstance(layer, ConvRecurrent):
        yield layer
    elif isinstance(layer, Network):
        for step in layer._graph.steps:
            yield from masked(step.layer)


def time_axis(lstm: ConvRecurrent, batched: bool) -> int:
    """Return which axis of sequences, and of masks, is that of the time steps."""
    return 1 if batched and not lstm.time_major else 0


def restored(restore: Callable[[Any], Any], outputs: Any) -> Any:
    """Return arrays in tuples, lists and dicts as the caller's kind of array."""
    return mapped(lambda array: None if array is None else restore(array), outputs)


def reverses(layer: Layer) -> bool:
    """Whether a layer returns the time steps last first."""
    return sum(lstm.go_backwards for lstm in masked(layer)) % 2 == 1


def _own(outputs: Any, inputs: list[Any]) -> Any:
    """Return the outputs in memory that neither inputs nor other outputs have."""
    taken = list(inputs)

    def own(array: Any) -> Any:
        if array is None:
            return None
        if any(np.may_share_memory(array, other) for other in taken):
            array = array.copy()
        taken.append(array)
        return array

    return mapped(own, outputs)


def _sum(a: Any, b: Any) -> Any:
    """Return the sum of two gradients, on the host where one is there."""
    if dispatch.on_gpu(a) != dispatch.on_gpu(b):
        a, b = dispatch.to_numpy(a), dispatch.to_numpy(b)
    return dispatch.to_view(a) + dispatch.to_view(b)


def _zipped(function: Callable[[Any, Any], Any], structure: Any, value: Any) -> Any:
    """Return tuples, lists and dicts with `function` of each leaf of a structure and of what stands in its place."""
    if isinstance(structure, tuple | list):
        return type(structure)(_zipped(function, a, b) for a, b in zip(structure, value, strict=True))
    if isinstance(structure, Mapping):
        return {key: _zipped(function, a, value[key]) for key, a in structure.items()}
    return function(structure, value)
