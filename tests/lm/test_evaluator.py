import math

import numpy as np
import pytest
import torch

from lm import loss, stream, tokenizers
from lm.corpora import markov
from lm.errors import UserError
from lm.evaluator import Score, evaluate, evaluating, headline, record, token_nlls, unigram_perplexity


def by_hand(net, ids, eos):
    """One token at a time, plain torch, float64 sum: [N] nats."""
    nlls, state, before = [], None, eos
    with torch.no_grad():
        for token in ids.tolist():
            hidden, state = net(torch.tensor([[before]]), state)
            logits = hidden[0, 0].double() @ net.decoder.weight.double().T + net.decoder.bias.double()
            nlls.append(float(torch.logsumexp(logits, 0) - logits[token]))
            before = token
    return np.array(nlls)


@pytest.fixture
def net(model):
    """A model whose statistics have moved, so that evaluation by frozen statistics differs from training's."""
    net = model(dropout=0.5)
    for seed in range(3):
        torch.manual_seed(seed)
        net(torch.randint(0, 5, (9, 4)))
    return net


@pytest.mark.parametrize("norm", ["online", "none"])
def test_exact_equals_the_sum_by_hand(model, text, tokenizer, norm):
    net, data = model(norm=norm).double(), text(12)
    score = evaluate(net, data, tokenizer, chunk=7)
    nlls = by_hand(net.eval(), data.ids, tokenizer.eos)
    assert score.nll == pytest.approx(nlls.sum(), rel=1e-12)
    assert score.ppl == pytest.approx(math.exp(nlls.sum() / len(nlls)), rel=1e-12)
    assert (score.tokens, score.words, score.eos) == (len(nlls), len(nlls) - 12, 12)
    is_eos = data.ids == tokenizer.eos
    assert score.ppl_without_eos == pytest.approx(math.exp(nlls[~is_eos].mean()))
    assert score.bits_per_word == pytest.approx(nlls.mean() / math.log(2))
    assert score.bits_per_byte == pytest.approx(nlls.sum() / math.log(2) / data.bytes)
    np.testing.assert_allclose(token_nlls(net, data, tokenizer, chunk=5), nlls, rtol=1e-10)


def test_cuts_change_nothing(net, text, tokenizer):
    net.double()
    scores = [evaluate(net, text(30), tokenizer, chunk=chunk).ppl for chunk in (1, 7, 35, 10**6)]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-9)


def test_unknown_words_are_counted_and_left_out_on_the_side(model, tokenizer):
    data = stream.encode(["the zebra sat", "", "<unk> ran"], tokenizer)
    net = model().double()
    score = evaluate(net, data, tokenizer)
    nlls = by_hand(net.eval(), data.ids, tokenizer.eos)
    assert (score.unk, score.eos, score.tokens) == (2, 3, 8)
    assert score.ppl_without_unk == pytest.approx(math.exp(nlls[data.ids != tokenizer.unk].mean()))


def test_columns_score_every_token_once(net, text, tokenizer):
    data = text(41)
    score = evaluate(net, data, tokenizer, protocol="columns", batch_size=3)
    assert len(data.ids) % 3, "the text must end raggedly for this test"
    assert (score.protocol, score.tokens, score.eos) == ("columns", len(data.ids), 41)
    assert score.ppl == pytest.approx(evaluate(net, data, tokenizer).ppl, rel=0.05)
    one = evaluate(net, data, tokenizer, protocol="columns", batch_size=1)
    assert one.nll == pytest.approx(evaluate(net, data, tokenizer).nll, rel=1e-12)


def test_chunk_mean_is_the_authors(model, text, tokenizer):
    net, data = model().double(), text(200)
    score = evaluate(net, data, tokenizer, protocol="chunk-mean")
    rows = len(data.ids) // 10
    table = torch.from_numpy(data.ids[: rows * 10]).view(10, rows).T
    total, state = 0.0, None
    net.eval()
    with torch.no_grad():
        for start in range(0, rows - 1, 32):
            stop = min(start + 32, rows - 1)
            hidden, state = net(table[start:stop], state)
            logits = hidden @ net.decoder.weight.T + net.decoder.bias
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), table[start + 1 : stop + 1].flatten())
            total += (stop - start) * math.exp(loss)
    assert (rows - 1) % 32, "the last chunk must be a short one for this test"
    assert score.ppl == pytest.approx(total / (rows - 1), rel=1e-12)
    assert score.ppl > evaluate(net, data, tokenizer).ppl * 0.9
    assert (score.tokens, score.words, score.bits_per_byte) == ((rows - 1) * 10, None, None)


def old(tokenizer):
    """The tokenizer as version 0.1 would have trained it."""
    return tokenizers.from_state({key: value for key, value in tokenizer.state().items() if key != "lossless"})


@pytest.mark.parametrize(
    ("kind", "size", "unit"),
    [("word", None, "word"), ("char", None, "character"), ("byte", None, "byte"), ("bpe", 275, "token")],
)
def test_a_perplexity_is_per_unit_of_the_tokenizer(lines, model, kind, size, unit):
    table = tokenizers.train(kind, lines(100), size)
    data = stream.encode(lines(10, 1), table)
    score = evaluate(model(vocabulary=table.size), data, table)
    text = "".join(f"{line}\n" for line in lines(10, 1))
    words = sum(len(line.split()) + 1 for line in lines(10, 1))
    units = {"word": words, "token": len(data.ids), "character": len(text), "byte": len(text.encode())}
    assert score.unit == table.unit == unit
    assert (score.words, score.eos, score.tokens) == (words - 10, 10, len(data.ids))
    assert score.ppl == pytest.approx(math.exp(score.nll / units[unit]))
    assert score.ppl_per_word == pytest.approx(math.exp(score.nll / words))
    assert score.bits_per_word == pytest.approx(score.nll / math.log(2) / words)
    assert score.bits_per_character == pytest.approx(score.nll / math.log(2) / len(text))
    assert score.bits_per_byte == pytest.approx(score.nll / math.log(2) / len(text.encode()))
    counts = torch.ones(table.size)
    assert unigram_perplexity(counts, data, unit) == pytest.approx(table.size ** (len(data.ids) / units[unit]))


def test_a_language_without_spaces_gets_a_finite_number(model):
    text = ["\u4f60\u597d\u4e16\u754c" * 2000]
    table = tokenizers.train("char", text)
    score = evaluate(model(vocabulary=table.size), stream.encode(text, table), table)
    assert score.ppl_per_word == math.inf
    assert record(score)["ppl_per_word"] is None
    assert 1 < score.ppl < 10
    assert headline(score) == f"{math.log2(score.ppl):.3f} bits per character"


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ("word", "perplexity 1,024.00"),
        ("token", "perplexity 1,024.00 per token, 2.500 bits per byte"),
        ("character", "10.000 bits per character"),
        ("byte", "10.000 bits per byte"),
    ],
)
def test_the_headline_fits_the_unit(unit, told):
    score = Score("exact", 1024.0, 1024.0, 1.0, 1, unit=unit, bits_per_byte=2.5)
    assert headline(score) == told


def test_pieces_of_version_0_1_are_reported_per_word(lines, model):
    chars = old(tokenizers.train("char", lines(100), None))
    data = stream.encode(lines(10, 1), chars)
    score = evaluate(model(vocabulary=chars.size), data, chars)
    words = data.words + data.eos
    assert score.tokens == len(data.ids) > words
    assert score.ppl == pytest.approx(math.exp(score.nll / words))
    assert score.ppl_per_token == pytest.approx(math.exp(score.nll / score.tokens))
    assert score.bits_per_word == pytest.approx(math.log2(score.ppl))
    assert score.bits_per_byte == pytest.approx(score.nll / math.log(2) / data.bytes)


@pytest.mark.parametrize(("kind", "size"), [("char", None), ("bpe", 275), ("unigram", 276), ("word", None)])
@pytest.mark.parametrize("made", [old, lambda table: table])
def test_chunk_mean_is_per_unit_too(lines, model, kind, size, made):
    pieces = made(tokenizers.train(kind, lines(100), size))
    data = stream.encode(lines(60, 1), pieces)
    net = model(vocabulary=pieces.size).double()
    score = evaluate(net, data, pieces, protocol="chunk-mean")
    rows = len(data.ids) // 10
    table = torch.from_numpy(data.ids[: rows * 10]).view(10, rows).T
    with evaluating(net):
        nll = net.token_nll(net(table[:-1])[0], table[1:])
    per_unit = len(data.ids) / (data.words + data.eos) if pieces.unit == "word" else 1.0
    for found, scale in ((score.ppl, per_unit), (score.ppl_per_token, 1.0)):
        expected = sum(len(chunk) * math.exp(chunk.mean() * scale) for chunk in nll.split(32)) / (rows - 1)
        assert found == pytest.approx(expected, rel=1e-9)
    assert (score.ppl > score.ppl_per_token) == (kind != "word" and pieces.unit == "word")


def test_nothing_moves(net, text, tokenizer):
    net.train()
    net.layers.eval()  # a mixed mode must come back too
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    for protocol in ("exact", "columns", "chunk-mean"):
        evaluate(net, text(30), tokenizer, protocol=protocol)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not net.layers.training


def test_modes_come_back_after_a_fault(net):
    def failing():
        with evaluating(net):
            assert not net.training
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert net.training


class Oracle(torch.nn.Module):
    """A model that knows a Markov source's transitions: hidden is the previous token, one-hot."""

    def __init__(self, transition):
        super().__init__()
        self.log_transition = torch.nn.Parameter(transition.clamp_min(1e-300).log())

    def forward(self, inputs, state=None, lengths=None):
        return torch.nn.functional.one_hot(inputs, len(self.log_transition)).double(), state

    def token_nll(self, hidden, targets):
        return loss.token_nll(hidden.flatten(0, 1), self.log_transition.T, None, targets.flatten()).view(targets.shape)


def test_the_best_model_of_a_markov_source_reads_its_entropy(model):
    source = markov.source()
    text = source.generate(400, seed=5)
    words = tokenizers.train("word", source.generate(3000, seed=6))
    order = [words.encode(f"w{i}")[0] for i in range(len(source.transition) - 1)] + [words.eos]
    transition = torch.zeros(words.size, words.size, dtype=torch.float64)
    transition[torch.tensor(order)[:, None], torch.tensor(order)] = torch.from_numpy(source.transition)
    score = evaluate(Oracle(transition), stream.encode(text, words), words, chunk=100)
    assert score.nll == pytest.approx(-source.log_probability(text), rel=1e-12)
    assert score.nll / score.tokens == pytest.approx(source.entropy, rel=0.02)
    data = stream.encode(text, words)
    assert evaluate(model(vocabulary=words.size), data, words).nll > score.nll


def test_a_model_that_knows_nothing_scores_the_vocabulary(model, text, tokenizer):
    net = model()
    torch.nn.init.zeros_(net.decoder.weight)
    assert evaluate(net, text(20), tokenizer).ppl == pytest.approx(tokenizer.size, rel=1e-6)


def test_the_unigram_model_counts_from_one(tokenizer):
    train, other = (stream.encode(lines, tokenizer) for lines in (["the cat"], ["the dog"]))
    counts = torch.bincount(torch.from_numpy(train.ids), minlength=tokenizer.size)
    total = 3 + tokenizer.size
    expected = (2 / total * 1 / total * 2 / total) ** (-1 / 3)
    assert unigram_perplexity(counts, other) == pytest.approx(expected)


def test_the_score_names_its_data(model, text, tokenizer):
    counts = torch.ones(tokenizer.size, dtype=torch.int64)
    score = evaluate(model(), text(20), tokenizer, data_sha256="d", train_counts=counts)
    assert (score.data_sha256, score.vocabulary_sha256) == ("d", tokenizer.sha256)
    assert score.unigram_ppl == pytest.approx(tokenizer.size)


def test_an_unknown_protocol_names_the_known_ones(model, text, tokenizer):
    with pytest.raises(UserError, match="must be one of exact, columns, chunk-mean; got 'fast'"):
        evaluate(model(), text(20), tokenizer, protocol="fast")


def test_a_text_too_short(model, text, tokenizer):
    with pytest.raises(UserError, match="chunk-mean must hold at least 20 tokens"):
        evaluate(model(), text(1), tokenizer, protocol="chunk-mean")


def test_a_broken_model_scores_not_a_number(model, text, tokenizer):
    net = model()
    torch.nn.init.constant_(net.decoder.bias, math.nan)
    assert math.isnan(evaluate(net, text(5), tokenizer).ppl)


def test_bands_hold_every_token_once_and_add_up(model, tokenizer):
    data = stream.encode(["the cat sat", "", "zebra the dog ran on a mat", "<unk>"], tokenizer)
    counts = torch.zeros(tokenizer.size, dtype=torch.int64)
    for word, count in (("the", 10_000), ("cat", 999), ("dog", 9), ("a", 1)):
        counts[tokenizer.encode(word)[0]] = count
    net = model()
    score = evaluate(net, data, tokenizer, chunk=3, train_counts=counts, groups=True)
    nlls = token_nlls(net, data, tokenizer)
    frequency, position = ({group.name: group for group in found} for found in (score.by_frequency, score.by_position))
    assert {name: group.tokens for name, group in frequency.items()} == {
        **{"0 times": 4, "1-9 times": 2, "100-999 times": 1, "10,000+ times": 2},
        **{"<unk>": 2, "<eos>": 4},
    }
    assert frequency["1-9 times"].nll == pytest.approx(nlls[7] + nlls[10])
    assert {name: group.tokens for name, group in position.items()} == {
        **{"place 1": 1, "place 2": 2, "place 3": 2, "place 4": 1, "place 5-8": 3},
        **{"<unk>": 2, "<eos>": 4},
    }
    assert position["place 2"].nll == pytest.approx(nlls[1] + nlls[6])
    assert position["place 2"].ppl == pytest.approx(math.exp((nlls[1] + nlls[6]) / 2))
    for groups in (score.by_frequency, score.by_position):
        assert sum(group.tokens for group in groups) == score.tokens
        assert math.fsum(group.nll for group in groups) == pytest.approx(score.nll, rel=1e-14)
    rows = record(score)
    assert rows["by_position"][0]["name"] == "place 1"
    assert "by_position" not in record(evaluate(net, data, tokenizer))
