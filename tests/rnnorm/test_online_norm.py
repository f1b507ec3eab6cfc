"""`OnlineNorm` as a module; its numbers are tested by the recorded cases, the oracle and the theory."""

import copy

import pytest
import torch

import rnnorm
from rnnorm.ops import running_stats


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


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_constants_may_be_whole_numbers() -> None:
    norm = rnnorm.OnlineNorm(3, alpha_fwd=1, alpha_bwd=1, eps=1, control_floor=0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(norm))(x), norm(x))
