"""Perplexity by named protocols. An evaluation moves nothing: no stream, no mode, no random number."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lm.distributed import Team
from lm.errors import UserError
from lm.stream import Columns, Stream, columns, plan
from lm.tokenizers import Tokenizer, Unit

if TYPE_CHECKING:
    from lm.model import LanguageModel

ProtocolName = Literal["exact", "columns", "chunk-mean"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
_CHUNK_MEAN_COLUMNS, _CHUNK_MEAN_STEPS = 10, 32  # of the online-normalization authors' experiment
_FREQUENCIES = (0, 1, 10, 100, 1000, 10_000)  # the least training count of each band
_POSITIONS = (1, 2, 3, 4, 5, 9, 17, 33, 65)  # the first place in the line of each band


@dataclass(frozen=True)
class Group:
    """Some of the scored tokens: their number, their nats in all, and exp(nll / tokens)."""

    name: str
    tokens: int
    nll: float
    ppl: float


@dataclass(frozen=True)
class Score:
    """A perplexity and all that is needed to read it. A field that a protocol does not define is None.

    Attributes:
        protocol: `exact`: the whole text as one column from the zero state, every token scored once.
            `columns`: as exact, in B columns side by side, which start from the zero state; for speed.
            `chunk-mean`: 10 trimmed columns in chunks of 32, mean of exp(chunk loss) weighted by length;
            per unit, a chunk's loss is its nats per token times the whole text's tokens per unit.
            `exact + …`: as exact, by a model that adapts to what it has scored; see `lm.adaptation`.
        ppl: per unit.
        unit: of the tokenizer: "word" (words and ends of lines), "token", "character" or "byte".
        ppl_per_token: per piece of the tokenizer.
        ppl_per_word: per word and end of line, whatever the tokenizer; infinite where words are very long.
        nll: nats in all, over `tokens` tokens.
        words, eos, unk: words of the text, ends of lines, tokens that are `<unk>`.
        ppl_without_eos, ppl_without_unk: with those left out of both the sum and the count.
        bits_per_word, bits_per_character, bits_per_byte: of the text, ends of lines counted.
        unigram_ppl: of the training text's unigram model (counts plus one) on the same text, per unit.
        data_sha256, vocabulary_sha256: of the text and of the tokenizer.
        by_frequency, by_position: the tokens in bands, where asked for; see `by_frequency`, `by_position`.
    """

    protocol: str
    ppl: float
    ppl_per_token: float
    nll: float
    tokens: int
    unit: Unit = "word"
    ppl_per_word: float | None = None
    words: int | None = None
    eos: int | None = None
    unk: int | None = None
    ppl_without_eos: float | None = None
    ppl_without_unk: float | None = None
    bits_per_word: float | None = None
    bits_per_character: float | None = None
    bits_per_byte: float | None = None
    unigram_ppl: float | None = None
    data_sha256: str = ""
    vocabulary_sha256: str = ""
    by_frequency: tuple[Group, ...] | None = None
    by_position: tuple[Group, ...] | None = None


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with None for each that is infinite or not a number, which JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def record(score: Score) -> dict[str, Any]:
    """Returns the whole score as JSON can hold it."""
    groups = {
        name: [finite(asdict(group)) for group in found]
        for name in ("by_frequency", "by_position")
        if (found := getattr(score, name)) is not None
    }
    plain = replace(score, by_frequency=None, by_position=None)
    return {k: v for k, v in finite(asdict(plain)).items() if not k.startswith("by_")} | groups


def evaluate(
    model: "LanguageModel",
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    protocol: ProtocolName = "exact",
    chunk: int = 1024,
    batch_size: int = 20,
    train_counts: Tensor | None = None,
    data_sha256: str = "",
    groups: bool = False,
    team: Team = Team(),  # noqa: B008
) -> Score:
    """Returns the score of a model on a stream of N tokens.

    Arguments:
        protocol: `exact`, `columns` or `chunk-mean`; see `Score`.
        chunk: steps computed at once; the result does not depend on it.
        batch_size: columns of the protocol `columns`.
        train_counts: [V], how often the training text holds each token, for `unigram_ppl`.
        groups: protocol `exact` with `train_counts`: the score by frequency and by position too.
        team: processes that each run a share of the columns; all of them return the whole score.

    Raises:
        UserError: an unknown protocol, or a stream too short for it.
    """
    if chunk < 1:
        raise UserError(f"a chunk must be at least 1 step; got {chunk}; 1024 is usual")
    if protocol not in PROTOCOLS:
        raise UserError(f"a protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}; choose one of these")
    if protocol == "chunk-mean":
        per_unit = len(stream.ids) / stream.units(tokenizer.unit)
        score = _chunk_mean(_nll(model, _trimmed(stream.ids), chunk), per_unit)
    else:
        cut = columns(stream.ids, 1 if protocol == "exact" else batch_size, tokenizer.eos)
        nll, scored = _shared_nll(model, cut, chunk, team).numpy(), _active(cut)
        score = summarize(nll[scored], cut.gather(0, cut.steps)[1].numpy()[scored], stream, tokenizer, protocol)
        if groups and protocol == "exact" and train_counts is not None:
            score = in_bands(score, nll[:, 0], stream, tokenizer, train_counts)
    return of_text(score, stream, tokenizer, train_counts, data_sha256)


def in_bands(score: Score, nll: np.ndarray, stream: Stream, tokenizer: Tokenizer, train_counts: Tensor) -> Score:
    """Returns the score with its bands, from the nats of each token of the stream in order, [N]."""
    given = (nll, stream.ids, tokenizer)
    return replace(score, by_frequency=by_frequency(*given, train_counts), by_position=by_position(*given))


def of_text(score: Score, stream: Stream, tokenizer: Tokenizer, train_counts: Tensor | None, data_sha256: str) -> Score:
    """Returns the score with the unigram model's and what the text and its tokenizer are known by."""
    unigram = None if train_counts is None else unigram_perplexity(train_counts, stream, tokenizer.unit)
    score = replace(score, unit=tokenizer.unit, unigram_ppl=unigram)
    return replace(score, data_sha256=data_sha256, vocabulary_sha256=tokenizer.sha256)


def token_nlls(model: "LanguageModel", stream: Stream, tokenizer: Tokenizer, chunk: int = 1024) -> np.ndarray:
    """Returns the nats of each of the stream's N tokens in order, [N] float64: what `exact` sums."""
    return _nll(model, columns(stream.ids, 1, tokenizer.eos), chunk).flatten().numpy()


def by_frequency(nll: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer, counts: Tensor) -> tuple[Group, ...]:
    """Returns the tokens in bands of how often the training text holds them; `<unk>` and `<eos>` apart.

    Arguments:
        nll: [N] nats of each token of the stream, in order.
        ids: [N], the stream.
        counts: [V], of the training text.
    """
    return _bands(nll, ids, tokenizer, counts.cpu().numpy()[ids], _FREQUENCIES, "{} times")


def by_position(nll: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer) -> tuple[Group, ...]:
    """Returns the tokens in bands of their place in the line, from 1; `<unk>` and `<eos>` apart.

    Arguments:
        nll: [N] nats of each token of the stream, in order.
        ids: [N], the stream.
    """
    is_first = np.concatenate([[True], ids[:-1] == tokenizer.eos])
    place = np.arange(len(ids)) - np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0)) + 1
    return _bands(nll, ids, tokenizer, place, _POSITIONS, "place {}")


def _bands(
    nll: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer, values: np.ndarray, starts: tuple[int, ...], name: str
) -> tuple[Group, ...]:
    """One group for each band of the values that has tokens, then `<unk>`, then `<eos>`: every token in one."""
    band = np.searchsorted(starts, values, side="right") - 1
    names = [name.format(_range(low, high)) for low, high in zip(starts, [*starts[1:], None], strict=True)]
    for special, token in (("<unk>", tokenizer.unk), ("<eos>", tokenizer.eos)):
        if token is not None:
            band = np.where(ids == token, len(names), band)
            names.append(special)
    tokens = np.bincount(band, minlength=len(names))
    sums = [float(nll[band == number].sum()) for number in range(len(names))]
    return tuple(
        Group(name, int(count), total, perplexity(total, int(count)))
        for name, count, total in zip(names, tokens, sums, strict=True)
        if count
    )


def _range(low: int, high: int | None) -> str:
    if high is None:
        return f"{low:,}+"
    return f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}"


def unigram_perplexity(counts: Tensor, stream: Stream, unit: Unit = "word") -> float:
    """Returns the perplexity per unit of the model p(token) = (count + 1) / (all counts + V)."""
    log_probs = torch.log((counts.double() + 1) / (counts.sum().double() + len(counts))).numpy()
    return perplexity(-float(log_probs[stream.ids].sum()), stream.units(unit))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients. After: each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _nll(model: "LanguageModel", cut: Columns, chunk: int) -> Tensor:
    """The nats of every target, [T, B] float64 on the CPU; padding has some too."""
    cut = cut.to(next(model.parameters()).device)
    parts, state = [], None
    with evaluating(model):
        for start, stop in plan(chunk, cut.steps, seed=0, epoch=0):
            window = cut.window(start, stop)
            hidden, state = model(window.inputs, state, window.lengths)
            parts.append(model.token_nll(hidden, window.targets))
    return torch.cat(parts).double().cpu()  # once: each copy waits for the device


def _shared_nll(model: "LanguageModel", cut: Columns, chunk: int, team: Team) -> Tensor:
    """`_nll` of the whole columns on each of the processes, which run a share each."""
    steps, width = cut.steps, cut.width
    first, stop = team.share(width)
    own = _nll(model, cut.part(first, stop), chunk) if first < stop else torch.zeros(steps, 0, dtype=torch.float64)
    return team.join(own, 1, width)


def _active(cut: Columns) -> np.ndarray:
    active = np.ones((cut.steps, cut.width), dtype=bool)
    active[-1, cut.last :] = False
    return active


def summarize(nll: np.ndarray, targets: np.ndarray, stream: Stream, tokenizer: Tokenizer, protocol: str) -> Score:
    """Returns the score from the nats of each scored token [N] and the tokens [N], in any order."""
    tokens, units = len(stream.ids), stream.units(tokenizer.unit)
    if len(nll) != tokens or len(targets) != tokens:
        raise RuntimeError(f"an evaluation must score each of the {tokens} tokens once; it scored {len(nll)}")
    total = float(nll.sum())
    is_eos = targets == tokenizer.eos
    is_unk = np.zeros_like(is_eos) if tokenizer.unk is None else targets == tokenizer.unk
    if int(is_eos.sum()) != stream.eos or int(is_unk.sum()) != stream.unk:
        raise RuntimeError("an evaluation must score every <eos> and <unk> of its stream once")
    bits, words = total / math.log(2), stream.words + stream.eos
    return Score(
        protocol=protocol,
        ppl=perplexity(total, units),
        ppl_per_token=perplexity(total, tokens),
        nll=total,
        tokens=tokens,
        ppl_per_word=perplexity(total, words),
        words=stream.words,
        eos=stream.eos,
        unk=stream.unk,
        ppl_without_eos=perplexity(float(nll[~is_eos].sum()), units - stream.eos),
        ppl_without_unk=perplexity(float(nll[~is_unk].sum()), units - stream.unk),
        bits_per_word=bits / max(1, words),
        bits_per_character=bits / stream.characters,
        bits_per_byte=bits / stream.bytes,
    )


_BITS = {"character": "bits per character", "byte": "bits per byte"}


def measured(ppl: float, unit: Unit, short: bool = False) -> str:
    """Returns a perplexity as the field reports it for its unit: of characters and bytes, as bits."""
    if unit in _BITS:
        bits = math.log2(ppl) if 0 < ppl < math.inf else math.inf
        return f"{bits:,.3f} {_BITS[unit]}"
    name = "ppl" if short else "perplexity"
    return f"{name} {ppl:,.2f}" + (" per token" if unit == "token" and not short else "")


def headline(score: Score) -> str:
    """Returns the number that fits the text: `measured`; of subwords with the bits per byte, which compare."""
    bits = score.bits_per_byte
    also = f", {bits:,.3f} bits per byte" if score.unit == "token" and bits is not None else ""
    return measured(score.ppl, score.unit) + also


def _trimmed(ids: np.ndarray) -> Columns:
    rows = len(ids) // _CHUNK_MEAN_COLUMNS
    if rows < 2:
        raise UserError(
            f"a text for chunk-mean must hold at least {2 * _CHUNK_MEAN_COLUMNS} tokens; got {len(ids)}; "
            "use the protocol exact"
        )
    starts = np.arange(_CHUNK_MEAN_COLUMNS) * rows + 1
    return Columns(ids, starts, rows - 1, _CHUNK_MEAN_COLUMNS, eos=0)


def _chunk_mean(nll: Tensor, per_unit: float) -> Score:
    chunks = nll.split(_CHUNK_MEAN_STEPS)

    def mean(scale: float) -> float:
        return sum(len(chunk) * perplexity(float(chunk.sum()) * scale, chunk.numel()) for chunk in chunks) / len(nll)

    return Score("chunk-mean", mean(per_unit), mean(1.0), float(nll.sum()), nll.numel())


def perplexity(nats: float, count: int) -> float:
    """Returns exp(nats / count); infinity where that is too large, not-a-number where there is nothing."""
    mean = nats / count if count else math.nan
    return math.inf if mean > 700 else math.exp(mean)
