"""Cells: single steps give the same results as a layer over the sequence."""

from typing import Any

import pytest
import torch

import rnnorm
from rnnorm import norms
from rnnorm._cells import CELLS
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("backend", registry.names())
def test_gradients_of_states_are_not_rounded_from_step_to_step_under_autocast(backend: str) -> None:
    """The forget gate is 0.999: rounded to bfloat16 at each step, the gradient of c would move by other amounts."""
    if registry.by_name(backend).why_not(torch.device("cpu"), torch.float32, None):
        pytest.skip(f"backend {backend!r} cannot run here")
    cell = rnnorm.LSTMCell(2, 4, norm="none", backend=backend, dtype=torch.float32)
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(cell.bias_ih[4:8], 7)
    h, begun = torch.zeros(1, 4, dtype=torch.float32), torch.ones(1, 4, dtype=torch.float32, requires_grad=True)
    c = begun
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(300):
            h, c = cell(h[:, :2] * 0, (h, c))
    (grad,) = torch.autograd.grad(c.sum(), begun)
    expected = torch.sigmoid(torch.tensor(7.0)) ** 300
    torch.testing.assert_close(grad, expected.expand(1, 4).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [norms.Online(0.9, 0.8), "layer", "rms", "none"], ids=lambda n: getattr(n, "kind", n))
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", registry.names())
def test_steps_equal_the_layer(backend: str, cell: str, norm: Any) -> None:
    if registry.by_name(backend).why_not(torch.device("cpu"), torch.float64, None):
        pytest.skip(f"backend {backend!r} cannot run here")
    options = {"cell_norm": True} if cell == "LSTM" and norm != "none" else {}
    torch.manual_seed(1)
    layer = getattr(rnnorm, cell)(3, 4, norm=norm, backend=backend, **options)
    torch.manual_seed(1)
    single = getattr(rnnorm, f"{cell}Cell")(3, 4, norm=norm, backend=backend, **options)
    assert [f"{name}_l0" for name in single.state_dict()] == list(layer.state_dict())
    x, g = torch.randn(6, 2, 3), torch.randn(6, 2, 4)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, last = layer(left)
    y.backward(g)
    state: Any = None
    outputs = []
    for step in right:
        state = single(step, state)
        outputs.append(state[0] if cell == "LSTM" else state)
    torch.stack(outputs).backward(g)
    torch.testing.assert_close(torch.stack(outputs), y)
    torch.testing.assert_close(state, tuple(s[0] for s in last) if cell == "LSTM" else last[0])
    torch.testing.assert_close(left.grad, right.grad)
    for (name, a), b in zip(single.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(single.named_buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_table_agrees_with_torch() -> None:
    """The numbers of gates and states equal those of torch's layers."""
    for name, cell in CELLS.items():
        options = {"nonlinearity": name[4:]} if name.startswith("rnn") else {}
        theirs = getattr(torch.nn, name.partition("_")[0].upper())(3, 5, **options)
        assert theirs.weight_hh_l0.shape == (len(cell.gates) * 5, 5)
        last = theirs(torch.zeros(1, 1, 3))[1]
        assert len(cell.states) == (len(last) if isinstance(last, tuple) else 1)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_reset_and_repr(cell: str) -> None:
    made = getattr(rnnorm, cell)(3, 4, norm="online")
    made(torch.randn(2, 3))
    made.reset_running_stats()
    assert made.norm_mean.eq(0).all()
    assert made.norm_var.eq(1).all()
    assert repr(made).startswith(f"{cell}(3, 4, norm=Online(")
