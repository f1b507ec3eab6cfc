"""Ids by hand; every sentencepiece round trip; states that come back; sizes and texts that are refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some

from lm import tokenizers
from lm.errors import UserError
from lm.text import words

LINES = [
    "the cat sat on the <unk>",
    "",
    "  the   dog saw the cat and the cat saw <unk> ",
    "caf\u00e9 \u2581 \u2585\u2585 \u4f60\u597d",
    "quick foxes jumped over lazy dogs; lazier dogs jumped over quicker foxes, and the quickest jump was jumped",
] * 4
SIZES = {"word": None, "char": None, "bpe": 310, "unigram": 300}


@pytest.fixture(scope="module")
def trained() -> dict[str, tokenizers.Tokenizer]:
    return {kind: tokenizers.train(kind, LINES, size) for kind, size in SIZES.items()}


def test_words_part_at_ascii_white_space_alone():
    assert words(" a\tb\x0b\x0cc\r\u00a0d\u2028e ") == ["a", "b", "c", "\u00a0d\u2028e"]


def test_word_ids_follow_frequency_then_text():
    table = tokenizers.train("word", ["b a b", "b a c"])
    assert table.state() == {"kind": "word", "pieces": ["b", "<eos>", "a", "c", "<unk>"]}
    assert (table.size, table.eos, table.unk) == (5, 1, 4)
    assert table.encode(" c \t b new <unk>") == [3, 0, 4, 4]
    assert table.decode([3, 0, 1, 1, 4, 1]) == "c b\n\n<unk>\n"
    assert table.decode(torch.tensor([3, 0])) == "c b"
    assert table.decode([]) == ""


def test_a_smaller_word_table_counts_what_it_drops_as_unk():
    table = tokenizers.train("word", ["b b b c c d d e"], 4)
    assert table.state()["pieces"] == ["<unk>", "b", "c", "<eos>"]  # d, d and e are <unk> now: it ties with b
    assert table.encode("b c d e") == [1, 2, 0, 0]
    assert tokenizers.train("word", ["a"], 100).size == 3


def test_ids_are_in_order_of_frequency_in_the_stream(trained):
    for kind in ("word", "char"):
        table = trained[kind]
        text = [" ".join(words(line)) for line in LINES]
        counts = Counter(i for line in text for i in [*table.encode(line), table.eos])
        found = [counts[i] for i in range(table.size)]
        assert found == sorted(found, reverse=True)


def test_characters():
    table = tokenizers.train("char", ["a  b", "ab"])
    assert table.state()["pieces"] == ["<eos>", "a", "b", " ", "<unk>"]
    assert table.encode("a bc") == [1, 3, 2, 4]
    assert table.decode([1, 3, 2, 0, 1]) == "a b\na"
    assert tokenizers.train("char", ["<eos> <unk>"]).encode("<eos>") != [0]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None, max_examples=150)
@given(line=some.text(some.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=40))
@example(line="the <unk> <unk>cat<unk>")
@example(line=" leading, trailing and  double ")
@example(line="<eos> <0unk> <0x41> <s> </s> \u2581 \u2585")
@example(line="\0\x1b\x1b0\x1b1\t\r\u2028\ue000\ufeff\U0001f600e\u0301\ufb01")
@example(line="long line of words " * 5000)
@example(line="x" * 50_000)
def test_sentencepiece_loses_nothing(trained, kind: str, line: str):
    table = trained[kind]
    ids = table.encode(line)
    assert table.eos not in ids
    assert table.decode(ids) == line
    assert table.decode([*ids, table.eos, *ids]) == f"{line}\n{line}"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_texts_own_unk_is_one_piece(trained, kind: str):
    table = trained[kind]
    assert table.encode("the <unk> cat <unk>").count(table.unk) == 2
    assert table.unk not in table.encode("never \u3042 seen")


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_training_is_a_function_of_the_text(trained, kind: str):
    again = tokenizers.train(kind, iter(LINES), SIZES[kind])
    assert again.sha256 == trained[kind].sha256
    assert again.size == (SIZES[kind] or again.size)
    other = tokenizers.train(kind, [*LINES, "a dog and a dog and a dog"] * 2, SIZES[kind])
    assert other.sha256 != again.sha256


@pytest.mark.parametrize("mark", ["", " \u2585", " \u2581"])
def test_no_line_is_left_out_of_training(mark: str):
    long = "zebra quagga " * 1000 + mark  # over 4,192 bytes
    table = tokenizers.train("bpe", [long, "a b"], 290)
    assert len(table.encode("zebra quagga")) == 2


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_state_comes_back(trained, kind: str, tmp_path: Path):
    table = trained[kind]
    text = "the cat saw"
    tokenizers.save(table, tmp_path / "tokenizer.json")
    torch.save(table.state(), tmp_path / "state.pt")
    back = [
        tokenizers.from_state(json.loads(json.dumps(table.state()))),
        tokenizers.from_state(torch.load(tmp_path / "state.pt", weights_only=True)),
        tokenizers.load(tmp_path / "tokenizer.json"),
    ]
    for other in back:
        assert (other.kind, other.size, other.eos, other.unk) == (kind, table.size, table.eos, table.unk)
        assert other.sha256 == table.sha256
        assert other.encode(text) == table.encode(text)
        assert other.decode(other.encode(text)) == text


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"kind": "word"},
        {"kind": "word", "pieces": ["a"]},
        {"kind": "word", "pieces": ["<unk>", "<eos>", "a", "a"]},
        {"kind": "char", "pieces": ["<unk>", "<eos>", 3]},
        {"kind": "bpe", "model": ""},
        {"kind": "bpe", "model": "!"},
        {"kind": "unigram", "model": "Z2FyYmFnZQ=="},
        {"kind": "bytes", "model": ""},
    ],
)
def test_a_foreign_state_is_refused(state):
    with pytest.raises(
        UserError, match=r"a tokenizer's state must be what its state\(\) returned; got .*; train it again"
    ):
        tokenizers.from_state(state)


def test_a_foreign_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a tokenizer must be a file; .* does not exist"):
        tokenizers.load(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"kind": "word", ')
    with pytest.raises(UserError, match=r"a tokenizer file must be JSON; .*half.json"):
        tokenizers.load(tmp_path / "half.json")


def test_the_word_eos_is_refused_where_it_could_not_be_told_apart():
    with pytest.raises(UserError, match=r"must not hold the word <eos>.*got '.*<eos>.*'; replace the word"):
        tokenizers.train("word", ["a <eos> b"])
    with pytest.raises(UserError, match=r"must not hold the word <eos>"):
        tokenizers.train("word", ["a b"]).encode("a <eos>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_size_that_does_not_fit_the_text(kind: str):
    with pytest.raises(UserError, match=rf"a {kind} vocabulary .* must have at most \d+ pieces; got 5000"):
        tokenizers.train(kind, LINES, 5000)
    with pytest.raises(UserError, match=rf"a {kind} vocabulary .* must have at least \d+ pieces .*; got 100"):
        tokenizers.train(kind, LINES, 100)
    with pytest.raises(UserError, match=r"must be trained on text; got blank lines alone"):
        tokenizers.train(kind, ["", " "], 300)
    assert tokenizers.train(kind, LINES).size < tokenizers.DEFAULT_PIECES


def test_an_unknown_kind_or_a_tiny_size():
    with pytest.raises(UserError, match=r"must be one of word, char, bpe, unigram; got 'bytes'"):
        tokenizers.train("bytes", ["a"])
    with pytest.raises(UserError, match=r"at least 3 pieces .* got 2"):
        tokenizers.train("word", ["a"], 2)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"kind": ' + "9" * 5000 + "}", '{"kind": "word", "pieces": ["\\ud800"]}']
)
def test_files_that_python_cannot_read(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"a tokenizer('s state must be what| file must be JSON)"):
        tokenizers.load(tmp_path / "mine.json")
