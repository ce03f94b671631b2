import pytest
from layer_checks import equal, normal

from fastclstm import functional
from fastclstm.layers import MaxPooling3D


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_size": 3, "stride": 2},
        {"pool_size": (1, 2, 3), "padding": "same"},
        {"pool_size": 2, "ceil_mode": True},
        {"pool_size": 2, "stride": (1, 2, 3), "padding": 1},
        {"pool_size": [3, 2, 2], "padding": [[1, 0], [0, 1], [1, 1]], "return_indices": True},
    ],
)
def test_max_pooling_is_the_functional(engine, options, data_format):
    x = normal(2, 5, 6, 7, 4)
    layer = MaxPooling3D(**options, data_format=data_format, engine=engine)
    renamed = {"strides" if k == "stride" else k: v for k, v in options.items()} | {"data_format": data_format}
    outputs, pullback = functional.max_pool3d_vjp(x, engine=engine, **renamed)
    indexed = layer.return_indices
    y = outputs[0] if indexed else outputs
    for got in (layer(x), layer(x, training=True)):
        equal(got[0] if indexed else got, y)
        if indexed:
            equal(got[1], outputs[1])
    assert layer.output_shape(x.shape) == y.shape
    dy = normal(*y.shape, seed=2)
    equal(layer.backward(dy), pullback((dy, None) if indexed else dy)["x"])
    assert layer.get_gradients() == {}
    assert layer.num_parameters == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "pool_size must be an integer >= 1 or 3 of them"),
        ({"stride": (1, 1)}, "strides must be an integer >= 1 or 3 of them"),
        ({"padding": 2}, "must be smaller than the window"),
        ({"data_format": "first"}, "data_format must be one of"),
    ],
)
def test_wrong_pooling_options_fail_at_once(options, message):
    with pytest.raises(ValueError, match=f"MaxPooling3D: .*{message}"):
        MaxPooling3D(**options)


def test_pooling_checks_names_flags_and_arrays_as_others_do():
    with pytest.raises(ValueError, match="unknown engine 'gpu'"):
        MaxPooling3D(engine="gpu")
    for name in ("ceil_mode", "return_indices"):
        with pytest.raises(ValueError, match=f"MaxPooling3D: {name} must be True or False, got 'no'"):
            MaxPooling3D(**{name: "no"})
    with pytest.raises(TypeError, match="MaxPooling3D: x is not a rectangular array"):
        MaxPooling3D()([[1, 2], [3]])
