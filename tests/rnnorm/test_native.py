"""The C++ backend where parity does not reach: slices that do not divide, threads, both products, extreme values."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm import norms
from rnnorm.ops import build, native

pytestmark = pytest.mark.skipif(build.load() is not None, reason=f"the C++ backend cannot run here: {build.load()}")

NORMS = {
    "online-scale": norms.Online(0.99, 0.9, guard="scale"),
    "online-clamp": norms.Online(0.99, 0.9, guard="clamp"),
    "online-plain": norms.Online(0.99, 0.9, guard="none", affine=False),
    **{name: norms.resolve(name) for name in ("layer", "rms", "none")},
}
LAYERS = {"LSTM": {}, "GRU": {}, "RNN": {}}


def _run(kind: str, backend: str, dtype: torch.dtype, H: int, norm: norms.Spec, T: int = 4, N: int = 3, **options):
    """Outputs, gradients and states of two windows, by name."""
    torch.manual_seed(1)
    layer = getattr(rnnorm, kind)(5, H, norm=norm, backend=backend, **options).to(dtype)
    found: dict[str, Tensor] = {}
    state = None
    for window in range(2):
        x = torch.randn(T, N, 5).to(dtype).requires_grad_()
        y, state = layer(x, state)
        y.backward(torch.randn(y.shape).to(dtype))
        state = state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)
        found |= {f"y{window}": y.detach(), f"grad_x{window}": x.grad}
    found |= {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().clamp(min=1e-3)
        error = (found[name].double() - want.double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_threads_and_products(monkeypatch, kind, norm, threads, micro):
    monkeypatch.setattr(native, "threads", threads)
    monkeypatch.setattr(native, "use_micro_kernel", micro)
    for H in (7, 41):
        expected = _run(kind, "scripted", torch.float64, H, NORMS[norm])
        _compare(_run(kind, "cpu", torch.float32, H, NORMS[norm]), expected, 5e-5)
        _compare(_run(kind, "cpu", torch.float64, H, NORMS[norm]), expected, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [("LSTM", {}), ("LSTM", {"cell_norm": True}), ("GRU", {})], ids=str)
def test_other_threads_in_the_backward(monkeypatch, options, norm):
    kind, more = options
    if norm == "none" and more:
        pytest.skip("no norm, no cell norm")
    found = []
    for counts in ((2, 2), (3, 2), (1, 3)):
        torch.manual_seed(1)
        layer = getattr(rnnorm, kind)(5, 19, norm=NORMS[norm], backend="cpu", dtype=torch.float64, **more)
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        monkeypatch.setattr(native, "threads", counts[0])
        y, _ = layer(x, lengths=[4, 2, 3])
        monkeypatch.setattr(native, "threads", counts[1])
        y.backward(torch.randn(y.shape, dtype=torch.float64))
        found.append(
            {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}, **dict(layer.named_buffers())}
        )
    for other in found[1:]:
        _compare(other, found[0], 1e-10)


@pytest.mark.parametrize("H", [1, 17, 200, 257])
@pytest.mark.parametrize("kind", LAYERS)
def test_odd_sizes(monkeypatch, kind, H):
    monkeypatch.setattr(native, "threads", 2)
    for norm in ("online-scale", "layer"):
        expected = _run(kind, "scripted", torch.float64, H, NORMS[norm])
        _compare(_run(kind, "cpu", torch.float64, H, NORMS[norm]), expected, 1e-9)
        if H > 1:  # a single unit is normalized to 1 or 0: its gradient is all rounding
            _compare(_run(kind, "cpu", torch.float32, H, NORMS[norm]), expected, 1e-4)


def test_more_samples_than_a_block_of_input_products():
    expected = _run("LSTM", "scripted", torch.float64, 5, NORMS["online-scale"], T=3, N=300)
    _compare(_run("LSTM", "cpu", torch.float64, 5, NORMS["online-scale"], T=3, N=300), expected, 1e-9)


@pytest.mark.parametrize("options", [{"cell_norm": True}, {"proj_size": 3}, {"bias": False}, {"bidirectional": True}])
def test_lstm_options_on_several_threads(monkeypatch, options):
    monkeypatch.setattr(native, "threads", 3)
    expected = _run("LSTM", "scripted", torch.float64, 19, NORMS["online-scale"], **options)
    _compare(_run("LSTM", "cpu", torch.float64, 19, NORMS["online-scale"], **options), expected, 1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_to_the_bit(monkeypatch, threads):
    monkeypatch.setattr(native, "threads", threads)
    first, second = (_run("LSTM", "cpu", torch.float32, 40, NORMS["online-scale"]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("kind", LAYERS)
def test_extreme_values_saturate(kind, size):
    """No overflow in the nonlinearities: without a norm the gates meet the values as they are."""
    torch.manual_seed(0)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        layer = getattr(rnnorm, kind)(3, 4, norm="none", backend=backend).to(dtype)
        x = (size * torch.randn(3, 2, 3)).to(dtype)
        results.append(layer(x)[0].detach())
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-6)


def test_nonlinearities_within_a_millionth():
    """A 1x1 RNN without norm is tanh of its input; an LSTM's output gate shows the sigmoid."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, 1e-20, -1e-20, 90.0, -90.0])])[None, :, None]
    rnn = rnnorm.RNN(1, 1, norm="none", bias=False, backend="cpu")
    lstm = rnnorm.LSTM(1, 1, norm="none", bias=False, backend="cpu")
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0)
        lstm.weight_ih_l0.copy_(torch.tensor([[0.0], [0.0], [100.0], [1.0]]))
        tanh = rnn(x)[0].double()
        assert (tanh - x.double().tanh()).abs().max() < 1e-6
        small = x.abs() < 0.5
        assert ((tanh - x.double().tanh()).abs()[small] <= 1e-6 * x.double().abs()[small]).all()
        h = lstm(x.abs())[0].double()
    expected = x.double().abs().sigmoid() * (0.5 * (100 * x.double().abs()).tanh()).tanh()
    assert (h - expected).abs().max() < 1e-6


def test_large_normalized_values_in_the_control_process():
    """|y| far above 8 makes 1 - (1 - alpha) y^2 negative: it must not be clamped."""
    spec = norms.Online(0.999, 0.9, guard="none")
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        layer = rnnorm.RNN(3, 4, norm=spec, backend=backend, dtype=torch.float64)
        x = (20 * torch.randn(3, 2, 3, dtype=torch.float64)).requires_grad_()
        layer(x)[0].sum().backward()
        results.append({"x": x.grad, "v": layer.norm_v_l0, "u": layer.norm_u_l0})
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-9, atol=1e-12)


def test_backward_keeps_at_most_12_tnh():
    T, N, H = 6, 5, 32
    layer = rnnorm.LSTM(H, H, backend="cpu")
    held = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal held
        parameters = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
        if tensor.data_ptr() not in parameters and tensor.numel() >= T * N:
            held += tensor.numel()
        return tensor

    x = torch.randn(T, N, H)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert 9 * T * N * H <= held <= 12 * T * N * H


def test_names_are_those_of_the_tables():
    from rnnorm._cells import CELLS

    text = (build._SOURCES / "cell.h").read_text()
    for label, names in (("cell_names", CELLS), ("kind_names", norms.KINDS), ("guard_names", norms.GUARDS)):
        quoted = ", ".join(f'"{name}"' for name in names)
        assert f"{label}{{{quoted}}}" in text, label


def test_refuses_what_it_cannot_run():
    cpu = native.Native()
    assert "not on meta" in str(cpu.why_not(torch.device("meta"), torch.float32, None))
    assert "int64" in str(cpu.why_not(torch.device("cpu"), torch.int64, None))


@pytest.mark.parametrize("length", [0, 5])
def test_lengths_past_the_modules_are_still_checked(length):
    layer = rnnorm.LSTM(2, 3, backend="cpu")
    x, h = torch.randn(4, 1, 2), torch.zeros(1, 3)
    operands = layer._operands(layer._own("_l0"), x, h, h, torch.tensor([length]))
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.T"):
        native.Native().forward(operands, layer._spec(), True)


def test_shapes_past_the_modules_are_still_checked():
    layer = rnnorm.LSTM(2, 3, backend="cpu")
    operands = layer._operands(layer._own("_l0"), torch.randn(4, 1, 2), torch.zeros(2, 3), torch.zeros(1, 3), None)
    with pytest.raises(ValueError, match="operand 1 must have shape"):
        native.Native().forward(operands, layer._spec(), True)


def test_long_horizons_keep_their_digits():
    """1 - alpha is formed in double: in float32 a horizon of a million samples would be off by a hundredth."""
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        layer = rnnorm.RNN(3, 5, norm=norms.Online(1 - 1e-6, 1 - 1e-6), backend=backend)
        layer(torch.randn(50, 4, 3))[0].sum().backward()
        results.append((layer.norm_mean_l0, layer.norm_u_l0))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["bias_hh", "norm_shift", "norm_var", "norm_u", "cell_norm_v", "c"])
def test_operands_that_are_missing_past_the_modules_are_refused(name):
    layer = rnnorm.LSTM(2, 3, norm="online", cell_norm=True, backend="cpu")
    operands = layer._operands(layer._own("_l0"), torch.randn(4, 2, 2), torch.zeros(2, 3), torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match="is missing, or another that goes with it"):
        native.Native().forward(operands._replace(**{name: None}), layer._spec(), True)


# Large enough for its memory to come from the pool.
def _large_window(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, its input, and the gradient that goes with it; no two share anything."""
    generator = torch.Generator().manual_seed(seed)
    layer = getattr(rnnorm, kind)(40, 72, norm="layer", backend="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    x = torch.randn(31, 17, 40, generator=generator).requires_grad_()
    return layer(x)[0], x, torch.randn(31, 17, 72, generator=generator)


def _large_gradient(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    y, x, grad = _large_window(kind, seed)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", LAYERS)
def test_two_graphs_never_share_a_block(kind):
    seeds = range(4)
    expected = [_large_gradient(kind, seed) for seed in seeds]
    alive = [_large_window(kind, seed) for seed in seeds]
    for seed in (2, 0, 3, 1):
        y, x, grad = alive[seed]
        y.backward(grad)
        assert torch.equal(y, expected[seed][0])
        assert torch.equal(x.grad, expected[seed][1])


def test_two_threads_never_share_a_block(monkeypatch):
    monkeypatch.setattr(native, "threads", 1)
    seeds = list(range(24))
    expected = [_large_gradient("LSTM", seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: _large_gradient("LSTM", seed), seeds))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def _sanitized() -> bool:
    return "-fsanitize" in os.environ.get("RNNORM_CXXFLAGS", "")


@pytest.mark.skipif(_sanitized(), reason="the sanitizers' build has no pool: it would hide what runs over an end")
def test_blocks_go_from_call_to_call():
    layer = rnnorm.LSTM(40, 72)
    operands = layer._operands(layer._own("_l0"), torch.randn(31, 17, 40), *torch.zeros(2, 17, 72), None)
    spec = layer._spec()

    def places() -> set[int]:
        with torch.no_grad():
            return {t.data_ptr() for t in native.Native().forward(operands, spec, True)[1] if t.nbytes >= 2**17}

    found = places()
    assert len(found) == 4  # h, c, y, rstd
    assert places() == found
