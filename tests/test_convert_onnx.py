"""to_onnx: whole models, runtimes other than ONNX Runtime, and what is refused."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported_onnx import (
    CELLS,
    FIRST,
    REF,
    SEQUENCES,
    Exported,
    N,
    agree,
    drawn,
    lstm,
    sequences,
)
from layer_checks import normal

import fastclstm
from fastclstm import to_onnx
from fastclstm.layers import (
    GRU,
    Activation,
    Add,
    BatchNormalization,
    Concatenate,
    Conv2D,
    ConvLSTM2D,
    Dense,
    Dropout,
    Flatten,
    Input,
    LeakyReLU,
    MaxPooling2D,
    MaxPooling3D,
    PReLU,
    TimeDistributed,
    UpSampling,
)
from fastclstm.models import EncoderForecaster, Model, MultiscaleForecaster, Sequential

# Models


def encoder_decoder():
    """States handed on, a mask that is an input, lengths, two inputs, outputs by name."""
    frames, later = Input((N, N, N, 1), name="frames"), Input((N, N, N, 2), name="later")
    valid, counts = Input((N,), name="valid"), Input(batch_shape=(N,), name="counts")
    encoder = ConvLSTM2D(1, 3, 3, return_state=True, return_sequences=False, num_layers=2, seed=0, **REF)
    last, states = encoder(frames, mask=valid)
    decoder = ConvLSTM2D(2, 3, 3, num_layers=2, seed=1, zero_output_for_mask=True, **REF)
    y = decoder(later, initial_state=states, lengths=counts)
    head = Conv2D(3, 1, 1, seed=2, **REF)
    return Model([frames, later, valid, counts], {"next": head(y), "now": head(last), "again": states[0][0]})


def nested():
    """A shared layer, a skip, a model within one, called twice, and an output that is an input."""
    x = Input((N, N, 3), name="x")
    inner = Model(x, Add()([Conv2D(3, 3, 3, activation="tanh", seed=0, **REF)(x), x]), name="inner")
    a, b = Input((N, N, N, 3), name="a"), Input((N, N, N, 3), name="b")
    block = TimeDistributed(inner, name="block")
    shared = ConvLSTM2D(3, 3, 3, seed=1, **REF)
    y = Concatenate()([shared(block(block(a))), shared(block(b))])
    chain = Sequential([Conv2D(6, 4, 3, stride=2, seed=2, **REF), LeakyReLU(0.1), ConvLSTM2D(4, 2, 3, seed=3, **REF)])
    return Model([a, b], [chain(y), a])


def classifier():
    """From frames to classes, with sizes that a Dense asks for."""
    return Sequential([
        ConvLSTM2D(1, 3, 3, return_sequences=False, seed=0, **REF), BatchNormalization(3), MaxPooling2D(2, **REF),
        Flatten(), Dense(24, 3, "softmax", seed=1),
    ])  # fmt: skip


def test_a_graph_with_states_masks_and_names(tmp_path):
    pytest.importorskip("onnxruntime")
    model = encoder_decoder()
    run = Exported(drawn(model), tmp_path)
    assert run.inputs == ["frames", "later", "valid", "counts"]
    assert run.outputs == ["next", "now", "again"]
    for B, T, S, H, W in ((2, 4, 3, 5, 6), (3, 2, 5, 4, 7)):
        given = {
            "frames": np.float32(normal(B, T, H, W, 1)), "later": np.float32(normal(B, S, H, W, 2)),
            "valid": normal(B, T, seed=4) > 0, "counts": np.arange(B) % (S + 1),
        }  # fmt: skip
        agree(run(**given), model(given))


def test_nested_and_shared_layers(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nested()
    run = Exported(drawn(model), tmp_path)
    assert run.inputs == ["a", "b"]
    assert len(set(run.outputs) | {"a", "b"}) == 4
    for sizes in ((2, 3, 5, 6), (1, 2, 7, 4)):
        a, b = (np.float32(normal(*sizes, 3, seed=n)) for n in range(2))
        agree(run(a, b), model([a, b]))
    streams = Exported(model, tmp_path, states=True)
    assert len(streams.inputs) == len(streams.outputs) == 2 + 2 * 3  # the shared layer runs twice


def test_a_mask_goes_to_every_convlstm_of_a_model(tmp_path):
    pytest.importorskip("onnxruntime")
    layers_ = [ConvLSTM2D(1, 2, 3, seed=0, go_backwards=True, **REF), Conv2D(2, 2, 3, seed=1, **REF)]
    model = Sequential([*layers_, ConvLSTM2D(2, 2, 3, seed=2, **REF)])
    run = Exported(model, tmp_path, mask=True)
    x, valid = np.float32(normal(3, 5, 4, 6, 1)), normal(3, 5, seed=3) > 0
    agree(run(x, valid), model(x, mask=valid))


def test_known_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    model = classifier()
    run = Exported(drawn(model), tmp_path, input_shape=[N, N, 8, 4, 1])
    for B, T in ((2, 3), (1, 5)):
        x = np.float32(normal(B, T, 8, 4, 1))
        agree(run(x), model(x))


def test_transposes_cancel(tmp_path):
    """One before the first convolution, one behind the last; none between them and what is element by element."""
    pytest.importorskip("onnxruntime")
    body = [Conv2D(4, 4, 3, seed=0, **REF), LeakyReLU(0.1), BatchNormalization(4), MaxPooling2D(2, **REF), PReLU(4)]
    run = Exported(drawn(Sequential([*body, UpSampling(2), Conv2D(4, 2, 3, seed=0, **REF)])), tmp_path)
    assert run.kinds.count("Transpose") == 2
    first = [Conv2D(4, 4, 3, seed=0, **FIRST, **REF), Activation("tanh"), ConvLSTM2D(4, 2, 3, seed=1, **FIRST, **REF)]
    assert Exported(Sequential(first), tmp_path, input_shape=(N, N, 4, N, N)).kinds.count("Transpose") == 2  # of time


FORECASTERS = [
    EncoderForecaster(1, (3, 2), 3, seed=0, **REF),
    EncoderForecaster(2, 3, 3, patch_size=2, inputs="nothing", cell="ConvGRU2D", seed=0, **FIRST, **REF),
    EncoderForecaster(1, (3, 2), 3, inputs="learnt", strides=(2, 2), seed=0, **REF),
    EncoderForecaster(1, 2, 3, inputs="zeros", peephole="elementwise", frame_size=(8, 4), seed=0, **REF),
    MultiscaleForecaster([Conv2D(1, 2, 3, seed=0, **REF), ConvLSTM2D(2, 3, 3, seed=1, **REF)], None,
                         [Conv2D(3, 1, 1, seed=2, **REF)], inputs="frames", reads="last"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FORECASTERS)))
def test_forecasters(number, tmp_path):
    pytest.importorskip("onnxruntime")
    model = drawn(FORECASTERS[number])
    run = Exported(model, tmp_path)
    assert (run.inputs, run.outputs) == (["frames", "steps"], ["output"])
    first = model.data_format == "channels_first"
    sizes = ((2, 4, 3, 8, 4), (1, 2, 5, 8, 4)) if number == 3 else ((2, 4, 3, 8, 4), (1, 2, 5, 12, 8))
    for B, T, steps, H, W in sizes:
        x = np.float32(normal(B, T, H, W, model.in_channels))
        x = np.ascontiguousarray(np.moveaxis(x, -1, 2)) if first else x
        agree(run(x, np.array([steps])), model.forecast(x, steps))


def test_a_forecaster_reads_a_stream(tmp_path):
    pytest.importorskip("onnxruntime")
    model = EncoderForecaster(1, (3, 2), 3, seed=0, **REF)
    run = Exported(drawn(model), tmp_path, states=True)
    assert run.inputs == ["frames", "steps", *(f"encoder.conv_lstm2d.{n}.{name}" for n in range(2) for name in "hc")]
    x, steps = np.float32(normal(2, 5, 6, 4, 1)), np.array([3])
    zeros = [np.zeros((2, 6, 4, F), np.float32) for F in (3, 3, 2, 2)]
    _, *states = run(x[:, :2], steps, *zeros)
    made, *states = run(x[:, 2:], steps, *states)
    agree([made, *states], [model.forecast(x, 3), model.encode(x)])


# dtypes and runtimes


def test_float64_by_the_reference_of_onnx(tmp_path):
    onnx, onnx_reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    layer = lstm(dtype="float64", num_layers=2, normalization="group", activation="selu")
    model = Sequential([layer, Conv2D(3, 2, 3, stride=2, seed=0, dtype="float64", **REF)])
    to_onnx(model, tmp_path / "model.onnx")
    x = normal(1, 2, 4, 3, 4)
    made = onnx_reference.ReferenceEvaluator(onnx.load(tmp_path / "model.onnx")).run(None, {"x": x})
    agree(made, model(x), 1e-7)
    run = Exported(model, tmp_path, dtype="float32")
    agree(run(np.float32(x)), np.float32(model(x)))


def test_a_forecaster_in_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = drawn(EncoderForecaster(1, (3, 2), 3, seed=0, **REF))
    to_onnx(model, tmp_path / "model.onnx")
    run = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = np.float32(normal(2, 4, 6, 5, 1))
    agree([run({"frames": x, "steps": np.array([3])})[0]], [model.forecast(x, 3)])


@pytest.mark.parametrize("options", [CELLS[n] for n in (1, 2, 3, 9, 14)], ids=str)
def test_openvino(options, tmp_path):
    openvino = pytest.importorskip("openvino")
    layer = lstm(**options)
    to_onnx(layer, tmp_path / "model.onnx", mask=True)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", hints)
    for sizes in ((2, 4, 7, 6), (3, 3, 8, 5)):
        x, valid = sequences(layer, *sizes)
        made = model({"x": x, "mask": valid})
        agree([made[n] for n in range(len(made))], layer(x, mask=valid))


def test_names_of_inputs_that_clash_are_numbered(tmp_path):
    pytest.importorskip("onnxruntime")
    x = Input((N, 4, 5, 1), name="mask")
    model = Model({"/constant_0": x}, {"conv_lstm2d.0.h.next": lstm(in_channels=1)(x)})
    run = Exported(model, tmp_path, mask=True, states=True)
    assert run.inputs == ["/constant_0", "mask", "conv_lstm2d.0.h", "conv_lstm2d.0.c"]
    assert run.outputs == ["conv_lstm2d.0.h.next", "conv_lstm2d.0.h.next_1", "conv_lstm2d.0.c.next"]
    run = Exported(Model({"mask": x}, lstm(in_channels=1)(x)), tmp_path, mask=True)
    assert run.inputs == ["mask", "mask_1"]
    run = Exported(Model({"conv_lstm2d.0.h": x}, lstm(in_channels=1)(x)), tmp_path, states=True)
    assert run.outputs[1:] == ["conv_lstm2d.0.h_1.next", "conv_lstm2d.0.c.next"]


def test_sizes_may_be_those_of_numpy(tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(Add(), tmp_path, input_shape=[[N, np.int64(3)], [np.int32(2), 3]])
    assert [each.shape for each in run.session.get_inputs()] == [["batch", 3], [2, 3]]


# Refusals


VECTOR = Input((3,))


class Own(LeakyReLU):
    """A subclass, which might compute something else."""


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (Sequential([Conv2D(1, 1, 3), TimeDistributed(Own())]), {}, NotImplementedError,
         "layer 1.layer, Own has no counterpart"),
        (Sequential([Flatten(), Dense(3, 2)]), {}, ValueError, "Flatten takes .* shapes; give input_shape"),
        (classifier(), {}, ValueError, "since in_features is 24"),
        (Dense(3, 2, (np.sin, np.cos)), {}, ValueError, "'sin' is a function of yours.*take one with a name"),
        (ConvLSTM2D(1, 1, 3, stateful=True), {}, ValueError, "give states=True"),
        (GRU(1, 1, stateful=True), {}, ValueError, "stateful"),
        (MaxPooling3D(2, ceil_mode=True, return_indices=True), {"input_shape": SEQUENCES}, NotImplementedError,
         "leave one"),
        (MaxPooling3D(1, 2, padding="same", return_indices=True), {"input_shape": SEQUENCES}, NotImplementedError,
         "give input_shape"),
        (Dense(3, 2), {"mask": True}, ValueError, "Dense has none"),
        (Dense(3, 2), {"states": 1}, ValueError, "states"),
        (Dense(3, 2), {"dtype": "float16"}, ValueError, "dtype"),
        (Dense(3, 2), {"input_shape": ("batch", 3)}, ValueError, "must have sizes >= 0, or None for any, got 'batch'"),
        (Dense(3, 2), {"input_shape": (-1, 3)}, ValueError, "must have sizes >= 0, or None for any, got -1"),
        (Dense(3, 2), {"input_shape": (True, 3)}, ValueError, "must have sizes >= 0, or None for any, got True"),
        (Dense(3, 2), {"input_shape": 5}, TypeError, "input_shape must be a tuple of sizes"),
        (Dense(3, 2), {"input_shape": (N, 4)}, ValueError, "in_features is 3"),
        (Conv2D(1, 1, 3)(Input((8, 8, 1))), {}, TypeError, "must be a layer or a model of layers, got Symbol"),
        (Model({"": VECTOR}, Dense(3, 2)(VECTOR)), {}, Exception, "'name' of 'value_info' is required"),
        (encoder_decoder(), {"input_shape": [(1, 2, 3, 4, 5)]}, ValueError, "input_shape"),
        (EncoderForecaster(1, 2, 3, inputs="noise"), {}, NotImplementedError, "'noise' are drawn anew"),
        (EncoderForecaster(1, 2, 3), {"mask": True}, ValueError, "mask is for recurrent layers"),
        (FORECASTERS[-1], {"states": True}, ValueError, "reads the last frame twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_told_before_a_file_is_touched(model, options, error, match, tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "model.onnx").write_text("before")
    with pytest.raises(error, match=match):
        to_onnx(model, tmp_path / "model.onnx", **options)
    assert (tmp_path / "model.onnx").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_an_error_says_where_it_came_up(tmp_path):
    pytest.importorskip("onnx")
    model = Sequential([Conv2D(1, 1, 3), Activation((np.sin, np.cos))])
    with pytest.raises(ValueError, match="sin") as caught:
        to_onnx(model, tmp_path / "model.onnx")
    assert "in layer 1, Activation" in caught.value.__notes__


def test_a_call_that_trains_is_refused(tmp_path):
    pytest.importorskip("onnx")
    x = Input((4, 4, 1))
    with pytest.raises(ValueError, match="training=True"):
        to_onnx(Model(x, Dropout(0.5)(x, training=True)), tmp_path / "model.onnx")


def test_more_weights_than_a_file_holds_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(importlib.import_module("fastclstm.convert.onnx"), "_LARGEST", 300)
    to_onnx(Dense(8, 8), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"the weights take .* GiB, but a file of ONNX holds less than 2"):
        to_onnx(ConvLSTM2D(1, 2, 3), tmp_path / "model.onnx")


def test_onnx_is_imported_only_when_asked_for():
    code = "import sys\nfrom fastclstm import to_onnx\nassert not {'onnx', 'onnxruntime', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(fastclstm.__file__).parents[1], check=True)


def test_without_onnx_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'fastclstm\[onnx\]'"):
        to_onnx(Dense(3, 2), tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    pytest.importorskip("onnxruntime")
    example = Path(fastclstm.__file__).parents[1] / "examples" / "export_onnx.py"
    environment = os.environ | {"PYTHONPATH": str(example.parents[1])}
    command = [sys.executable, str(example)]
    told = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert [line[:8] for line in told.splitlines()[-3:]] == ["one of 3", "frame by", "4 sequen"]
