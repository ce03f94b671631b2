"""The networks that foretell several frames at once, which train makes for arrays and for files."""

from __future__ import annotations

from fastclstm.models import EncoderForecaster

KERNEL = 5


def forecaster(
    frame: tuple[int, ...], filters: int, scales: int, patch: int, seed: int, engine: str | None,
    kernel_size: int = KERNEL, head_activation: str = "sigmoid",
) -> EncoderForecaster:  # fmt: skip
    """Return a network that makes all frames (H, W, C) that follow: layers of one size, or each of half the size.

    Raises ValueError where frames do not fit.
    """
    H, W, C = frame
    smallest = patch * 2 ** (scales - 1)
    if H % smallest or W % smallest:
        raise ValueError(f"train: frames of {H}×{W} pixels cannot be cut into patches of {patch} and halved "
                         f"{scales - 1} times; give other --patch or fewer --scales")  # fmt: skip
    layers, strides = (2, None) if scales == 1 else (scales, (1, *[2] * (scales - 1)))
    return EncoderForecaster(C, (filters,) * layers, kernel_size, patch_size=patch, strides=strides, inputs="nothing",
                             head_activation=head_activation, seed=seed, engine=engine)  # fmt: skip
