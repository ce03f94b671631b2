"""from_torch and to_torch of ConvGRUs, against modules written from their descriptions."""

import numpy as np
import pytest

from fastclstm import ConvGRU2D, from_torch, to_torch
from fastclstm.convert.torch import GRU_DIALECTS

torch = pytest.importorskip("torch")
nn = torch.nn


def conv(inputs, outputs, k=3, **options):
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


class Cell(nn.Module):
    """One step is ``keep ∘ h + (1 − keep) ∘ n``; what is called how, and what else is done, is the dialect's."""

    def __init__(self, C, F, dialect, bias=True):
        super().__init__()
        self.dialect, self.F = dialect, F
        if dialect == "jhhuang96-gru":
            self.conv1 = nn.Sequential(conv(C + F, 2 * F, 5), nn.GroupNorm(2 * F // 32, 2 * F))
            self.conv2 = nn.Sequential(conv(C + F, F, 5), nn.GroupNorm(F // 32, F))
        elif dialect == "aserdega-gru":
            self.conv_zr, self.conv_h1, self.conv_h2 = conv(C + F, 2 * F), conv(C, F), conv(F, F)
        elif dialect == "utae-gru":
            self.conv_gates, self.conv_can = conv(C + F, 2 * F, bias=bias), conv(C + F, F, bias=bias)
        elif dialect == "mlcast":
            self.combined_gates, self.out_gate = conv(C + F, 2 * F), conv(C + F, F)
        elif dialect == "kimmel-gru":
            self.update_gate, self.reset_gate, self.out_gate = (conv(C + F, F) for _ in range(3))
        elif dialect == "raft":
            self.convz, self.convr, self.convq = (conv(F + C, F) for _ in range(3))
        else:
            self.update_gate_conv, self.read_gate_conv, self.output_conv = (conv(C + F, F) for _ in range(3))

    def forward(self, x, h):
        both = torch.cat([x, h], 1)

        def candidate(function, activation=torch.tanh):
            return activation(function(torch.cat([x, r * h], 1)))

        match self.dialect:
            case "jhhuang96-gru":
                z, r = torch.sigmoid(self.conv1(both)).split(self.F, 1)
                return (1 - z) * h + z * candidate(self.conv2)
            case "aserdega-gru":
                z, r = torch.sigmoid(self.conv_zr(both)).split(self.F, 1)
                return z * h + (1 - z) * torch.tanh(self.conv_h1(x) + r * self.conv_h2(h))
            case "utae-gru":
                r, z = torch.sigmoid(self.conv_gates(both)).split(self.F, 1)
                return (1 - z) * h + z * candidate(self.conv_can)
            case "mlcast":
                z, r = torch.sigmoid(self.combined_gates(both)).chunk(2, 1)
                return h * (1 - z) + candidate(self.out_gate) * z
            case "kimmel-gru":
                z, r = torch.sigmoid(self.update_gate(both)), torch.sigmoid(self.reset_gate(both))
                return h * (1 - z) + candidate(self.out_gate) * z
            case "raft":
                z, r = (torch.sigmoid(gate(torch.cat([h, x], 1))) for gate in (self.convz, self.convr))
                return (1 - z) * h + z * torch.tanh(self.convq(torch.cat([r * h, x], 1)))
            case _:
                z, r = torch.sigmoid(self.update_gate_conv(both)), torch.sigmoid(self.read_gate_conv(both))
                return z * h + (1 - z) * candidate(self.output_conv, torch.relu)


def shuffled(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.ndim == 1 else 0))
    return module.double()


def rolled(cells, x):
    for cell in cells:
        h, outputs = torch.zeros(len(x), cell.F, *x.shape[3:], dtype=x.dtype), []
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
            outputs.append(h)
        x = torch.stack(outputs, 1)
    return x


def frames(C=3, seed=1):
    return np.random.default_rng(seed).standard_normal((2, 4, C, 7, 6))


def agree(layer, cells, x):
    y = rolled(cells, torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x), y, rtol=0, atol=1e-10 * np.abs(y).max())


@pytest.mark.parametrize("dialect", GRU_DIALECTS)
@pytest.mark.parametrize("named", [True, False])
def test_a_cell(dialect, named):
    F = 64 if "jhhuang96" in dialect else 5
    cell = shuffled(Cell(3, F, dialect))
    layer = from_torch(cell, dialect if named else None, engine="reference")
    assert isinstance(layer, ConvGRU2D)
    assert layer.reset_after is (dialect == "aserdega-gru")
    x = frames()
    agree(layer, [cell], x)
    state = to_torch(layer, dialect)
    assert state.keys() == cell.state_dict().keys()
    other = Cell(3, F, dialect).double()
    other.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    agree(layer, [other], x)


def test_a_cell_at_hand_tells_what_it_keeps():
    class Other(Cell):
        def forward(self, x, h):
            z, r = torch.sigmoid(self.conv_gates(torch.cat([x, h], 1))).split(self.F, 1)
            return z * h + (1 - z) * torch.tanh(self.conv_can(torch.cat([x, r * h], 1)))

    cell = shuffled(Other(3, 5, "utae-gru"))
    agree(from_torch(cell, engine="reference"), [cell], frames())
    with pytest.raises(ValueError, match="not of the dialect 'utae-gru': it has order='zr' and keeps='z'; leave"):
        from_torch(cell, "utae-gru")
    cell.forward = lambda x, h: 2 * Other.forward(cell, x, h)
    with pytest.raises(ValueError, match="computes something else"):
        from_torch(cell)


def test_a_cell_that_takes_its_state_first_is_compared_too():
    class Update(Cell):
        def forward(self, h, x):
            return super().forward(x, h)

    cell = shuffled(Update(4, 4, "raft"))
    alike = Cell(4, 4, "raft").double()
    alike.load_state_dict(cell.state_dict())
    agree(from_torch(cell, engine="reference"), [alike], frames(4))


def test_gradients_are_those_of_the_module():
    cell = shuffled(Cell(2, 32, "jhhuang96-gru"))
    layer = from_torch(cell, engine="reference")
    x = frames(2)
    tensor = torch.tensor(x, requires_grad=True)
    y = rolled([cell], tensor)
    cotangent = np.random.default_rng(5).standard_normal(y.shape)
    y.backward(torch.from_numpy(cotangent))
    layer(x, training=True)
    np.testing.assert_allclose(layer.backward(cotangent), tensor.grad.numpy(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dialect", "place"), [("utae-gru", "cell_list.{}"), ("kimmel-gru", "ConvGRUCell_{:02d}")])
def test_stacked_cells(dialect, place):
    cells = [shuffled(Cell(3, 4, dialect), 0), shuffled(Cell(4, 6, dialect), 1)]
    state = {
        f"net.{place.format(n)}.{name}": v for n, cell in enumerate(cells) for name, v in cell.state_dict().items()
    }
    layer = from_torch(state, engine="reference")
    assert layer.out_channels == (4, 6)
    agree(layer, cells, frames())
    written = to_torch(layer, dialect)
    assert {f"net.{name}" for name in written} == state.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[f"net.{name}"].numpy())


def test_cells_that_are_named_are_stacked():
    cells = [shuffled(Cell(3, 4, "mlcast"), 0), shuffled(Cell(4, 4, "mlcast"), 1)]
    state = {f"{place}.{name}": v for place, cell in zip(("first", "second"), cells, strict=True)
             for name, v in cell.state_dict().items()}  # fmt: skip
    agree(from_torch(state, "mlcast", cells=["first", "second"], engine="reference"), cells, frames())
    agree(from_torch(state, prefix="second.", engine="reference"), cells[1:], frames(4))
    with pytest.raises(ValueError, match=r"several fit: first\., second\.; say which with prefix"):
        from_torch(state, "mlcast")
    with pytest.raises(ValueError, match=r"no cell of a ConvGRU is at third\."):
        from_torch(state, "mlcast", cells=["third"])


def test_without_biases():
    cell = shuffled(Cell(3, 4, "utae-gru", bias=False))
    layer = from_torch(cell, engine="reference")
    assert not layer.use_bias
    agree(layer, [cell], frames())


def test_check():
    cell, x = shuffled(Cell(3, 4, "utae-gru")), frames()
    y = rolled([cell], torch.from_numpy(x)).detach().numpy()
    from_torch(cell, check=(x, y), engine="reference")
    with pytest.raises(ValueError, match="the layer's output differs from check's y by up to"):
        from_torch(cell, check=(x, y[:, ::-1].copy()), engine="reference")


def test_what_no_dialect_has_is_refused():
    layer = ConvGRU2D(3, 4, 3, reset_after=False, seed=0)
    with pytest.raises(ValueError, match="to_torch: the dialect 'aserdega-gru' has no reset_after=False; it has True"):
        to_torch(layer, "aserdega-gru")
    with pytest.raises(ValueError, match="the dialect 'dgmr' has no activation='tanh'"):
        to_torch(layer, "dgmr")
    with pytest.raises(ValueError, match="has odd kernels, got 4×4"):
        to_torch(ConvGRU2D(3, 4, 4, reset_after=False), "mlcast")
    with pytest.raises(TypeError, match="the dialect 'mlcast' is of a ConvGRU2D, got Cell"):
        to_torch(Cell(3, 4, "mlcast"), "mlcast")
    weights = {"combined_gates.weight": np.zeros((8, 7, 3, 3)), "out_gate.weight": np.zeros((4, 6, 3, 3))}
    with pytest.raises(ValueError, match=r"these shapes are none of a ConvGRU: combined_gates.weight \(8, 7, 3, 3\)"):
        from_torch(weights)
    with pytest.raises(ValueError, match="reset_after follow from the weights; leave them out"):
        from_torch(Cell(3, 4, "mlcast"), reset_after=True)
