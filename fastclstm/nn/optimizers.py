"""Optimizers: what a step does to the parameters, by name, to the same numbers as PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.nn import Options, is_number, look_up, schedules
from fastclstm.spec import choice, expect_shape

_STEPS = "steps"


@dataclass(eq=False)
class Optimizer(Options):
    """What all optimizers share.

    Parameters
    ----------
    learning_rate : float or function
        A number, or a function from the step (0, 1, …) to one, such as those in `fastclstm.nn.schedules`. It may be
        assigned to between steps.
    weight_decay : float
        This times the parameter is added to its gradient (`AdamW`: taken off the parameter itself).
    clip_norm : float, optional
        Where the norm of all gradients together is above this, they are scaled down to it.
    clip_value : float, optional
        Gradients are clipped to ±this, element by element.

    Attributes
    ----------
    steps : int
        How many have been taken.
    state : dict of dict of array
        By parameter, what the steps so far left: means of its gradients and the like. A step replaces it and modifies
        nothing in it, so that assigning `steps` and `state` as they were before the step undoes it.

    Raises
    ------
    ValueError
        An option out of range.
    TypeError
        A learning rate that is neither a number nor a function.
    """

    learning_rate: Any = 0.01
    _: KW_ONLY
    weight_decay: float = 0
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.get(self.learning_rate)
        self._check_number("weight_decay", 0)
        for name in ("clip_norm", "clip_value"):
            if getattr(self, name) is not None:
                self._check_number(name, 0, inclusive=False)
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError(f"{type(self).__name__}: give clip_norm or clip_value, not both")
        self.steps = 0
        self.state: dict[str, dict[str, np.ndarray]] = {}

    def step(self, parameters: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the new values of those parameters that have a gradient; nothing given is modified.

        After an error, an interruption too, `steps` and `state` are as they were.

        Parameters
        ----------
        parameters : mapping from name to array, float32 or float64
        gradients : mapping from name to array of the parameter's shape

        Returns
        -------
        dict of array
            Of the parameters' shapes and dtypes.

        Raises
        ------
        FloatingPointError
            A gradient with NaN or Inf.
        ValueError
            A gradient of an unknown parameter or of another shape, a learning rate that is no number >= 0.
        """
        op = type(self).__name__
        checked = {name: self._checked(name, parameters, gradient) for name, gradient in gradients.items()}
        rate = schedules.get(self.learning_rate)(self.steps)
        if not is_number(rate) or rate < 0:
            raise ValueError(f"{op}: the learning rate of step {self.steps} must be a number >= 0, got {rate!r}")
        state, moved = dict(self.state), {}
        for name, gradient in self._clipped(checked).items():
            parameter = np.asarray(parameters[name])
            slots = state[name] = {"count": np.array(0)} | self.state.get(name, {})
            slots |= {slot: np.zeros_like(parameter) for slot in self.slots if slot not in slots}
            slots["count"] = np.asarray(slots["count"] + 1)
            moved[name] = self._update(parameter, gradient, float(rate), slots)
        self.steps, self.state = self.steps + 1, state
        return moved

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays of its shape that `state` has of each parameter, beside the ``"count"`` of its steps."""
        return ()

    def get_state(self) -> dict[str, np.ndarray]:
        """Return copies of all that later steps depend on: ``"steps"``, and the `state` as ``"parameter/slot"``."""
        flat = {f"{name}/{slot}": array for name, arrays in self.state.items() for slot, array in arrays.items()}
        return {key: np.array(array) for key, array in ({_STEPS: self.steps} | flat).items()}

    def set_state(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what `get_state` returned: the next steps are the same, to the bit.

        Raises
        ------
        ValueError
            A name that is not the state's, or missing; a count that is no integer >= 0. Nothing has changed then.
        """
        names = {key: key.rpartition("/") for key in arrays if key != _STEPS}
        expected = {f"{name}/{slot}" for name, _, _ in names.values() for slot in ("count", *self.slots)} | {_STEPS}
        if wrong := sorted(expected.symmetric_difference(arrays)):
            raise ValueError(
                f"{type(self).__name__}: a state has {_STEPS!r} and, of each parameter, "
                f"{', '.join(('count', *self.slots))}; missing or unknown: {', '.join(map(repr, wrong))}"
            )
        copies = {key: np.array(array) for key, array in arrays.items()}
        for key, array in copies.items():
            counts = key == _STEPS or key.endswith("/count")
            if counts and (array.shape or array.dtype.kind not in "iu" or array < 0):
                raise ValueError(f"{type(self).__name__}: {key} of a state must be an integer >= 0, got {array}")
        state: dict[str, dict[str, np.ndarray]] = {}
        for key, (name, _, slot) in names.items():
            state.setdefault(name, {})[slot] = copies[key]
        self.steps, self.state = int(copies[_STEPS]), state

    def _checked(self, name: str, parameters: Mapping[str, np.ndarray], gradient: Any) -> np.ndarray:
        """Return the gradient in its parameter's dtype."""
        op = type(self).__name__
        if name not in parameters:
            raise ValueError(f"{op}: gradient of an unknown parameter {name!r}; they are {', '.join(parameters)}")
        parameter = np.asarray(parameters[name])
        choice(op, f"dtype of {name}", parameter.dtype.name, ("float32", "float64"))
        gradient = np.asarray(gradient, parameter.dtype)
        expect_shape(op, f"gradient of {name}", gradient.shape, parameter.shape, "that of the parameter")
        for slot, array in self.state.get(name, {}).items():
            if slot in self.slots:
                expect_shape(op, f"{slot} of {name}", array.shape, parameter.shape, "that of the parameter, which "
                             "the state of this optimizer is not of; take a new one")  # fmt: skip
        if not np.isfinite(gradient).all():
            raise FloatingPointError(
                f"{op}: the gradient of {name} holds NaN or Inf; look for them in the data, or lower the learning rate"
            )
        return gradient

    def _clipped(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.clip_value is not None:
            return {name: np.clip(g, -self.clip_value, self.clip_value) for name, g in gradients.items()}
        if self.clip_norm is not None:
            unit, norm = 1.0, _norm(gradients.values())
            if math.isinf(norm):
                unit = max(float(np.abs(g).max(initial=0)) for g in gradients.values())
                norm = _norm(np.divide(g, unit, dtype=np.float64) for g in gradients.values())
            if norm > self.clip_norm / unit:
                return {name: g * (self.clip_norm / unit / norm) for name, g in gradients.items()}
        return gradients

    def _update(
        self, parameter: np.ndarray, gradient: np.ndarray, rate: float, state: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Return the parameter's new value, and put new arrays into its state."""
        raise NotImplementedError

    def _decayed(self, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return gradient + self.weight_decay * parameter if self.weight_decay else gradient


@dataclass(eq=False)
class SGD(Optimizer):
    """Gradient descent, with a velocity that keeps the share `momentum` of itself at each step, also Nesterov's.

    Other parameters are those of `Optimizer`.

    Notes
    -----
    Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.

    Examples
    --------
    >>> SGD(0.5).step({"w": np.array([1.0])}, {"w": np.array([4.0])})
    {'w': array([-1.])}
    """

    momentum: float = 0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("momentum", 0, 1)
        choice("SGD", "nesterov", self.nesterov, (False, True))
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0; give momentum=0.9, say")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays that `state` has of each parameter."""
        return ("velocity",) * bool(self.momentum)

    def _update(
        self, parameter: np.ndarray, gradient: np.ndarray, rate: float, state: dict[str, np.ndarray]
    ) -> np.ndarray:
        gradient = self._decayed(parameter, gradient)
        if not self.momentum:
            return parameter - rate * gradient
        velocity = state["velocity"] = self.momentum * state["velocity"] + gradient
        return parameter - rate * (gradient + self.momentum * velocity if self.nesterov else velocity)


@dataclass(eq=False)
class RMSprop(Optimizer):
    """Gradients divided by the root of their mean square: Tieleman & Hinton, Coursera lecture 6e, 2012.

    Other parameters are those of `Optimizer`.

    Parameters
    ----------
    rho : float
        The share that means of the past keep at each step: 0.9 as in Keras and in the lecture; PyTorch's has 0.99.
    momentum : float
        The share that the velocity keeps at each step.
    epsilon : float
        Added to the root.
    centered : bool
        Divide by the root of the variance instead: Graves, "Generating sequences with recurrent neural networks", 2013.
    """

    rho: float = 0.9
    momentum: float = 0
    epsilon: float = 1e-8
    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("rho", 0, 1)
        self._check_number("momentum", 0, 1)
        self._check_number("epsilon", 0, inclusive=False)
        choice("RMSprop", "centered", self.centered, (False, True))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays that `state` has of each parameter."""
        return ("square", *["mean"] * self.centered, *["velocity"] * bool(self.momentum))

    def _update(
        self, parameter: np.ndarray, gradient: np.ndarray, rate: float, state: dict[str, np.ndarray]
    ) -> np.ndarray:
        gradient = self._decayed(parameter, gradient)
        square = state["square"] = _blend(state["square"], gradient * gradient, self.rho)
        if self.centered:
            mean = state["mean"] = _blend(state["mean"], gradient, self.rho)
            square = np.maximum(square - mean * mean, 0)
        velocity = gradient / (np.sqrt(square) + self.epsilon)
        if self.momentum:
            velocity = state["velocity"] = self.momentum * state["velocity"] + velocity
        return parameter - rate * velocity


@dataclass(eq=False)
class Adam(Optimizer):
    """Means of the gradients divided by the root of their mean squares, both freed of their bias towards 0.

    Other parameters are those of `Optimizer`.

    Parameters
    ----------
    beta_1, beta_2 : float
        The shares that the means, and the mean squares, of the past keep at each step.
    epsilon : float
        Added to the root.
    amsgrad : bool
        Divide by the largest mean square so far: Reddi, Kale & Kumar, ICLR 2018.

    Notes
    -----
    Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. The bias depends on how many
    steps a parameter itself has taken, so that a layer unfrozen late starts well.

    Examples
    --------
    >>> Adam(0.1).step({"w": np.array([1.0])}, {"w": np.array([4.0])})["w"].round(6)
    array([0.9])
    """

    learning_rate: Any = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_1", "beta_2"):
            self._check_number(name, 0, 1)
            if getattr(self, name) == 1:
                self._refuse(name, "below 1")
        self._check_number("epsilon", 0, inclusive=False)
        choice(type(self).__name__, "amsgrad", self.amsgrad, (False, True))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays that `state` has of each parameter."""
        return ("mean", "square", *["max_square"] * self.amsgrad)

    def _update(
        self, parameter: np.ndarray, gradient: np.ndarray, rate: float, state: dict[str, np.ndarray]
    ) -> np.ndarray:
        gradient, count = self._decayed(parameter, gradient), int(state["count"])
        mean = state["mean"] = _blend(state["mean"], gradient, self.beta_1)
        square = state["square"] = _blend(state["square"], gradient * gradient, self.beta_2)
        if self.amsgrad:
            square = state["max_square"] = np.maximum(state["max_square"], square)
        root = np.sqrt(square) / math.sqrt(1 - self.beta_2**count) + self.epsilon
        return parameter - rate / (1 - self.beta_1**count) * mean / root


@dataclass(eq=False)
class AdamW(Adam):
    """`Adam` whose weight decay shrinks the parameters, by the learning rate's share of it, and no gradient.

    Notes
    -----
    Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    """

    _: KW_ONLY
    weight_decay: float = 0.01

    def _update(
        self, parameter: np.ndarray, gradient: np.ndarray, rate: float, state: dict[str, np.ndarray]
    ) -> np.ndarray:
        return super()._update(parameter * (1 - rate * self.weight_decay), gradient, rate, state)

    def _decayed(self, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return gradient


def _norm(arrays: Iterable[np.ndarray]) -> float:
    """Return the norm of all together, of squares summed in float64; Inf where these are too large for it."""
    return math.sqrt(sum(float(np.einsum("i,i", a, a, dtype=np.float64)) for a in (a.ravel("K") for a in arrays)))


def _blend(old: np.ndarray, new: np.ndarray, keep: float) -> np.ndarray:
    return keep * old + (1 - keep) * new


TABLE: dict[str, type[Optimizer]] = {"sgd": SGD, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW}
"""The optimizers by name."""


def get(spec: Any) -> Optimizer:
    """Return the optimizer that `spec` means: a name, which gives a new one, or an `Optimizer`.

    Raises
    ------
    ValueError
        An unknown name.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("adam").learning_rate
    0.001
    """
    if isinstance(spec, Optimizer):
        return spec
    if isinstance(spec, str):
        return look_up("optimizer", TABLE, spec)()
    raise TypeError(f"an optimizer must be a name ({', '.join(TABLE)}) or an Optimizer, got {spec!r}")
