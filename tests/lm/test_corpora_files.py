"""Texts in files of every form: split, joined, unpacked, in other encodings; and what is refused in every split."""

import gzip
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lm import config, corpora
from lm import text as texts
from lm.corpora import characters, checks, hub
from lm.corpora.files import Reading, divide, shares
from lm.errors import UserError
from lm.text import Text

LINES = "".join(f"line {number} of \u00e9 words\n" for number in range(500))


def whole(corpus: corpora.Corpus) -> bytes:
    return b"".join(b"".join(text.blocks()) for text in corpus.splits.values())


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    elif path.suffix == ".parquet":
        rows = content.decode().removesuffix("\n").split("\n")
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": [*range(len(rows))]}), path)
        return path
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["book.txt", "book", "book.txt.gz", "book.zst", "book.parquet"])
@pytest.mark.parametrize("large", [False, True])
def test_one_file_is_split_in_blocks_of_lines(tmp_path: Path, monkeypatch, name: str, large: bool):
    if large:
        monkeypatch.setattr(texts, "LARGE", 1000)
    path = write(tmp_path / name, LINES.encode())
    for _ in range(2):
        found = corpora.load(str(path), tmp_path / "data")
        assert found.name == "book"
        assert whole(found) == LINES.encode()
        sizes = [text.facts.lines for text in found.splits.values()]
        assert sizes == pytest.approx([450, 25, 25], abs=5)
        assert all(next(reversed([*text.blocks()])).endswith(b"\n") for text in found.splits.values())
        assert found.note.startswith(f"{path} is split 90/5/5 by lines: train {sizes[0]} lines of ")
    unpacked = [*(tmp_path / "data").rglob("*.txt")]
    assert len(unpacked) == (large and path.suffix in (".gz", ".zst", ".parquet"))
    assert (tmp_path / "data").exists() == large


def test_a_changed_file_is_unpacked_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(texts, "LARGE", 1000)
    path = write(tmp_path / "a.gz", LINES.encode())
    corpora.load(str(path), tmp_path / "data")
    write(path, LINES.upper().encode())
    assert whole(corpora.load(str(path), tmp_path / "data")) == LINES.upper().encode()


@pytest.mark.parametrize("content", ["\u4f60\u597d" * 300, "word and word " * 100, "a\n" * 30])
def test_few_lines_are_split_by_characters(content: str):
    found, note = divide(Text(content.encode(), "a.txt"), "8/1/1")
    assert "by characters" in note
    texts = ["".join(block.decode() for block in text.blocks()) for text in found.values()]
    assert "".join(texts) == content
    if " " in content:
        assert all(text.endswith(" ") for text in texts)
    assert [len(text) / len(content) for text in texts] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_a_short_text_is_refused_for_the_splits_that_are_needed_alone(tmp_path: Path):
    path = write(tmp_path / "b.txt", b"a")
    for needed, lacking in ((["train", "valid"], "valid"), (["test"], "test")):
        with pytest.raises(UserError, match=rf"which leave none for {lacking}; use a longer .* with {lacking}\.txt"):
            corpora.load(str(path), tmp_path, needed)
    assert [*corpora.load(str(path), tmp_path, ["train"]).splits] == ["train"]
    with pytest.raises(UserError, match="which leave none for valid"):  # of a command that reads them all
        corpora.load(str(path), tmp_path, ())


def test_a_share_of_none_is_no_split_and_a_short_text_is_refused():
    assert [*divide(Text(LINES.encode()), "9/1/0")[0]] == ["train", "valid"]
    with pytest.raises(UserError, match=r"b\.txt must be long enough to split 90/5/5; got 1 bytes, which leave none"):
        divide(Text(b"a", "b.txt"), "90/5/5")
    for form in ("90/10", "0/1/1", "a/b/c", "-1/1/1", ""):
        with pytest.raises(UserError, match=r"data\.split must .*; got '.*'; "):
            shares(form)


@pytest.mark.parametrize("name", ["valid.txt", "val.txt", "dev.txt.gz", "validation.parquet", "valid.txt.zst"])
def test_the_names_of_a_folder_s_splits(tmp_path: Path, name: str):
    write(tmp_path / "train.txt", b"a\n")
    write(tmp_path / name, b"b c\n")
    assert [*corpora.load(str(tmp_path), tmp_path / "data").splits["valid"]] == ["b c"]


def test_a_folder_needs_the_splits_that_are_used(tmp_path: Path):
    write(tmp_path / "test.txt", b"a\n")
    assert [*corpora.load(str(tmp_path), tmp_path, ["test"]).splits] == ["test"]
    with pytest.raises(UserError, match=r"the train split must be a file; got \S+train\.txt, which does not exist"):
        corpora.load(str(tmp_path), tmp_path)


@pytest.mark.parametrize("large", [False, True])
def test_what_is_wrong_in_one_of_joined_files_is_found_there(tmp_path: Path, monkeypatch, large: bool):
    monkeypatch.setattr(texts, "LARGE", 1000 if large else 10**9)
    for name, content in (("a", LINES.encode()), ("b", b"one\ntwo \xff\n" + LINES.encode()), ("c", LINES.encode())):
        write(tmp_path / f"{name}.txt", content)
    found = corpora.load(str(tmp_path / "*.txt"), tmp_path / "data", options=Reading(split="50/50/0"))
    with pytest.raises(UserError, match=r"got \S+b\.txt, line 2, with byte 0xff at byte offset 8; convert"):
        found.require("word")


def test_a_pattern_joins_files_in_order(tmp_path: Path):
    write(tmp_path / "src/b/z.py", b"def z():\n\treturn 1")
    write(tmp_path / "src/a.py", b"import b\r\n" * 200)
    write(tmp_path / "src/c.txt", b"no")
    found = corpora.load(f"{tmp_path}/src/**/*.py", tmp_path / "data")
    assert found.name == "src"
    assert corpora.load(f"{tmp_path}/src/[a-b]*.py", tmp_path).name == "src"
    assert whole(found) == b"import b\r\n" * 200 + b"def z():\n\treturn 1\n"
    with pytest.raises(UserError, match=r"a pattern must find files; got \S+\*\.c', which finds none"):
        corpora.load(f"{tmp_path}/src/*.c", tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str):
    path = write(tmp_path / "a.txt", LINES.encode(encoding))
    assert whole(corpora.load(str(path), tmp_path, options=Reading(encoding))) == LINES.encode()


@pytest.mark.parametrize(("form", "lacking"), [("100/0/0", "valid"), ("95/5/0", "test"), ("95/0/5", "valid")])
def test_a_split_without_a_share_is_refused_where_it_is_needed(tmp_path: Path, form: str, lacking: str):
    path, options = write(tmp_path / "a.txt", LINES.encode()), Reading(split=form)
    for source in (str(path), f"{tmp_path}/a*.txt"):
        with pytest.raises(
            UserError, match=rf"\.txt, .* must have a share for {lacking}; got data\.split={form}, .*; "
        ):
            corpora.load(source, tmp_path, [lacking], options)
        assert lacking not in corpora.load(source, tmp_path, ["train"], options).splits


@pytest.mark.parametrize("encoding", ["nonsense", "base64", "rot13", "", "a\0b"])
def test_an_encoding_that_is_none_of_text(tmp_path: Path, encoding: str):
    message = r"must be an encoding of text that Python knows; got '.*'; write utf-8, latin-1"
    with pytest.raises(UserError, match=f"the encoding of a text {message}"):
        Reading(encoding)
    with pytest.raises(UserError, match=f"data.encoding {message}"):
        config.build({"data": {"encoding": encoding}})


def test_what_cannot_be_read_is_said(tmp_path: Path):
    path = write(tmp_path / "a.txt", LINES.encode())
    with pytest.raises(UserError, match=r"in the encoding that is named, ascii; got \S+a\.txt, .*near byte 10"):
        corpora.load(str(path), tmp_path, options=Reading("ascii"))
    packed = write(tmp_path / "a.txt.gz", LINES.encode())
    for content, why in ((packed.read_bytes()[:-20], "ended before"), (b"plain", "[Nn]ot a gzipped")):
        packed.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.txt\.gz must be a whole file; got one that is damaged \(.*{why}"):
            corpora.load(str(packed), tmp_path)
    frame = zstandard.compress(random.Random(0).randbytes(300_000).hex().encode())
    for rest in (5, 9, len(frame) // 2):
        (tmp_path / "cut.zst").write_bytes(frame + frame[:-rest])
        with pytest.raises(UserError, match=r"cut\.zst must be a whole file; got one that is damaged \(it ends within"):
            corpora.load(str(tmp_path / "cut.zst"), tmp_path)
    (tmp_path / "a.zst").write_bytes(b"plain")
    (tmp_path / "a.parquet").write_bytes(b"plain")
    for name in ("a.zst", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name} must be a whole file; got one that is damaged"):
            corpora.load(str(tmp_path / name), tmp_path)
    table = write(tmp_path / "t.parquet", LINES.encode())
    with pytest.raises(
        UserError, match=r"data\.column must be a column of \S+t\.parquet; got 'body', and it has text, id"
    ):
        corpora.load(str(table), tmp_path, options=Reading(column="body"))


def test_a_column_of_text_is_taken_alone(tmp_path: Path):
    """The only one where none was named; never another than the named one, nor numbers or lists."""
    columns = {"id": [1, 2], "parts": [["a"], ["b"]], "body": ["a b", "c"]}
    for name, values in columns.items():
        pyarrow.parquet.write_table(pyarrow.table({name: values}), tmp_path / f"{name}.parquet")
    packed = pyarrow.table({"text": pyarrow.array(["a b", "c"]).dictionary_encode()})
    pyarrow.parquet.write_table(packed, tmp_path / "packed.parquet")
    for name in ("body", "packed"):
        assert whole(corpora.load(str(tmp_path / f"{name}.parquet"), tmp_path, ["train"])) == b"a b\nc\n"
    for name, kind in (("id", "int64"), ("parts", "list<")):
        with pytest.raises(UserError, match=rf"data\.column must hold text; got '{name}' of \S+, which holds {kind}"):
            corpora.load(str(tmp_path / f"{name}.parquet"), tmp_path)
    with pytest.raises(UserError, match=r"data\.column must be a column of \S+body\.parquet; got 'bodies'"):
        corpora.load(str(tmp_path / "body.parquet"), tmp_path, options=Reading(column="bodies"))


def test_markup_that_is_taken_as_text_is_warned_of(tmp_path: Path):
    write(tmp_path / "rows.jsonl", b'{"text": "a"}\n' * 200)
    (warning,) = corpora.load(str(tmp_path / "rows.jsonl"), tmp_path).require("word")
    assert "rows.jsonl is read as plain text, its markup too; to read one column of it, write that column" in warning
    assert corpora.load(str(tmp_path / "rows.jsonl"), tmp_path).require("byte") == [warning]
    write(tmp_path / "before.txt", b"a\n")
    assert corpora.load(str(tmp_path / "*"), tmp_path).require("word") == [warning]


def test_a_carriage_return_between_line_feeds_is_warned_of(tmp_path: Path):
    write(tmp_path / "a.txt", b"a b\n" * 50 + b"c\rd\n")
    for number in range(3):
        write(tmp_path / f"b{number}.txt", b"a\r" * 50)
    found = corpora.load(str(tmp_path / "*.txt"), tmp_path, ("train",), Reading(split="100/0/0"))
    (warning,) = found.require("word")
    assert re.search(r"a\.txt, line 51 holds a carriage return that no line feed follows: it is white space", warning)


def test_a_packed_file_under_its_own_name_is_to_be_unpacked(tmp_path: Path):
    """By a command that reads text alone."""
    path = write(tmp_path / "a.txt.gz", LINES.encode())
    (tmp_path / "a.txt").write_bytes(path.read_bytes())
    table = write(tmp_path / "t.parquet", LINES.encode())
    (tmp_path / "t.txt").write_bytes(table.read_bytes())
    for each in (path, tmp_path / "a.txt", table, tmp_path / "t.txt"):
        way = "unpack it" if each.name.startswith("a") else "write its column of text to a file"
        with pytest.raises(UserError, match=rf"which begins as a \.\w+ file does; {way}$"):
            checks.require({"scored": Text(each, str(each))}, "word", checks.Ways(packed=False))
    with pytest.raises(UserError, match=r"which begins as a \.gz file does; unpack it$"):
        checks.require({"scored": Text(path, str(path).replace(".gz", ".GZ"))}, "word")


def test_a_data_set_of_the_hub_is_kept(tmp_path: Path):
    """A folder that `datasets` loads stands for the hub."""
    for split, count in (("train", 300), ("validation", 20)):
        write(tmp_path / f"mine/{split}.parquet", "".join(f"{split} \u00e9 {i}\n" for i in range(count)).encode())
    source = f"hf:{tmp_path / 'mine'}"
    found = corpora.load(source, tmp_path / "data")
    assert found.name == "mine"
    assert {split: text.facts.lines for split, text in found.splits.items()} == {"train": 300, "valid": 20}
    for path in (tmp_path / "mine").iterdir():
        path.unlink()
    kept = corpora.load(source, tmp_path / "data", options=Reading("latin-1"))  # it is kept in UTF-8
    assert whole(kept) == whole(found)
    assert "\u00e9" in whole(kept).decode()
    with pytest.raises(UserError, match=r"mine must have the splits test; got train, valid"):
        corpora.load(source, tmp_path / "data", ["test"])


def test_a_data_set_without_a_network(tmp_path: Path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    told = r"hf:who/what must be on the hub or kept in \S+; got no answer .*ConnectionError: no route.*; check the name"
    with pytest.raises(UserError, match=told):
        corpora.load("hf:who/what", tmp_path)


FAULTS = {
    b"ok\nab\xffc\n": (
        "must be UTF-8 text; .*line 2, with byte 0xff at byte offset 5",
        {"word", "char", "bpe", "unigram"},
    ),
    b"ok\nab\0c\n": ("must be text; got a NUL in .*line 2, as in UTF-16", {"word", "char", "bpe", "unigram"}),
    b"ok\na <eos> c\n": ("must not hold the word <eos>.*; got it in .*line 2; replace", {"word"}),
    b"ok\rab\rc\r": ("must end with line feeds; got carriage returns alone in .*line 1; convert", {"word"}),
}


@pytest.mark.parametrize("content", FAULTS)
@pytest.mark.parametrize("split", corpora.SPLITS)
def test_a_fault_is_found_in_every_split_for_the_tokenizers_it_matters_to(tmp_path: Path, content: bytes, split: str):
    told, kinds = FAULTS[content]
    for name in corpora.SPLITS:
        write(tmp_path / f"{name}.txt", content if name == split else b"a\n")
    found = corpora.load(str(tmp_path), tmp_path)
    for kind in ("word", "char", "bpe", "unigram", "byte"):
        if kind in kinds:
            with pytest.raises(
                UserError, match=rf"the {split} split.* {told}".replace("split.* must end", "split must end")
            ):
                found.require(kind)
        else:
            assert found.require(kind) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(LINES.encode()), r"a\.txt, which begins as a \.gz file does; unpack it, or give it a name that"),
        (zstandard.compress(LINES.encode()), r"a\.txt, which begins as a \.zst file does; unpack it"),
        (LINES.encode("utf-16"), r"byte 0xff at byte offset 0; .* as by --set data\.encoding=utf-16, or"),
        (LINES.encode("utf-32"), r"byte 0xff at byte offset 0; .* as by --set data\.encoding=utf-32, or"),
        (LINES.encode("utf-16-le"), r"--set data\.encoding=utf-16-le, or"),
        (LINES.encode("utf-16-be"), r"--set data\.encoding=utf-16-be, or"),
        (LINES.encode("latin-1"), r"line 1, with byte 0xe9 .* as by --set data\.encoding=latin-1, or"),
        (b"PK\x03\x04\0\0", r"a\.txt, which begins as a \.zip file does; unpack it$"),
        (b"the cat \0 sat on the mat\n", r"a NUL in \S+a\.txt, line 1, as in .*; remove it, or take bytes: --set"),
        (b"a b c\n" * 100 + b"x\0y\n", r"a NUL in \S+a\.txt, line 101, as in .*; remove it, or take bytes: --set"),
        (b"a\0\n", r"a NUL in \S+a\.txt, line 1, .*; give --set data\.encoding=utf-16-le, or take bytes: --set"),
    ],
)
def test_what_a_file_may_be_is_said(tmp_path: Path, content: bytes, told: str):
    (tmp_path / "a.txt").write_bytes(content)
    splits = {"valid": Text(tmp_path / "a.txt", str(tmp_path / "a.txt"))}
    with pytest.raises(UserError, match=f"the valid split must be .*{told}"):
        checks.require(splits, "word")
    part = splits["valid"].part(len(content) // 2 // 4 * 4, len(content))
    if "line 1" not in told:
        with pytest.raises(UserError, match=told.partition("byte 0xff at byte offset 0; ")[2] or told):
            checks.require({"valid": part}, "char")


def test_no_hint_names_an_option_that_is_not_there(tmp_path: Path):
    for content in FAULTS:
        with pytest.raises(UserError) as caught:
            checks.require({"test": Text(content)}, "word", checks.Ways("", ""))
        assert "--" not in str(caught.value)
        assert re.search(r"; (convert|replace|remove) [^;]+$", str(caught.value))


def test_a_mark_in_the_middle_is_a_warning(tmp_path: Path):
    write(tmp_path / "train.txt", b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    write(tmp_path / "valid.txt", b"\xef\xbb\xbfa\r\n")
    found = corpora.load(str(tmp_path), tmp_path)
    assert found.require("char") == []
    (warning,) = found.require("word")
    assert warning.startswith(f"{tmp_path}/train.txt, line 2 holds U+FEFF")


@pytest.mark.parametrize("name", ["text8", "enwik8"])
def test_million_characters(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(characters, "SIZE", 200)
    monkeypatch.setattr(characters, "SHARES", {"train": (0, 180), "valid": (180, 190), "test": (190, 200)})
    with pytest.raises(UserError, match=rf"{name} must be in \S+; got no file {name} there"):
        corpora.load(name, tmp_path)
    content = b"ab c" * 50 if name == "text8" else "\u00e9".encode() * 100
    for suffix in (".gz", ""):
        path = write(tmp_path / name / f"{name}{suffix}", content)
        found = corpora.load(name, tmp_path)
        assert {split: text.size for split, text in found.splits.items()} == {"train": 180, "valid": 10, "test": 10}
        assert whole(found) == content
        path.unlink()
    write(tmp_path / name / name, content[1:])
    with pytest.raises(UserError, match=rf"{name} must hold 200 bytes; got \S+ with 199"):
        corpora.load(name, tmp_path)
    write(tmp_path / name / name, content[:-1] + b"X")
    if name == "text8":
        with pytest.raises(UserError, match=r"text8 must hold a to z and spaces alone; got b'X'"):
            corpora.load(name, tmp_path)


def test_the_characters_of_the_treebank(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        hub, "load", lambda _, folder: {split: Text.of([f" {folder.name} <unk> N ", ""]) for split in corpora.SPLITS}
    )
    monkeypatch.setattr(characters, "PTB", dict.fromkeys(corpora.SPLITS, 13))
    assert [*corpora.load("ptb-char", tmp_path).splits["train"]] == ["ptb <unk> N", ""]
    monkeypatch.setattr(characters, "PTB", dict.fromkeys(corpora.SPLITS, 14))
    with pytest.raises(UserError, match=r"ptb-char must hold 14 characters in train; got 13"):
        corpora.load("ptb-char", tmp_path)
