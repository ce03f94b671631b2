import numpy as np
import pytest
from layer_checks import check_layer, normal

from fastclstm import LearntInput


def test_it_adds_a_number_a_channel(tmp_path):
    layer = LearntInput(3, initializer="random_normal", seed=0, dtype="float64")
    check_layer(layer, normal(2, 2, 3, 4, 3), tmp_path / "layer")
    first = LearntInput(2, initializer="ones", data_format="channels_first")
    np.testing.assert_array_equal(first(np.zeros((1, 2, 3, 4))), np.ones((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="LearntInput: x has 2 channels but in_channels is 3"):
        layer(np.zeros((1, 2, 2, 2)))
