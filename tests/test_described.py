import importlib
import inspect
import json
import math
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastclstm
from fastclstm import GRU, Conv2D, ConvLSTM2D, Dense, EncoderForecaster, Model
from fastclstm.nn import optimizers
from fastclstm.nn.described import Described, describe, is_tellable, plain, restore


@dataclass
class Inner(Described):
    factor: float = 1


@dataclass
class Outer(Described):
    size: Any = 3
    inner: Any = None
    activation: Any = "tanh"
    kernel_initializer: Any = "zeros"
    seed: Any = None


def through_json(description):
    return json.loads(json.dumps(description))


@pytest.mark.parametrize(
    "thing",
    [
        Inner(),
        Outer(),
        Outer((1, (2, "a")), Inner(0.5), None, True, 7),
        Outer((Inner(1), (Inner(2), 3)), Outer(inner=Outer(inner=Inner(4)))),
    ],
)
def test_round_trip(thing):
    assert restore(through_json(describe(thing))) == thing


def test_what_a_description_looks_like():
    assert describe(Outer((1, 2), Inner(2))) == {
        "class": f"{__name__}.Outer",
        "options": {
            "size": [1, 2],
            "inner": {"class": f"{__name__}.Inner", "options": {"factor": 2}, "functions": []},
            "activation": "tanh",
            "kernel_initializer": "zeros",
            "seed": None,
        },
        "functions": [],
    }


def test_functions_are_asked_for():
    description = through_json(describe(Outer(activation=(math.sin, math.cos), size=math.sin)))
    assert description["functions"] == ["size", "activation"]
    with pytest.raises(ValueError, match=r"Outer had functions.*give them: .*Outer\.load\(path, size=…, act"):
        restore(description)
    with pytest.raises(ValueError, match=r"give them: .*Outer\.load\(path, activation=…\)"):
        restore(description, size=1)
    assert restore(description, size=1, activation="relu") == Outer(1, activation="relu")


def test_how_parameters_were_drawn_is_not_asked_for():
    thing = Outer(kernel_initializer=lambda shape, rng, dtype: None, seed=np.random.default_rng(0))
    assert restore(through_json(describe(thing))) == Outer()


def test_options_replace_those_described():
    assert restore(describe(Outer(size=1)), size=2, seed=5) == Outer(size=2, seed=5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ConvLSTM2D(filters=8, kernel_size=3, inputs=1),
         "ConvLSTM2D: unknown option 'filters'; did you mean 'out_channels'? The options are in_channels, "),
        (lambda: ConvLSTM2D(1, 8, 3, batch_input_shape=(None, 5, 8, 8, 1)), "did you mean 'in_channels'? The options"),
        (lambda: ConvLSTM2D(1, 8, 3, unknown=1), "'unknown'; the options are in_channels, "),
        (lambda: ConvLSTM2D(1, 8, 3, return_sequence=True), "did you mean 'return_sequences'? The options"),
        (lambda: Conv2D(1, 8, 3, strides=2), "Conv2D: unknown option 'strides'; did you mean 'stride'? The options"),
        (lambda: Dense(units=3), "did you mean 'out_features'? The options"),
        (lambda: GRU(2, hidden_size=3), "did you mean 'units'? The options"),
        (lambda: EncoderForecaster(1, filters=3), "did you mean 'hidden_channels'? The options"),
        (lambda: Model(None, None, inputz=1), "Model: unknown option 'inputz'; did you mean 'inputs'? The options"),
        (lambda: optimizers.Adam(lr=1), "Adam: unknown option 'lr'; the options are learning_rate, beta_1, "),
        (lambda: Outer(sise=1),
         "Outer: unknown option 'sise'; did you mean 'size'? The options are size, inner, activation, "),
    ],
)  # fmt: skip
def test_options_that_there_are_not(make, told):
    with pytest.raises(TypeError, match=re.escape(told)):
        make()


def test_not_all_of_many_options_are_listed():
    count = len(inspect.signature(ConvLSTM2D).parameters)
    with pytest.raises(TypeError, match=rf"the options are in_channels, (\w+, ){{10}}\w+ and {count - 12} more$"):
        ConvLSTM2D(1, 8, 3, unknown=1)


def test_a_constructor_of_its_own_says_what_it_takes():
    class Anything(Inner):
        def __init__(self, **options):
            super().__init__(factor=len(options))

    class Renamed(Inner):
        def __init__(self, times):
            super().__init__(factor=times)

    assert Anything(a=1, b=2).factor == 2
    assert Renamed(times=3).factor == 3
    with pytest.raises(TypeError, match=r"Renamed: unknown option 'factor'; the options are times$"):
        Renamed(factor=3)
    assert list(inspect.signature(Dense).parameters)[:2] == ["in_features", "out_features"]  # not those of __new__


def test_unknown_class():
    with pytest.raises(ValueError, match="unknown class 'Nothing'; import the module that defines it before loading"):
        restore({"class": "Nothing", "options": {}})


@pytest.mark.parametrize("value", [None, True, 1, 0.5, "a", (), (1, ("a", None)), [1], Inner(), (Inner(), 2)])
def test_tellable(value):
    assert is_tellable(value)


@pytest.mark.parametrize("value", [math.sin, (1, math.sin), np.random.default_rng(0), np.ones(2), {"a": 1}, {1}])
def test_not_tellable(value):
    assert not is_tellable(value)


def test_plain():
    value = plain([np.float32(0.5), np.array([1, 2]), (np.bool_(True), "a", None), np.array(3)])
    assert value == (0.5, (1, 2), (True, "a", None), 3)
    assert [type(item) for item in (value[0], value[1][0], value[2][0], value[3])] == [float, int, bool, int]
    inner = Inner()
    assert plain(inner) is inner


def subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_no_two_classes_of_the_package_share_a_name():
    for room in ("nn", "layers"):
        package = importlib.import_module(f"fastclstm.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"fastclstm.{room}."):
            importlib.import_module(module.name)
    found = {cls for cls in subclasses(Described) if cls.__module__.startswith(f"{fastclstm.__name__}.")}
    names = sorted(cls.__name__ for cls in found)
    assert len(names) > 30
    assert names == sorted(set(names))
