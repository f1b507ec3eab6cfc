"""From a line of text to ids and back: words, characters, sentencepiece BPE and unigram; frozen.

A tokenizer is its state: a plain dictionary that goes into every checkpoint, into a JSON file,
and into one sha256.
"""

import base64
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lm.errors import UserError
from lm.files import read_text, write_whole
from lm.text import BOM, Text, words

UNK = "<unk>"
EOS = "<eos>"
KINDS = ("word", "char", "bpe", "unigram")
EOS_PIECE = 1  # its id in every sentencepiece model of ours
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
    def encode(self, line: str) -> list[int]:
        """Returns the ids of one line, without its end of line."""

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        """Yields the ids of a text, ends of lines among them, block by block."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; the end-of-line id becomes a line feed."""

    def piece(self, token: int) -> str:
        """Returns a token as the vocabulary writes it."""

    def state(self) -> dict[str, Any]:
        """Returns what `from_state` needs: text, numbers, lists and dictionaries only."""


class _Base:
    """What all of them share: the hash of the state, and decoding line by line."""

    @property
    def eos(self) -> int:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def encode(self, line: str) -> list[int]:
        raise NotImplementedError

    def _decode_line(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        lines = iter(text)
        while some := [*itertools.islice(lines, 10_000)]:
            found = [[*self.encode(" ".join(words(line))), self.eos] for line in some]
            yield np.fromiter(itertools.chain.from_iterable(found), np.int64)

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
    """

    kind: str
    pieces: tuple[str, ...]

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

    def encode(self, line: str) -> list[int]:
        if self.kind == "word":
            return self._encode_words(line.encode()).tolist()
        return [self._ids.get(character, self.unk) for character in line]

    def encode_text(self, text: Text) -> Iterator[np.ndarray]:
        if self.kind != "word":
            yield from super().encode_text(text)
            return
        for block in plain_blocks(text):
            yield self._encode_words(block.replace(b"\n", b" %b " % _LINE_END))

    def _encode_words(self, block: bytes) -> np.ndarray:
        found = block.split()  # of bytes, at ASCII white space
        if EOS.encode() in block and EOS.encode() in found:
            raise _reserved(block)
        return np.fromiter(map(self._known.__getitem__, found), np.int64, len(found))

    def piece(self, token: int) -> str:
        return self.pieces[token]

    def _decode_line(self, ids: list[int]) -> str:
        return (" " if self.kind == "word" else "").join(self.pieces[i] for i in ids)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "pieces": list(self.pieces)}


def plain_blocks(text: Text) -> Iterator[bytes]:
    """Yields the blocks of a text without a BOM at its start, its last line ended."""
    last = b""
    for number, block in enumerate(text.blocks()):
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


def _train_lookup(kind: str, text: Text, size: int | None) -> Lookup:
    counts: Counter[str] = Counter()
    for line in text:
        counts.update(words(line) if kind == "word" else " ".join(words(line)))
    if EOS in counts:
        raise _reserved(EOS.encode())
    unknown = counts.pop(UNK, 0)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = len(ranked) if size is None else size - 2
    unknown += sum(count for _, count in ranked[kept:])
    table = [*ranked[:kept], (UNK, unknown), (EOS, text.facts.lines)]
    return Lookup(kind, tuple(piece for piece, _ in sorted(table, key=lambda item: (-item[1], item[0]))))


def train(kind: str, text: Iterable[str] | Text, size: int | None = None) -> Tokenizer:
    """Builds a tokenizer from the training lines alone.

    Args:
        kind: "word", "char", "bpe" or "unigram".
        text: the training text, or its lines; runs of white space count as one space.
        size: V, all pieces counted. None: every word or character of the text; for bpe and unigram 8,000, or
            as many as the text gives.

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
    if kind in ("word", "char"):
        return _train_lookup(kind, Text.of(text), size)
    return _train_pieces(kind, Text.of(text), size)


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer whose `state()` this is."""
    try:
        kind = state["kind"]
        if kind in ("word", "char"):
            pieces = tuple(state["pieces"])
            "".join(pieces).encode()  # half a surrogate pair is no text
            whole = all(isinstance(piece, str) for piece in pieces)
            if whole and len(set(pieces)) == len(pieces) and {UNK, EOS} <= set(pieces):
                return Lookup(kind, pieces)
        if kind in ("bpe", "unigram"):
            found = Pieces(kind, base64.b64decode(state["model"], validate=True))
            if found.model and found.eos == EOS_PIECE:  # reading eos parses the model
                return found
    except (KeyError, TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"a tokenizer's state must be what its state() returned; got {str(state)[:60]!r}; train it again")


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer as JSON."""
    write_whole(Path(path), (json.dumps(tokenizer.state(), ensure_ascii=False, indent=0) + "\n").encode())


def load(path: Path) -> Tokenizer:
    """Reads a tokenizer that `save` wrote."""
    try:
        state = json.loads(read_text(Path(path), "a tokenizer"))
    except (ValueError, RecursionError) as fault:  # an integer of 5,000 digits is a bare ValueError
        raise UserError(f"a tokenizer file must be JSON; got {path}: {fault}; train the tokenizer again") from None
    return from_state(state)


# sentencepiece writes a space as U+2581, takes U+2585 as a mark and skips NUL: escaped, they survive.
_ESCAPES = str.maketrans({"\x1b": "\x1b0", "\u2581": "\x1b1", "\u2585": "\x1b2", "\0": "\x1b3"})
_UNESCAPES = {"0": "\x1b", "1": "\u2581", "2": "\u2585", "3": "\0"}
_ESCAPED = re.compile("\x1b([0-3])")


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: _UNESCAPES[found[1]], text)


@dataclass(frozen=True)
class Pieces(_Base):
    """A sentencepiece model. Lossless: any line decodes to itself, by bytes where no piece fits.

    `unk` is the piece of the text's own `<unk>` (Penn Treebank's); nothing is unknown to the model.
    """

    kind: str
    model: bytes

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

    def encode(self, line: str) -> list[int]:
        return list(self._processor.EncodeAsIds(line.translate(_ESCAPES)))

    def piece(self, token: int) -> str:
        return _unescaped(self._processor.IdToPiece(token))

    def _decode_line(self, ids: list[int]) -> str:
        return _unescaped(self._processor.DecodeIds(ids))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode("ascii")}


def _train_pieces(kind: str, lines: Iterable[str], size: int | None) -> Pieces:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=_escaped(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=DEFAULT_PIECES if size is None else size,
            hard_vocab_limit=size is not None,  # a size that was asked for is met or refused
            num_threads=1,  # unigram pieces depend on it
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
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
    return Pieces(kind, model.getvalue())


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


def _escaped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if text := " ".join(words(line)):
            yield text.translate(_ESCAPES)
