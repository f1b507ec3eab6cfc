"""Large texts: what is kept is what a small text gives, is used again, and is made anew where the text changes."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm import corpora, store, stream, tokenizers
from lm import text as texts
from lm.text import Text

LINES = "".join(f"\tword{number % 50} and  \u4f60 {number}\r\n" for number in range(3000))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch):
    """Everything from 1,000 bytes on is large, and blocks are small."""
    monkeypatch.setattr(texts, "LARGE", 1000)
    monkeypatch.setattr(Text.blocks, "__defaults__", (700,))


def opened(tmp_path: Path) -> Text:
    return corpora.load(str(tmp_path / "book.txt"), tmp_path / "data").splits["train"]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_large_text_gives_what_a_small_one_does(tmp_path: Path, large, kind: str, monkeypatch):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    given = (330 if kind in ("bpe", "unigram") else None, 2, 10**6)
    table = store.tokenizer(kind, text, *given)
    found = store.encoded(text, table)
    assert not text.facts.found.keys() - {"cr"}
    small = Text(b"".join(text.blocks()))
    assert text.facts == small.facts
    assert tokenizers.train(kind, small, given[0], min_count=2, sample=10**6).sha256 == table.sha256
    expected = stream.encode(small, table)
    assert np.array_equal(found.ids, expected.ids)
    assert found.ids.dtype == (np.uint8 if table.size <= 256 else np.uint16)
    assert [found.words, found.eos, found.unk, found.bytes, found.characters] == [
        *(expected.words, expected.eos, expected.unk, expected.bytes, expected.characters)
    ]
    cut, whole = (stream.columns(ids, 7, table.eos) for ids in (found.ids, expected.ids))
    assert all((ours == theirs).all() for ours, theirs in zip(cut.gather(0, 99), whole.gather(0, 99), strict=True))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data/cache").iterdir()}
    monkeypatch.setattr(Text, "_read", None)  # the second time no text is read
    again = Text(text.content, "book.txt", text.start, text.stop, tmp_path / "data/cache")
    assert store.tokenizer(kind, again, *given).sha256 == table.sha256
    assert np.array_equal(store.encoded(again, table).ids, expected.ids)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data/cache").iterdir()} == before


def test_a_file_that_changed_is_read_again(tmp_path: Path, large):
    path = tmp_path / "book.txt"
    path.write_bytes(LINES.encode())
    first = opened(tmp_path).facts
    path.write_bytes(LINES.encode().replace(b"and", b"And"))
    os.utime(path, ns=(1, 1))
    assert opened(tmp_path).facts.sha256 != first.sha256
    kept = next((tmp_path / "data/cache").glob("facts-*"))
    kept.write_text("{}")
    path.write_bytes(LINES.encode())
    assert opened(tmp_path).facts == first


def test_what_is_being_made_has_no_name_yet(tmp_path: Path, large, monkeypatch):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    table = tokenizers.train("word", text)
    blocks = table.encode_text(text)

    def failing(_):
        yield next(blocks)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(table), "encode_text", lambda self, text: failing(text))
    with pytest.raises(KeyboardInterrupt):
        store.encoded(text, table)
    assert not [*(tmp_path / "data/cache").glob("*ids-*")]


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: content + bytes(100),
        lambda content: b"\xff" * len(content),
        lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:],
    ],
    ids=["empty", "cut", "zero", "longer", "ones", "bit"],
)
def test_what_is_damaged_is_made_again(tmp_path: Path, large, damaged):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    table = store.tokenizer("word", text, None, 1, 1000)
    expected = np.array(store.encoded(text, table).ids)
    kept = [next((tmp_path / "data/cache").glob(form)) for form in ("ids-*", "tokenizer-*")]
    whole = [path.read_bytes() for path in kept]
    for path, content in zip(kept, whole, strict=True):
        path.unlink()  # its memory is mapped by what was read before
        path.write_bytes(damaged(content))
    assert store.tokenizer("word", text, None, 1, 1000).sha256 == table.sha256
    assert np.array_equal(store.encoded(text, table).ids, expected)
    assert kept[0].read_bytes() == whole[0]


def test_a_small_text_leaves_no_file(tmp_path: Path):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    store.encoded(text, store.tokenizer("word", text, None, 1, 1000))
    assert not (tmp_path / "data").exists()


def test_a_line_says_what_is_done_where_there_is_no_terminal(tmp_path: Path, large, capsys):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    store.encoded(text, store.tokenizer("word", text, None, 1, 1000))
    told = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["reading"] * 3 + ["making", "encoding"], "facts of each split, then the rest"


def test_what_is_kept_is_of_its_text_and_tokenizer(tmp_path: Path, large):
    """Vocabularies of other settings, and ids of other vocabularies, are others."""
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    text = opened(tmp_path)
    given = [(None, 1), (None, 2), (30, 1)]
    tables = [store.tokenizer("word", text, size, least, 1000) for size, least in given]
    assert [table.sha256 for table in tables] == [
        tokenizers.train("word", text, size, min_count=least).sha256 for size, least in given
    ]
    for table in tables:
        assert np.array_equal(store.encoded(text, table).ids, stream.encode(text, table).ids)


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path: Path, large, capsys):
    (tmp_path / "book.txt").write_bytes(LINES.encode())
    expected = store.encoded(text := opened(tmp_path), table := tokenizers.train("word", text)).ids
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").symlink_to(tmp_path / "away/gone")  # where nobody can make a folder, root included
    again = opened(tmp_path)
    assert np.array_equal(store.encoded(again, table).ids, expected)
    assert np.array_equal(store.encoded(opened(tmp_path), table).ids, expected)
    said = capsys.readouterr().err
    assert said.count("data/cache cannot be written; what is made of large texts is kept in ") == 1
    kept = Path(re.search(r"is kept in (\S+) until", said)[1])
    assert {path.name.partition("-")[0] for path in kept.iterdir()} == {"facts", "ids"}
