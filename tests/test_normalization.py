import re

import numpy as np
import pytest

from fastclstm.nn import normalization
from fastclstm.nn.described import describe, restore
from fastclstm.nn.normalization import Normalization


def test_get():
    own = Normalization("group", 8)
    assert normalization.get(own) is own
    for kind in ("layer", "group", "batch"):
        assert normalization.get(kind) == Normalization(kind)
    with pytest.raises(ValueError, match="unknown normalization 'instance'; known are layer, group, batch"):
        normalization.get("instance")
    with pytest.raises(TypeError, match=r"must be a name \(layer, group, batch\) or a Normalization, got 3"):
        normalization.get(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "instance"}, "kind must be one of 'layer', 'group', 'batch', got 'instance'"),
        ({"kind": "group", "groups": 0}, "groups must be an integer >= 1"),
        ({"kind": "layer", "groups": 2}, "groups=2 goes with kind 'group' only, got kind 'layer'; leave groups out"),
        ({"kind": "layer", "momentum": 0.5}, "momentum=0.5 goes with kind 'batch' only"),
        ({"kind": "batch", "elementwise": True}, "elementwise=True goes with kind 'layer' only"),
        ({"kind": "batch", "momentum": 1.5}, "momentum must be a finite number >= 0 and <= 1, got 1.5"),
        ({"kind": "layer", "epsilon": 0}, "epsilon must be a finite number > 0, got 0"),
        ({"kind": "layer", "epsilon": float("nan")}, "epsilon must be a finite number > 0, got nan"),
        ({"kind": "layer", "separate": "yes"}, "separate must be one of False, True, got 'yes'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match="^Normalization: " + re.escape(message)):
        Normalization(**options)


@pytest.mark.parametrize(
    "given",
    [
        Normalization("layer", elementwise=True, separate=True),
        Normalization("group", groups=np.int64(8)),
        Normalization("batch", momentum=np.float32(0.5), epsilon=1e-3),
    ],
)
def test_files_hold_it(given):
    assert restore(describe(given)) == given
    assert all(type(value) in (bool, int, float, str, type(None)) for value in given.options.values())
