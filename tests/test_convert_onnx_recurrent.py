"""to_onnx: the options of the ConvLSTM, other cells, masks, states and single steps, against our own numbers."""

import numpy as np
import pytest
from exported_onnx import (
    CELLS,
    CHANNELS_FIRST,
    FIRST,
    REF,
    SEQUENCES,
    Exported,
    N,
    agree,
    drawn,
    lstm,
    sequences,
    values,
)
from layer_checks import normal

from fastclstm.layers import (
    GRU,
    LSTM,
    ConvGRU2D,
    ConvGRU2DCell,
    ConvLSTM1D,
    ConvLSTM2DCell,
    ConvLSTM3D,
    ConvLSTM3DCell,
    ConvRNN2D,
    ConvRNN2DCell,
)
from fastclstm.layers.symbolic import leaves
from fastclstm.nn.activations import TABLE as ACTIVATIONS
from fastclstm.nn.normalization import Normalization

IDS = ["-".join(key for key in case if key != "return_state") for case in CELLS]


@pytest.mark.parametrize("options", CELLS, ids=IDS)
def test_a_convlstm_is_one_scan_whatever_its_options(options, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(**options)
    run = Exported(layer, tmp_path)
    assert run.kinds.count("Scan") == (layer.num_layers if layer.bidirectional else 1)
    for sizes in ((2, 4, 7, 6), (1, 1, 5, 8), (3, 6, 8, 5)):
        x, _ = sequences(layer, *sizes)
        agree(run(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConvGRU2D(4, 3, 3, num_layers=2, go_backwards=True, return_state=True, leaky_relu_slope=0.1, **REF),
         SEQUENCES),
        (ConvGRU2D(4, 4, 3, reset_after=False, normalization=Normalization("group", groups=6), stride=2,
                   bidirectional=True, **FIRST, **REF), CHANNELS_FIRST),
        (ConvGRU2D(4, 3, 3, reset_after=False, use_bias=False, recurrent_kernel_size=5, **REF), SEQUENCES),
        (ConvGRU2D(0, 3, 3, stride=2, return_state=True, **REF), (N, N, N, N, 0)),
        (ConvRNN2D(4, 3, 3, normalization="group", padding_mode="circular", return_sequences=False, **REF), SEQUENCES),
        (ConvLSTM1D(4, 3, 3, num_layers=2, peephole="channel", stride=2, return_state=True, **REF), (N, N, N, 4)),
        (ConvLSTM1D(4, 3, 2, 1, bidirectional=True, return_sequences=False, **FIRST, **REF), (N, N, 4, N)),
        (ConvLSTM3D(4, 3, (2, 3, 3), normalization="group", stride=(1, 2, 1), return_state=True, **REF),
         (N, N, N, N, N, 4)),
        (ConvLSTM3D(4, 2, 3, bidirectional=True, merge_mode="sum", **FIRST, **REF), (N, N, 4, N, N, N)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_cells_and_frames(layer, shape, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(layer), tmp_path, states=True)
    assert run.kinds.count("Scan") == 1
    returned, layer.return_state = layer.return_state, True
    for batch, base in ((2, 4), (3, 6)):
        x = values(shape, layer, batch, base)
        _, zeros = layer(x)
        states = [tuple(np.float32(normal(*array.shape, seed=n)) for n, array in enumerate(cell)) for cell in zeros]
        y, after = layer(x, initial_state=states)
        agree(run(x, *leaves(states)), [y, after, after] if returned else [y, after])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("options", [CELLS[n] for n in (0, 2, 3, 4, 5, 7, 9)], ids=str)
def test_masks_of_a_convlstm(options, zero, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(zero_output_for_mask=zero, **options)
    run = Exported(layer, tmp_path, mask=True)
    assert run.inputs == ["x", "mask"]
    for sizes in ((3, 5, 7, 6), (2, 3, 5, 8)):
        x, valid = sequences(layer, *sizes)
        agree(run(x, valid), layer(x, mask=valid))
        x[np.broadcast_to(~valid[(..., *[None] * 3)], x.shape)] = np.nan  # which nobody sees
        agree(run(x, valid), layer(x, mask=valid))


@pytest.mark.parametrize(
    "layer", [LSTM(4, 3, go_backwards=True, return_state=True, **REF), GRU(4, 3)], ids=["LSTM", "GRU"]
)
def test_masks_and_states_of_recurrent_layers(layer, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(layer), tmp_path, mask=True, states=True)
    x, valid = np.float32(normal(3, 6, 4)), normal(3, 6, seed=5) > 0
    valid[0, :3] = False
    states = tuple(np.float32(normal(3, 3, seed=n)) for n in range(len(run.inputs) - 2))
    expected = layer(x, mask=valid, initial_state=[states])
    layer.return_state = True
    _, after = layer(x, mask=valid, initial_state=[states])
    agree(run(x, valid, *states), [expected, after])


@pytest.mark.parametrize("options", [CELLS[n] for n in (0, 1, 8, 11, 14)], ids=str)
def test_a_stream_is_its_pieces(options, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(**options | {"return_state": False, "stateful": True})
    run = Exported(layer, tmp_path, states=True)
    x, _ = sequences(layer, 2, 7, 8, 7)
    layer.return_state, layer.stateful = True, False
    _, states = layer(x[:, :1])
    names = [f"{cell}.{name}" for cell in range(len(layer.cells)) for name in "hc"]
    assert (run.inputs, run.outputs) == (["x", *names], ["output", *(f"{name}.next" for name in names)])
    feeds = {name: np.zeros_like(state) for name, state in zip(names, leaves(states), strict=True)}
    for part in np.split(x, [1, 4], 1):
        _, *after = made = run(x=part, **feeds)
        feeds = dict(zip(names, after, strict=True))
    output, states = layer(x)
    output = output[:, 4:] if layer.return_sequences else output
    agree(made, [output, states])
    one = Exported(layer, tmp_path, states=True, input_shape=(N, 1, N, N, 4))
    assert "Scan" not in one.kinds  # of one frame no loop is made
    y, states = layer(x[:, :1])
    agree(one(x[:, :1], *(np.zeros_like(state) for state in leaves(states))), [y, states, states])


@pytest.mark.parametrize(
    ("cell", "frame"),
    [
        (ConvLSTM3DCell(4, 3, 3, **REF), (3, 4, 5)), (ConvRNN2DCell(4, 3, 3, **REF), (4, 5)),
        (ConvGRU2DCell(4, 3, 3, reset_after=False, **REF), (4, 5)), (ConvGRU2DCell(4, 3, 3, **REF), (4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_step_of_other_cells(cell, frame, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(cell), tmp_path)
    arrays = [np.float32(normal(2, *frame, C, seed=C)) for C in (4, *[3] * len(cell._state_names))]
    agree(run(*arrays), cell(*arrays))


def test_a_cell_is_one_step(tmp_path):
    pytest.importorskip("onnxruntime")
    cell = drawn(ConvLSTM2DCell(4, 3, 3, stride=2, peephole="channel", **FIRST, **REF))
    run = Exported(cell, tmp_path)
    x, h, c = (np.float32(normal(2, *shape)) for shape in ((4, 7, 6), (3, 4, 3), (3, 4, 3)))
    assert (run.inputs, run.outputs) == (["x", "h", "c"], ["h.next", "c.next"])
    agree(run(x, h, c), cell(x, h, c))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_cell_of_any_activation(name, tmp_path):
    pytest.importorskip("onnxruntime")
    gates = "sigmoid" if name == "exponential" else name  # else numbers grow beyond all bounds
    cell = drawn(ConvLSTM2DCell(4, 3, 3, activation=name, recurrent_activation=gates, **REF))
    x, h, c = (np.float32(0.3 * normal(2, 5, 4, C, seed=C)) for C in (4, 3, 3))
    agree(Exported(cell, tmp_path)(x, h, c), cell(x, h, c))
