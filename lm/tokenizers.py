"""From text to ids and back: words, characters, bytes, sentencepiece BPE and unigram; frozen.

A tokenizer is its state: a plain dictionary that goes into every checkpoint, into a JSON file,
and into one sha256.

Words are what stands between white space, and a line ends with `<eos>`. All others are lossless: spaces, tabs and other
white space are part of the text, `<eos>` is the line feed, and the ids of a text are the whole text. Those that early
versions trained are not: their state lacks `lossless`, and they see a line as its words with one space between them.
"""

import base64
import hashlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lm.errors import UserError
from lm.files import read_text, write_whole
from lm.text import BOM, Text, words

UNK = "<unk>"
EOS = "<eos>"
Unit = Literal["word", "token", "character", "byte"]
KINDS = ("word", "char", "byte", "bpe", "unigram")
EOS_PIECE = 1  # its id in every sentencepiece model of ours
SAMPLE = 20_000_000  # bytes that sentencepiece is trained on
DEFAULT_PIECES = 8000  # size of a sentencepiece vocabulary when none is asked for
_LINE_END = b"\xff"  # stands for it among words; no UTF-8 text holds this byte


class Tokenizer(Protocol):
    """What the stream, the sampler and the checkpoint know of a tokenizer. V = `size`; ids are 0 … V - 1."""

    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def unk(self) -> int | None: ...
    @property
    def sha256(self) -> str: ...
    @property
    def unused(self) -> tuple[int, ...]:
        """Ids that no text is encoded to."""

    @property
    def lossless(self) -> bool:
        """Whether the ids of a text are the whole text."""

    @property
    def unit(self) -> Unit:
        """What its perplexity is per."""

    def encode(self, line: str) -> list[int]:
        """Returns the ids of one line, without its end of line."""

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        """Yields the ids of a text, ends of lines among them, block by block."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; the end-of-line id becomes a line feed."""

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the UTF-8 text of ids; of a lossless tokenizer, the very bytes that were encoded."""

    def piece(self, token: int) -> str:
        """Returns a token as the vocabulary writes it."""

    def unknown(self, text: str) -> list[str]:
        """Returns what in a text is read as `<unk>`, each word or character once."""

    def state(self) -> dict[str, Any]:
        """Returns what `from_state` needs: text, numbers, lists and dictionaries only."""


class _Base:
    """What all of them share: the hash of the state, and encoding and decoding by lines."""

    kind: str
    lossless: bool

    @property
    def eos(self) -> int:
        raise NotImplementedError

    @property
    def unused(self) -> tuple[int, ...]:
        return ()

    @property
    def unit(self) -> Unit:
        return _UNITS[self.kind] if self.lossless else "word"

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def encode(self, line: str) -> list[int]:
        raise NotImplementedError

    def _encode_lines(self, lines: list[str]) -> list[list[int]]:
        return [self.encode(line) for line in lines]

    def _decode_line(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        if self.lossless:
            for block in text.blocks():
                *lines, rest = self._encode_lines(block.decode().split("\n"))
                yield _joined([*([*line, self.eos] for line in lines), rest])
            return
        whole = iter(text)
        while some := [*itertools.islice(whole, 10_000)]:
            yield _joined([*line, self.eos] for line in self._encode_lines([" ".join(words(line)) for line in some]))

    @cached_property
    def sha256(self) -> str:
        canonical = json.dumps(self.state(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        lines: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == self.eos:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._decode_line(line) for line in lines)

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()

    def unknown(self, text: str) -> list[str]:
        return []


_UNITS: dict[str, Unit] = {"word": "word", "char": "character", "byte": "byte", "bpe": "token", "unigram": "token"}


def _joined(parts: Iterable[list[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(parts), np.int64)


class _Known(dict[bytes, int]):
    """The ids of words; of one that is not there, `unk`."""

    unk: int

    def __missing__(self, word: bytes) -> int:
        return self.unk


@dataclass(frozen=True)
class Lookup(_Base):
    """One id per word, or one per character, by descending frequency in the training text, then by text.

    A piece that the training text does not hold becomes `<unk>`; so does the literal word `<unk>` (Penn
    Treebank's). The literal word `<eos>` cannot be distinguished from the end of a line and is refused.
    Characters are lossless but for those that are `<unk>`.
    """

    kind: str
    pieces: tuple[str, ...]
    lossless: bool = False

    @property
    def size(self) -> int:
        return len(self.pieces)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @cached_property
    def eos(self) -> int:
        return self._ids[EOS]

    @cached_property
    def unk(self) -> int:
        return self._ids[UNK]

    @cached_property
    def _known(self) -> _Known:
        known = _Known({piece.encode(): i for piece, i in self._ids.items()})
        known[_LINE_END] = known.pop(EOS.encode())
        known.unk = self.unk
        return known

    @cached_property
    def _by_code(self) -> np.ndarray:
        """The ids of characters, by their number."""
        table = np.full(sys.maxunicode + 1, self.unk, np.int32)
        for piece, i in self._ids.items():
            if len(piece) == 1:
                table[ord(piece)] = i
        table[ord("\n")] = self.eos
        return table

    def encode(self, line: str) -> list[int]:
        if self.kind == "word":
            return self._encode_words(line.encode()).tolist()
        return self._by_code[_codes(line)].tolist()

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        if self.kind == "word":
            for block in plain_blocks(text):
                yield self._encode_words(block.replace(b"\n", b" %b " % _LINE_END))
        elif self.lossless:
            for block in text.blocks():
                yield self._by_code[_codes(block.decode())].astype(np.int64)
        else:
            yield from super().encode_text(text)

    def _encode_words(self, block: bytes) -> np.ndarray:
        found = block.split()  # of bytes, at ASCII white space
        if EOS.encode() in block and EOS.encode() in found:
            raise _reserved(block)
        return np.fromiter(map(self._known.__getitem__, found), np.int64, len(found))

    def piece(self, token: int) -> str:
        return self.pieces[token]

    def unknown(self, text: str) -> list[str]:
        found = words(text) if self.kind == "word" else text.replace("\n", "")
        return [piece for piece in dict.fromkeys(found) if piece not in self._ids]

    def _decode_line(self, ids: list[int]) -> str:
        return (" " if self.kind == "word" else "").join(self.pieces[i] for i in ids)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "pieces": list(self.pieces)} | ({"lossless": True} if self.lossless else {})


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@dataclass(frozen=True)
class Bytes(_Base):
    """One id per byte, which is its value. Nothing is unknown; text need not be UTF-8."""

    kind: str = "byte"
    lossless: bool = True
    size: int = 256
    unk: int | None = None

    @property
    def eos(self) -> int:
        return ord("\n")

    def encode(self, line: str) -> list[int]:
        return [*line.encode()]

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        for block in text.blocks():
            yield np.frombuffer(block, np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self.to_bytes(ids).decode(errors="replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(map(int, ids))

    def piece(self, token: int) -> str:
        if token == self.eos:
            return EOS
        return chr(token) if 32 <= token < 127 else f"<0x{token:02X}>"

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}


def plain_blocks(text: Text) -> Iterator[bytes]:
    """Yields the blocks of a text, cut between words, without a BOM at its start, its last line ended."""
    last = b""
    for number, block in enumerate(text.blocks_of_words()):
        yield block.removeprefix(BOM) if number == 0 else block
        last = block
    if last and not last.endswith(b"\n"):
        yield b"\n"


def _reserved(text: bytes) -> UserError:
    begin = max(0, text.find(EOS.encode()) - 30)
    return UserError(
        f"text must not hold the word {EOS}, which marks the end of a line; "
        f"got {text[begin : begin + 60].decode(errors='replace')!r}; "
        "replace the word, or use a char, bpe or unigram tokenizer"
    )


def _train_words(text: Text, size: int | None, least: int) -> Lookup:
    counts: Counter[bytes] = Counter()
    for block in plain_blocks(text):
        counts.update(block.split())
    if EOS.encode() in counts:
        raise _reserved(EOS.encode())
    unknown = counts.pop(UNK.encode(), 0)
    return _by_frequency("word", counts, unknown, text, size, least)


def _train_characters(text: Text, size: int | None, least: int) -> Lookup:
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for block in text.blocks():
        counts += np.bincount(_codes(block.decode()), minlength=len(counts))
    counts[ord("\n")] = 0  # it is <eos>
    found = {chr(code).encode(): int(counts[code]) for code in np.flatnonzero(counts)}
    return _by_frequency("char", found, 0, text, size, least)


def _by_frequency(
    kind: str, counts: dict[bytes, int], unknown: int, text: Text, size: int | None, least: int
) -> Lookup:
    """The pieces with `<unk>` and `<eos>` among them, by descending frequency, then by text (in UTF-8, which has the
    same order)."""

    def place(item: tuple[bytes, int]) -> tuple[int, bytes]:
        return -item[1], item[0]

    kept = sorted((item for item in counts.items() if item[1] >= least), key=place)[: size and size - 2]
    unknown += sum(counts.values()) - sum(count for _, count in kept)
    ends = text.facts.lines if kind == "word" else text.facts.line_feeds
    table = sorted([*kept, (UNK.encode(), unknown), (EOS.encode(), ends)], key=place)
    return Lookup(kind, tuple(piece.decode() for piece, _ in table), lossless=kind == "char")


def train(
    kind: str,
    text: Iterable[str] | Text,
    size: int | None = None,
    *,
    min_count: int = 1,
    sample: int = SAMPLE,
) -> Tokenizer:
    """Builds a tokenizer from the training text alone.

    Args:
        kind: "word", "char", "byte", "bpe" or "unigram".
        text: the training text, or its lines.
        size: V, all pieces counted. None: every word or character of the text; for bpe and unigram 8,000, or
            as many as the text gives. Of bytes it is 256.
        min_count: word, char: how often the text must hold a piece; rarer ones are `<unk>`, which is so trained.
        sample: bpe, unigram: about as many bytes of the text are read, taken from all over it.

    Raises:
        UserError: an unknown kind, a bpe or unigram size that the text cannot fill, the word `<eos>` in a
            word text.
    """
    if kind not in KINDS:
        raise UserError(f"a tokenizer must be one of {', '.join(KINDS)}; got {kind!r}; choose one of these")
    if size is not None and size < 3:
        raise UserError(
            f"a vocabulary must have at least 3 pieces ({UNK}, {EOS} and one more); got {size}; ask for more"
        )
    text = Text.of(text)
    if kind == "byte":
        if size not in (None, 256):
            raise UserError(f"a vocabulary of bytes must have 256 pieces; got {size}; leave the size out")
        return Bytes()
    if kind in ("word", "char"):
        return (_train_words if kind == "word" else _train_characters)(text, size, min_count)
    return _train_pieces(kind, text, size, sample)


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer whose `state()` this is."""
    try:
        kind = state["kind"]
        if kind in ("word", "char"):
            pieces = tuple(state["pieces"])
            "".join(pieces).encode()  # half a surrogate pair is no text
            whole = all(isinstance(piece, str) for piece in pieces)
            if whole and len(set(pieces)) == len(pieces) and {UNK, EOS} <= set(pieces):
                return Lookup(kind, pieces, _lossless(state))
        if kind == "byte" and len(state) == 1:
            return Bytes()
        if kind in ("bpe", "unigram"):
            found = Pieces(kind, base64.b64decode(state["model"], validate=True), _lossless(state))
            if found.model and found.eos == EOS_PIECE:  # reading eos parses the model
                return found
    except (KeyError, TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"a tokenizer's state must be what its state() returned; got {str(state)[:60]!r}; train it again")


def _lossless(state: dict[str, Any]) -> bool:
    if state.get("lossless", True) is not True:
        raise ValueError
    return "lossless" in state


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer as JSON."""
    write_whole(Path(path), (json.dumps(tokenizer.state(), ensure_ascii=False, indent=0) + "\n").encode())


def load(path: Path) -> Tokenizer:
    """Reads a tokenizer that `save` wrote."""
    try:
        state = json.loads(read_text(Path(path), "a tokenizer"))
    except (ValueError, RecursionError) as fault:  # an integer of 5,000 digits is a bare ValueError
        raise UserError(
            f"a tokenizer file must be JSON; got {path}: {fault}; put the file there that was made"
        ) from None
    return from_state(state)


# sentencepiece writes a space as U+2581, takes U+2585 as a mark and skips NUL: escaped, they survive.
_ESCAPES = str.maketrans({"\x1b": "\x1b0", "\u2581": "\x1b1", "\u2585": "\x1b2", "\0": "\x1b3"})
_UNESCAPES = {"0": "\x1b", "1": "\u2581", "2": "\u2585", "3": "\0"}
_ESCAPED = re.compile("\x1b([0-3])")
UNFINISHED = ("\ufffd", "\x1b")  # how the text of pieces may end whose last character is not whole


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: _UNESCAPES[found[1]], text)


@dataclass(frozen=True)
class Pieces(_Base):
    """A sentencepiece model. Any line decodes to itself, by bytes where no piece fits.

    `unk` is the piece of the text's own `<unk>` (Penn Treebank's); nothing is unknown to the model.
    """

    kind: str
    model: bytes
    lossless: bool = False

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    @property
    def size(self) -> int:
        return int(self._processor.GetPieceSize())

    @cached_property
    def eos(self) -> int:
        return int(self._processor.eos_id())

    @cached_property
    def unk(self) -> int:
        return int(self._processor.PieceToId(UNK))

    @property
    def unused(self) -> tuple[int, ...]:
        return (int(self._processor.unk_id()),)  # bytes stand in for it

    def encode(self, line: str) -> list[int]:
        return list(self._processor.EncodeAsIds(line.translate(_ESCAPES)))

    def _encode_lines(self, lines: list[str]) -> list[list[int]]:
        return self._processor.EncodeAsIds([line.translate(_ESCAPES) for line in lines])

    def piece(self, token: int) -> str:
        return _unescaped(self._processor.IdToPiece(token))

    def _decode_line(self, ids: list[int]) -> str:
        return _unescaped(self._processor.DecodeIds(ids))

    def state(self) -> dict[str, Any]:
        kept = {"lossless": True} if self.lossless else {}
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode("ascii")} | kept


def _train_pieces(kind: str, text: Text, size: int | None, sample: int) -> Pieces:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=_escaped(text, sample),
            model_writer=model,
            model_type=kind,
            vocab_size=DEFAULT_PIECES if size is None else size,
            hard_vocab_limit=size is not None,  # a size that was asked for is met or refused
            num_threads=1,  # unigram pieces depend on it
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # so that the parts of a line are encoded as the line is
            allow_whitespace_only_pieces=True,  # indentation
            character_coverage=1.0,
            byte_fallback=True,
            max_sentence_length=2**30,  # longer lines would be dropped silently
            unk_piece="<0unk>",  # frees the name <unk>, which the text itself may hold
            user_defined_symbols=[UNK],
            bos_id=-1,
            pad_id=-1,
            unk_id=0,
            eos_id=EOS_PIECE,
            eos_piece=EOS,
            minloglevel=2,
        )
    except RuntimeError as fault:
        raise _misfit(kind, size, str(fault)) from None
    return Pieces(kind, model.getvalue(), lossless=True)


def _misfit(kind: str, size: int | None, fault: str) -> UserError:
    if "sentences_.empty()" in fault:
        return UserError(f"a {kind} vocabulary must be trained on text; got blank lines alone; give more text")
    if most := re.search(r"too high .* <= (\d+)", fault):
        return UserError(
            f"a {kind} vocabulary of this text must have at most {most[1]} pieces; got {size}; "
            "ask for fewer or give more text"
        )
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", fault):
        return UserError(
            f"a {kind} vocabulary of this text must have at least {least[1]} pieces (256 bytes, every "
            f"character and 3 marks); got {size}; ask for more"
        )
    return UserError(f"a {kind} vocabulary must fit its text; got {size}: {fault}; ask for another")


def _escaped(text: Text, sample: int) -> Iterator[str]:
    """The lines of a text that are not blank; of a large one, those of blocks that lie evenly over it."""
    share, taken, seen = min(1.0, sample / max(1, text.size)), 0, 0
    for block in text.blocks(2**16):
        seen += len(block)
        if taken >= share * seen:
            continue
        taken += len(block)
        for line in block.decode().split("\n"):
            if line.strip():
                yield line.translate(_ESCAPES)
