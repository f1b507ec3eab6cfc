import pytest
import torch
import torch.nn.functional as F

from lm import loss
from lm.loss import linear_cross_entropy, token_nll


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
def test_equals_the_plain_form_in_float64(rows, with_bias):
    hidden, weight, bias, targets = problem(rows)
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


def test_autocast_multiplies_in_bfloat16_and_sums_wider():
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


def test_memory_stays_far_below_the_logits(monkeypatch):
    seen = []
    score = loss._score

    def spying(*arguments):
        for found in score(*arguments):
            seen.append(found[1].numel())
            yield found

    monkeypatch.setattr(loss, "_score", spying)
    hidden, weight, bias, targets = problem(1280)
    linear_cross_entropy(hidden, weight, bias, targets)
    assert max(seen) * 8 <= 1280 * weight.shape[0]


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
    with pytest.raises(ValueError, match=r"targets must lie in 0 … 10"):
        linear_cross_entropy(hidden, weight, bias, targets)
    with pytest.raises(ValueError, match=r"targets must lie in 0 … 10"):
        token_nll(hidden, weight, bias, targets)


def test_wrong_shapes_are_refused():
    hidden, weight, bias, targets = problem(4)
    with pytest.raises(ValueError, match=r"hidden must be \[M, E\]"):
        linear_cross_entropy(hidden[:, :3], weight, bias, targets)
    with pytest.raises(ValueError, match=r"bias must be \[V\] = \[11\]"):
        linear_cross_entropy(hidden, weight, bias[:5], targets)
    with pytest.raises(ValueError, match=r"must be \[M\] = \[4\]"):
        linear_cross_entropy(hidden, weight, bias, targets[:3])


def test_double_backward_raises():
    hidden, weight, bias, targets = problem(4)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_two_backwards_through_one_graph_agree():
    hidden, weight, bias, targets = problem(4)
    total, _ = linear_cross_entropy(hidden, weight, bias, targets)
    first = torch.autograd.grad(total, weight, retain_graph=True)
    second = torch.autograd.grad(total, weight)
    assert torch.equal(first[0], second[0])
