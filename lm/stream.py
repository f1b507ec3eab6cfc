"""From lines to one stream of ids, from it to B columns, from these to the windows of truncated BPTT.

The targets of all windows together are the stream, each token once: the ragged end is padded
and masked, never cut.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lm.errors import UserError
from lm.text import Facts, Text
from lm.tokenizers import UNK, Tokenizer, Unit

_SOME = 2**22  # ids that are looked at together
MANY_UNKNOWN = 0.1  # share of unknown words in a text that is warned of


@dataclass(frozen=True)
class Stream:
    """A text as ids. Of words: for each line in order its words, then `<eos>` (a blank line is one `<eos>`); of a
    lossless tokenizer, the whole text, its line feeds as `<eos>`.

    Attributes:
        ids: [N] integers.
        words: words in the text, end of lines not counted.
        eos: tokens equal to the tokenizer's `eos`: ends of lines.
        unk: tokens equal to the tokenizer's `unk`.
        bytes, characters: of what the tokenizer reads: the whole text if it is lossless, else
            `" ".join(words) + "\\n"` over all lines; in UTF-8.
    """

    ids: np.ndarray
    words: int
    eos: int
    unk: int
    bytes: int
    characters: int

    def units(self, unit: Unit) -> int:
        """Returns how many of these the text holds; words with the ends of lines."""
        counts = {"word": self.words + self.eos, "token": len(self.ids), "character": self.characters}
        return {**counts, "byte": self.bytes}[unit]

    def counts(self, size: int) -> np.ndarray:
        """Returns how often each of `size` ids occurs, [V] int64."""
        found = np.zeros(size, np.int64)
        for start in range(0, len(self.ids), _SOME):
            found += np.bincount(self.ids[start : start + _SOME], minlength=size)
        return found


def encode(text: Text | Iterable[str], tokenizer: Tokenizer) -> Stream:
    """Returns the stream of a text, or of its lines."""
    text = Text.of(text)
    ids = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_text(text)])
    return stream_of(ids, text.facts, tokenizer)


def stream_of(ids: np.ndarray, facts: Facts, tokenizer: Tokenizer) -> Stream:
    """Returns the stream of a text from its ids and facts."""
    size = (facts.bytes, facts.characters) if tokenizer.lossless else (facts.plain_bytes, facts.plain_characters)
    eos, unk = (_count(ids, token) for token in (tokenizer.eos, tokenizer.unk))
    return Stream(ids, facts.words, eos, unk, *size)


def many_unknown(stream: Stream, tokenizer: Tokenizer, split: str) -> str | None:
    """Returns a warning where more than `MANY_UNKNOWN` of a split is `<unk>`, else None."""
    pieces = len(stream.ids) - stream.eos
    if not stream.unk > MANY_UNKNOWN * pieces:
        return None
    return (
        f"warning: {stream.unk / pieces:.1%} of the {split} text is {UNK}, not in the vocabulary of "
        f"{tokenizer.size:,}: its perplexity says little"
    )


def _count(ids: np.ndarray, token: int | None) -> int:
    parts = (ids[start : start + _SOME] == token for start in range(0, len(ids), _SOME))
    return 0 if token is None else sum(int(np.count_nonzero(part)) for part in parts)


@dataclass(frozen=True)
class Window:
    """One stretch of the columns.

    Attributes:
        inputs, targets: [t, B] int64; padding holds 0.
        lengths: [B] int64 on the CPU, or None when nothing is padded.
        mask: [t, B] bool, true where a target counts, or None when nothing is padded.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Columns:
    """A stream as B columns read side by side, T rows; windows are gathered from the stream as they are needed.

    Attributes:
        ids: [N] integers, the stream.
        starts: [B], where in the stream each column begins.
        steps: T.
        last: columns active in the last row; B when all are, 0 only in a part of wider columns.
        eos: the input of the first token of the stream.
        device: where windows are.
        held: on another device than the CPU, the columns there, [T + 1, B] int32 with the first inputs before them, so
            that windows cross nothing.
    """

    ids: np.ndarray
    starts: np.ndarray
    steps: int
    last: int
    eos: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    held: Tensor | None = None

    @property
    def width(self) -> int:
        """B."""
        return len(self.starts)

    def gather(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs (the token before each target) and targets of rows start … stop - 1, each [t, B] int64;
        padding holds 0."""
        position = self.starts + np.arange(start, stop)[:, None]
        padded = np.zeros(position.shape, dtype=bool)
        if stop == self.steps:
            padded[-1:, self.last :] = True
        position[padded] = 0
        targets = self.ids[position].astype(np.int64)
        inputs = self.ids[position - 1].astype(np.int64)
        inputs[position == 0] = self.eos
        inputs[padded] = targets[padded] = 0
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def window(self, start: int, stop: int) -> Window:
        """Returns rows start … stop - 1. A last window of one ragged row is refused: a length would be 0."""
        steps, width = self.steps, self.width
        if not 0 <= start < stop <= steps:
            raise ValueError(f"a window must lie within 0 … {steps}; got {start} … {stop}")
        ragged = stop == steps and self.last < width
        if ragged and stop - start == 1:
            raise ValueError("a window over the ragged last row must have two rows or more; join it to the one before")
        if self.held is None:
            inputs, targets = self.gather(start, stop)
        else:
            inputs, targets = self.held[start:stop].long(), self.held[start + 1 : stop + 1].long()
        if not ragged:
            return Window(inputs, targets, None, None)
        lengths = torch.full((width,), stop - start)
        lengths[self.last :] -= 1
        mask = torch.ones(stop - start, width, dtype=torch.bool, device=self.device)
        mask[-1, self.last :] = False
        return Window(inputs * mask, targets, lengths, mask)

    def to(self, device: torch.device) -> "Columns":
        """Returns the columns on a device, from which windows are taken."""
        if device == self.device:
            return self
        moved = replace(self, device=device, held=None)
        if device.type == "cpu":
            return moved
        return replace(moved, held=replace(self, device=torch.device("cpu"), held=None)._table().to(device))

    def _table(self) -> Tensor:
        """The first inputs and all targets, as `held` has them."""
        table = np.empty((self.steps + 1, self.width), np.int32)
        for start in range(0, self.steps, rows := max(1, _SOME // max(1, self.width))):
            stop = min(start + rows, self.steps)
            inputs, table[start + 1 : stop + 1] = self.gather(start, stop)
            if start == 0:
                table[0] = inputs[0]
        return torch.from_numpy(table)

    def active(self, start: int, stop: int) -> int:
        """Returns how many targets of the window count."""
        return (stop - start) * self.width - (self.width - self.last if stop == self.steps else 0)

    def part(self, first: int, stop: int) -> "Columns":
        """Returns the columns first … stop - 1."""
        last = min(max(self.last - first, 0), stop - first)
        held = None if self.held is None else self.held[:, first:stop].contiguous()
        return replace(self, starts=self.starts[first:stop], last=last, held=held)


def parts(width: int, count: int) -> list[tuple[int, int]]:
    """Returns `width` columns as `count` stretches (first, one past the last) of widths that differ by at most one."""
    cuts = [width * k // count for k in range(count + 1)]
    return list(itertools.pairwise(cuts))


def columns(ids: np.ndarray, batch_size: int, eos: int, what: str = "a text") -> Columns:
    """Cuts a stream of N ids into B columns of lengths that differ by at most one.

    The input of each column's first token is the token before it in the stream; of the very first, `eos`.

    Arguments:
        what: the text's role, for the error.

    Raises:
        UserError: fewer than 2 * B tokens.
    """
    if batch_size == 1 and len(ids) < 2:
        raise UserError(f"{what} must hold at least 2 tokens; got {len(ids)}; use a longer text")
    if batch_size < 1 or len(ids) < 2 * batch_size:
        raise UserError(
            f"{what} must hold at least 2 tokens for each of its columns; got {len(ids)} tokens for {batch_size} "
            "columns; lower the batch size (train.batch_size) or use a longer text"
        )
    long, last = divmod(len(ids), batch_size)
    column = np.arange(batch_size)
    return Columns(ids, column * long + np.minimum(column, last), long + (last > 0), last or batch_size, eos)


@dataclass(frozen=True)
class Policy:
    """How long the windows of an epoch are: `fixed`, `uniform` in low … high, or `awd` around high."""

    kind: str
    low: int
    high: int

    def draw(self, generator: np.random.Generator) -> int:
        """Returns the length of the next window."""
        if self.kind == "awd":  # salesforce/awd-lstm-lm, main.py: the base is halved once in twenty
            base = self.high if generator.random() < 0.95 else self.high / 2
            return max(self.low, int(generator.normal(base, 5)))
        return int(generator.integers(self.low, self.high + 1))

    def rate_scale(self, length: int) -> float:
        """Returns the factor of the learning rate for a window: length / n under AWD-LSTM's law, else 1."""
        return length / self.high if self.kind == "awd" else 1.0


_UNIFORM = re.compile(r"uniform\{(\d{1,9})\.\.(\d{1,9})\}")
_AWD = re.compile(r"awd\{(\d{1,9})\}")


def policy(text: str | int) -> Policy:
    """Reads a window-length policy: `64`, `uniform{2..128}` or `awd{70}`.

    Raises:
        UserError: another form, a length below 1, an empty range.
    """
    form = str(text).strip()
    found = None
    if re.fullmatch(r"\d{1,9}", form):
        found = Policy("fixed", int(form), int(form))
    elif match := _UNIFORM.fullmatch(form):
        found = Policy("uniform", int(match[1]), int(match[2]))
    elif match := _AWD.fullmatch(form):
        found = Policy("awd", 5, int(match[1]))
    if found is None or min(found.low, found.high) < 1 or (found.kind != "awd" and found.low > found.high):
        raise UserError(
            f"a window must be a length of at least 1 such as 64, uniform{{2..128}} or awd{{70}}; "
            f"got {form[:60]!r}; write one of these forms"
        )
    return found


def plan(policy_text: str | int, steps: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Returns the windows (start, stop) of an epoch: contiguous, over 0 … steps, a function of its arguments.

    The last window is never of length 1 (unless steps is): it is joined to the one before, because a
    column that is one shorter must still have a token in it.
    """
    law = policy(policy_text)
    generator = np.random.default_rng([seed, epoch])
    cuts = [0]
    while cuts[-1] < steps:
        cuts.append(min(cuts[-1] + law.draw(generator), steps))
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        del cuts[-2]
    return list(itertools.pairwise(cuts))
