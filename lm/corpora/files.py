"""Texts in files: plain, compressed, in another encoding, tables; one that is split, or several that are joined."""

import codecs
import functools
import glob
import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Any, Literal, get_args

from lm import text as texts
from lm.errors import UserError
from lm.files import cache_file, reading, write_chunks
from lm.text import SPACES, Text

Split = Literal["train", "valid", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
FEW_LINES = 100  # a text of fewer is split by characters
_PIECE = 2**20
_PACKED = 2**12  # bytes that are unpacked at once: a few may become many
_UTF8 = ("utf-8", "utf_8", "utf8")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        encoding: of text files, a name that Python knows.
        split: shares of train, valid and test of a text that is one file.
        column: of a table, the one that holds the text.
    """

    encoding: str = "utf-8"
    split: str = "90/5/5"
    column: str = "text"

    def __post_init__(self) -> None:
        known_encoding(self.encoding, "the encoding of a text")


def known_encoding(name: str, setting: str) -> str:
    """Returns the name of an encoding as it is; `setting` is what named it.

    Raises:
        UserError: Python does not know it, or it is none of text, as base64.
    """
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise UserError(
            f"{setting} must be an encoding of text that Python knows; got {name!r}; write utf-8, latin-1, gb18030 …"
        ) from None
    return name


PLAIN = Reading()


def shares(form: str) -> tuple[float, float, float]:
    """Reads `90/5/5`: the shares of train, valid and test.

    Raises:
        UserError: another form, or no share for train.
    """
    numbers = form.split("/")
    if len(numbers) != 3 or not all(re.fullmatch(r"\d{1,4}(\.\d{1,4})?", number) for number in numbers):
        raise UserError(f"data.split must be shares of train, valid and test such as 90/5/5; got {form!r}; write it so")
    train, valid, test = map(float, numbers)
    if not train:
        raise UserError(f"data.split must leave a share for train; got {form!r}; give it one, such as 90/5/5")
    return train, valid, test


def is_pattern(source: str) -> bool:
    """Returns whether a source is a pattern of paths, such as `src/**/*.py`."""
    return glob.has_magic(source) and not Path(source).exists()


def find(folder: Path, stems: Iterable[str]) -> Path | None:
    """Returns the first file of a folder whose name is one of the stems, perhaps compressed, or a table."""
    for stem in stems:
        for suffix in ("", ".gz", ".zst"):
            if (path := folder / f"{stem}{suffix}").exists():
                return path
        if stem.endswith(".txt") and (path := folder / f"{stem.removesuffix('.txt')}.parquet").exists():
            return path
    return None


def refuse_pipe(path: Path, instead: str) -> None:
    """Raises UserError if the path is a pipe, as of a shell's <(command)."""
    if path.is_fifo():
        raise UserError(f"data must be files, which are read more than once; got {path}, a pipe; {instead}")


def open_text(path: Path, options: Reading, cache: Path) -> Text:
    """Returns the text of a file as UTF-8: of `.gz`, `.zst` and `.parquet` files too, and of other encodings.

    Raises:
        UserError: the file cannot be read, or is not in the encoding; a table without the column.
    """
    with reading(path, "a text"):
        known = path.stat()
    form = path.suffix.lower()
    plain = options.encoding.lower() in _UTF8
    if form not in _READERS and plain:
        return Text(path, str(path), cache=cache)
    key = [str(path.resolve()), known.st_size, known.st_mtime_ns, options.encoding, options.column]
    return kept(lambda: _chunks(path, options), key, cache, str(path))


def given(content: bytes | Path, name: str, encoding: str) -> Text:
    """Returns the text of a file, or of bytes, as UTF-8, and keeps nothing of it in files.

    Raises:
        UserError: the file cannot be read, or is not in the encoding.
    """
    if isinstance(content, Path) and content.is_fifo():  # a pipe is read once
        content = b"".join(_plain(content, PLAIN))
    if encoding.lower() in _UTF8:
        return Text(content, name)
    chunks = [content] if isinstance(content, bytes) else _plain(content, PLAIN)
    return Text(b"".join(_decoded(chunks, known_encoding(encoding, "the encoding of a text"), name)), name)


def join(pattern: str, options: Reading, cache: Path) -> Text:
    """Returns the texts of all files that a pattern finds, in the order of their paths, as one.

    Raises:
        UserError: no file.
    """
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"a pattern must find files; got {pattern!r}, which finds none; check it, and put it in quotes")
    stats = [path.stat() for path in paths]
    key = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
    key.append([options.encoding, options.column])
    found = kept(lambda: _joined(paths, options), key, cache, pattern)
    return replace(found, joined=tuple(map(str, paths)), files=functools.partial(_sizes, paths, options))


def _sizes(paths: Iterable[Path], options: Reading) -> Iterator[tuple[str, int]]:
    """The name of each file, and its bytes in what they are joined to."""
    return ((str(path), sum(map(len, _joined([path], options)))) for path in paths)


def _joined(paths: Iterable[Path], options: Reading) -> Iterator[bytes]:
    for path in paths:
        last = b"\n"
        for last in _chunks(path, options):
            yield last
        if not last.endswith(b"\n"):  # else the last line would go on in the next file
            yield b"\n"


def kept(chunks: Callable[[], Iterator[bytes]], key: Any, cache: Path, name: str) -> Text:
    """Returns bytes as a text: in memory where they are few, else in a file of the cache, which is used again for an
    equal key."""
    place = cache_file(cache, f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.txt")
    if place.exists():
        return Text(place, name, cache=cache)
    first, size, made = [], 0, chunks()
    for chunk in made:
        first.append(chunk)
        if (size := size + len(chunk)) > texts.LARGE:
            break
    else:
        return Text(b"".join(first), name)
    write_chunks(place, chain(first, made))
    return Text(place, name, cache=cache)


def _chunks(path: Path, options: Reading) -> Iterator[bytes]:
    """The bytes of a file as UTF-8, however it is kept."""
    found = _READERS.get(path.suffix.lower(), _plain)(path, options)
    if options.encoding.lower() in _UTF8 or path.suffix.lower() == ".parquet":
        yield from found
        return
    yield from _decoded(found, options.encoding, str(path))


def _decoded(chunks: Iterable[bytes], encoding: str, name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
            offset += len(chunk)
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as fault:
        raise UserError(
            f"a text must be in the encoding that is named, {encoding}; got {name}, which is not ({fault}) near byte "
            f"{offset + getattr(fault, 'start', 0):,}; name another, or convert the file to UTF-8"
        ) from None


def _plain(path: Path, _: Reading) -> Iterator[bytes]:
    with reading(path, "a text"), path.open("rb") as file:
        yield from _pieces(file)


def _gzip(path: Path, _: Reading) -> Iterator[bytes]:
    with reading(path, "a text"):
        try:
            with gzip.open(path) as file:
                yield from _pieces(file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
            raise _damaged(path, str(fault)) from None


def _zstd(path: Path, _: Reading) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(
            f"reading {path} needs the package zstandard, which is not installed; install it with: "
            "pip install 'rnnorm[lm]'"
        ) from None
    make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    unpacker = None  # of the frame that has begun
    try:
        with reading(path, "a text"), path.open("rb") as file:
            while piece := file.read(_PACKED):
                while piece:
                    unpacker = unpacker or make()
                    if unpacked := unpacker.decompress(piece):
                        yield unpacked
                    piece, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
    except zstandard.ZstdError as fault:
        raise _damaged(path, str(fault)) from None
    if unpacker is not None:
        raise _damaged(path, "it ends within a frame")


def _pieces(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _parquet(path: Path, options: Reading) -> Iterator[bytes]:
    from pyarrow import ArrowException, parquet

    try:
        with reading(path, "a text"), parquet.ParquetFile(path) as table:
            column = text_column(table.schema_arrow.names, options.column, str(path))
            require_text(str(table.schema_arrow.field(column).type), column, str(path))
            for batch in table.iter_batches(columns=[column]):
                yield rows(batch.column(0).to_pylist())
    except ArrowException as fault:
        raise _damaged(path, str(fault).splitlines()[0]) from None


def text_column(names: Iterable[str], wanted: str, where: str) -> str:
    """Returns the column that holds the text: the wanted one, or the only one where none was named.

    Raises:
        UserError: neither.
    """
    names = list(names)
    if wanted in names:
        return wanted
    if len(names) == 1 and wanted == PLAIN.column:
        return names[0]
    raise UserError(
        f"data.column must be a column of {where}; got {wanted!r}, and it has {', '.join(names)}; "
        "name one, by --set data.column=NAME to train and by --column NAME elsewhere"
    )


def require_text(kind: str, column: str, where: str) -> None:
    """Raises UserError where a column of this type, as pyarrow names it, does not hold text."""
    if "string" not in kind or any(nested in kind for nested in ("list", "struct", "map")):
        raise UserError(
            f"data.column must hold text; got {column!r} of {where}, which holds {kind}; name another column"
        )


def rows(texts: Iterable[Any]) -> bytes:
    """Returns rows of a table as lines. A row that holds several lines is several lines; one that is absent is none."""
    return b"".join(f"{str(text).removesuffix(chr(10))}\n".encode() for text in texts if text is not None)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} must be a whole file; got one that is damaged ({why}); get it again")


_READERS: dict[str, Callable[[Path, Reading], Iterator[bytes]]] = {
    ".gz": _gzip,
    ".zst": _zstd,
    ".parquet": _parquet,
}


def divide(text: Text, form: str, needed: Iterable[str] = SPLITS) -> tuple[dict[str, Text], str]:
    """Splits one text into contiguous blocks: between lines, or between characters where it has few lines.

    Returns:
        The splits that hold something, and how it was split, as a line for a person.

    Raises:
        UserError: a form that `shares` refuses; a text too short for a split that has a share and is needed.
    """
    parts = dict(zip(SPLITS, shares(form), strict=True))
    by = "lines" if _has_many_lines(text) else "characters"
    cuts = [round(text.size * share / sum(parts.values())) for share in accumulate(parts.values())]
    cuts = [0, *(_line_end(text, cut) if by == "lines" else _character(text, cut) for cut in cuts)]
    found = {
        name: text.part(start, stop)
        for (name, share), start, stop in zip(parts.items(), cuts, cuts[1:], strict=False)
        if share and (stop > start or name in needed)
    }
    for name, one in found.items():
        if not one.size:
            raise UserError(
                f"{text.name} must be long enough to split {form}; got {text.size:,} bytes, which leave none for "
                f"{name}; use a longer text, or a folder with {name}.txt"
            )
    counted = ", ".join(f"{name} {one.facts.lines:,} lines of {one.size:,} bytes" for name, one in found.items())
    return found, f"{text.name} is split {form} by {by}: {counted}"


def _has_many_lines(text: Text) -> bool:
    """Whether there are `FEW_LINES` line feeds; reads no further."""
    counts = accumulate(block.count(b"\n") for block in text.blocks())
    return any(count >= FEW_LINES for count in counts)


def _line_end(text: Text, cut: int) -> int:
    """Where the first line ends that ends at this offset or after it."""
    offset = begin = max(0, cut - 1)
    for block in text.part(begin, text.size).blocks():
        if (found := block.find(b"\n")) >= 0:
            return offset + found + 1
        offset += len(block)
    return text.size


def _character(text: Text, cut: int) -> int:
    """The nearest end of a word before this offset; of a character, where no word ends near it."""
    near = max(0, cut - 200)
    before = b"".join(text.part(near, cut).blocks())
    after = b"".join(text.part(cut, min(cut + 1, text.size)).blocks())
    if not after:
        return cut
    if (space := max(before.rfind(bytes([space])) for space in SPACES)) >= 0:
        return near + space + 1
    while after[0] & 0xC0 == 0x80 and before:  # inside a character
        before, after = before[:-1], before[-1:] + after
    return near + len(before)
