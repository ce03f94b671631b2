"""What training asks of a network: the protocol that it knows models by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from fastclstm.layers.base import Layer
from fastclstm.nn.described import Description
from fastclstm.training.batches import Batch


class Model(Protocol):
    """A network as training sees it; `Trainable` makes one of a `Container`. The public names are those of `Layer`."""

    _input_names: tuple[str, ...] | None
    """Of the inputs, where they are a list or dict; None where there is one array."""
    _output_names: tuple[str, ...] | None

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Name of each parameter and its array."""

    @property
    def trainable_parameters(self) -> dict[str, np.ndarray]:
        """Those that have gradients."""

    @property
    def penalty(self) -> float:
        """What is added to the loss."""

    def set_parameters(self, arrays: Mapping[str, Any]) -> None:
        """Replace all parameters."""

    def apply_constraints(self) -> None:
        """Bring the parameters to where their constraints want them."""

    def get_gradients(self) -> dict[str, np.ndarray]:
        """Return what the last `backward` left."""

    def backward(self, *gradients: Any) -> Any:
        """Pull the gradient of the last training call's output back."""

    def _begin_step(self, seed: int, epoch: int, step: int) -> None:
        """Hear where a training is, before each step, and what to draw from: a seed of the whole training."""

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        """Return the outputs for a batch: one array, or a list or dict of them."""

    def _check_batch(self, op: str, batch: Batch) -> None:
        """Raise ValueError where the batch is none for this model."""

    def _fit_options(self) -> dict[str, Any]:
        """Return what a checkpoint should know of `_predict_batch`, as JSON holds it."""

    def _described(self) -> Description:
        """Return class and options, as files tell them."""

    def _walk(self) -> Iterator[tuple[str, Layer]]:
        """Yield the network and every layer within, each with its path."""

    def _frozen(self) -> list[str]:
        """Return the places of the frozen layers."""

    def _part(self, place: str) -> Layer:
        """Return the layer at such a place."""
