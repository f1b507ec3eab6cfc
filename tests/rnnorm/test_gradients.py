"""Gradients where the backward pass is an ordinary derivative: layer, RMS, no norm; online only when frozen."""

from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm import norms
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")

EXACT: dict[str, tuple[Any, bool]] = {
    "layer": (norms.Layer(), True),
    "rms": (norms.RMS(affine=False), True),
    "none": ("none", True),
    # With a_f = 1 statistics are constant, with a_b = 1 so is the control.
    **{f"frozen-{guard}": (norms.Online(1.0, 1.0, guard=guard), True) for guard in norms.GUARDS},
    **{f"eval-{guard}": (norms.Online(0.9, 0.8, guard=guard), False) for guard in norms.GUARDS},
}


@pytest.mark.parametrize("norm", EXACT)
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("backend", registry.names())
def test_gradcheck(backend: str, cell: str, norm: str) -> None:
    cases.skip_unless_runs(backend)
    spec, training = EXACT[norm]
    layer, own = cases.CELLS[cell]
    if norm == "none" and "cell_norm" in own:
        own = {name: value for name, value in own.items() if name != "cell_norm"}
    case = cases.Case("", layer, norms.resolve(spec), own, I=2, H=4, training=training)
    made = case.build(backend)
    widths = (own.get("proj_size", case.H), case.H) if layer == "LSTM" else (case.H,)
    x = torch.randn(3, 2, case.I, requires_grad=True)
    states = [torch.randn(1, 2, width, requires_grad=True) for width in widths]
    names = [name for name, _ in made.named_parameters()]

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given, parameters = rest[: len(widths)], rest[len(widths) :]
        arguments = x, tuple(given) if layer == "LSTM" else given[0]
        changed = dict(zip(names, parameters, strict=True))
        y, last = torch.func.functional_call(made, changed, arguments, {"lengths": [3, 2]})
        return (y, *last) if layer == "LSTM" else (y, last)

    parameters = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(function, (x, *states, *parameters), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("guard", norms.GUARDS)
def test_gradcheck_of_online_norm(guard: str, training: bool) -> None:
    alphas = {"alpha_fwd": 1.0, "alpha_bwd": 1.0} if training else {}
    norm = rnnorm.OnlineNorm(3, guard=guard, **alphas).train(training)
    with torch.no_grad():
        norm.mean.normal_()
        norm.var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()))


def test_control_changes_the_gradient() -> None:
    """With a_b < 1, which the tests above exclude, the backward pass is not the derivative."""
    x, g = torch.randn(6, 2), torch.randn(6, 2)
    grads = []
    for alpha_bwd in (1.0, 0.5):
        leaf = x.clone().requires_grad_()
        norm = rnnorm.OnlineNorm(2, alpha_fwd=1.0, alpha_bwd=alpha_bwd, guard="none")
        norm(leaf).backward(g)
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0][0], grads[1][0])  # the first sample meets u = v = 0
    assert (grads[0][1:] - grads[1][1:]).abs().min() > 1e-3
