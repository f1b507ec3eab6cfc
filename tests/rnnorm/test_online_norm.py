"""`OnlineNorm` as a module, and its backends against the definition; see also the recorded cases, oracle and theory."""

import contextlib
import copy
import importlib
import pickle
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rnnorm
from rnnorm import norms
from rnnorm.ops import build, native, registry, running_stats

ops = importlib.import_module("rnnorm.ops.online_norm")


def test_defaults_and_names() -> None:
    norm = rnnorm.OnlineNorm(3)
    assert (norm.alpha_fwd, norm.alpha_bwd, norm.eps, norm.guard) == (0.999, 0.99, 1e-5, "clamp")
    assert list(norm.state_dict()) == ["weight", "bias", "mean", "var", "u", "v"]
    assert all(value.shape == (3,) for value in norm.state_dict().values())
    assert list(rnnorm.OnlineNorm(3, affine=False).state_dict()) == ["mean", "var", "u", "v"]
    assert "guard='scale'" in repr(rnnorm.OnlineNorm(3, guard="scale"))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 5), (0, 3), (0, 3, 5), (4, 3, 0)])
def test_shape_and_dtype_of_the_output(shape: tuple[int, ...]) -> None:
    norm = rnnorm.OnlineNorm(3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = norm(x)
        assert (y.shape, y.dtype) == (shape, dtype)
        y.float().sum().backward()
        assert (x.grad.shape, x.grad.dtype) == (shape, dtype)
    assert norm.mean.dtype == torch.float32
    assert norm.mean.isfinite().all()


def test_empty_batch_moves_nothing() -> None:
    norm = rnnorm.OnlineNorm(3)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.zeros(0, 3, requires_grad=True)).sum().backward()
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_first_sample_is_normalized_by_the_initial_statistics() -> None:
    norm = rnnorm.OnlineNorm(3, guard="none", eps=1e-5)
    x = torch.randn(1, 3)
    torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize(
    "N",
    [1, 2, running_stats.ROW_BY_ROW * 2 + 1, running_stats.BLOCK, running_stats.BLOCK + 1, 3 * running_stats.BLOCK - 1],
)
def test_blocks_and_scans_equal_single_samples(N: int) -> None:
    """Samples of one call are treated as if each had its own; so is the backward pass, in the order of the samples."""
    whole = rnnorm.OnlineNorm(2, alpha_fwd=0.97, alpha_bwd=0.9, guard="none", dtype=torch.float64)
    single = copy.deepcopy(whole)
    for _ in range(2):
        x, g = torch.randn(N, 2, 3, dtype=torch.float64), torch.randn(N, 2, 3, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        y = whole(leaf)
        y.backward(g)
        for n in range(N):
            one = x[n : n + 1].clone().requires_grad_()
            out = single(one)
            out.backward(g[n : n + 1])
            torch.testing.assert_close(out[0], y[n], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(one.grad[0], leaf.grad[n], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(single.state_dict(), whole.state_dict(), rtol=1e-10, atol=1e-11)


def test_constant_and_extreme_input_stay_finite() -> None:
    norm = rnnorm.OnlineNorm(3, alpha_fwd=0.9)
    for x in (torch.zeros(300, 3), torch.full((300, 3), 1e4), 1e6 * torch.randn(300, 3)):
        leaf = x.requires_grad_()
        y = norm(leaf)
        y.sum().backward()
        assert y.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert (norm.var >= 0).all()


def test_reset() -> None:
    norm = rnnorm.OnlineNorm(3)
    norm(torch.randn(5, 3)).square().sum().backward()
    with torch.no_grad():
        norm.weight.fill_(3)
    norm.reset_running_stats()
    assert norm.weight.eq(3).all()
    expected = rnnorm.OnlineNorm(3).state_dict()
    norm.reset_parameters()
    torch.testing.assert_close(norm.state_dict(), expected, rtol=0, atol=0)


def test_a_diverging_control_is_the_same_in_one_call_and_in_many() -> None:
    """Factors far below -1, whose products over many samples overflow in float32 while the gradients are zero."""
    torch.manual_seed(0)
    x = 1e4 + 1e3 * torch.randn(256, 2)
    whole = rnnorm.OnlineNorm(2, alpha_fwd=0.9999, alpha_bwd=0.98)
    single = copy.deepcopy(whole)
    whole(x.clone().requires_grad_()).sum().backward()
    for row in x.unsqueeze(1):
        single(row.requires_grad_()).sum().backward()
    assert whole.v.isfinite().all()
    torch.testing.assert_close(whole.u, single.u, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(whole.v, single.v, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.55, 0.6, 0.7, 0.75])
def test_a_variance_that_decays_fast_is_never_negative(alpha: float) -> None:
    norm = rnnorm.OnlineNorm(64, alpha_fwd=alpha)
    norm(1e6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    norm(torch.zeros(64, 64))
    assert (norm.var >= 0).all()
    assert norm(torch.zeros(64, 64)).isfinite().all()


def test_an_empty_batch_gives_zero_gradients() -> None:
    norm = rnnorm.OnlineNorm(3)
    norm(torch.zeros(0, 3)).sum().backward()
    assert norm.weight.grad.tolist() == norm.bias.grad.tolist() == [0, 0, 0]


_CHANGED = {"alpha_fwd": 0.5, "alpha_bwd": 0.25, "eps": 3, "guard": "scale", "control_floor": 0.5}
_FORMS = [lambda norm: norm, copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm)), torch.jit.script]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("form", _FORMS, ids=["itself", "copied", "pickled", "scripted"])
def test_changed_constants_act_as_those_of_the_constructor(form: Any) -> None:
    given, changed = rnnorm.OnlineNorm(3, **_CHANGED), rnnorm.OnlineNorm(3)
    for name, value in _CHANGED.items():
        setattr(changed, name, value)
    assert repr(changed) == repr(given)
    changed = form(changed)
    for training in (True, True, False):
        records = []
        for norm in (given, changed):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = norm.train(training)(x)
            records.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*records)
    torch.testing.assert_close(dict(changed.state_dict()), dict(given.state_dict()))


def test_a_compiled_norm_follows_its_constants() -> None:
    torch._dynamo.reset()
    norm, twin = rnnorm.OnlineNorm(3), rnnorm.OnlineNorm(3, alpha_fwd=0.5, guard="none")
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(5, 3))
    norm.alpha_fwd, norm.guard = 0.5, "none"
    norm.reset_running_stats()
    x = torch.randn(5, 3)
    torch.testing.assert_close(compiled(x), twin(x))


@pytest.mark.parametrize(("name", "bad"), [("alpha_fwd", 0), ("alpha_bwd", 2), ("eps", -1), ("guard", "relu")])
def test_a_constant_out_of_range_changes_nothing(name: str, bad: Any) -> None:
    norm = rnnorm.OnlineNorm(3)
    before = repr(norm), norm.constants
    with pytest.raises(ValueError, match=name):
        setattr(norm, name, bad)
    assert (repr(norm), norm.constants) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_constants_may_be_whole_numbers() -> None:
    norm = rnnorm.OnlineNorm(3, alpha_fwd=1, alpha_bwd=1, eps=1, control_floor=0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(norm))(x), norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Every backend against the definition.


def _run(
    shape: tuple[int, ...],
    backend: str,
    dtype: torch.dtype = torch.float64,
    *,
    layout: Any = None,
    spread: float = 1.0,
    windows: int = 2,
    frozen: tuple[str, ...] = (),
    device: str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of some calls, by name; `frozen` need no gradient."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])

    def draw(*size: int) -> Tensor:
        drawn = (spread * torch.randn(size, generator=generator, dtype=torch.float64)).to(device, dtype)
        return drawn if layout is None else layout(drawn)

    options = {"alpha_fwd": 0.97, "alpha_bwd": 0.9, **options}
    norm = rnnorm.OnlineNorm(shape[1], backend=backend, dtype=dtype, device=device, **options)
    found: dict[str, Tensor] = {}
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(1 + 0.3 * torch.randn(shape[1], generator=generator))
            norm.bias.copy_(0.5 * torch.randn(shape[1], generator=generator))
    for name, parameter in norm.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for window in range(windows):
        norm.zero_grad()
        # Channels of different means, which the first samples see as far from the statistics.
        x = (draw(*shape) + torch.arange(shape[1], device=device).view(-1, *[1] * (len(shape) - 2))).to(dtype)
        x = (x if layout is None else layout(x)).requires_grad_("x" not in frozen)
        y = norm(x)
        if y.requires_grad:
            y.backward(draw(*shape))
        found |= {f"y{window}": y.detach(), f"grad_x{window}": x.grad}
        found |= {f"grad_{name}{window}": p.grad for name, p in norm.named_parameters()}
        found |= {f"{name}{window}": value.clone() for name, value in norm.named_buffers()}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape
        error = (found[name].double() - want.double()).abs().max() / want.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: off by {error:.2e}"


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


SHAPES = [
    *((1, 1), (7, 3), (3, 17), (130, 2), (5, 64), (4, 65), (2, 129), (130, 35)),
    *((1, 1, 1), (6, 3, 1, 1), (5, 3, 7), (3, 16, 2, 2), (4, 33, 5, 3), (2, 2, 10_000), (3, 70, 2, 3, 4)),
]
OPTIONS: dict[str, dict[str, Any]] = {
    **{guard: {"guard": guard} for guard in norms.GUARDS},
    "bare": {"affine": False, "guard": "scale", "eps": 1e-3},
    "floor": {"control_floor": 0.95, "guard": "none"},
    "far": {"spread": 30.0, "guard": "clamp"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_backends_equal_the_definition(backend: str, shape: tuple[int, ...], options: str) -> None:
    cases.skip_unless_runs(backend)
    expected = _run(shape, "reference", **OPTIONS[options])
    _assert_close(_run(shape, backend, **OPTIONS[options]), expected, 1e-11)
    # Rounding of an input that is far from its mean, and of the sums over a sample.
    _assert_close(_run(shape, backend, torch.float32, **OPTIONS[options]), expected, 2e-4)


class _Watched(TorchDispatchMode):
    """A mode that watches calls, which are then recorded in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS)
def test_watched_calls_equal_the_definition(options: str) -> None:
    expected = _run((130, 35), "reference", **OPTIONS[options])
    with _Watched() as mode:
        found = _run((130, 35), "auto", **OPTIONS[options])
    _assert_close(found, expected, 1e-11)
    assert mode.seen.count("rnnorm.online_norm_backward.default") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_may_be_watched_alone(dtype: torch.dtype) -> None:
    found = []
    for mode in (contextlib.nullcontext(), _Watched()):
        norm = rnnorm.OnlineNorm(3, alpha_bwd=0.9)
        x = torch.arange(12.0).view(4, 3).to(dtype).requires_grad_()
        y = norm(x)
        with mode:
            y.backward(torch.ones_like(y))
        found.append((x.grad, norm.weight.grad, norm.bias.grad, norm.u, norm.v))
    assert "rnnorm.online_norm_backward.default" in mode.seen
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # forward mode loads its rules
@pytest.mark.parametrize("recorded", ["in C++", "in Python"])
def test_gradients_that_would_be_wrong_are_refused(monkeypatch: pytest.MonkeyPatch, recorded: str) -> None:
    cases.skip_unless_runs("cpu")
    if recorded == "in Python":
        monkeypatch.setattr(registry.by_name("cpu"), "online_norm_recorded", None)
    norm, x = rnnorm.OnlineNorm(3), torch.randn(4, 3, requires_grad=True)
    y = norm(x)
    assert (y.grad_fn.name() == "_OnlineNormBackward") == (recorded == "in Python")
    with pytest.raises(RuntimeError, match=r"^double backward through online normalization .*create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^an online-normalized graph can be run backward once"):
        y.sum().backward()
    y = norm(x.detach())  # without the gradient of the input no control process runs
    with pytest.raises(RuntimeError, match=r"^double backward through a fused"):
        torch.autograd.grad(y.sum(), norm.weight, create_graph=True)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    frozen, x = rnnorm.OnlineNorm(3, alpha_bwd=1.0), torch.randn(4, 3, requires_grad=True)
    y = frozen(x)
    one, two = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"transforms of torch.func"):
        torch.autograd.grad(y, x, torch.randn(2, 4, 3), is_grads_batched=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"transforms of torch.func"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3)))


def test_a_call_that_raises_moves_nothing() -> None:
    norm = rnnorm.OnlineNorm(3)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        norm(x)
    assert not norm.mean.any()
    assert norm.var.eq(1).all()


def test_negative_views_and_half_an_affine_map() -> None:
    x, grad = torch.randn(4, 3), torch.randn(4, 3)
    half, bare = rnnorm.OnlineNorm(3), rnnorm.OnlineNorm(3, affine=False)
    half.bias = None  # half an affine map is none
    found = []
    for module in (half, bare):
        for given, back in ((x, grad), (torch._neg_view(-x), torch._neg_view(-grad))):
            module.reset_running_stats()
            given = given.detach().requires_grad_()
            y = module(given)
            found.append((y.detach(), torch.autograd.grad(y, given, back)[0], module.u.clone(), module.var.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", [_channels_last, _strided])
@pytest.mark.parametrize("guard", norms.GUARDS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (3, 16, 2, 2), (4, 70, 5, 3), (2, 3, 2, 3, 4), (9, 4)], ids=str)
@pytest.mark.parametrize("backend", [*cases.CANDIDATES, "reference"])
def test_orders_in_memory(backend: str, shape: tuple[int, ...], guard: str, layout: Any) -> None:
    cases.skip_unless_runs(backend)
    found = _run(shape, backend, layout=layout, guard=guard)
    _assert_close(found, _run(shape, "reference", guard=guard), 1e-11)
    if layout is _channels_last:
        assert found["y0"].stride() == found["grad_x0"].stride() == layout(torch.empty(shape)).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guard", norms.GUARDS)
@pytest.mark.parametrize("shape", [(9, 5), (4, 20, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_narrow_dtypes_round_inputs_and_outputs_alone(
    backend: str, shape: tuple[int, ...], guard: str, dtype: torch.dtype
) -> None:
    """The same as float32 of the rounded input, parameters and gradient, rounded once at the end."""
    cases.skip_unless_runs(backend)
    for layout in (None, _channels_last):
        found = _run(shape, backend, dtype, guard=guard, layout=layout, windows=1)
        norm = rnnorm.OnlineNorm(shape[1], alpha_fwd=0.97, alpha_bwd=0.9, guard=guard, backend=backend)
        rounded = _replayed(norm, shape, dtype)
        for name in ("y0", "grad_x0", "grad_weight0", "grad_bias0"):
            assert found[name].dtype == dtype
            torch.testing.assert_close(found[name], rounded[name].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        for name in ("mean0", "var0", "u0", "v0"):
            torch.testing.assert_close(found[name], rounded[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [_channels_last, torch.clone])
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_sums_over_many_equal_values_are_precise(backend: str, layout: Any, channels: int) -> None:
    """As of a blank image: roundings of one long sum would all go one way."""
    x = layout(torch.full((1, channels, 512, 512), 0.1)).requires_grad_()
    norm = rnnorm.OnlineNorm(channels, alpha_fwd=0.5, alpha_bwd=0.5, guard="none", backend=backend)
    (norm(x) * 0.1).mean().backward()
    given, y = 0.1 / channels, 0.1 / (1 + 1e-5) ** 0.5  # sums over the channel's values, and each of them
    for found, exact in (
        (norm.mean, 0.05),
        (norm.var, 0.5 + 0.25 * 0.01),
        (norm.bias.grad, given),
        (norm.weight.grad, given * y),
        (norm.u, given / 512**2 / (1 + 1e-5) ** 0.5),
    ):
        torch.testing.assert_close(
            found.double(), torch.full((channels,), exact, dtype=torch.float64), rtol=3e-6, atol=0
        )


def _replayed(norm: rnnorm.OnlineNorm, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `_run` draws, rounded to a dtype, through a module in float32."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    with torch.no_grad():
        norm.weight.copy_((1 + 0.3 * torch.randn(shape[1], generator=generator)).to(dtype))
        norm.bias.copy_((0.5 * torch.randn(shape[1], generator=generator)).to(dtype))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = (x + torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))).to(dtype).float().requires_grad_()
    y = norm(x)
    y.backward(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).float())
    found = {"y0": y.detach(), "grad_x0": x.grad, "grad_weight0": norm.weight.grad, "grad_bias0": norm.bias.grad}
    return found | {f"{name}0": value for name, value in norm.named_buffers()}


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("weight", "bias"), ("x", "bias")], ids=str)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_what_needs_no_gradient(backend: str, frozen: tuple[str, ...]) -> None:
    cases.skip_unless_runs(backend)
    found, expected = (_run((6, 4, 3), name, frozen=frozen) for name in (backend, "reference"))
    if "x" in frozen:  # the control process is the gradient of x
        assert not found["u1"].any()
        assert not found["v1"].any()
        for name in ("u0", "v0", "u1", "v1"):
            del found[name], expected[name]
    _assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_no_memory_of_the_inputs_size_is_kept_but_the_input(backend: str) -> None:
    cases.skip_unless_runs(backend)
    kept: list[Tensor] = []
    norm, x = rnnorm.OnlineNorm(8, backend=backend), torch.randn(32, 8, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(tensor.numel() for tensor in kept) == [8, 8, 8, 8, x.numel()]


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto'"):
        rnnorm.OnlineNorm(3, backend="fast")
    assert "backend='scripted'" in repr(rnnorm.OnlineNorm(3, backend="scripted"))
    norm = rnnorm.OnlineNorm(3, backend="cpu", device="meta")
    with pytest.raises(
        rnnorm.BackendUnavailable, match=r"'cpu' cannot run this call: it runs on the CPU only; got meta"
    ):
        ops._forward(torch.zeros(2, 3, device="meta"), None, None, *norm.buffers(), "none", norm._constants, "cpu")


@pytest.mark.parametrize("backend", registry.names())
def test_the_backend_that_was_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.skip_unless_runs(backend)
    calls = []
    for row in registry.BACKENDS:
        for part in ("online_norm", "online_norm_recorded"):
            own = getattr(row, part)
            spy = own and (lambda *a, own=own, name=row.name: (calls.append(name), own(*a))[1])
            monkeypatch.setattr(row, part, spy)
    rnnorm.OnlineNorm(3, backend=backend)(torch.randn(4, 3))
    rnnorm.OnlineNorm(3, backend=backend)(torch.randn(4, 3, requires_grad=True))
    assert calls == [backend] * 2


class _Broken:
    """A backend with a fault in one of its two functions, recorded in Python."""

    online_norm_recorded = None

    def __init__(self, name: str, part: str, fault: Any) -> None:
        self.sound, self.part, self.change = registry.by_name(name), part, fault

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.sound, name)
        return (lambda *args: self.change(own, *args)) if name == self.part else own


def _mean_after_its_sample(call: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, *rest: Any) -> Any:
    moved = call(x[:1], weight, bias, mean, *rest)[1]
    y, *after = call(x, weight, bias, mean, *rest)
    return y + 1e-6 * (moved - mean).view(-1, *[1] * (x.dim() - 2)), *after


def _last_sample_lost(call: Any, x: Tensor, *rest: Any) -> Any:
    return call(x, *rest)[0], *call(x[:-1], *rest)[1:]


def _own_variance_lost(call: Any, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    y, mean, _ = call(x, weight, bias, *rest)
    return y, mean, call(x.flatten(2).mean(2), weight, bias, *rest)[2]


def _guard_ignored(call: Any, *args: Any) -> Any:
    return call(*args[:5], "none", *args[6:])


def _guard_of_backward_ignored(call: Any, *args: Any) -> Any:
    return call(*args[:8], "none", *args[9:])


def _bias_twice(call: Any, x: Tensor, weight: Any, bias: Tensor, *rest: Any) -> Any:
    return call(x, weight, 2 * bias, *rest)


def _statistics_after_the_call(call: Any, grad: Tensor, x: Tensor, w: Any, b: Any, mean: Tensor, *rest: Any) -> Any:
    return call(grad, x, w, b, mean + 1e-6 * x.mean(), *rest)


def _state_dropped(place: int) -> Any:
    def fault(call: Any, *args: Any) -> Any:
        args[place].zero_()
        return call(*args)

    return fault


def _floor_ignored(call: Any, *args: Any) -> Any:
    return call(*args[:9], [*norms.Constants(*args[9])._replace(control_floor=-1e9)], *args[10:])


def _samples_backwards(call: Any, grad: Tensor, x: Tensor, *rest: Any) -> Any:
    dx, *affine = call(grad.flip(0), x.flip(0), *rest)
    return dx.flip(0), *affine


_FAULTS = {
    "mean after its sample": ("online_norm", _mean_after_its_sample, {}),
    "last sample lost": ("online_norm", _last_sample_lost, {}),
    "own variance lost": ("online_norm", _own_variance_lost, {}),
    "clamp ignored": ("online_norm", _guard_ignored, {"guard": "clamp", "spread": 30.0}),
    "scale ignored": ("online_norm", _guard_ignored, {"guard": "scale"}),
    "bias twice": ("online_norm", _bias_twice, {}),
    "clamp not differentiated": (
        "online_norm_backward",
        _guard_of_backward_ignored,
        {"guard": "clamp", "spread": 30.0},
    ),
    "scale not differentiated": ("online_norm_backward", _guard_of_backward_ignored, {"guard": "scale"}),
    "other statistics": ("online_norm_backward", _statistics_after_the_call, {}),
    "u dropped": ("online_norm_backward", _state_dropped(6), {}),
    "v dropped": ("online_norm_backward", _state_dropped(7), {}),
    "floor ignored": ("online_norm_backward", _floor_ignored, {"control_floor": 0.97}),
    "samples backwards": ("online_norm_backward", _samples_backwards, {}),
}


@pytest.mark.parametrize("fault", _FAULTS)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_a_broken_backend_is_found(monkeypatch: pytest.MonkeyPatch, backend: str, fault: str) -> None:
    cases.skip_unless_runs(backend)
    part, change, options = _FAULTS[fault]
    expected = _run((6, 4, 3), "reference", **options)
    _assert_close(_run((6, 4, 3), backend, **options), expected, 1e-11)
    broken = _Broken(backend, part, change)
    monkeypatch.setattr(registry, "BACKENDS", [broken if row.name == backend else row for row in registry.BACKENDS])
    with pytest.raises(AssertionError, match="off by"):
        _assert_close(_run((6, 4, 3), backend, **options), expected, 1e-11)


@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_statistics_may_be_columns_of_a_table(backend: str) -> None:
    """A row of the table for each channel, as `load_state_dict(..., assign=True)` leaves it."""
    cases.skip_unless_runs(backend)
    torch.manual_seed(1)
    x, found = torch.randn(4, 3), []
    for name, tabled in (("reference", False), (backend, True)):
        norm = rnnorm.OnlineNorm(3, guard="none", backend=name)
        table = torch.zeros(3, 4)
        table[:, 1] = 1
        held = dict(zip(("mean", "var", "u", "v"), table.unbind(1), strict=True))
        if tabled:
            norm.load_state_dict({**norm.state_dict(), **held}, assign=True)
            assert norm.v.stride() == (4,)
        norm(x.clone().requires_grad_()).square().sum().backward()
        found.append({key: getattr(norm, key).clone() for key in held})
    _assert_close(found[1], found[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_definition_on_a_gpu(shape: tuple[int, ...], options: str, cuda: torch.device) -> None:
    expected = _run(shape, "reference", **OPTIONS[options])
    for layout in (None, _channels_last):
        same = {"layout": layout, "device": "cuda", **OPTIONS[options]}
        _assert_close(_run(shape, "triton", **same), expected, 1e-11)
        _assert_close(_run(shape, "triton", torch.float32, **same), expected, 2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The C++ kernels.

on_cpp = pytest.mark.skipif(build.load() is not None, reason=f"the C++ backend cannot run here: {build.load()}")


@on_cpp
@pytest.mark.parametrize("guard", norms.GUARDS)
@pytest.mark.parametrize("shape", [(9, 100), (700, 200), (5, 7, 11), (4, 70, 5, 3), (40, 70, 5, 13)], ids=str)
@pytest.mark.parametrize("layout", [None, _channels_last, _strided])
def test_results_do_not_depend_on_the_threads(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layout: Any, guard: str
) -> None:
    found = []
    for threads in (1, 2, 3, 64, 1):
        monkeypatch.setattr(native, "threads", threads)
        found.append(_run(shape, "cpu", torch.float32, layout=layout, guard=guard))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


@on_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x must have shape \[N, C, \*\]; got \[6\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x must have a floating-point dtype; got Int"),
        ({"mean": torch.zeros(4)}, r"mean must have shape \[3\]; got \[4\]"),
        ({"var": torch.ones(3, dtype=torch.float64)}, "var must have dtype Float; got Double"),
        ({"weight": torch.ones(2)}, r"weight must have shape \[3\]; got \[2\]"),
        ({"bias": None}, "weight and bias must both be given, or neither"),
        ({"u": torch.zeros(2)}, r"u must have shape \[3\]; got \[2\]"),
        ({"v": torch.zeros(3, dtype=torch.float64)}, "v must have dtype Float; got Double"),
        ({"grad": torch.zeros(3, 3)}, r"gradient must have shape \[2, 3\]; got \[3, 3\]"),
        ({"grad": torch.zeros(2, 3, dtype=torch.float64)}, "gradient must have dtype Float; got Double"),
        ({"guard": "wall"}, r"guard must be one of \[none, scale, clamp\]; got wall"),
        ({"constants": [0.1]}, "there must be 6 constants; got 1"),
        ({"threads": -1}, r"threads must lie in 0\.\.1024; got -1"),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_kernels_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"grad": torch.zeros(2, 3), "x": torch.zeros(2, 3)}
    given |= {"weight": torch.ones(3), "bias": torch.zeros(3), "mean": torch.zeros(3), "var": torch.ones(3)}
    given |= {"u": torch.zeros(3), "v": torch.zeros(3), "guard": "clamp", "constants": [*norms.Online().constants]}
    given |= {"need_input": True, "threads": 0}
    torch.ops.rnnorm_cpu.online_norm_backward(*given.values())
    given |= change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnorm_cpu.online_norm_backward(*given.values())
    for name in ("grad", "u", "v", "need_input"):
        del given[name]
    if not change.keys() & {"grad", "u", "v"}:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.rnnorm_cpu.online_norm(*given.values())
