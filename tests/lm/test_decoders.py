import pytest
import torch
import torch.nn.functional as F

from lm import decoders
from lm.decoders import AdaptiveSoftmax, MixtureOfSoftmaxes, Softmax
from lm.errors import UserError
from lm.model import LockedDropout

T, N, H, V = 5, 3, 16, 40
TARGETS = torch.randint(V, (T, N), generator=torch.Generator().manual_seed(1))
MASKS = {"all": None, "some": torch.rand(T, N, generator=torch.Generator().manual_seed(2)) < 0.6}


def mixture(dropout=0.0):
    return MixtureOfSoftmaxes(H, V, 4, 3, LockedDropout(dropout))


def mixture_by_hand(net, hidden):
    """The probabilities [T, N, V], all logits stored."""
    latents = net.latent(hidden).tanh().view(T, N, net.experts, -1)
    each = (latents @ net.weight.T + net.bias).softmax(-1)
    return (net.prior(hidden).softmax(-1)[..., None] * each).sum(2)


KINDS = {
    "softmax": (lambda: Softmax(H, V), lambda net, h: (h @ net.weight.T + net.bias).softmax(-1)),
    "projected": (
        lambda: Softmax(H, V, 4),
        lambda net, h: (h @ net.projection.weight.T @ net.weight.T + net.bias).softmax(-1),
    ),
    "mixture": (mixture, mixture_by_hand),
    "adaptive": (
        lambda: AdaptiveSoftmax(H, V, [5, 20]),
        lambda net, h: net.log_prob(h.flatten(0, 1)).exp().view(T, N, V),
    ),
    "two clusters": (lambda: AdaptiveSoftmax(H, V), lambda net, h: net.log_prob(h.flatten(0, 1)).exp().view(T, N, V)),
}


@pytest.fixture(params=KINDS)
def case(request):
    """A decoder in float64, some output of layers, and the probabilities written out."""
    torch.manual_seed(0)
    make, probabilities = KINDS[request.param]
    return make().double(), torch.randn(T, N, H, dtype=torch.float64, requires_grad=True), probabilities


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_loss_and_gradients_are_those_of_the_probabilities(case, mask):
    net, hidden, probabilities = case
    inputs = [hidden, *net.parameters()]
    nats = -probabilities(net, hidden).gather(2, TARGETS[..., None])[..., 0].log()
    expected = (nats if mask is None else nats[mask]).sum()
    found, count = net.loss(hidden, TARGETS, mask)
    assert count == (T * N if mask is None else int(mask.sum()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, inputs) for loss in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_probabilities_sum_to_one_at_any_temperature(case, temperature, monkeypatch):
    net, hidden, probabilities = case
    monkeypatch.setattr(decoders, "_MOST_LOG_PROBS", 4 * V)  # rows in several parts
    wanted = probabilities(net, hidden) ** (1 / temperature)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    found = torch.stack([net.token_nll(hidden, torch.full((T, N), v), temperature) for v in range(V)], -1)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, -wanted.detach().log(), rtol=1e-9, atol=1e-12)
    if temperature == 1:
        torch.testing.assert_close(net.log_probs(hidden), wanted.log(), rtol=1e-9, atol=1e-12)
        assert net.log_probs(hidden[0, 0]).shape == (V,)


def test_without_gradients_the_loss_is_the_same(case):
    net, hidden, _ = case
    with torch.no_grad():
        plain, _ = net.loss(hidden, TARGETS)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, net.loss(hidden, TARGETS)[0].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_losses_and_gradients_are_near(kind):
    torch.manual_seed(0)
    net, hidden = KINDS[kind][0](), torch.randn(T, N, H, requires_grad=True)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _ = net.loss(hidden.bfloat16() if autocast else hidden, TARGETS, MASKS["some"])
            nats = net.token_nll(hidden.bfloat16() if autocast else hidden, TARGETS)
        found.append([loss.detach(), nats, *torch.autograd.grad(loss, [hidden, *net.parameters()])])
    assert found[1][0].dtype == found[1][1].dtype == torch.float64
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(one.detach().abs().max()))


def test_the_loss_is_of_torchs_module():
    net = AdaptiveSoftmax(H, V, [5, 20])
    hidden = torch.randn(T, N, H)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss.forward(net, hidden.flatten(0, 1), TARGETS.flatten())
    assert net.loss(hidden, TARGETS)[0].item() == pytest.approx(-theirs.output.double().sum().item(), rel=1e-6)


def test_a_cluster_without_targets_has_a_gradient_of_zeros():
    net = AdaptiveSoftmax(H, V, [5, 20])
    net.loss(torch.randn(T, N, H), torch.zeros(T, N, dtype=torch.int64))[0].backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_latents_are_dropped_by_one_mask_for_all_steps_and_the_prior_is_not():
    net, hidden = mixture(0.5), torch.randn(1, N, H).expand(T, N, H)
    latents, log_prior = net._parts(hidden)
    zeros = latents == 0
    assert zeros.any()
    assert torch.equal(zeros, zeros[:1].expand_as(zeros))
    net.eval()
    calm, same = net._parts(hidden)
    assert not (calm == 0).any()
    torch.testing.assert_close(latents, torch.where(zeros, 0, 2 * calm))
    torch.testing.assert_close(log_prior, same)
    torch.testing.assert_close(same, F.log_softmax(net.prior(hidden), -1))


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [9, 5], [V], [5, V + 1]])
def test_cutoffs_rise_within_the_vocabulary(cutoffs):
    with pytest.raises(UserError, match=r"model.cutoffs must rise within 1 … 39, .*; got \["):
        AdaptiveSoftmax(H, V, cutoffs)


def test_clusters_have_some_width():
    with pytest.raises(UserError, match="must have at least 64 units for 3 clusters; got 16; raise"):
        AdaptiveSoftmax(H, V, [5, 20, 30])
    assert AdaptiveSoftmax(15, V).n_clusters == 1


@pytest.mark.parametrize("vocabulary", [3, 12, 150, 5000])
def test_cutoffs_of_their_own(vocabulary):
    net = AdaptiveSoftmax(H * 5, vocabulary)
    assert net.cutoffs[-1] == vocabulary
    assert net.log_probs(torch.randn(2, 2, H * 5)).exp().sum(-1).sub(1).abs().max() < 1e-5
