"""Memory of arrays that is aligned, and used again."""

import numpy as np

from fastclstm.engines import lending


def test_lent_memory_is_used_again():
    """When no array refers to it any more, and not before; and not all of it is kept."""
    shape, dtype = (3, 1 << 20), np.dtype(np.float32)
    one, other = (lending.lend(shape, dtype) for _ in range(2))
    assert one.shape == shape
    assert one.ctypes.data % 64 == 0
    assert not np.may_share_memory(one, other)
    place, part = one.ctypes.data, one[1:, 5:]
    del one
    third = lending.lend(shape, dtype)
    assert third.ctypes.data != place
    part[:] = 1
    lending._spare.clear()
    del part
    again = lending.lend((2, 1 << 20), dtype)  # a little less is enough
    assert again.ctypes.data == place
    several = [lending.lend((lending.LENT_BYTES[1] // 3,), np.dtype(np.uint8)) for _ in range(5)]
    del several, again, third, other
    assert sum(memory.nbytes for memory in lending._spare) <= lending.LENT_BYTES[1]


def test_memory_is_aligned():
    assert lending.aligned_empty(5, np.dtype(np.float64)).ctypes.data % 64 == 0
