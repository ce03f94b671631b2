"""ConvLSTM2D beside Keras's own layer: every option that both have, alone and drawn together."""

import numpy as np
import pytest

from fastclstm.layers import ConvLSTM2D

pytestmark = pytest.mark.keras

B, T, H, W, C, F = 2, 4, 5, 6, 2, 3


@pytest.fixture(params=["reference", "cpu"])
def engine(request, directly):
    return request.param


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


ACTIVATIONS = [
    "tanh",
    "sigmoid",
    "hard_sigmoid",
    "relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "softplus",
    "softsign",
    "linear",
]

VARIANTS = {
    "default": {},
    "one step, one filter": {"shape": (1, 1, 3, 3, 1), "filters": 1},
    "last only": {"return_sequences": False},
    "strides": {"strides": (2, 1)},
    "valid": {"padding": "valid"},
    "even kernel": {"kernel_size": (2, 4)},
    "dilation": {"dilation_rate": (2, 1), "padding": "valid"},
    "no bias": {"use_bias": False},
    "channels first": {"data_format": "channels_first"},
    "backwards": {"go_backwards": True},
    "mask": {"mask": True},
    "mask, backwards, last only": {"mask": True, "go_backwards": True, "return_sequences": False},
    "zeros under the mask": {"mask": True, "zero_output_for_mask": True},
    "zeros under the mask, last only": {"mask": True, "zero_output_for_mask": True, "return_sequences": False},
    "initial state": {"initial_state": True},
    "dropout": {"dropout": 0.4},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "both dropouts": {"dropout": 0.4, "recurrent_dropout": 0.3, "strides": 2},
    "recurrent activation": {"recurrent_activation": "hard_sigmoid"},
    **{f"merge {mode}": {"merge_mode": mode} for mode in ("concat", "sum", "mul", "ave", None)},
    "merge, last only": {"merge_mode": "concat", "return_sequences": False, "mask": True},
    "merge, initial state": {"merge_mode": "ave", "initial_state": True},
    **{f"activation {name}": {"activation": name} for name in ACTIVATIONS},
}


def drawn(seed):
    """A random configuration."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    variant = {
        "kernel_size": pick(1, 3, (2, 3), (4, 1)), "padding": pick("same", "valid"), "use_bias": pick(True, False),
        "activation": pick(*ACTIVATIONS[:7]), "recurrent_activation": pick("sigmoid", "hard_sigmoid", "tanh"),
        "data_format": pick("channels_last", "channels_first"), "return_sequences": pick(True, False),
        "go_backwards": pick(True, False), "mask": pick(True, False), "zero_output_for_mask": pick(True, False),
        "initial_state": pick(True, False),
        "shape": (pick(1, 3), pick(1, 2, 5), pick(4, 7), pick(4, 9), pick(1, 3)), "filters": pick(1, 4, 5),
    }  # fmt: skip
    variant |= pick({}, {"strides": pick(2, (1, 3))}, {"dilation_rate": 2, "kernel_size": 2})
    both_ways = {"merge_mode": pick("concat", "sum", "mul", "ave", None), "go_backwards": False}  # Keras takes no other
    return variant | pick({}, both_ways, {"dropout": 0.5}, {"recurrent_dropout": 0.2})


@pytest.fixture
def check_against_keras(keras, engine):
    """Compare the layers in float64: outputs, states, and the gradients of x and of the weights."""
    import torch

    def run(variant):
        options = {
            "kernel_size": 3,
            "padding": "same",
            "return_sequences": True,
            "data_format": "channels_last",
        } | variant
        shape, filters = options.pop("shape", (B, T, H, W, C)), options.pop("filters", F)
        masked, with_state = options.pop("mask", False), options.pop("initial_state", False)
        both_ways, merge_mode = "merge_mode" in options, options.pop("merge_mode", None)
        theirs = keras.layers.ConvLSTM2D(filters, return_state=True, dtype="float64", **options)
        if both_ways:
            theirs = keras.layers.Bidirectional(theirs, merge_mode=merge_mode, dtype="float64")
            options["zero_output_for_mask"] = options["return_sequences"]  # Keras's Bidirectional sets it so
        renamed = {"strides": "stride", "dilation_rate": "dilation"}
        ours = ConvLSTM2D(
            shape[-1], filters, return_state=True, dtype="float64", engine=engine, seed=0,
            bidirectional=both_ways,
            merge_mode=merge_mode if both_ways else "concat", **{renamed.get(k, k): v for k, v in options.items()},
        )  # fmt: skip
        x = normal(*shape)
        if options["data_format"] == "channels_first":
            x = np.ascontiguousarray(np.moveaxis(x, -1, 2))
        theirs.build(x.shape)
        theirs.set_weights([0.5 * normal(*w.shape, seed=n) for n, w in enumerate(theirs.get_weights())])
        ours.set_parameters(dict(zip(ours.parameters, theirs.get_weights(), strict=True)))
        mask = normal(*shape[:2], seed=5) > -0.3 if masked else None
        states = None
        if with_state:
            probe = ours(x)[1]
            states = [tuple(normal(*s.shape, seed=6 + n) for n, s in enumerate(pair)) for pair in probe]
        training = bool(options.get("dropout") or options.get("recurrent_dropout"))
        if training:  # the same masks on both sides
            share_masks(theirs.cell, ours.cells[0], torch)
        tensor = torch.tensor(x, requires_grad=True)
        flat_states = [torch.tensor(s) for pair in states or [] for s in pair] or None
        tensor_mask = None if mask is None else torch.tensor(mask)
        their_outputs = theirs(tensor, initial_state=flat_states, mask=tensor_mask, training=training)
        their_outputs = [o for output in their_outputs for o in (output if isinstance(output, tuple) else [output])]
        output, last = ours(x, initial_state=states, mask=mask, training=True)
        outputs = [*(output if isinstance(output, tuple) else [output]), *(s for pair in last for s in pair)]
        joined_otherwise = both_ways and options["data_format"] == "channels_first" and merge_mode == "concat"
        if joined_otherwise:  # Keras joins the last axis, which is the width; ours the channels
            halves = np.split(outputs[0], 2, axis=2 if options["return_sequences"] else 1)
            outputs[0] = np.concatenate(halves, axis=-1)
        assert len(outputs) == len(their_outputs)
        for mine, other in zip(outputs, their_outputs, strict=True):
            np.testing.assert_allclose(mine, other.detach().numpy(), rtol=1e-9, atol=1e-10)
        if joined_otherwise:
            return
        cotangents = [normal(*o.shape, seed=9 + n) for n, o in enumerate(outputs)]
        loss = sum((o * torch.tensor(d)).sum() for o, d in zip(their_outputs, cotangents, strict=True))
        weights = [w.value for w in theirs.trainable_variables]
        expected = torch.autograd.grad(loss, [tensor, *weights])
        count = len(outputs) - 2 * len(last)
        dy = tuple(cotangents[:count]) if count > 1 else cotangents[0]
        dstates = list(zip(cotangents[count::2], cotangents[count + 1 :: 2], strict=True))
        gradients = [ours.backward(dy, dstates), *ours.get_gradients().values()]
        hard = "hard_sigmoid" in options.values()  # whose slope, 1/6, PyTorch rounds to float32
        for mine, other in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(mine, other.numpy(), rtol=1e-7, atol=1e-5 if hard else 1e-8)

    return run


def share_masks(their_cell, cell, torch):
    """Give Keras's cell, which draws its own, the masks that ours draws."""
    draw, drawn_masks = cell._draw, {}

    def remember(rate, shape):
        key = (rate, shape)
        if key not in drawn_masks:
            drawn_masks[key] = draw(rate, shape)
        return drawn_masks[key]

    cell._draw = remember

    def masks(rate):
        def get(step_input):
            if rate == 0:
                return None
            shape = tuple(step_input.shape)
            first = cell.data_format == "channels_first"
            drawn_now = remember(rate, (shape[0], *shape[2:], shape[1]) if first else shape)
            return list(torch.tensor(np.moveaxis(drawn_now, -1, 2) if first else drawn_now))

        return get

    their_cell.get_dropout_mask = masks(cell.dropout)
    their_cell.get_recurrent_dropout_mask = masks(cell.recurrent_dropout)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option(check_against_keras, name):
    check_against_keras(VARIANTS[name])


@pytest.mark.parametrize("seed", range(40))
def test_drawn_combinations(check_against_keras, seed):
    check_against_keras(drawn(seed))


def test_stateful(keras, engine):
    x = normal(B, 6, H, W, C)
    theirs = keras.layers.ConvLSTM2D(F, 3, padding="same", stateful=True, return_sequences=True, dtype="float64")
    ours = ConvLSTM2D(C, F, 3, stateful=True, dtype="float64", engine=engine)
    theirs.build((B, 2, H, W, C))
    ours.set_parameters(dict(zip(ours.parameters, theirs.get_weights(), strict=True)))
    for start in (0, 2, 4):
        part = x[:, start : start + 2]
        np.testing.assert_allclose(ours(part), theirs(part).detach().numpy(), rtol=1e-9, atol=1e-12)
    theirs.reset_state()
    ours.reset_state()
    np.testing.assert_allclose(ours(x[:, :2]), theirs(x[:, :2]).detach().numpy(), rtol=1e-9, atol=1e-12)
