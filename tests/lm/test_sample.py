import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from lm import sample as sampling
from lm import stream, tokenizers
from lm.errors import UserError
from lm.sample import _draw, sample
from lm.text import Text

LOG_PROBS = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.35]))


def draws(temperature=1.0, top_k=None, top_p=None, count=4000):
    generator = torch.Generator().manual_seed(0)
    found = [_draw(LOG_PROBS, temperature, top_k, top_p, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=4) / count


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.03)


def test_draws_follow_the_model():
    close(draws(), [0.1, 0.5, 0.05, 0.35])


def test_temperature_sharpens():
    squares = torch.tensor([0.1, 0.5, 0.05, 0.35]) ** 2
    close(draws(temperature=0.5), (squares / squares.sum()).tolist())
    close(draws(temperature=0.0, count=10), [0.0, 1.0, 0.0, 0.0])
    close(draws(temperature=1e-310, count=10), [0.0, 1.0, 0.0, 0.0])


def test_top_k_keeps_the_likeliest():
    close(draws(top_k=2), [0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85])
    close(draws(top_k=99), [0.1, 0.5, 0.05, 0.35])


def test_top_p_keeps_the_fewest_that_hold_it():
    close(draws(top_p=0.4), [0.0, 1.0, 0.0, 0.0])
    close(draws(top_p=0.51), [0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85])
    close(draws(top_p=1.0), [0.1, 0.5, 0.05, 0.35])


def test_greedy_text_is_the_argmax_step_by_step(model, tokenizer):
    net = model()
    ids = [tokenizer.eos, *tokenizer.encode("the cat")]
    net.eval()
    for _ in range(5):  # the whole prefix again each time: no carried state to get wrong
        hidden, _ = net(torch.tensor(ids)[:, None])
        ids.append(int(net.log_probs(hidden[-1, 0]).argmax()))
    net.train()
    text = sample(net, tokenizer, prompt="the cat", length=5, temperature=0)
    assert text == tokenizer.decode(ids[1:])


def test_one_seed_one_text_and_nothing_else_moves(model, tokenizer):
    net = model()
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, again, other = (sample(net, tokenizer, length=40, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_prompt_of_many_lines_is_kept(model, tokenizer):
    text = sample(model(), tokenizer, prompt="the cat\na dog", length=3)
    assert text.startswith("the cat\na dog")
    assert sample(model(), tokenizer, prompt="the zebra", length=1).startswith("the <unk>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite; got inf"),
        ({"top_k": 0}, "top-k must be at least 1; got 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1; got 1.5"),
        ({"length": 0}, "length must be from 1 to 1,000,000; got 0; draw one token or more"),
        ({"length": 10**9}, "length must be from 1 to 1,000,000; got 1000000000; draw several texts"),
        (
            {"prompt": "the c\udcfft"},
            r"a prompt must be UTF-8 text; got 'the c\\udcfft', whose character 6 is not UTF-8",
        ),
    ],
)
def test_wrong_arguments(model, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        sample(model(), tokenizer, **arguments)


def test_a_prompt_is_split_as_training_text_is(model, tokenizer):
    """A no-break space is part of its word; a carriage return is white space."""
    for prompt, ids in (
        ("the cat", ["the", "cat"]),
        (" the\tcat\r\nsat ", ["the", "cat", None, "sat"]),
        ("the\u00a0cat", ["the\u00a0cat"]),
        ("the\n", ["the", None]),
        ("\n", [None]),
        (" ", []),
        ("", []),
    ):
        expected = [tokenizer.eos if word is None else tokenizer.encode(word)[0] for word in ids]
        assert sampling.encode_prompt(prompt, tokenizer) == expected
        if prompt.strip():
            whole = stream.encode(Text(prompt.encode()), tokenizer).ids.tolist()
            assert whole == expected + [tokenizer.eos] * (not prompt.endswith("\n"))
    table = tokenizers.train("byte", [])
    assert sampling.encode_prompt(" a\t\n", table) == [*b" a\t\n"]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@settings(deadline=None, max_examples=60)
@given(data=some.data())
def test_what_is_shown_as_it_is_drawn_is_the_text(kind, data):
    table = _table(kind)
    ids = data.draw(some.lists(some.integers(0, table.size - 1), max_size=30))
    shown = list(sampling.texts(table, ids))
    assert "".join(shown) == table.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_character_that_pieces_part_is_shown_once_and_whole(kind):
    table = tokenizers.train(kind, ["the cat sat on b1 and b2"] * 9)
    text = "b1 \u2581\u2583 \u2585\x1b\0 b2"
    shown = [*sampling.texts(table, table.encode(text))]
    assert "".join(shown) == text
    assert not any(part.endswith("\x1b") and part != "\x1b" for part in shown)


@functools.cache
def _table(kind):
    return tokenizers.train(kind, ["a\u4f60 b ab <unk> \ufffd a", "b a  b"] * 9, None)


def test_unk_is_never_drawn_where_it_is_not_wanted(model, tokenizer):
    net = model()
    with torch.no_grad():
        net.decoder.bias[tokenizer.unk] = 3.0
    drawn = [sample(net, tokenizer, length=60, no_unk=no_unk) for no_unk in (False, True)]
    assert ["<unk>" in text for text in drawn] == [True, False]


def test_a_token_that_no_text_holds_is_never_drawn(model):
    pieces = _table("bpe")
    net = model(vocabulary=pieces.size)
    with torch.no_grad():
        net.decoder.bias[pieces.unused] = 9.0
    assert "\u2047" not in sample(net, pieces, length=60)


def test_what_a_vocabulary_lacks():
    words, characters = _table("word"), _table("char")
    assert words.unknown("a zebra\nab zebra <unk>\u00a0x") == ["zebra", "<unk>\u00a0x"]
    assert characters.unknown("az\nbz") == ["z"]
    assert _table("byte").unknown("z") == _table("bpe").unknown("z") == []
