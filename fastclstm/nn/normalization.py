"""Normalization of a cell's pre-activations: which statistics, of what, and with how many weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastclstm.nn import Options, look_up
from fastclstm.spec import choice

KINDS = ("layer", "group", "batch")


@dataclass(frozen=True)
class Normalization(Options):
    """What is normalized to zero mean and unit variance before the gates: ``gamma * (z - mean) / std + beta``.

    Parameters
    ----------
    kind : "layer", "group" or "batch"
        The mean and variance of a value are taken over all pixels and channels of its sample, over the pixels of its
        group of channels in its sample, or over the whole batch of its channel's pixels.
    groups : int, optional
        How many groups of channels "group" makes of the 4F; None: 4, one a gate.
    epsilon : float
        Added to the variance under the root.
    momentum : float
        Of "batch": the share that the moving mean and variance keep at each update.
    separate : bool
        Normalize the input's and the hidden state's convolutions each for itself, instead of their sum.
    elementwise : bool
        Of "layer": weights ``gamma`` and ``beta`` for every pixel and channel (HO, WO, 4F), instead of (4F,).

    Raises
    ------
    ValueError
        An option out of range, or one that `kind` has no use for.

    Notes
    -----
    Ba et al., "Layer Normalization", 2016; Wu & He, "Group Normalization", ECCV 2018; Ioffe & Szegedy, "Batch
    Normalization", ICML 2015; for recurrent nets Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017.

    Examples
    --------
    >>> Normalization("group", groups=8).epsilon
    1e-05
    """

    kind: str
    groups: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    separate: bool = False
    elementwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("Normalization", "kind", self.kind, KINDS)
        if self.groups is not None:
            self._check_integer("groups", 1)
        self._check_number("epsilon", 0, inclusive=False)
        self._check_number("momentum", 0, 1)
        for name in ("separate", "elementwise"):
            choice("Normalization", name, getattr(self, name), (False, True))
        for name, kind in (("groups", "group"), ("momentum", "batch"), ("elementwise", "layer")):
            value, default = getattr(self, name), getattr(Normalization, name)
            if value != default and self.kind != kind:
                raise ValueError(
                    f"Normalization: {name}={value!r} goes with kind {kind!r} only, got kind {self.kind!r}; "
                    f"leave {name} out"
                )


TABLE: dict[str, Normalization] = {kind: Normalization(kind) for kind in KINDS}
"""The kinds with their usual options, by name."""


def get(spec: Any) -> Normalization:
    """Return the normalization that `spec` means: a name or a `Normalization`.

    Raises
    ------
    ValueError
        An unknown name.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("layer")
    Normalization(kind='layer', groups=None, epsilon=1e-05, momentum=0.9, separate=False, elementwise=False)
    """
    if isinstance(spec, Normalization):
        return spec
    if isinstance(spec, str):
        return look_up("normalization", TABLE, spec)
    raise TypeError(f"a normalization must be a name ({', '.join(TABLE)}) or a Normalization, got {spec!r}")
