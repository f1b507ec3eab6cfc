"""Results can be changed in place, as those of torch's layers, without changing tensors that were saved for the
backward pass, carried or returned with them."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnorm
from rnnorm import norms
from rnnorm.ops import registry

T, N, INPUTS, H = 4, 3, 5, 6
NORMS: dict[str, Any] = {
    "online": norms.Online(0.9, 0.8),
    "rms": "rms",
    "none": "none",
}
# In place, and the same out of place.
CHANGES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "relu_": (torch.relu_, torch.relu),
    "add_": (lambda t: t.add_(1), lambda t: t + 1),
    "zero_": (lambda t: t.zero_(), lambda t: t * 0),
    "detach_": (lambda t: t.detach_(), lambda t: t.detach()),
}


def _given(kind: str) -> dict[str, Any]:
    """Inputs of a layer or cell by form."""
    if "Cell" in kind:
        return {"batch": torch.randn(N, INPUTS, requires_grad=True), "alone": torch.randn(INPUTS, requires_grad=True)}
    packed = pack_padded_sequence(torch.randn(T, N, INPUTS, requires_grad=True), [2, 4, 1], enforce_sorted=False)
    return {
        "batch": torch.randn(T, N, INPUTS, requires_grad=True),
        "one": torch.randn(1, 1, INPUTS, requires_grad=True),
        "alone": torch.randn(T, INPUTS, requires_grad=True),
        "packed": packed,
    }


def _outputs(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in _outputs(part)]


def _gradients(module: nn.Module, x: Any, outputs: list[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss to which every output contributes differently."""
    leaves = [*module.parameters(), *([x] if isinstance(x, Tensor) else [])]
    loss = sum((torch.linspace(1, 2, o.numel()) * o.reshape(-1)).sum() for o in outputs if o.requires_grad)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def _check(module: Any, x: Any, make: Callable[[Any], Any] = lambda module: module) -> None:
    """Changes each output of what is made of the module, in each way, with gradients and without, and compares with the
    same out of place."""
    module, twin = make(module), copy.deepcopy(module)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            count = len(_outputs(module(x)))
            twin(x)
        for k, (in_place, apart) in itertools.product(range(count), CHANGES.values()):
            with torch.set_grad_enabled(grad):
                found, expected = _outputs(module(x)), _outputs(twin(x))
                in_place(found[k])
                expected[k] = apart(expected[k])
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            if grad and any(o.requires_grad for o in expected):
                ours = _gradients(module, x, found)
                torch.testing.assert_close(ours, _gradients(twin, x, expected), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(module(x), twin(x), rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("backend", registry.names())
def test_outputs_can_be_changed_in_place(backend: str, kind: str, norm: str, training: bool) -> None:
    for form, x in _given(kind).items():
        for batch_first in (False, True) if form == "batch" and "Cell" not in kind else (False,):
            options = {"batch_first": True} if batch_first else {}
            module = getattr(rnnorm, kind)(INPUTS, H, norm=NORMS[norm], backend=backend, **options).train(training)
            _check(module, x)


@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "dropout": 0.0}, {"bidirectional": True}, {"proj_size": 3}], ids=str
)
@pytest.mark.parametrize("backend", registry.names())
def test_outputs_of_stacked_layers_can_be_changed_in_place(backend: str, options: dict[str, Any]) -> None:
    for x in _given("LSTM").values():
        _check(rnnorm.LSTM(INPUTS, H, backend=backend, **options), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("way", ["script", "export"])
def test_outputs_of_captured_modules_can_be_changed_in_place(way: str, kind: str) -> None:
    for form, x in _given(kind).items():
        if form != "packed":
            options = {"batch_first": True} if form == "batch" and "Cell" not in kind else {}
            module = getattr(rnnorm, kind)(INPUTS, H, **options).eval()
            _check(module, x, torch.jit.script if way == "script" else _exported(x))


def _exported(x: Tensor) -> Callable[[nn.Module], nn.Module]:
    return lambda module: torch.export.export(module, (x,)).module()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("guard", norms.GUARDS)
@pytest.mark.parametrize("shape", [(N, INPUTS), (N, INPUTS, 1), (N, INPUTS, 2, 3), (0, INPUTS)], ids=str)
def test_outputs_of_a_norm_can_be_changed_in_place(
    shape: tuple[int, ...], guard: str, affine: bool, training: bool
) -> None:
    norm = rnnorm.OnlineNorm(INPUTS, guard=guard, affine=affine).train(training)
    _check(norm, torch.randn(shape, requires_grad=True))
