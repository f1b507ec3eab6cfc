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
from lm.text import Text, words

LINES = [
    "the cat sat on the <unk>",
    "",
    "  the   dog saw the cat and the cat saw <unk> ",
    "caf\u00e9 \u2581 \u2585\u2585 \u4f60\u597d",
    "quick foxes jumped over lazy dogs; lazier dogs jumped over quicker foxes, and the quickest jump was jumped",
] * 4
SIZES = {"word": None, "char": None, "byte": None, "bpe": 310, "unigram": 300}


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
        text = LINES
        counts = Counter(i for line in text for i in [*table.encode(line), table.eos])
        found = [counts[i] for i in range(table.size)]
        assert found == sorted(found, reverse=True)


def test_characters():
    table = tokenizers.train("char", ["a  b", "ab"])
    assert table.state() == {"kind": "char", "pieces": [" ", "<eos>", "a", "b", "<unk>"], "lossless": True}
    assert table.encode("a bc") == [2, 0, 3, 4]
    assert table.decode([2, 0, 3, 1, 2]) == "a b\na"
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


CODE = 'def f(x):\n\tif x:\n\t\treturn  "\u4f60\u597d"   # \u00a0\n\n    \n        pass\t\n' * 20
RAW = some.text(some.characters(codec="utf-8"), max_size=80) | some.text("ab \t\r\n\ufeff\u4f60", max_size=80)


@pytest.fixture(scope="module")
def lossless() -> dict[str, tokenizers.Tokenizer]:
    sizes = {"char": None, "byte": None, "bpe": 300, "unigram": 284}
    return {kind: tokenizers.train(kind, Text(CODE.encode()), size) for kind, size in sizes.items()}


def encoded(table: tokenizers.Tokenizer, content: bytes) -> list[int]:
    return [token for ids in table.encode_text(Text(content)) for token in ids.tolist()]


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@settings(deadline=None, max_examples=150)
@given(text=RAW)
@example(text=CODE.rstrip("\n"))
@example(text="\ufeff\r\n \r")
def test_a_text_comes_back_byte_for_byte(lossless, kind: str, text: str):
    table = lossless[kind]
    ids = encoded(table, text.encode())
    assert table.to_bytes(ids) == text.encode()
    assert ids.count(table.eos) == text.count("\n")
    assert (table.lossless, table.unit) == (True, "byte" if kind == "byte" else "token")


def test_characters_and_bytes_come_back(lossless):
    assert lossless["char"].to_bytes(encoded(lossless["char"], CODE.encode())) == CODE.encode()
    anything = bytes(range(256)) + "\u4f60".encode()[:2]
    assert lossless["byte"].to_bytes(encoded(lossless["byte"], anything)) == anything
    assert lossless["byte"].decode([0xE4, 0xBD, 0xA0, 0xFF, 10]) == "\u4f60\ufffd\n"
    assert [lossless["byte"].piece(token) for token in (10, 65, 0xE4)] == ["<eos>", "A", "<0xE4>"]
    assert lossless["char"].unit == "character"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "unigram"])
def test_how_a_text_is_read_changes_no_id(lossless, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Blocks of a line that is longer than them, too."""
    content = (CODE.replace("\n", " ") + "\n").encode()
    whole = encoded(lossless[kind], content)
    monkeypatch.setattr(Text.blocks, "__defaults__", (64,))
    assert lossless[kind].to_bytes(encoded(lossless[kind], content)) == lossless[kind].to_bytes(whole) == content
    if kind in ("char", "byte"):
        assert encoded(lossless[kind], content) == whole


def test_indentation_is_a_piece_of_its_own(lossless):
    for kind in ("bpe", "unigram"):
        table = tokenizers.train(kind, Text(b"        return x\n\t\t\tif y\n" * 50))
        assert len(table.encode("        ")) <= 2, kind
        assert table.decode(table.encode("\t\t\t        ")) == "\t\t\t        "


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_those_of_version_0_1_see_words_with_one_space_between(lossless, kind: str):
    state = {key: value for key, value in lossless[kind].state().items() if key != "lossless"}
    old = tokenizers.from_state(state)
    assert (old.lossless, old.unit, "lossless" in old.state()) == (False, "word", False)
    expected = [*old.encode("if x:"), old.eos, old.eos, *old.encode("pass"), old.eos]
    assert encoded(old, b"\tif  x: \r\n\npass") == expected
    with pytest.raises(UserError, match="a tokenizer's state must be"):
        tokenizers.from_state({**state, "lossless": False})


def test_rare_words_are_unk(tmp_path: Path):
    table = tokenizers.train("word", ["a a b b c d"], min_count=2)
    assert table.state()["pieces"] == ["<unk>", "a", "b", "<eos>"]
    assert tokenizers.train("char", ["aab"], min_count=2).state()["pieces"] == ["a", "<eos>", "<unk>"]


def test_a_large_text_is_sampled_all_over():
    """sentencepiece sees about as many bytes as asked for, from the start to the end."""
    blocks = b"".join((b"%c%d" % (65 + place, place) * 3 + b"\n") * 2**16 for place in range(10))
    seen = [*tokenizers._escaped(Text(blocks), len(blocks) // 5)]
    assert sum(len(line) + 1 for line in seen) == pytest.approx(len(blocks) / 5, rel=0.3)
    assert {line[0] for line in seen} == set("ABCDEFGHIJ")
    assert len([*tokenizers._escaped(Text(blocks), len(blocks))]) == 10 * 2**16


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
    assert (other.sha256 != again.sha256) == (kind != "byte")


@pytest.mark.parametrize("mark", ["", " \u2585", " \u2581"])
def test_no_line_is_left_out_of_training(mark: str):
    long = "zebra quagga " * 1000 + mark  # over 4,192 bytes
    table = tokenizers.train("bpe", [long, "a b"], 290)
    assert len(table.encode(" zebra quagga")) == 2


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
    with pytest.raises(UserError, match=r"must be one of word, char, byte, bpe, unigram; got 'bytes'"):
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
