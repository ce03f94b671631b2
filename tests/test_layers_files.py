import json

import numpy as np
import pytest
from layer_checks import equal, normal
from safetensors.numpy import load_file, save_file

from fastclstm.layers import ConvLSTM2D, ConvLSTM2DCell, MaxPooling3D, TimeDistributionCalculator


def build(*args, **kwargs):
    return ConvLSTM2D(*args, **{"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"} | kwargs)


@pytest.mark.usefixtures("directly")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "use_bias": False, "padding_mode": "circular", "seed": None},
        {
            "num_layers": 2,
            "out_channels": [2, 3],
            "kernel_size": [3, (2, 5)],
            "leaky_relu_slope": 0.2,
            "cell_clip": 0.5,
        },
        {"padding": [[1, 0], [2, 1]], "stride": [1, 2], "return_state": True, "go_backwards": True},
        {"num_layers": 2, "kernel_size": (3, 3), "activation": "relu", "return_sequences": False},
    ],
)
def test_save_and_load(tmp_path, options):
    layer = build(**{"in_channels": 2, "out_channels": 2, "kernel_size": 3} | options)
    path = tmp_path / "layer.safetensors"
    layer.save(path)
    other = ConvLSTM2D.load(str(path))
    assert other.options == layer.options
    assert repr(other) == repr(layer)
    assert [cell.options | {"seed": 0} for cell in other.cells] == [cell.options | {"seed": 0} for cell in layer.cells]
    assert list(other.parameters) == list(layer.parameters)
    for name, array in layer.parameters.items():
        assert other.parameters[name].dtype == array.dtype
        assert other.parameters[name].tobytes() == array.tobytes()
        assert not other.parameters[name].flags.writeable
    assert list(load_file(path)) == sorted(layer.parameters)
    x = normal(1, 3, 6, 7, 2)
    assert np.array_equal(*(one(x)[0] if layer.return_state else one(x) for one in (layer, other)))
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_loading_replaces_options_and_draws_nothing(tmp_path):
    layer, path = build(1, 2, 3), tmp_path / "w"
    layer.save(path)

    def never(shape, rng, dtype):
        raise AssertionError

    other = ConvLSTM2D.load(path, dtype="float32", return_state=True, kernel_initializer=never)
    assert (other.dtype, other.return_state) == ("float32", True)
    equal(other.cells[0].kernel, layer.cells[0].kernel.astype("float32"))
    assert (ConvLSTM2D(1, 2, 3, seed=0).cells[0].kernel != 0).all()  # layers made later are initialized again


def test_functions_and_generators_are_not_in_files(tmp_path):
    def ones(shape, rng, dtype):
        return np.ones(shape, dtype)

    path, pair = tmp_path / "w", (np.sin, np.cos)
    layer = build(1, 2, 3, activation=pair, kernel_initializer=ones, seed=np.random.default_rng(0))
    layer.save(path)
    with pytest.raises(ValueError, match=r"give them: ConvLSTM2D\.load\(path, activation=…\)"):
        ConvLSTM2D.load(path)
    other = ConvLSTM2D.load(path, activation=pair)
    assert other.seed is None
    x = normal(1, 2, 4, 4, 1)
    equal(other(x), layer(x))
    assert (other(x) != build(1, 2, 3, kernel_initializer=ones)(x)).any()


def test_load_errors(tmp_path):
    layer, path = build(1, 2, 3), tmp_path / "w.safetensors"
    layer.save(path)
    arrays = {name: np.array(array) for name, array in layer.parameters.items()}
    header = {"format_version": 1, "class": "ConvLSTM2D", "functions": [], "options": layer.options}

    def load(arrays=arrays, **changes):
        save_file(arrays, path, {"fastclstm": json.dumps(header | changes)})
        return ConvLSTM2D.load(path)

    equal(load().cells[0].bias, layer.cells[0].bias)
    name = r"w\.safetensors "
    with pytest.raises(ValueError, match=name + "holds a ConvLSTM2D, not a MaxPooling3D; load it with that class"):
        MaxPooling3D.load(path)
    with pytest.raises(ValueError, match=name + r"does not fit: .* missing layers\.0\.bias, unknown none"):
        load({name: array for name, array in arrays.items() if "bias" not in name})
    with pytest.raises(ValueError, match=name + "does not fit: .* missing none, unknown extra"):
        load(arrays | {"extra": np.zeros(1)})
    with pytest.raises(ValueError, match=name + r"does not fit: .*kernel has shape \(3, 3, 1, 8\) but must be \(5, 5"):
        load(options=layer.options | {"kernel_size": 5})
    with pytest.raises(
        ValueError, match=name + "does not fit: .* unknown option 'wings'; the options are in_channels, "
    ):
        load(options=layer.options | {"wings": 2})
    for wrong in ({}, [], None, layer.options | {"stride": -1}, layer.options | {"in_channels": "one"}):
        with pytest.raises(ValueError, match=name + "does not fit"):
            load(options=wrong)
    with pytest.raises(ValueError, match=name + "does not fit"):  # at once, without taking the memory
        load(options=layer.options | {"out_channels": 10**6})
    with pytest.raises(FileNotFoundError):
        ConvLSTM2D.load(tmp_path / "nothing")


def test_other_layers_are_saved_too(tmp_path):
    path = tmp_path / "w"
    for layer in (
        MaxPooling3D((1, 2, 2), padding="same"),
        TimeDistributionCalculator(0.25, 7, seed=1),
        ConvLSTM2DCell(1, 2, 3, leaky_relu_slope=0.1),
    ):
        layer.save(path)
        assert repr(type(layer).load(path)) == repr(layer)
