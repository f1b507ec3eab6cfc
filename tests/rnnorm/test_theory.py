"""Measures the properties of the algorithm: algorithm.md section 3, items 4 to 6."""

import itertools
import math
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rnnorm
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")

# Horizons 1 / (1 - alpha). The error falls as one over the horizon: four times as far, a quarter, nearly.
HORIZONS = (8, 32, 128)
SHRINK = 0.35
SETTLED = 2_000


def _stationary(N: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples `x` of a mean and deviation per channel, their true normalized values, a cause `z` of x, a gradient."""
    generator = torch.Generator().manual_seed(11)
    z, rest, noise = (torch.randn(N, C, generator=generator) for _ in range(3))
    true = 0.6 * z + 0.8 * rest
    mean, deviation = torch.linspace(-2, 3, C), torch.linspace(0.5, 2, C)
    gradient = 0.7 + 0.5 * true + 0.3 * (true**2 - 1) + 0.4 * z + 0.5 * noise
    return mean + deviation * true, true, z, gradient


def _online(x: Tensor, gradient: Tensor, horizon: float) -> tuple[Any, Tensor, Tensor]:
    """The module after one pass over the stream, the gradients of its samples, and its outputs."""
    alpha = 1 - 1 / horizon
    norm = rnnorm.OnlineNorm(x.size(1), alpha_fwd=alpha, alpha_bwd=alpha, affine=False, guard="none")
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    y.backward(gradient)
    assert leaf.grad is not None
    return norm, leaf.grad, y.detach()


def _assert_shrinking(errors: list[float]) -> None:
    assert all(later < SHRINK * sooner for sooner, later in itertools.pairwise(errors)), errors


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def test_averaged_gradient_tends_to_batch_norms() -> None:
    """`E[dx z]`, the gradient of a weight on `z` before the norm, against batch normalization's over all samples."""
    x, _, z, g = _stationary(24_000, 48)
    y = (x - x.mean(0)) / x.std(0, correction=0)
    batch = (g - g.mean(0) - y * (g * y).mean(0)) / x.std(0, correction=0)
    errors = [_rms(((_online(x, g, horizon)[1] - batch) * z)[SETTLED:].mean(0)) for horizon in HORIZONS]
    signal = _rms((batch * z).mean(0))
    assert signal > 0.2
    _assert_shrinking(errors)
    assert errors[-1] < 0.02 * signal


def test_gradient_becomes_orthogonal_to_one_and_to_y() -> None:
    x, _, _, g = _stationary(24_000, 48)
    along = []
    for horizon in HORIZONS:
        _, dx, y = _online(x, g, horizon)
        along.append(_rms((dx * y)[SETTLED:].mean(0)))
    _assert_shrinking(along)
    assert along[-1] < 0.002 * _rms(g)
    # E[dx] is u / N, and u is bounded: it vanishes with the length of the stream, at any horizon.
    means = []
    for N in (500, 2_000, 8_000):
        norm, dx, _ = _online(x[:N], g[:N], 32)
        torch.testing.assert_close(dx.mean(0), norm.u / N)
        means.append(_rms(dx.mean(0)))
    _assert_shrinking(means)


@pytest.mark.parametrize("alpha", [0.7, 0.9])
def test_statistics_tend_to_the_streams_own(alpha: float) -> None:
    C, N = 20_000, 80
    x = 3 + 2 * torch.randn(N, C)
    norm = rnnorm.OnlineNorm(C, alpha_fwd=alpha)
    norm(x)
    # The start's weight is alpha^N; what is left is the spread of an average over C independent streams.
    spread = math.sqrt((1 - alpha) / (1 + alpha))
    assert norm.mean.mean().item() == pytest.approx(3, abs=5 * 2 * spread / math.sqrt(C) + 3 * alpha**N)
    ratio = norm.var.mean().item() / 4
    expected = 2 * alpha / (1 + alpha)
    tolerance = 5 * expected * math.sqrt(2) * spread / math.sqrt(C)
    assert ratio == pytest.approx(expected, abs=tolerance)
    assert abs(expected - 1) > 2 * tolerance


def test_control_stays_bounded() -> None:
    x, _, _, g = _stationary(20_000, 16)
    g = g.clamp(-1, 1)
    norm = rnnorm.OnlineNorm(16, alpha_fwd=0.99, alpha_bwd=0.9, guard="none")
    sizes = []
    for start in range(0, len(x), 50):
        leaf = x[start : start + 50].clone().requires_grad_()
        norm(leaf).backward(g[start : start + 50])
        sizes.append(torch.stack((norm.u.abs().max(), norm.v.abs().max())))
    largest = torch.stack(sizes).unflatten(0, (2, -1)).amax(1)
    # As far as the horizon times the largest step; and no further in the second half than in the first.
    assert (largest[1] < 1.5 * largest[0]).all(), largest
    assert (largest < 10 * 10).all(), largest


@pytest.mark.parametrize("floor", [-math.inf, 1e-5])
def test_a_floor_keeps_the_control_finite_while_the_statistics_lag(floor: float) -> None:
    """Values 30 times their estimated deviation: each sample multiplies v by about -90, or by the floor."""
    generator = torch.Generator().manual_seed(12)
    x, g = (torch.randn(40, 8, generator=generator) for _ in range(2))
    norm = rnnorm.OnlineNorm(8, alpha_fwd=1.0, alpha_bwd=0.9, guard="none", control_floor=floor)
    leaf = (30 * x).requires_grad_()
    norm(leaf).backward(g)
    assert leaf.grad is not None
    if floor > -math.inf:
        assert leaf.grad.abs().max() < 30**2 * g.abs().max() ** 2
    else:
        assert leaf.grad.abs().max() > 1e20


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_windows_of_any_lengths_are_one_stream(lengths: list[int]) -> None:
    x = torch.randn(sum(lengths), 3, 2, dtype=torch.float64)
    whole, cut = (rnnorm.OnlineNorm(3, alpha_fwd=0.97, dtype=torch.float64) for _ in range(2))
    expected = whole(x)
    torch.testing.assert_close(torch.cat([cut(part) for part in x.split(lengths)]), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(cut.mean, whole.mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(cut.var, whole.var, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["lstm-cell_norm-online-scale-plain", "gru-online-clamp-plain", "rnn_tanh-online-none-plain"]
)
@pytest.mark.parametrize("backend", registry.names())
def test_windows_of_a_layer_are_one_stream(backend: str, name: str) -> None:
    cases.skip_unless_runs(backend)
    case = cases.BY_ID[name]
    whole, cut = case.build(backend), case.build(backend)
    x = torch.randn(12, case.N, case.I)
    expected, last = whole(x)
    state, outputs = None, []
    for part in x.split([5, 1, 4, 2]):
        y, state = cut(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)
    for (key, a), b in zip(cut.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=key)


def test_a_long_stream_far_from_zero_keeps_its_precision() -> None:
    """In float32, a mean a thousand deviations away: the statistics stay those of the float64 stream."""
    x = 1000 + torch.randn(20_000, 4)
    narrow = rnnorm.OnlineNorm(4, alpha_fwd=0.999, guard="none", dtype=torch.float32)
    wide = rnnorm.OnlineNorm(4, alpha_fwd=0.999, guard="none")
    for part in x.float().split(20):
        y = narrow(part)
        expected = wide(part.double())
    assert (y - expected).abs().max() < 2e-3
    torch.testing.assert_close(narrow.var.double(), wide.var, rtol=2e-3, atol=0)
