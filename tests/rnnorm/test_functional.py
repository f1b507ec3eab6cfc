"""The fused decoder and loss, on each backend, against torch's own linear layer and cross entropy in float64."""

import importlib
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnnorm.functional import linear_cross_entropy, summed_nll, token_nll
from rnnorm.ops import build, chunked, native, registry

CPU = pytest.param("cpu", marks=pytest.mark.skipif(build.load() is not None, reason=f"{build.load()}"))


@pytest.fixture(params=[CPU, pytest.param("cpu-blas", marks=CPU.marks), "scripted", "scripted-cuda"], autouse=True)
def form(request, monkeypatch):
    """Every test runs with the C++ form, with and without the micro-kernel, and with torch's own operations, also as on
    a CUDA device."""
    name, _, variant = request.param.partition("-")
    monkeypatch.setattr(registry, "BACKENDS", [registry.by_name(name)])
    monkeypatch.setattr(native, "use_micro_kernel", variant != "blas")
    if variant == "cuda":
        monkeypatch.setattr(chunked, "_place", lambda tensor: "cuda")
    return request.param


def problem(rows, dtype=torch.float64, width=5, classes=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    bias = torch.randn(classes, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), targets


def plain(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300, 2100])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_the_plain_form_in_float64(monkeypatch, rows, with_bias, threads):
    monkeypatch.setattr(native, "threads", threads)
    hidden, weight, bias, targets = problem(rows, classes=11 if rows < 300 else 333)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    total, count = linear_cross_entropy(hidden, weight, bias if with_bias else None, targets)
    expected = plain(hidden, weight, bias if with_bias else None, targets)
    assert count == rows
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(total * 0.3, inputs), torch.autograd.grad(expected * 0.3, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1 / 3, 2e-8, 1e5])
def test_weights_of_rows_are_not_rounded_to_half_precision(dtype, factor, autocast):
    """1/3 is not a number of bfloat16; the others are beyond float16."""
    if (torch.bfloat16 if autocast else dtype) not in registry.BACKENDS[0].losses:
        pytest.skip("this form does not run this dtype")
    hidden, weight, bias, targets = problem(6, torch.float32 if autocast else dtype)
    rows = torch.full((6,), factor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (whole, _), (total, count) = (linear_cross_entropy(hidden, weight, bias, targets, w) for w in (None, rows))
    assert count == 6
    torch.testing.assert_close(total, whole * factor, rtol=1e-6, atol=0)
    if dtype == torch.float16 and not autocast and factor != 1 / 3:
        return  # the gradients are beyond float16 as well
    ours, theirs = (torch.autograd.grad(t, (weight, bias)) for t in (total / factor, whole))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def worst_gradient(inputs, targets, autocast):
    """The largest relative error of a gradient, of inputs of lower precision on any device."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(plain(*exact, targets), exact)
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=autocast):
        total, _ = linear_cross_entropy(*inputs, targets)
    found = torch.autograd.grad(total, inputs)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def confident(dtype, device="cpu"):
    """Rows whose target's probability p is nearly 1: the rounding of p is as large as p - 1, the gradient."""
    torch.manual_seed(0)
    weight, targets = (torch.randn(1000, 64) * 0.3).bfloat16(), torch.randint(1000, (256,))
    towards = weight[targets].double() / weight[targets].double().square().sum(1, keepdim=True)
    hidden = (17 * towards + 0.05 * torch.randn(256, 64)).bfloat16()
    assert F.linear(hidden.double(), weight.double()).softmax(1).gather(1, targets[:, None]).median() > 0.998
    inputs = hidden, weight, torch.zeros(1000)
    return [t.to(device, dtype).requires_grad_() for t in inputs], targets.to(device)


def large_vocabulary(device="cpu"):
    """The sum of e^x over more than 65,504 words is beyond float16, and so are factors of an even probability."""
    torch.manual_seed(0)
    weight, targets = torch.randn(70_000, 8) * 0.05, torch.randint(70_000, (9,))
    hidden, bias = torch.randn(9, 8) * 0.02, torch.zeros(70_000)
    return [t.half().to(device).requires_grad_() for t in (hidden, weight, bias)], targets.to(device)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_confident_rows_in_bfloat16(form, autocast):
    if torch.bfloat16 not in registry.BACKENDS[0].losses:
        pytest.skip("this form does not run this dtype")
    inputs, targets = confident(torch.float32 if autocast else torch.bfloat16)
    # torch's own operators round the logits on the CPU, and so the probabilities
    assert worst_gradient(inputs, targets, autocast) < (0.005 if form == "cpu" else 0.06)


def test_gradients_in_float16_of_a_large_vocabulary():
    if torch.float16 not in registry.BACKENDS[0].losses:
        pytest.skip("this form does not run this dtype")
    assert worst_gradient(*large_vocabulary(), autocast=False) < 2e-3


def test_gradcheck():
    hidden, weight, bias, targets = problem(7)
    mask = torch.tensor([True, False, True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_cross_entropy(*inputs, targets, mask)[0], (hidden, weight, bias)
    )


def test_float32_sums_in_float64():
    hidden, weight, bias, targets = problem(2100, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets)
    exact = plain(*(t.detach().double() for t in (hidden, weight, bias)), targets)
    assert total.dtype == torch.float64
    assert abs(total.item() / exact.item() - 1) < 2e-7
    total.backward()
    assert {t.grad.dtype for t in (hidden, weight, bias)} == {torch.float32}


def test_masked_rows_count_nothing_and_get_no_gradient():
    hidden, weight, bias, targets = problem(6)
    mask = torch.tensor([True, True, False, True, False, True])
    targets[~mask] = 0
    total, count = linear_cross_entropy(hidden, weight, bias, targets, mask)
    expected = plain(hidden[mask], weight, bias, targets[mask])
    assert count == 4
    torch.testing.assert_close(total, expected)
    total.backward()
    assert torch.equal(hidden.grad[~mask], torch.zeros(2, 5, dtype=torch.float64))
    assert hidden.grad[mask].abs().min() > 0


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, -2.0])], ids=str)
def test_the_sum_alone(mask):
    hidden, weight, bias, targets = problem(3)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets, mask)
    alone = summed_nll(hidden, weight, bias, targets, mask)
    assert torch.equal(alone, total)
    assert torch.equal(*(torch.autograd.grad(value, weight)[0] for value in (alone, total)))


def test_no_row_at_all():
    hidden, weight, bias, targets = problem(3)
    total, count = linear_cross_entropy(hidden, weight, bias, targets, torch.zeros(3, dtype=torch.bool))
    assert (total.item(), count) == (0.0, 0)
    total.backward()
    assert not weight.grad.any()


def test_a_tied_weight_gets_both_gradients():
    _, weight, bias, targets = problem(6)
    inputs = torch.tensor([1, 2, 3, 1, 2, 3])
    (ours,) = torch.autograd.grad(linear_cross_entropy(F.embedding(inputs, weight), weight, bias, targets)[0], weight)
    (theirs,) = torch.autograd.grad(plain(F.embedding(inputs, weight), weight, bias, targets), weight)
    torch.testing.assert_close(ours, theirs)


def test_only_asked_gradients_are_formed():
    hidden, weight, bias, targets = problem(6)
    total, _ = linear_cross_entropy(hidden, weight.detach(), bias.detach(), targets)
    total.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, bias, targets)[0].requires_grad


def test_far_logits_stay_finite():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, None, torch.tensor([1, 1]))
    total.backward()
    assert total.item() == 2000.0
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("mask", [torch.bool, torch.float32])
def test_float32_at_real_width(mask, form):
    """Many tiles and blocks, odd sizes, weights of rows, logits far apart."""
    hidden, weight, bias, targets = problem(333, torch.float32, width=37, classes=1003, seed=3)
    with torch.no_grad():
        hidden[5] *= 40
        weight[700] *= 3
    generator = torch.Generator().manual_seed(4)
    weights = torch.randint(0, 3, (333,), generator=generator).to(mask)
    total, count = linear_cross_entropy(hidden, weight, bias, targets, weights)
    total.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    nats = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    (nats @ weights.double()).backward()
    assert count == int((weights != 0).sum())
    assert abs(total.item() / (nats @ weights.double()).item() - 1) < 1e-6
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 2e-6


def test_nan_and_infinity_come_out():
    hidden, weight, bias, targets = problem(5, torch.float32)
    with torch.no_grad():
        hidden[2, 1] = float("nan")
    nats = token_nll(hidden, weight, bias, targets)
    assert nats[2].isnan()
    assert nats[[0, 1, 3, 4]].isfinite().all()
    with torch.no_grad():
        bias[int(targets[0])] = -float("inf")
    assert token_nll(hidden, weight, bias, targets)[0] == float("inf")


def test_masked_targets_may_be_anything():
    hidden, weight, bias, targets = problem(6)
    mask = torch.arange(6) < 3
    expected = linear_cross_entropy(hidden, weight, bias, targets, mask)[0]
    targets[~mask] = -100
    assert torch.equal(linear_cross_entropy(hidden, weight, bias, targets, mask)[0], expected)


def test_results_do_not_change_from_run_to_run(monkeypatch):
    monkeypatch.setattr(native, "threads", 2)
    found = []
    for _ in range(3):
        hidden, weight, bias, targets = problem(300, torch.float32, width=16, classes=500)
        total, _ = linear_cross_entropy(hidden, weight, bias, targets)
        found.append((total, *torch.autograd.grad(total, (hidden, weight, bias))))
    assert all(torch.equal(one, first) for run in found[1:] for one, first in zip(run, found[0], strict=True))


def test_strided_and_half_tensors():
    hidden, weight, bias, targets = problem(6)
    wide = torch.stack([hidden.detach(), hidden.detach()], 2).requires_grad_()
    ours, _ = linear_cross_entropy(wide[:, :, 1], weight.t().contiguous().t(), bias, targets)
    torch.testing.assert_close(ours, plain(hidden, weight, bias, targets))
    (grad,) = torch.autograd.grad(ours, wide)
    torch.testing.assert_close(grad[:, :, 1], torch.autograd.grad(plain(hidden, weight, bias, targets), hidden)[0])


def test_opcheck():
    hidden, weight, bias, targets = problem(6, torch.float32)
    weights = torch.tensor([1.0, 0, 2, 1, 1, 1])
    for options in ((bias, None), (None, weights)):
        arguments = (hidden, weight, options[0], targets, options[1], torch.float32)
        torch.library.opcheck(torch.ops.rnnorm.linear_cross_entropy.default, arguments)


def test_compiled_whole_equals_eager():
    hidden, weight, bias, targets = problem(40, torch.float32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, count = linear_cross_entropy(hidden.tanh(), weight, bias, targets)
        return total / count

    inputs = (hidden, weight, bias)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_token_nll_is_the_sum_taken_apart():
    hidden, weight, bias, targets = problem(300)
    rows = token_nll(hidden, weight, bias, targets)
    assert rows.shape == (300,)
    assert not rows.requires_grad
    torch.testing.assert_close(rows.sum(), linear_cross_entropy(hidden, weight, bias, targets)[0])
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(rows, expected.detach())


@pytest.mark.parametrize("wrong", [-1, 11, -100])
def test_targets_outside_the_vocabulary_are_refused(wrong):
    hidden, weight, bias, targets = problem(4)
    targets[2] = wrong
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.V-1 = 0\.\.10; got"):
        linear_cross_entropy(hidden, weight, bias, targets)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.V-1 = 0\.\.10; got"):
        token_nll(hidden, weight, bias, targets)


@pytest.mark.parametrize("wrong", [-1, 11, -100])
def test_targets_outside_the_vocabulary_are_refused_on_the_device(wrong):
    """As on a GPU, where nothing is read back for it."""
    loss = importlib.import_module("rnnorm.ops.linear_cross_entropy")
    targets = torch.tensor([3, wrong, 0, 10])
    with pytest.raises(RuntimeError, match=r"targets must lie in 0\.\.V-1 = 0\.\.10"):
        loss._assert_in_range(targets, None, 11)
    with pytest.raises(RuntimeError, match=r"targets must lie in 0\.\.V-1 = 0\.\.10"):
        loss._assert_in_range(targets, torch.tensor([0.0, 0.5, 1.0, 1.0]), 11)
    loss._assert_in_range(targets, torch.tensor([1.0, 0.0, 1.0, 1.0]), 11)


def test_wrong_shapes_are_refused():
    hidden, weight, bias, targets = problem(4)
    with pytest.raises(ValueError, match=r"hidden must be \[M, E\]"):
        linear_cross_entropy(hidden[:, :3], weight, bias, targets)
    with pytest.raises(ValueError, match=r"bias must be \[V\] = \[11\]"):
        linear_cross_entropy(hidden, weight, bias[:5], targets)
    with pytest.raises(ValueError, match=r"must be \[M\] = \[4\]"):
        linear_cross_entropy(hidden, weight, bias, targets[:3])


def test_a_weight_without_values_is_refused():
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="must be on cpu; got weight on meta"):
        linear_cross_entropy(hidden, torch.empty(7, 4, device="meta"), None, targets)


def test_double_backward_raises():
    hidden, weight, bias, targets = problem(4)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_autocast_multiplies_in_bfloat16_and_sums_wider(monkeypatch):
    monkeypatch.undo()  # the form that is chosen by itself
    hidden, weight, bias, targets = problem(300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, bias, targets)
        expected = plain(hidden, weight, bias, targets)
    inputs = (hidden, weight, bias)
    assert not torch.equal(total, linear_cross_entropy(*inputs, targets)[0])
    torch.testing.assert_close(total, expected.double(), rtol=1e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * float(theirs.abs().max()))


_PEAK = """
import re, sys, torch
from pathlib import Path
from rnnorm.functional import linear_cross_entropy
from rnnorm.ops import registry
registry.BACKENDS = [registry.by_name(sys.argv[1])]
assert registry.choose_loss(torch.device("cpu"), torch.float32)
torch.set_num_threads(1)

def run(M, V):
    hidden, weight = torch.randn(M, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, None, torch.zeros(M, dtype=torch.int64))[0].backward()

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

run(256, 20000)
before = peak()
run(2048, 20000)
print((peak() - before) / (2048 * 20000 * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_below_an_eighth_of_the_logits(form):
    if form != "cpu":
        pytest.skip("BLAS allocates its own buffers; the next test counts")
    found = subprocess.run([sys.executable, "-c", _PEAK, form], capture_output=True, text=True, check=True)
    assert 0 < float(found.stdout) < 0.125


class _Made(TorchDispatchMode):
    """The largest number of values in any tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel())
        return found


def test_the_reference_makes_no_tensor_of_an_eighth_of_the_logits(monkeypatch):
    monkeypatch.setattr(chunked, "_place", lambda tensor: "cpu")
    hidden, weight, bias, targets = problem(1280, torch.float32, classes=700)
    with _Made() as made:
        chunked.linear_cross_entropy(hidden, weight, bias, targets, None, torch.float32, (True, True, True))
    assert 1280 * 700 / 32 < made.largest < 1280 * 700 / 8


class _Live(TorchDispatchMode):
    """The most bytes at one time in tensors that operations made."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and not func.is_view and tensor.data_ptr() not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(tensor, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [512, 20_000])
@pytest.mark.parametrize("masked", [False, True])
def test_memory_on_a_device_is_that_of_a_chunk(monkeypatch, form, dtype, rows, masked):
    """Everything that is alive at one time counts: the chunk's logits, rounded ones too, the rows' and the classes'."""
    if form != "scripted-cuda":
        pytest.skip("the other forms are tested against an eighth in float32")
    monkeypatch.setattr(chunked, "_LOGITS", 64 * 2_000)
    classes = 2_000
    hidden, weight, bias, targets = (t.detach() for t in problem(rows, dtype, width=1, classes=classes))
    weights = (targets % 3 > 0).float() if masked else None
    with _Live() as live:
        chunked.linear_cross_entropy(hidden, weight, bias, targets, weights, dtype, (True, True, True))
    chunk = 64 * classes * (4 if dtype == torch.float32 else 6)
    assert chunk <= live.most < 1.25 * chunk + 40 * rows + 20 * classes


def test_two_backwards_through_one_graph_agree():
    hidden, weight, bias, targets = problem(4)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets)
    first = torch.autograd.grad(total, weight, retain_graph=True)
    second = torch.autograd.grad(total, weight)
    assert torch.equal(first[0], second[0])


def test_the_loss_scale_of_float16_may_exceed_its_range(form: str) -> None:
    if form.startswith("cpu"):
        pytest.skip("the C++ form has no float16")
    torch.manual_seed(0)
    hidden, weight = (torch.randn(4, 8) * 0.01).half().requires_grad_(), (torch.randn(10, 8) * 0.01).half()
    targets = torch.zeros(4, dtype=torch.long)
    (linear_cross_entropy(hidden, weight, None, targets)[0] * 65536).backward()
    exact = hidden.detach().double().requires_grad_()
    (F.cross_entropy(F.linear(exact, weight.double()), targets, reduction="sum") * 65536).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=5e-3, atol=1)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["scripted"], indirect=True)
@pytest.mark.parametrize("rows", [1, 33, 2100])
def test_equals_the_plain_form_on_a_gpu(cuda, form, rows):
    hidden, weight, bias, targets = (t.detach().to(cuda) for t in problem(rows, classes=333))
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    mask = torch.rand(rows, device=cuda).mul(2).floor()
    total, count = linear_cross_entropy(*inputs, targets, mask)
    expected = (F.cross_entropy(F.linear(*inputs), targets, reduction="none") * mask).sum()
    assert count == mask.count_nonzero()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["scripted"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_products_of_half_precision_are_not_rounded_on_a_gpu(cuda, form, dtype, autocast):
    assert worst_gradient(*confident(dtype, cuda), autocast=autocast) < 0.005
    if dtype == torch.float16:
        assert worst_gradient(*large_vocabulary(cuda), autocast=False) < 2e-3
