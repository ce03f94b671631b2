"""Winograd's tiles: which there are, what each errs, and how large kernels are cut into pieces.

F(m, k) computes m outputs of k taps from α = m + k − 1 inputs with α multiplications; a tile of F(m_y×m_x, k_y×k_x)
with α_y·α_x. An axis of one tap is not transformed: α = m. Kernels of more than 7 taps on an axis, or of fewer where
that is cheaper, are a sum of pieces of k taps, each a convolution with its own origin. Dilated convolutions are
interleaved dense ones: the pixels of a tile are a dilation apart. A strided convolution is the sum of those of its
lattices: every stride-th tap, on every stride-th pixel. So tiles of one size do kernels of any: what has fewer taps
than the tile is filled up with zeros.

Largest and root-mean-square error of an output in float32, relative to the root mean square of the outputs, where
normal inputs of 64 channels meet weights uniform in ±1/sqrt(k²·64) (400 tiles, matrix products summed channel by
channel; `python -m bench.errors --tiles`):

| tile   | α | multiplications an output | largest | r.m.s.  | direct, r.m.s. |
| ------ | - | ------------------------- | ------- | ------- | -------------- |
| F(3,2) | 4 |  1.8 of 4                 | 1.3e-6  | 2.6e-7  | 2.9e-7         |
| F(2,3) | 4 |  4.0 of 9                 | 1.1e-6  | 2.5e-7  | 4.4e-7         |
| F(5,2) | 6 |  1.4 of 4                 | 1.0e-5  | 1.2e-6  | 2.9e-7         |
| F(4,3) | 6 |  2.3 of 9                 | 8.9e-6  | 1.1e-6  | 4.2e-7         |
| F(3,4) | 6 |  4.0 of 16                | 6.2e-6  | 1.1e-6  | 5.9e-7         |
| F(2,5) | 6 |  9.0 of 25                | 5.5e-6  | 1.2e-6  | 7.0e-7         |
| F(5,4) | 8 |  2.6 of 16                | 2.6e-5  | 3.1e-6  | 5.8e-7         |
| F(4,5) | 8 |  4.0 of 25                | 2.8e-5  | 3.2e-6  | 7.2e-7         |
| F(3,6) | 8 |  7.1 of 36                | 1.8e-5  | 3.5e-6  | 8.5e-7         |
| F(2,7) | 8 | 16.0 of 49                | 2.3e-5  | 4.3e-6  | 1.0e-6         |
| F(6,3) | 8 |  1.8 of 9                 | 3.4e-5  | 3.6e-6  | 4.4e-7         |
| F(7,2) | 8 |  1.3 of 4                 | 4.5e-5  | 4.2e-6  | 3.0e-7         |

What errs 3e-5 at most is taken: not the last two, whose gain is small.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from fastclstm.spec import ConvSpec, Pair

OUTPUTS = {1: (1, 4), 2: (3, 5), 3: (2, 4), 4: (3, 5), 5: (2, 4), 6: (3,), 7: (2,)}
"""Outputs m of a tile on an axis, by the taps k."""


class Tile(NamedTuple):
    """F(m_y×m_x, k_y×k_x): the outputs of a tile, and the taps of a kernel's piece."""

    m_y: int
    m_x: int
    k_y: int
    k_x: int

    @property
    def points(self) -> int:
        """Elements of the transformed tile."""
        return (self.m_y + self.k_y - 1) * (self.m_x + self.k_x - 1)

    @property
    def outputs(self) -> int:
        """Outputs of a tile."""
        return self.m_y * self.m_x

    def __str__(self) -> str:
        return f"F({self.m_y}×{self.m_x}, {self.k_y}×{self.k_x})"


class Cut(NamedTuple):
    """A piece of a kernel on one axis: k taps from `first` on, of which earlier pieces have the first `skipped`.

    So no piece reads beyond the kernel.
    """

    first: int
    skipped: int


def cuts(size: int, k: int) -> list[Cut]:
    """Cut `size` taps into pieces of k; of fewer taps make one piece that begins with zeros."""
    return [Cut(min(n, size - k), max(0, n + k - size)) for n in range(0, size, k)]


def pieces(KH: int, KW: int, tile: Tile) -> list[tuple[Cut, Cut]]:
    """Cut a kernel into pieces of tile.k_y × tile.k_x taps: where each is, on both axes."""
    return [(y, x) for y in cuts(KH, tile.k_y) for x in cuts(KW, tile.k_x)]


def along(size: int, m: int, dilation: int) -> int:
    """Count of tiles of m outputs, a dilation apart, that cover `size` outputs of an axis."""
    whole, rest = divmod(size, m * dilation)
    return whole * dilation + min(rest, dilation)


Lattice = tuple[slice, slice]
"""Which taps of a kernel's two axes."""


def lattices(KH: int, KW: int, strides: Pair) -> list[Lattice]:
    """Return the taps that see the same pixels of every stride × stride, for each of these that any tap sees."""
    s_y, s_x = strides
    return [(slice(y, KH, s_y), slice(x, KW, s_x)) for y in range(min(s_y, KH)) for x in range(min(s_x, KW))]


@lru_cache(maxsize=256)
def dense(specs: tuple[ConvSpec, ...]) -> tuple[ConvSpec, ...]:
    """Return the convolutions of all lattices: strides and dilation are equal where they are strided."""
    found = []
    for spec in specs:
        (top, bottom), (left, right) = spec.padding
        dilation = max(spec.strides[0], spec.dilation[0]), max(spec.strides[1], spec.dilation[1])
        for y, x in lattices(spec.KH, spec.KW, spec.strides):
            pads = (top - y.start, bottom), (left - x.start, right)
            KH, KW = len(range(spec.KH)[y]), len(range(spec.KW)[x])
            found.append(replace(spec, KH=KH, KW=KW, padding=pads, dilation=dilation))
    return tuple(found)


@lru_cache(maxsize=256)
def interleaved(specs: tuple[ConvSpec, ...]) -> Pair | None:
    """Outputs from one to the next of a tile, for all convolutions; None where they do not agree.

    That is the dilation of dense ones, any along an axis of one tap.
    """
    pair = []
    for axis in (0, 1):
        apart = {s.dilation[axis] // s.strides[axis] for s in dense(specs) if (s.KH, s.KW)[axis] > 1} or {1}
        if len(apart) > 1:
            return None
        pair.append(apart.pop())
    return pair[0], pair[1]


@lru_cache(maxsize=256)
def choices(*sizes: Pair) -> tuple[Tile, ...]:
    """Tiles for the kernels of these sizes together.

    Where a kernel has fewer taps than the tile, pixels beyond it meet zeros: not for tiles of two outputs, whose errors
    shall stay within the receptive fields (`outliers`).
    """
    found = dict.fromkeys(tile for size in sizes for tile in _for_size(*size))
    return tuple(tile for tile in found if all(_suits(tile, size) for size in sizes))


def _suits(tile: Tile, size: Pair) -> bool:
    axes = zip(tile[:2], tile[2:], size, strict=True)
    return all((k > 1 or taps == 1) and (k <= taps or m > 2) for m, k, taps in axes)


def _for_size(KH: int, KW: int) -> tuple[Tile, ...]:
    """Tiles for a kernel; square ones for square kernels, of which fewer are compiled."""
    if KH == KW:
        return tuple(Tile(m, m, k, k) for m, k in _choices(KH))
    return tuple(Tile(m_y, m_x, k_y, k_x) for m_y, k_y in _choices(KH) for m_x, k_x in _choices(KW))


def _choices(size: int) -> list[tuple[int, int]]:
    """Pairs of m and k for an axis: the whole, up to 7 taps, or above 5 pieces of 3, 4 or 5."""
    whole = {size} if size <= max(OUTPUTS) else set()
    cut = {-(-size // count) for count in range(2, size)} & {3, 4, 5} if size > 5 else set()
    return [(m, k) for k in sorted(whole | cut) for m in OUTPUTS[k]]
