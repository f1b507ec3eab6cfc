"""Log-probabilities of a text, token by token, by lines."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lm import store, stream
from lm.evaluator import evaluating, perplexity, token_nlls
from lm.text import Text

if TYPE_CHECKING:
    from lm.trained import TrainedModel

HEADS = ("line", "token", "text", "log_prob", "surprisal", "perplexity")
_SHORT = 512  # tokens of a line that is computed beside others
_TOGETHER = 64  # lines


class Token(NamedTuple):
    """A token and its log-probability in nats.

    Attributes:
        text: as the vocabulary writes it: a word, a character, a sentencepiece piece; `<eos>` is the end of a line.
        log_prob: ln of its probability after the tokens before it.
    """

    text: str
    log_prob: float

    @property
    def prob(self) -> float:
        """Its probability."""
        return math.exp(self.log_prob)

    @property
    def surprisal(self) -> float:
        """-log2 of its probability."""
        return -self.log_prob / math.log(2)


@dataclass(frozen=True)
class ScoredLine:
    """A line with its end.

    Attributes:
        number: from 1.
        tokens: of the line, `<eos>` the last; a last line without a line end has none, where the tokenizer keeps text
            as it is.
    """

    number: int
    tokens: tuple[Token, ...]

    @property
    def log_prob(self) -> float:
        """The sum over the tokens, in nats."""
        return math.fsum(token.log_prob for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(-self.log_prob, len(self.tokens))


def lines(trained: "TrainedModel", text: Text, *, one_stream: bool) -> Iterator[ScoredLine]:
    """Yields the lines of a text.

    Arguments:
        one_stream: the state is carried from line to line, as `eval` does, whose nats these then are; else each line
            starts from the zero state, after `<eos>`.

    Raises:
        UserError: text that the tokenizer cannot read.
    """
    encoded = store.encoded(text, trained.tokenizer)
    if one_stream:
        yield from _of_one_stream(trained, encoded)
        return
    whole = enumerate(_apart(encoded.ids.tolist(), trained.tokenizer.eos), 1)
    while some := [*itertools.islice(whole, _TOGETHER)]:
        short = [line for line in some if len(line[1]) <= _SHORT]
        nats = dict(zip((number for number, _ in short), _together(trained, [line for _, line in short]), strict=True))
        for number, line in some:
            yield _scored(trained, number, line, nats[number] if number in nats else _alone(trained, line))


def _of_one_stream(trained: "TrainedModel", encoded: stream.Stream) -> Iterator[ScoredLine]:
    nats = token_nlls(trained.model, encoded, trained.tokenizer, trained.config.eval.chunk).tolist()
    begin = 0
    for number, line in enumerate(_apart(encoded.ids.tolist(), trained.tokenizer.eos), 1):
        yield _scored(trained, number, line, nats[begin : begin + len(line)])
        begin += len(line)


def _apart(ids: Iterable[int], eos: int) -> Iterator[list[int]]:
    line: list[int] = []
    for token in ids:
        line.append(token)
        if token == eos:
            yield line
            line = []
    if line:
        yield line


def _scored(trained: "TrainedModel", number: int, ids: list[int], nats: list[float]) -> ScoredLine:
    return ScoredLine(number, tuple(Token(trained.tokenizer.piece(i), -n) for i, n in zip(ids, nats, strict=True)))


def _together(trained: "TrainedModel", some: list[list[int]]) -> list[list[float]]:
    """The nats of short lines, side by side."""
    if not some:
        return []
    model, eos = trained.model, trained.tokenizer.eos
    lengths = torch.tensor([len(line) for line in some])
    targets = torch.zeros(int(lengths.max()), len(some), dtype=torch.int64)
    for column, line in enumerate(some):
        targets[: len(line), column] = torch.tensor(line)
    inputs = torch.cat([torch.full((1, len(some)), eos), targets[:-1]])
    device = next(model.parameters()).device
    with evaluating(model):
        hidden, _ = model(inputs.to(device), None, lengths)
        nats = model.token_nll(hidden, targets.to(device)).double().cpu()
    return [nats[: len(line), column].tolist() for column, line in enumerate(some)]


def _alone(trained: "TrainedModel", line: list[int]) -> list[float]:
    """The nats of a long line."""
    one = stream.Stream(np.array(line), 0, 0, 0, 0, 0)
    return token_nlls(trained.model, one, trained.tokenizer, trained.config.eval.chunk).tolist()


def tsv(found: Iterable[ScoredLine]) -> Iterator[str]:
    """Yields a table with tabs: a row for each token, a row `total` for each line, and one for all."""
    yield "\t".join(HEADS)
    tokens = 0
    sums: list[float] = []
    for line in found:
        for place, token in enumerate(line.tokens, 1):
            yield _row(line.number, place, _plain(token.text), token.log_prob, "")
        yield _row(line.number, "total", f"{len(line.tokens)} tokens", line.log_prob, repr(line.perplexity))
        tokens += len(line.tokens)
        sums.append(line.log_prob)
    total = math.fsum(sums)
    yield _row("all", "total", f"{tokens} tokens", total, repr(perplexity(-total, tokens)))


def _row(line: int | str, place: int | str, text: str, log_prob: float, ppl: str) -> str:
    return f"{line}\t{place}\t{text}\t{log_prob!r}\t{-log_prob / math.log(2)!r}\t{ppl}"


def _plain(text: str) -> str:
    """A token as one field: what would end it is written as in Python."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n")


def json_lines(found: Iterable[ScoredLine]) -> Iterator[str]:
    """Yields a JSON object for each line, and one for all."""
    tokens = 0
    sums: list[float] = []
    for line in found:
        parts = [{"text": t.text, "log_prob": t.log_prob, "surprisal": t.surprisal} for t in line.tokens]
        yield json.dumps({"line": line.number, **_totals(line.log_prob, len(line.tokens)), "tokens": parts})
        tokens += len(line.tokens)
        sums.append(line.log_prob)
    yield json.dumps({"line": "all", **_totals(math.fsum(sums), tokens)})


def _totals(log_prob: float, count: int) -> dict[str, float | None]:
    found = perplexity(-log_prob, count)
    return {
        "count": count,
        "log_prob": log_prob,
        "surprisal": -log_prob / math.log(2),
        "perplexity": found if math.isfinite(found) else None,
    }
