"""Whether wgmma may compute products: a switch, and a check of each tiling on the GPU at hand before its first use."""

from __future__ import annotations

import os
import warnings
from weakref import WeakKeyDictionary

import numpy as np

from fastclstm.engines.cuda import product
from fastclstm.engines.cuda.device import Device
from fastclstm.spec import ConvSpec

VARIABLE = "FASTCLSTM_CUDA_WGMMA"
"""The environment variable that is 0 where mma.sync is to compute all products."""

TOLERANCE = 1e-3
"""The largest difference from mma.sync, in units of the largest value: operands are the same, sums in another order."""

_checked: WeakKeyDictionary[Device, dict[object, bool]] = WeakKeyDictionary()


def works(device: Device, tiling: product.Tiling) -> bool:
    """Whether a tiling of wgmma.cuh is to be used: it is not switched off and agrees with mma.sync on this device.

    That is decided, and computed, once. Raises ValueError for a value of the variable that is neither 0 nor 1.
    """
    device = device.itself
    known = _checked.setdefault(device, {})
    form = tiling.macros  # one for every frame
    if form not in known:
        wanted = os.environ.get(VARIABLE, "1")
        if wanted not in ("0", "1"):
            raise ValueError(f"the environment variable {VARIABLE} must be 0 or 1, got {wanted!r}")
        flaw = None if wanted == "0" else _flaw(device, tiling)
        known[form] = wanted == "1" and flaw is None
        if flaw is not None:
            size = f"{tiling.rows}x{tiling.columns}{' with a halo' if tiling.frame else ''}"
            warnings.warn(
                f"engine 'cuda': products of kind {tiling.kind} by wgmma, {size}, {flaw}; that is used instead; please "
                f"report it ({VARIABLE}=0: no check)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
    return known[form]


def _flaw(device: Device, tiling: product.Tiling) -> str | None:
    """Say what is wrong with a tiling on this device, other than with mma.sync; None: nothing."""
    try:
        agrees = _agrees(device, tiling)
    except RuntimeError as error:
        return f"fail on this GPU ({error}), unlike mma.sync"
    return None if agrees else "differ on this GPU from those by mma.sync"


def _agrees(device: Device, tiling: product.Tiling) -> bool:
    """Compare a small convolution: more than one block of pixels, of columns and of the depth than there are stages."""
    rng = np.random.default_rng(0)
    size = (9, 16, 48) if tiling.frame is None else (17, 18, 2 * tiling.depth + 16)  # three chunks of a halo
    x, kernel = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((1, *size), (3, 3, size[2], tiling.columns + 8))
    )
    spec = ConvSpec.infer(x.shape, kernel.shape)
    tiling = product.of_form(tiling, (spec.HO, spec.WO), [product.window(spec)])
    found, expected = (
        device.get(product.convolve(spec, used, device.put(x), device.put(kernel), None))
        for used in (tiling, product.tilings(tiling.kind, 4)[-1])
    )
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())
