"""Texts by hand: lines, blocks that make up the text, and facts as a slow reading finds them."""

import hashlib
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from lm import text as texts
from lm import tokenizers
from lm.corpora import Corpus, stats
from lm.errors import UserError
from lm.text import Text, words

ALPHABET = "ab \t\r\n\n\u00a0\u00e9\u4f60\U0001f600\ufeff\0"
BYTES = some.text(ALPHABET, max_size=60).map(str.encode)


def lines_of(content: bytes) -> list[str]:
    """The definition of lines, by hand."""
    lines = content.decode().removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


@settings(deadline=None, max_examples=300)
@given(content=BYTES, size=some.integers(1, 70), start=some.integers(0, 5))
@example(content=b"\xef\xbb\xbfa\r\n\r", size=2, start=0)
@example(content="\u4f60\u4f60\u4f60\u4f60".encode(), size=5, start=0)
@example(content=b"\xff\x80\x80\x80\x80\x80 a", size=3, start=0)
@example(content=b"\x80\x80\x80\x80", size=1, start=0)
def test_blocks_make_up_the_text(content: bytes, size: int, start: int):
    start = min(start, len(content))
    found = [*Text(content).part(start, len(content)).blocks(size)]
    assert b"".join(found) == content[start:]
    assert all(found)
    for block, after in itertools.pairwise(found):
        assert block.endswith(b"\n") or after[:1] in b" \t\n\r\x0b\x0c" or b"\n" not in block
        assert not (block.endswith(b"\r") and after.startswith(b"\n"))
    if start == 0 and is_utf8(content):
        assert all(map(is_utf8, found))


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(deadline=None, max_examples=300)
@given(content=BYTES, size=some.integers(4, 70))
@example(content=b"\xef\xbb\xbfa\r\nb \r", size=4)
@example(content=b"a \r\r\n\r", size=4)
def test_facts_and_lines_are_those_of_a_slow_reading(content: bytes, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text.blocks, "__defaults__", (size,))
        text = Text(content)
        found, lines = text.facts, [*text]
    assert lines == lines_of(content)
    plain = "".join(" ".join(words(line)) + "\n" for line in lines)
    assert (found.bytes, found.characters) == (len(content), len(content.decode()))
    if content != texts.BOM:  # which is no line, and counted as one
        assert (found.plain_bytes, found.plain_characters) == (len(plain.encode()), len(plain))
        assert found.lines == len(lines)
        assert found.lines_sha256 == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert found.words == sum(len(words(line)) for line in lines)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    for name, pattern in (("nul", rb"\0"), ("cr", rb"\r(?!\n)"), ("bom", rb"(?<!^)\xef\xbb\xbf")):
        match = re.search(pattern, content)
        assert found.found.get(name) == (match and match.start())


def test_what_may_be_wrong_is_found_with_its_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a\nb<eos> <unk>x\n<unk> <eos>\n\xff\n")
    text = Text(tmp_path / "a.txt", "a.txt")
    assert text.facts.found == {"unk": 16, "eos": 22, "utf8": 28}
    assert text.place(22) == "a.txt, line 3"
    part = text.part(16, text.size)
    assert part.facts.found == {"unk": 0, "eos": 6, "utf8": 12}
    assert part.place(12) == "a.txt, line 4"


def test_a_file_that_shrinks_or_goes(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("abc\n")
    text = Text(path, "a.txt", stop=9)
    with pytest.raises(UserError, match=r"a\.txt must not change while it is read"):
        list(text)
    path.unlink()
    with pytest.raises(UserError, match=r"a text must be a file; got \S+a\.txt, which does not exist"):
        list(text)


def test_reading_is_watched_and_repeats():
    seen: list[int] = []
    text = Text(b"a b\n" * 9, watch=seen.append)
    assert [*text.blocks(8)] == [b"a b\na b\n"] * 4 + [b"a b\n"]
    assert sum(seen) == 36
    assert [*text] == [*text] == ["a b"] * 9


@settings(deadline=None, max_examples=100)
@given(content=BYTES, size=some.integers(1, 9))
@example(content=b"a bcdefghijk\nl", size=4)
def test_a_word_is_whole_whatever_the_size_of_a_block(content: bytes, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text.blocks, "__defaults__", (size,))
        text = Text(content)
        counted = stats.stats(Corpus("it", {"train": text}), 1)[0].words
        assert counted == text.facts.words
        tokenizer = tokenizers.train("word", text)
        assert sum(block.size for block in tokenizer.encode_text(text)) == counted + text.facts.lines
        assert b"".join(text.blocks_of_words()) == content
    words_of = {word.decode() for word in content.removeprefix(texts.BOM).split()}
    assert {*tokenizer.pieces} == words_of | {"<unk>", "<eos>"}
