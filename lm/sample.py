"""Text from a model, one token at a time."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError
from lm.evaluator import evaluating
from lm.files import utf8
from lm.model import LanguageModel
from lm.text import Text
from lm.tokenizers import UNFINISHED, Tokenizer

LONGEST = 1_000_000  # the whole text is decoded at once, from memory


def sample(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    prompt: str = "",
    length: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    no_unk: bool = False,
    seed: int = 0,
) -> str:
    """Returns the prompt and `length` tokens drawn after it; `<eos>` becomes a line feed.

    Arguments:
        prompt: any text, read as training text is; the last line is left open.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_k: draw among the `top_k` most probable tokens only.
        top_p: draw among the fewest most probable tokens that hold this much probability (Holtzman et al. 2020).
        no_unk: never draw `<unk>`.
        seed: random seed; the same seed gives the same text, and no global random number is drawn.

    Raises:
        UserError: a temperature below 0 or not finite, a seed outside 0 … 2^63 - 1, a top_k below 1, a length below 1
            or above `LONGEST`, a top_p outside (0, 1], a prompt that is not text.
    """
    prefix = encode_prompt(prompt, tokenizer)
    law = Law(temperature, top_k, top_p, no_unk, seed)
    return tokenizer.decode([*prefix, *draw(model, tokenizer, prefix, length, law)])


@dataclass(frozen=True)
class Law:
    """How tokens are drawn; see `sample`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    no_unk: bool = False
    seed: int = 0


def draw(model: LanguageModel, tokenizer: Tokenizer, prefix: list[int], length: int, law: Law) -> Iterator[int]:
    """Returns an iterator of `length` tokens drawn after these.

    Raises:
        UserError: see `sample`.
    """
    _check(length, law)
    return _drawn(model, tokenizer, prefix, length, law)


def _drawn(model: LanguageModel, tokenizer: Tokenizer, prefix: list[int], length: int, law: Law) -> Iterator[int]:
    generator = torch.Generator().manual_seed(law.seed)
    device = next(model.parameters()).device
    state, tokens, never = None, [tokenizer.eos, *prefix], [*tokenizer.unused]
    if law.no_unk and tokenizer.unk is not None:
        never.append(tokenizer.unk)
    for _ in range(length):
        with evaluating(model):
            hidden, state = model(torch.tensor(tokens, device=device)[:, None], state)
            log_probs = model.log_probs(hidden[-1, 0]).cpu()
        log_probs[never] = -torch.inf
        tokens = [_draw(log_probs, law.temperature, law.top_k, law.top_p, generator)]
        yield tokens[0]


def texts(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of tokens as they come; together it is `tokenizer.decode` of all of them."""
    line: list[int] = []
    shown = ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if tokenizer.kind == "byte" else None
    for token in tokens:
        if decoder is not None:
            yield decoder.decode(tokenizer.to_bytes([token]))
        elif tokenizer.kind == "char":
            yield tokenizer.decode([token])
        elif token == tokenizer.eos:
            yield tokenizer.decode(line).removeprefix(shown) + "\n"
            line, shown = [], ""
        else:
            line.append(token)
            text = tokenizer.decode(line)
            if not text.endswith(UNFINISHED):  # more of a character may follow
                yield text.removeprefix(shown)
                shown = text
    yield decoder.decode(b"", final=True) if decoder else tokenizer.decode(line).removeprefix(shown)


def next_tokens(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int) -> list[tuple[int, float]]:
    """Returns the `count` most probable tokens after a prompt and their log-probabilities, the most probable first.

    Raises:
        UserError: a count below 1, a prompt that is not text.
    """
    if count < 1:
        raise UserError(f"a count must be at least 1; got {count}; ask for one token or more")
    device = next(model.parameters()).device
    with evaluating(model):
        hidden, _ = model(torch.tensor([tokenizer.eos, *encode_prompt(prompt, tokenizer)], device=device)[:, None])
        log_probs, order = model.log_probs(hidden[-1, 0]).double().cpu().sort(descending=True, stable=True)
    return list(zip(order[:count].tolist(), log_probs[:count].tolist(), strict=True))


def _check(length: int, law: Law) -> None:
    if not 1 <= length <= LONGEST:
        way = "draw one token or more" if length < 1 else "draw several texts by several seeds"
        raise UserError(f"a length must be from 1 to {LONGEST:,}; got {length}; {way}")
    if not 0 <= law.temperature < float("inf"):
        rule = "finite" if law.temperature > 0 else "at least 0"
        raise UserError(f"a temperature must be {rule}; got {law.temperature}; 1 is the model's own, 0 is greedy")
    if law.top_k is not None and law.top_k < 1:
        raise UserError(f"top-k must be at least 1; got {law.top_k}; leave it out to draw among all")
    if law.top_p is not None and not 0 < law.top_p <= 1:
        raise UserError(f"top-p must be above 0 and at most 1; got {law.top_p}; leave it out to draw among all")
    if not 0 <= law.seed < 2**63:
        raise UserError(f"a seed must be from 0 to 2^63 - 1; got {law.seed}; choose another")


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a prompt, its last line left open.

    Raises:
        UserError: it is not text.
    """
    content = utf8(prompt, "a prompt")
    ids = [token for some in tokenizer.encode_text(Text(content)) for token in some.tolist()]
    if prompt and not tokenizer.lossless and not prompt.endswith("\n"):
        ids.pop()  # the end of the last line
    return ids


def _draw(
    log_probs: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(log_probs.argmax())
    log_probs = log_probs.double()
    # the largest becomes 0 first, so that no temperature, however low, makes all of them -inf
    scores, order = ((log_probs - log_probs.max()) / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        scores = scores[:top_k]
    probs = scores.softmax(0)
    if top_p is not None:
        before = probs.cumsum(0) - probs  # a token stays if those above it hold less than top_p
        probs = probs[before < top_p]
    return int(order[torch.multinomial(probs, 1, generator=generator)])
