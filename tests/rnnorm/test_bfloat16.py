"""Products in bfloat16 in the C++ backend: each error is within what the rounding of operands explains."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rnnorm
from rnnorm.functional import linear_cross_entropy, token_nll
from rnnorm.ops import build, native

UNIT = 2.0**-8  # the largest relative error of rounding to bfloat16


@pytest.fixture(autouse=True)
def needs_kernel() -> None:
    reason = build.load()
    if reason is not None:
        pytest.skip(reason)
    if "bfloat16" not in torch.ops.rnnorm_cpu.micro_kernels():
        pytest.skip("this processor has no instructions for products in bfloat16")


def _close(found: Tensor, exact: Tensor, products: Tensor, units: float) -> None:
    """`products` are sums of absolute products; float32's own rounding is far below a hundredth of a unit."""
    excess = ((found.double() - exact).abs() - (units + 0.01) * UNIT * products).max().item()
    assert excess <= 1e-7, excess


@pytest.mark.parametrize(
    ("N", "sizes"), [(1, (1, 1)), (3, (2, 5)), (20, (7, 33)), (57, (64, 48)), (600, (33, 17)), (2, (1100, 530))]
)
def test_every_product_is_within_the_rounding_of_its_operands(N: int, sizes: tuple[int, int]) -> None:
    """One step of max(0, W x + R h), whose gradients are products of d = dy where the step is active."""
    torch.manual_seed(0)
    inputs, units = sizes
    layer = rnnorm.RNN(inputs, units, nonlinearity="relu", norm="none", backend="cpu", bias=False)
    W, R = (p.detach().double() for p in (layer.weight_ih_l0, layer.weight_hh_l0))
    x, h, dy = (torch.randn(1, N, k).bfloat16() for k in (inputs, units, units))
    given, initial = x.float().requires_grad_(), h.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(given, initial)
    y.backward(dy)
    X, H = x[0].double(), h[0].double()
    exact, products = X @ W.T + H @ R.T, X.abs() @ W.abs().T + H.abs() @ R.abs().T
    # x and h are exact in bfloat16: only the weights and y are rounded.
    _close(y[0], exact.relu(), products + exact.abs(), 1)
    d = dy[0].double() * (y[0] > 0)
    _close(layer.weight_ih_l0.grad, d.T @ X, d.T.abs() @ X.abs(), 0)
    _close(layer.weight_hh_l0.grad, d.T @ H, d.T.abs() @ H.abs(), 0)
    for grad, weight in ((given.grad, W), (initial.grad, R)):
        # The gradient itself is rounded as autocast's input was.
        _close(grad[0], d @ weight, d.abs() @ weight.abs() + (d @ weight).abs(), 1)
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lstm": ("LSTM", {}, False),
    "projected": ("LSTM", {"proj_size": 5, "cell_norm": True}, True),
    "masked": ("LSTM", {"weight_dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.2}, False),
    "gru": ("GRU", {"recurrent_dropout": 0.3}, True),
    "rnn": ("RNN", {}, False),
}


def _outcome(layer: Any, dtype: torch.dtype, backend: str, x: Tensor, lengths: Tensor | None, reset: Tensor) -> Any:
    layer = copy.deepcopy(layer).to(dtype)
    layer.backend = backend
    x = x.to(dtype, copy=True).requires_grad_()
    torch.manual_seed(2)  # of the masks
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y, last = layer(x, lengths=lengths, reset=reset)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).to(y.dtype))
    states = last if isinstance(last, tuple) else (last,)
    return [t.detach().double() for t in (y, *states, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers())]


@pytest.mark.parametrize("norm", ["none", "online", "layer", "rms"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 1, 4, 5])], ids=["dense", "lengths"])
def test_a_layer_is_no_further_from_float64_than_the_definition_in_bfloat16(
    case: str, norm: str, lengths: Tensor | None
) -> None:
    """The definition's products round their results too, so its distance bounds what rounded operands explain."""
    kind, options, bidirectional = CASES[case]
    if norm == "none":
        options = {k: v for k, v in options.items() if k != "cell_norm"}
    torch.manual_seed(1)
    layer = getattr(rnnorm, kind)(9, 37, norm=norm, bidirectional=bidirectional, **options)
    x, reset = torch.randn(6, 4, 9), torch.rand(6, 4) < 0.2
    exact = _outcome(layer, torch.float64, "reference", x, lengths, reset)
    defined = _outcome(layer, torch.float32, "reference", x, lengths, reset)
    found = _outcome(layer, torch.float32, "cpu", x, lengths, reset)
    for ours, theirs, right in zip(found, defined, exact, strict=True):
        allowed = 1.5 * (theirs - right).norm() + UNIT * right.norm()
        assert (ours - right).norm() <= allowed


def test_gradients_are_unbiased_over_random_inputs() -> None:
    torch.manual_seed(4)
    layer = rnnorm.LSTM(16, 16, norm="layer", backend="cpu")
    exact = copy.deepcopy(layer).double()
    direction, errors = [torch.randn_like(p) for p in layer.parameters()], []
    for _ in range(400):
        x, g, found = torch.randn(3, 4, 16).bfloat16().float(), torch.randn(3, 4, 16).bfloat16(), []
        for module in (layer, exact):
            module.zero_grad()
            weight = next(module.parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=module is layer):
                y, _ = module(x.to(weight.dtype))
            y.backward(g.to(y.dtype))
            grads = [p.grad.double() for p in module.parameters()]
            found.append(sum((d * grad).sum().item() for d, grad in zip(direction, grads, strict=True)))
        errors.append(found[0] - found[1])
    error = torch.tensor(errors)
    # The weights' rounding is fixed, so it may leave a bias: far below the spread of a single error.
    assert abs(error.mean()) < 4 * error.std() / len(errors) ** 0.5 + 0.05 * error.std()


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_repeat_to_the_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "threads", threads)
    x = torch.randn(7, 5, 40)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = rnnorm.LSTM(40, 70, backend="cpu").bfloat16()
        y, _ = layer(x.bfloat16())
        y.sum().backward()
        runs.append([y, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_without_the_kernel_products_run_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = rnnorm.LSTM(8, 8, norm="none", backend="cpu"), torch.randn(5, 2, 8).bfloat16()
    monkeypatch.setattr(native, "use_micro_kernel", False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded, _ = layer(x)
    with torch.no_grad():
        exact, _ = layer(x.float())
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize(("M", "E", "V"), [(1, 1, 2), (3, 5, 7), (17, 33, 130), (300, 20, 1001), (0, 4, 9)])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_cross_entropy_is_within_the_rounding_of_its_operands(
    M: int, E: int, V: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "threads", threads)
    torch.manual_seed(5)
    hidden, weight = torch.randn(M, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    bias, targets = torch.randn(V, requires_grad=True), torch.randint(V, (M,))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, bias, targets)
        nats = token_nll(hidden, weight, bias, targets)
        again, _ = linear_cross_entropy(hidden, weight, bias, targets)
    assert torch.equal(total, again)
    inputs = (hidden, weight, bias)
    grads = torch.autograd.grad(total, inputs)
    h, w, b = (t.detach().double() for t in inputs)
    logits = h @ w.T + b
    # A logit is off by at most two units of its absolute products; a log-probability by twice the largest of the row's.
    off = 2.02 * UNIT * (h.abs() @ w.abs().T)
    exact = F.cross_entropy(logits, targets, reduction="none")
    assert ((nats - exact).abs() <= 2 * off.amax(1, keepdim=True)[:, 0] + 1e-6).all()
    # Its probability is off by the factor e^(2 off), and is rounded as an operand once more, as is the other operand.
    p = logits.softmax(1)
    spread = p * ((2 * off.amax(1, keepdim=True)).exp() - 1) + 2 * UNIT * p
    right = p - F.one_hot(targets, V)
    # The target's own row is added unrounded, but its probability is not exact either.
    exact_grads = (right @ w, right.T @ h, right.sum(0))
    allowed = (spread @ w.abs() + 2 * UNIT * p @ w.abs(), spread.T @ h.abs() + 2 * UNIT * p.T @ h.abs(), spread.sum(0))
    for grad, truth, bound in zip(grads, exact_grads, allowed, strict=True):
        assert grad.dtype == torch.float32
        assert ((grad - truth).abs() <= bound + 1e-5).all()


def test_gradients_of_linear_cross_entropy_are_not_rounded() -> None:
    hidden, weight = torch.randn(40, 12).bfloat16(), torch.randn(30, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, None, torch.randint(30, (40,)))[0].backward()
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_logits_far_apart_stay_finite_in_bfloat16() -> None:
    """References are raised in mid-course, which rescales exponentials that are kept in bfloat16."""
    hidden = torch.eye(2).repeat(40, 1).requires_grad_()
    weight = torch.tensor([[1.0, -1.0]]) * torch.linspace(-300, 300, 500)[:, None]
    targets = torch.arange(80) % 500
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, None, targets)
        nats = token_nll(hidden, weight, None, targets)
    logits = hidden.detach().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(total, hidden)
    expected = (logits.softmax(1) - F.one_hot(targets, 500)) @ weight.double()
    torch.testing.assert_close(grad.double(), expected, rtol=2e-2, atol=0.5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_may_be_switched_at_any_time() -> None:
    """Without it products run in float32, also those of the backward of a call before."""
    torch.manual_seed(0)
    layer = rnnorm.LSTM(40, 64, norm="layer", backend="cpu").bfloat16()
    x = torch.randn(7, 20, 40, dtype=torch.bfloat16)
    weight, targets = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 50, (140,))

    def outcome(forward: bool, backward: bool) -> list[Tensor]:
        layer.zero_grad()
        with torch.backends.mkldnn.flags(enabled=forward):
            why = rnnorm.why_not_bfloat16()
            assert why is None if forward else "is switched off (torch.backends.mkldnn)" in str(why)
            y, _ = layer(x)
            total, _ = linear_cross_entropy(y.flatten(0, 1), weight, None, targets)
        with torch.backends.mkldnn.flags(enabled=backward):
            total.backward()
        return [total.detach(), *(parameter.grad for parameter in layer.parameters())]

    expected = outcome(True, True)
    for forward, backward in ((True, False), (False, True), (False, False)):
        for one, other in zip(outcome(forward, backward), expected, strict=True):
            assert (one.double() - other.double()).norm() <= 0.02 * other.double().norm()
