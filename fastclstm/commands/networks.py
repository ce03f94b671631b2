"""What train does alike for arrays and for files: networks that foretell several frames at once, and going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastclstm.models import EncoderForecaster

KERNEL = 5


@contextmanager
def going_on(checkpoint: Path, restart: bool) -> Iterator[None]:
    """Say of a training in this block from where it goes on; if it is interrupted, that it can; or why it cannot."""
    if not restart and checkpoint.exists():
        print(f"going on from {checkpoint}; --restart starts anew")
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {checkpoint}")
        raise
    except ValueError as error:
        if "another training" in str(error):
            raise ValueError(f"{error}; that is, add --restart or choose another --out") from error
        raise


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
