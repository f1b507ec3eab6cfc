"""What a tokenizer cannot take, found in every split before training starts, with its file and line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lm.errors import UserError
from lm.text import Text
from lm.tokenizers import EOS

# How files of other forms begin, and what their names must end in to be read as such.
_FORMS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_PACKED = {b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zX": ".xz"}  # that are not read
_SOME = 1000  # bytes
_MARKED_UP = re.compile(r"\.(csv|tsv|jsonl|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)
_AS_IT_IS = "{} is read as plain text, its markup too; to read one column of it, write that column to a file of text"
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Ways:
    """What a command takes before an encoding and before a kind of tokens, empty where it takes none; and whether it
    reads packed files and tables."""

    encoding: str = "--set data.encoding="
    kind: str = "--set data.tokenizer="
    packed: bool = True


OF_TRAINING = Ways()


def require(splits: Mapping[str, Text], kind: str, ways: Ways = OF_TRAINING) -> list[str]:
    """Returns warnings of what is taken as it is, in any split.

    Arguments:
        kind: of the tokenizer. Bytes take everything.
        ways: how the error may say that the text can be read.

    Raises:
        UserError: text that is not UTF-8 or holds NUL; for words, the word `<eos>`, or lines that end with carriage
            returns alone.
    """
    found = []
    if kind != "byte":
        found += [warning for split, text in splits.items() for warning in _checked(split, text, kind, ways)]
    for text in splits.values():
        marked_up = [name for name in text.joined or (text.name,) if _MARKED_UP.search(name)]
        found += [_AS_IT_IS.format(name) for name in marked_up[:1]]
    return [*dict.fromkeys(found)]  # of one file that is split: once


def _checked(split: str, text: Text, kind: str, ways: Ways) -> list[str]:
    found = text.facts.found
    head = _head(text)
    form = next((end for start, end in (_FORMS | _PACKED).items() if head.startswith(start)), None)
    if form and {"utf8", "nul"} & found.keys():
        way = "write its column of text to a file" if form == ".parquet" else "unpack it"
        if ways.packed and form in _FORMS.values() and not text.name.lower().endswith(form):
            way += f", or give it a name that ends in {form}"
        raise UserError(f"the {split} split must be text; got {text.name}, which begins as a {form} file does; {way}")
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    as_bytes = [f"take bytes: {ways.kind}byte"] if ways.kind else []
    if "utf8" in found:
        offset = found["utf8"]
        byte = next(text.part(offset, offset + 1).blocks())[0]
        file, line, at = text.locate(offset)
        named = (
            [f"name its encoding, as by {ways.encoding}{encoding or _likely(text) or 'latin-1'}"]
            if ways.encoding
            else []
        )
        raise UserError(
            f"the {split} split must be UTF-8 text; got {file}, line {line:,}, with byte 0x{byte:02x} at byte "
            f"offset {at}; {_either(['convert the file to UTF-8', *named, *as_bytes])}"
        )
    if "nul" in found:
        likely = encoding or _likely(text)
        way = f"give {ways.encoding}{likely}" if ways.encoding else "convert the file to UTF-8"
        raise UserError(
            f"the {split} split must be text; got a NUL in {text.place(found['nul'])}, as in UTF-16 and binary files; "
            f"{_either([way if likely else 'remove it', *as_bytes])}"
        )
    return _checked_words(split, text, ways) if kind == "word" else []


def _checked_words(split: str, text: Text, ways: Ways) -> list[str]:
    found = text.facts.found
    if "eos" in found:
        other = [f"use another tokenizer, such as {ways.kind}bpe"] if ways.kind else []
        raise UserError(
            f"the {split} split must not hold the word {EOS}, which marks the end of a line; got it in "
            f"{text.place(found['eos'])}; {_either(['replace the word', *other])}"
        )
    if "cr" in found and not text.facts.line_feeds:
        raise UserError(
            f"the lines of the {split} split must end with line feeds; got carriage returns alone in "
            f"{text.place(found['cr'])}; convert it, as by tr '\\r' '\\n'"
        )
    warnings = []
    if "cr" in found:
        warnings.append(
            f"{text.place(found['cr'])} holds a carriage return that no line feed follows: it is white space, and ends "
            "no line; where lines end so, convert the file, as by tr '\\r' '\\n'"
        )
    if "bom" in found:
        place = text.place(found["bom"])
        warnings.append(f"{place} holds U+FEFF, a byte order mark inside the text: it is part of its word")
    return warnings


def _head(text: Text) -> bytes:
    """The first bytes of what a text, or a part of one, lies in."""
    return b"".join(replace(text, start=0, stop=min(4, text.start + text.size), watch=None).blocks())


def _likely(text: Text) -> str | None:
    """The encoding to try for a text without a mark: NUL is every other byte of most UTF-16; None where it is rare."""
    if (first := text.facts.found.get("nul")) is None:
        return "latin-1"
    some = b"".join(text.part(max(0, first - _SOME), min(first + _SOME, text.size)).blocks())
    if some.count(0) < len(some) / 4:
        return None
    return "utf-16-le" if (text.start + first) % 2 else "utf-16-be"


def _either(ways: Sequence[str]) -> str:
    *first, last = ways
    return f"{', '.join(first)}, or {last}" if first else last
