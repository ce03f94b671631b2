"""What engines make of weights is made once, and again when a weight has changed."""

import ctypes
import gc
import pickle
import weakref

import numpy as np
import pytest

import fastclstm
from fastclstm.engines import remembered


def frozen(*shape):
    """An array that nobody can make writable."""
    return np.ndarray(shape, np.float32, np.ones(shape, np.float32).tobytes())


class Makes:
    """Something to remember that counts how often it was made."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return object()


def test_frozen_arrays_are_packed_once():
    make, kernel, bias = Makes(), frozen(3), frozen(2)
    first = remembered.remember((kernel, bias), ("a",), make)
    assert remembered.remember((kernel, bias), ("a",), make) is first
    assert make.count == 1
    for arrays, key in (((kernel, bias), ("b",)), ((kernel, None), ("a",)), ((bias, kernel), ("a",)),
                        ((kernel, frozen(2)), ("a",))):  # fmt: skip
        assert remembered.remember(arrays, key, make) is not first
    assert make.count == 5
    assert remembered.remember((kernel, bias), ("a",), make) is first


def writable():
    return np.ones(3, np.float32)


def read_only():
    array = writable()
    array.flags.writeable = False
    return array


def read_only_view():
    array = writable()[:]
    array.flags.writeable = False
    return array


def memory_of_others():
    array = np.frombuffer(bytearray(writable().tobytes()), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", [writable, read_only, read_only_view, memory_of_others])
def test_what_may_change_is_packed_again_when_it_has(kind):
    make, array, other = Makes(), kind(), frozen(2)
    first = remembered.remember((other, array), (), make)
    assert remembered.remember((other, array), (), make) is first
    address = (ctypes.c_float * 3).from_address(array.ctypes.data)  # whatever the flags say
    for value in (5.0, np.nan, -np.nan, 1.0):
        address[1] = value
        second = remembered.remember((other, array), (), make)
        assert second is not first
        assert remembered.remember((other, array), (), make) is second
        first = second
    assert make.count == 5


def test_read_only_flag_taken_back_for_a_moment_is_noticed():
    make, array = Makes(), read_only()
    first = remembered.remember((array,), (), make)
    array.flags.writeable = True
    array[0] = 5
    assert remembered.remember((array,), (), make) is not first
    array[0] = 6
    array.flags.writeable = False
    remembered.remember((array,), (), make)
    assert make.count == 3


def test_weights_of_layers_are_never_compared():
    layer = fastclstm.ConvLSTM2D(2, 3, 3, seed=0)
    copy = pickle.loads(pickle.dumps(layer))
    for weights in (*layer.parameters.values(), *copy.parameters.values()):
        assert remembered._frozen(weights)
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            weights.flags.writeable = True


def test_frozen_views_of_frozen_arrays_are_remembered():
    make, view = Makes(), frozen(6).reshape(2, 3)
    assert remembered.remember((view,), (), make) is remembered.remember((view,), (), make)


def test_entries_die_with_their_arrays():
    kernel, bias = frozen(3), frozen(2)
    value = remembered.remember((kernel, bias), (), lambda: frozen(1))
    gone, key = weakref.ref(value), (id(kernel), id(bias))
    assert key in remembered._remembered
    del bias, value
    gc.collect()
    assert gone() is None
    assert key not in remembered._remembered


def test_not_more_is_kept_than_the_limit():
    kept = [frozen(1) for _ in range(remembered.MOST + 5)]
    make = Makes()
    for array in kept:
        remembered.remember((array,), (), make)
    assert len(remembered._remembered) == remembered.MOST
    remembered.remember((kept[-1],), (), make)
    assert make.count == len(kept)


def test_what_is_made_on_a_passage_is_made_once():
    fixed, open_ = remembered.immutable(np.ones(3)), np.ones(3)
    assert remembered.passing((fixed,), ("a",), list) is not remembered.passing((fixed,), ("a",), list)
    with remembered.passage(4) as passage:
        first = remembered.passing((fixed, None), ("a",), list)
        assert remembered.passing((fixed, None), ("a",), list) is first
        assert remembered.passing((fixed, None), ("b",), list) is not first
        assert remembered.passing((open_,), ("a",), list) is not remembered.passing((open_,), ("a",), list)
        assert (remembered.current((fixed,)), passage.steps) == (passage, 4)
        assert remembered.current((open_,)) is None
    assert remembered.current((fixed,)) is None
