"""Gate values: the cells' equations applied to them give the layer's outputs."""

import pytest
import torch

import rnnorm

T, N, INPUTS, H = 5, 3, 4, 6


def moved(kind, **options):
    """A layer with statistics other than initial, and an input; float64."""
    torch.manual_seed(0)
    layer = getattr(rnnorm, kind)(INPUTS, H, backend="reference", dtype=torch.float64, **options)
    for _ in range(3):
        layer(torch.randn(T, N, INPUTS, dtype=torch.float64))
    return layer.eval(), torch.randn(T, N, INPUTS, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["online", "layer", "rms", "none"])
def test_the_equations_of_each_cell_hold(norm):
    layer, x = moved("LSTM", norm=norm)
    y, (_, last) = layer(x)
    found = rnnorm.gates(layer, x)
    c = torch.zeros(N, H, dtype=torch.float64)
    for t in range(T):
        c = found["f_l0"][t] * c + found["i_l0"][t] * found["g_l0"][t]
        torch.testing.assert_close(found["o_l0"][t] * c.tanh(), y[t])
    torch.testing.assert_close(c, last[0])
    layer, x = moved("GRU", norm=norm, num_layers=2)
    y, _ = layer(x)
    found = rnnorm.gates(layer, x)
    h = torch.zeros(N, H, dtype=torch.float64)
    for t in range(T):
        h = (1 - found["z_l1"][t]) * found["n_l1"][t] + found["z_l1"][t] * h
        torch.testing.assert_close(h, y[t])
    assert found.keys() == {f"{gate}_l{layer}" for gate in "rzn" for layer in (0, 1)}
    for nonlinearity in ("tanh", "relu"):
        layer, x = moved("RNN", norm=norm, nonlinearity=nonlinearity, bidirectional=True)
        y, _ = layer(x)
        found = rnnorm.gates(layer, x)
        torch.testing.assert_close(torch.cat([found["h_l0"], found["h_l0_reverse"]], 2), y)


def test_nothing_moves_and_a_state_and_batch_first_are_taken():
    layer, x = moved("GRU", batch_first=True)
    layer.train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    rows, h = x.transpose(0, 1).contiguous(), torch.randn(1, N, H, dtype=torch.float64)
    found = rnnorm.gates(layer, rows, h)
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    y, _ = layer.eval()(rows, h)
    first = (1 - found["z_l0"][0]) * found["n_l0"][0] + found["z_l0"][0] * h[0]
    torch.testing.assert_close(first, y[:, 0])


def test_a_wrong_input_is_refused():
    layer, x = moved("GRU")
    with pytest.raises(ValueError, match=r"input must be \[T, N, I\]"):
        rnnorm.gates(layer, x[0])
    with pytest.raises(ValueError, match="input_size = 4; got 3"):
        rnnorm.gates(layer, x[..., :3])
    for other in (rnnorm.LSTMCell(4, 5), torch.nn.LSTM(4, 5)):
        with pytest.raises(TypeError, match=f"layer must be an LSTM, GRU or RNN of rnnorm; got {type(other).__name__}"):
            rnnorm.gates(other, x)
