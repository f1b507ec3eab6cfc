import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm import adaptation, stream
from lm.adaptation import Adaptation, Cache, Dynamic
from lm.errors import UserError
from lm.evaluator import token_nlls
from lm.model import detach

DYNAMIC, CACHE = Dynamic(lr=0.05, decay=0.1, eps=0.01, segment=5), Cache(weight=0.3, theta=0.7, window=6)
MEANS = {
    "temperature": Adaptation(1.3),
    "dynamic": Adaptation(1.0, DYNAMIC),
    "cache": Adaptation(1.0, None, CACHE),
    "all": Adaptation(0.8, DYNAMIC, CACHE),
}


@pytest.fixture
def net(model):
    """A model in float64, its statistics moved."""
    net = model(dropout=0.5, num_layers=2, alpha_fwd=31 / 32).double()
    net(torch.randint(0, 5, (9, 4)))
    return net


@pytest.fixture
def rms(net, text, tokenizer):
    return adaptation.gradient_rms(net, text(40).ids, tokenizer.eos, 5)


def nlls(net, ids, tokenizer, means, rms):
    return adaptation.token_nlls(net, np.asarray(ids), tokenizer.eos, means, rms, chunk=7)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_later_text_changes_no_earlier_score(net, text, tokenizer, rms, means):
    one, other = text(6, seed=1).ids[:23], text(9, seed=2).ids[:23]
    for cut in range(1, 23):
        mixed = np.concatenate([one[:cut], other[cut:]])
        ours, theirs = (nlls(net, ids, tokenizer, means, rms)[:cut] for ids in (one, mixed))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
@pytest.mark.parametrize("t", [0, 1, 4, 5, 17])
def test_the_probabilities_of_all_tokens_at_a_place_sum_to_one(net, text, tokenizer, rms, means, t):
    """So a token is scored without being seen: whatever stands there, the distribution is the same one."""
    ids = text(6, seed=1).ids
    scores = [
        nlls(net, [*ids[:t], token, *ids[t + 1 : t + 3]], tokenizer, means, rms)[t] for token in range(tokenizer.size)
    ]
    assert np.exp(-np.array(scores)).sum() == pytest.approx(1, rel=1e-12)


def test_temperature_divides_the_logits(net, text, tokenizer):
    ids = text(6, seed=1).ids
    inputs = torch.from_numpy(np.concatenate([[tokenizer.eos], ids[:-1]]))[:, None]
    found = nlls(net, ids, tokenizer, MEANS["temperature"], None)
    hidden, _ = net.eval()(inputs)
    logits = hidden @ net.decoder.weight.T + net.decoder.bias
    wanted = (logits[:, 0] / 1.3).log_softmax(1)[torch.arange(len(ids)), torch.from_numpy(ids)]
    np.testing.assert_allclose(found, -wanted.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_dynamic_evaluation_is_its_definition(net, text, tokenizer, rms, temperature):
    """A loop as the paper has it, weight by weight, on a copy: at a temperature the gradients are as without it."""
    ids, eos = text(7, seed=1).ids, tokenizer.eos
    found = nlls(net, ids, tokenizer, Adaptation(temperature, DYNAMIC), rms)
    copied, expected, state = copy.deepcopy(net).eval(), [], None
    weights = [*copied.parameters()]
    begun = [weight.detach().clone() for weight in weights]
    mean = torch.cat([r.flatten() for r in rms]).mean()
    before = np.concatenate([[eos], ids[:-1]])
    for start in range(0, len(ids), 5):
        inputs, targets = (torch.from_numpy(each[start : start + 5])[:, None] for each in (before, ids))
        hidden, state = copied(inputs, None if state is None else detach(state))
        nats = -copied.log_probs(hidden).gather(2, targets[..., None]).flatten()
        tempered = (copied.log_probs(hidden) / temperature).log_softmax(2)
        expected += (-tempered.gather(2, targets[..., None])).flatten().tolist()
        copied.zero_grad()
        nats.mean().backward()
        with torch.no_grad():
            for weight, origin, r in zip(weights, begun, rms, strict=True):
                pull = torch.minimum(torch.ones(()), 0.1 * r / mean)
                weight += pull * (origin - weight) - 0.05 * weight.grad / (r + 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert not np.allclose(found, token_nlls(net, text(7, seed=1), tokenizer))


def test_gradient_statistics_are_root_mean_squares_over_segments(net, text, tokenizer):
    data = text(30)
    found = adaptation.gradient_rms(net, data.ids, tokenizer.eos, 5)
    width = min(100, len(data.ids) // 2)
    cut = stream.columns(data.ids, width, tokenizer.eos)
    copied, squares, state, count = copy.deepcopy(net).eval(), None, None, 0
    rows = len(data.ids) // width
    for start in range(0, rows, 5):
        stop = min(start + 5, rows)
        window = cut.window(start, stop)
        hidden, state = copied(window.inputs, None if state is None else detach(state))
        copied.zero_grad()
        (-copied.log_probs(hidden).gather(2, window.targets[..., None]).mean()).backward()
        grads = [weight.grad.square() for weight in copied.parameters()]
        squares = grads if squares is None else [a + b for a, b in zip(squares, grads, strict=True)]
        count += 1
    for ours, theirs in zip(found, squares, strict=True):
        torch.testing.assert_close(ours, (theirs / count).sqrt(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [1, 6, 1000])
@pytest.mark.parametrize(("rows", "pairs"), [(1, 99), (4, 99), (256, 10**6), (256, 20), (256, 1)])
def test_the_cache_is_its_definition(net, text, tokenizer, monkeypatch, window, rows, pairs):
    monkeypatch.setattr(adaptation, "_ROWS", rows)
    monkeypatch.setattr(adaptation, "_PAIRS", pairs)
    ids, cache = text(6, seed=1).ids, replace(CACHE, window=window)
    found = nlls(net, ids, tokenizer, Adaptation(1.0, None, cache), None)
    inputs = torch.from_numpy(np.concatenate([[tokenizer.eos], ids[:-1]]))[:, None]
    hidden = net.eval()(inputs)[0][:, 0].detach().numpy()
    expected = []
    for t, nats in enumerate(token_nlls(net, text(6, seed=1), tokenizer)):
        pairs = range(max(0, t - window), t)
        weights = np.array([math.exp(0.7 * hidden[t] @ hidden[i]) for i in pairs])
        pointed = sum(w for w, i in zip(weights, pairs, strict=True) if ids[i] == ids[t]) / weights.sum() if t else 0
        expected.append(-math.log(0.7 * math.exp(-nats) + 0.3 * pointed) if t else nats)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_evaluation_leaves_the_model_as_it_was(net, text, tokenizer, rms, means):
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.train()
    net.output_dropout.eval()
    modes = [module.training for module in net.modules()]
    ours, again = (nlls(net, text(5).ids, tokenizer, means, rms) for _ in range(2))
    assert np.array_equal(ours, again)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_means_of_no_strength_are_the_exact_score(net, text, tokenizer, rms):
    still = Adaptation(1.0, Dynamic(1e-300, 0.0, 1.0, 5), Cache(0.0, 1.0, 9))
    exact = token_nlls(net, text(5), tokenizer)
    np.testing.assert_allclose(nlls(net, text(5).ids, tokenizer, still, rms), exact, rtol=1e-12)


def test_a_text_of_one_subject_is_scored_better(net, text, tokenizer, rms):
    ids = np.resize(text(2, seed=1).ids, 200)
    plain = nlls(net, ids, tokenizer, Adaptation(), rms).mean()
    cache = replace(CACHE, window=20)
    for means in (Adaptation(1.0, DYNAMIC), Adaptation(1.0, None, cache), Adaptation(1.0, DYNAMIC, cache)):
        assert nlls(net, ids, tokenizer, means, rms).mean() < plain - 0.1


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_short_texts_and_large_constants(net, text, tokenizer, count):
    """A segment and a window beyond the text; statistics of gradients over as few tokens."""
    ids = text(9, seed=1).ids[:count]
    rms = adaptation.gradient_rms(net, ids, tokenizer.eos, 999)
    assert len(rms) == len([*net.parameters()])
    means = Adaptation(1.1, replace(DYNAMIC, segment=999), replace(CACHE, window=10**9))
    scores = nlls(net, ids, tokenizer, means, rms)
    assert scores.shape == (count,)
    assert np.isfinite(scores).all()
    assert scores[0] == pytest.approx(nlls(net, ids, tokenizer, Adaptation(1.1), rms)[0])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [True, False])
def test_tuning_is_never_worse_than_where_it_began(net, text, tokenizer, rms, temperature):
    ids, lines = np.resize(text(3, seed=1).ids, 60), []
    options = {"temperature": temperature, "say": lines.append}
    found = adaptation.tune(net, ids, tokenizer.eos, MEANS["all"], rms, **options)
    assert found.dynamic is not None
    assert found.cache is not None
    assert (found.temperature == 0.8) == (not temperature)
    means = [replace(found, cache=None, dynamic=None), replace(found, cache=None), found]
    scores = [nlls(net, ids, tokenizer, each, rms).mean() for each in means]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < nlls(net, ids, tokenizer, replace(MEANS["all"], temperature=found.temperature), rms).mean()
    best = min(float(line.split()[0]) for line in lines)
    assert best == pytest.approx(math.exp(scores[-1]), rel=5e-4)
    assert all(mean.protocol in "\n".join(lines) for mean in means)


@pytest.mark.parametrize("weight", [0.9, 0.995])
def test_a_weight_of_the_cache_is_tuned_from_the_given_one_up_to_all(net, text, tokenizer, weight):
    """A text of one word, which the cache alone foretells best."""
    ids, begun = np.full(50, 3), Adaptation(1.0, None, replace(CACHE, weight=weight))
    found = adaptation.tune(net, ids, tokenizer.eos, begun, temperature=False, say=lambda line: None)
    assert found.cache.weight == max(weight, 0.99)


def test_a_cache_that_does_not_help_gets_no_weight(net, text, tokenizer):
    """A text whose words never return."""
    ids = np.random.default_rng(0).permutation(tokenizer.size)
    found = adaptation.tune(
        net, ids, tokenizer.eos, Adaptation(1.0, None, CACHE), temperature=False, say=lambda _: None
    )
    assert found.cache.weight == 0


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
@pytest.mark.parametrize("decoder", [{}, {"decoder": "mixture"}, {"decoder": "adaptive", "tied": False}])
def test_temperatures_at_the_ends_of_float32_give_numbers(model, text, tokenizer, decoder, temperature):
    net, ids = model(**decoder), text(5).ids
    rms = adaptation.gradient_rms(net, ids, tokenizer.eos, 5)
    for dynamic in (None, DYNAMIC):
        assert np.isfinite(nlls(net, ids, tokenizer, Adaptation(temperature, dynamic), rms)).all()
    with pytest.raises(UserError, match=r"must be above 0 and finite; got 9e-31; .* 1e-30 the least"):
        Adaptation(9e-31)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_switched_on_where_they_are_needed(net, text, tokenizer, rms, mode):
    ids = text(5).ids
    with mode():
        again = adaptation.gradient_rms(net, text(40).ids, tokenizer.eos, 5)
        inside = nlls(net, ids, tokenizer, MEANS["all"], again)
    assert np.array_equal(inside, nlls(net, ids, tokenizer, MEANS["all"], rms))


def test_outputs_are_kept_for_a_cache_only(net, text, tokenizer, rms, monkeypatch):
    kept = []
    monkeypatch.setattr(
        adaptation, "_joined", lambda *lists, joined=adaptation._joined: (kept.append(len(lists[1])), joined(*lists))[1]
    )
    for means in MEANS.values():
        nlls(net, text(5).ids, tokenizer, means, rms)
    assert [count > 0 for count in kept] == [means.cache is not None for means in MEANS.values()]


def test_constants_are_given_back_as_they_were():
    means = Adaptation(
        1.23456789, replace(DYNAMIC, lr=1 / 3e5, decay=0.0), replace(CACHE, window=2_000_001, weight=1.0)
    )
    assert adaptation.given(means) == [
        "--temperature=1.23456789",
        "--dynamic",
        f"--set eval.dynamic_lr={1 / 3e5!r}",
        "--set eval.dynamic_decay=0",
        "--set eval.dynamic_eps=0.01",
        "--set eval.dynamic_segment=5",
        "--cache",
        "--set eval.cache_weight=1",
        "--set eval.cache_theta=0.7",
        "--set eval.cache_window=2000001",
    ]
    assert "temperature(1.23456789)" in means.protocol
    assert "window 2000001" in means.protocol


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: replace(CACHE, weight=1.5),
            "the weight of cache must be at least 0 and at most 1, and finite; got 1.5",
        ),
        (lambda: replace(CACHE, theta=-1.0), "the theta of cache must be at least 0, and finite; got -1.0"),
        (lambda: replace(CACHE, window=0), "the window of cache must be at least 1, and finite; got 0"),
        (lambda: replace(DYNAMIC, lr=math.inf), "the lr of dynamic must be at least 0, and finite; got inf"),
        (lambda: replace(DYNAMIC, decay=math.nan), "the decay of dynamic must be at least 0, and finite; got nan"),
        (lambda: replace(DYNAMIC, eps=-1.0), "the eps of dynamic must be at least 0, and finite; got -1.0"),
        (lambda: replace(DYNAMIC, segment=0), "the segment of dynamic must be at least 1, and finite; got 0"),
    ],
)
def test_constants_are_in_their_range(make, told):
    with pytest.raises(UserError, match=told):
        make()


def test_the_protocol_names_every_constant():
    text = MEANS["all"].protocol
    assert text == (
        "exact + temperature(0.8) + dynamic(lr 0.05, decay 0.1, eps 0.01, segment 5) "
        "+ cache(weight 0.3, theta 0.7, window 6)"
    )
    assert Adaptation().protocol == "exact"
