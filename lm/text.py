"""A text as bytes, read block by block: a file, a part of one, or bytes in memory; and what words are."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.files import cache_file, reading, utf8, write_whole

BLOCK = 2**22  # bytes
LARGE = 2**24  # bytes of a text from which on what is made of it is kept in files
BOM = b"\xef\xbb\xbf"
SPACES = b" \t\n\r\x0b\x0c"
_WORD = re.compile(r"[^ \t\n\r\x0b\x0c]+")  # str.split would also cut at no-break spaces and other Unicode blanks


def words(line: str) -> list[str]:
    """Returns the words of a line: what stands between runs of ASCII white space."""
    return _WORD.findall(line)


@dataclass(frozen=True)
class Facts:
    """What one pass over a text finds.

    Attributes:
        bytes, characters: of the whole text.
        plain_bytes, plain_characters: of the words of each line with one space between them, and a line feed.
        words: see `words`.
        lines: a last line without a line end counts.
        sha256: of the bytes.
        lines_sha256: of each line and a line feed, without a BOM at the start and carriage returns before line feeds.
        line_feeds: lines but a last one without a line end.
        found: first offset of what may be wrong: `utf8`, `nul`, `cr` (not before a line feed), `bom` (not at the
            start), and the words `eos` and `unk`.
    """

    bytes: int
    characters: int
    plain_bytes: int
    plain_characters: int
    words: int
    lines: int
    sha256: str
    lines_sha256: str
    line_feeds: int
    found: dict[str, int]

    def digest(self, lossless: bool) -> str:
        """Returns the sha256 of what a tokenizer reads: the bytes, or the lines."""
        return self.sha256 if lossless else self.lines_sha256


@dataclass(frozen=True)
class Text:
    """One text: the bytes, or the part `start` … `stop` - 1 of a file; `name` is what errors call it.

    What is found in a large file is kept in the folder `cache`, and trusted while the file's size and time stay.

    Iterating yields its lines as `str`: cut at line feeds alone, without a BOM at the start and a carriage return at
    the end of a line.
    """

    content: bytes | Path
    name: str = "the text"
    start: int = 0
    stop: int | None = None
    cache: Path | None = field(default=None, compare=False)
    watch: Callable[[int], None] | None = field(default=None, compare=False)  # gets the number of bytes read
    joined: tuple[str, ...] = field(default=(), compare=False)  # names of the files that it was joined from
    files: Callable[[], Iterable[tuple[str, int]]] | None = field(default=None, compare=False)  # and their sizes

    @classmethod
    def of(cls, lines: "Iterable[str] | Text", name: str = "the text") -> "Text":
        """Returns the text of these lines; a text is returned as it is.

        Raises:
            UserError: a line that is not text.
        """
        if isinstance(lines, Text):
            return lines
        return cls.of_string("".join(f"{line}\n" for line in lines), name)

    @classmethod
    def of_string(cls, content: str, name: str = "the text") -> "Text":
        """Returns a string as a text.

        Raises:
            UserError: it is not text.
        """
        return cls(utf8(content, name), name)

    @cached_property
    def size(self) -> int:
        """In bytes."""
        if self.stop is not None:
            return self.stop - self.start
        if isinstance(self.content, bytes):
            return len(self.content) - self.start
        with reading(self.content, "a text"):
            return self.content.stat().st_size - self.start

    def part(self, start: int, stop: int) -> "Text":
        """Returns the bytes start … stop - 1 as a text."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def blocks(self, size: int = BLOCK) -> Iterator[bytes]:
        """Yields the bytes in order. A block ends after a line feed; where it holds none, before white space, else
        between characters."""
        rest = b""
        for block in self._read(size):
            joined = rest + block
            cut = _cut(joined)
            if cut:
                yield joined[:cut]
            rest = joined[cut:]
        if rest:
            yield rest

    def blocks_of_words(self) -> Iterator[bytes]:
        """Yields the blocks in order, joined where a word continues from one into the next."""
        held: list[bytes] = []
        for block in self.blocks():
            if held and (held[-1][-1] in SPACES or block[0] in SPACES):
                yield b"".join(held)
                held = []
            held.append(block)
        if held:
            yield b"".join(held)

    def _read(self, size: int) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            stop = self.start + self.size
            for at in range(self.start, stop, size):
                yield self._seen(self.content[at : min(at + size, stop)])
            return
        with reading(self.content, "a text"), self.content.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                block = file.read(min(size, left))
                if not block:
                    raise UserError(f"{self.name} must not change while it is read; it became shorter; start again")
                left -= len(block)
                yield self._seen(block)

    def _seen(self, block: bytes) -> bytes:
        if self.watch is not None:
            self.watch(len(block))
        return block

    def __iter__(self) -> Iterator[str]:
        rest = ""
        for number, block in enumerate(self.blocks()):
            *lines, rest = (rest + (block.removeprefix(BOM) if number == 0 else block).decode()).split("\n")
            yield from (line.removesuffix("\r") for line in lines)
        if rest:
            yield rest.removesuffix("\r")

    @property
    def is_large(self) -> bool:
        """Whether what is made of the text is kept."""
        return self.cache is not None and self.size >= LARGE

    @cached_property
    def facts(self) -> Facts:
        """What one pass over the text finds."""
        if self.cache is None or not isinstance(self.content, Path) or not self.is_large:
            return _examine(self)
        with reading(self.content, "a text"):
            known = self.content.stat()
        key = [_FORM, str(self.content.resolve()), known.st_size, known.st_mtime_ns, self.start, self.size]
        place = cache_file(self.cache, f"facts-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json")
        if place.exists():
            with suppress(ValueError, TypeError, RecursionError):  # of another version
                return Facts(**json.loads(place.read_bytes()))
        with watched(self, "reading") as text:
            found = _examine(text)
        write_whole(place, json.dumps(asdict(found)).encode())
        return found

    def place(self, offset: int) -> str:
        """Returns the name of the text with the number of the line that holds the byte at this offset."""
        name, line, _ = self.locate(offset)
        return f"{name}, line {line:,}"

    def locate(self, offset: int) -> tuple[str, int, int]:
        """Returns where the byte at this offset is: the name of its file, the line there, and the offset there."""
        name, begin, at = self.name, 0, self.start + offset
        for each, size in self.files() if self.files else ():
            if at < begin + size:
                name = each
                break
            begin += size
        before = replace(self, start=begin, stop=at, watch=None)
        return name, 1 + sum(block.count(b"\n") for block in before._read(BLOCK)), at - begin


_FORM = 1  # of kept facts; raise it where their meaning changes


@contextmanager
def watched(text: Text, what: str) -> Iterator[Text]:
    """Inside, reading the text moves a bar on a terminal; elsewhere one line says what is done. Nothing where the text
    is small."""
    from tqdm import tqdm

    if text.size < LARGE:
        yield text
        return
    label = f"{what} {text.name}"
    with tqdm(total=text.size, desc=label, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if bar.disable:  # no terminal
            print(f"{label}: {text.size / 1e6:,.0f} MB", file=sys.stderr, flush=True)
        yield replace(text, watch=bar.update)


def _cut(block: bytes) -> int:
    """How many bytes of an unfinished block make up whole lines, else words, else characters."""
    if cut := block.rfind(b"\n") + 1:
        return cut
    if (cut := max(block.rfind(bytes([space])) for space in SPACES)) > 0:
        return cut
    cut = len(block.removesuffix(b"\r"))  # a line feed may follow
    while cut and cut > len(block) - 3 and block[cut - 1] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    if cut and block[cut - 1] >= 0xC0:
        cut -= 1
    return cut


_SUSPECTS = {
    "nul": re.compile(rb"\0"),
    "cr": re.compile(rb"\r(?!\n)"),
    "bom": re.compile(BOM),
    "eos": re.compile(rb"(?<![^\s])<eos>(?![^\s])"),
    "unk": re.compile(rb"(?<![^\s])<unk>(?![^\s])"),
}
_HINTS = {"nul": b"\0", "cr": b"\r", "bom": BOM, "eos": b"<eos>", "unk": b"<unk>"}  # faster to look for


def _examine(text: Text) -> Facts:
    raw, as_lines = hashlib.sha256(), None  # the second only once it differs
    found: dict[str, int] = {}
    count = _Count()
    held = b""
    for block in text.blocks():
        begin = 3 if count.bytes == 0 and block.startswith(BOM) else 0
        for name, hint in _HINTS.items():
            if name not in found and hint in block and (match := _SUSPECTS[name].search(block, begin)):
                found[name] = count.bytes + match.start()
        if "utf8" not in found and (fault := _not_utf8(block)) is not None:
            found["utf8"] = count.bytes + fault
        plain = held + block[begin:].replace(b"\r\n", b"\n")
        held = b"\r" if plain.endswith(b"\r") else b""  # of the last line it belongs to its end
        plain = plain.removesuffix(held)
        if as_lines is None and plain != block:
            as_lines = raw.copy()
        raw.update(block)
        if as_lines is not None:
            as_lines.update(plain)
        count.add(block, begin)
    if count.open:
        as_lines = raw.copy() if as_lines is None else as_lines
        as_lines.update(b"\n")
    return count.facts(raw.hexdigest(), (raw if as_lines is None else as_lines).hexdigest(), found)


_IS_SPACE = np.isin(np.arange(256), list(SPACES))


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


class _Count:
    """Counts what there is in blocks of a text."""

    def __init__(self) -> None:
        self.bytes = self.characters = self.words = self.line_feeds = 0
        self._inside = self._letters = self._full_lines = 0  # bytes and characters of words; lines that hold a word
        self._in_word = self._in_full_line = self.open = False

    def add(self, block: bytes, begin: int) -> None:
        """Counts a block; words begin at `begin`."""
        data = np.frombuffer(block, np.uint8)
        characters = _count((data & 0xC0) != 0x80)
        self.bytes += len(data)
        self.characters += characters
        letters = ~_IS_SPACE[data]
        letters[:begin] = False
        self._inside += _count(letters)
        self._letters += _count((data[letters] & 0xC0) != 0x80)
        first = letters.copy()
        first[1:] &= ~letters[:-1]
        first[0] &= not self._in_word
        self.words += _count(first)
        ends = np.flatnonzero(data == 10)
        self.line_feeds += len(ends)
        starts = np.concatenate([[0], ends + 1])
        full = np.logical_or.reduceat(np.append(letters, False), starts)
        full[0] |= self._in_full_line
        self._full_lines += _count(full[:-1])
        self._in_word, self._in_full_line, self.open = bool(letters[-1]), bool(full[-1]), bool(data[-1] != 10)

    def facts(self, sha256: str, lines_sha256: str, found: dict[str, int]) -> Facts:
        """Returns all counts with these."""
        lines = self.line_feeds + self.open
        between = self.words - self._full_lines - self._in_full_line + lines  # spaces and line feeds
        return Facts(
            bytes=self.bytes,
            characters=self.characters,
            plain_bytes=self._inside + between,
            plain_characters=self._letters + between,
            words=self.words,
            lines=lines,
            sha256=sha256,
            lines_sha256=lines_sha256,
            line_feeds=self.line_feeds,
            found=found,
        )


def _not_utf8(block: bytes) -> int | None:
    try:
        block.decode()
    except UnicodeDecodeError as fault:
        return fault.start
    return None
