"""Text from a model, one token at a time."""

import torch
from torch import Tensor

from lm.errors import UserError
from lm.evaluator import evaluating
from lm.model import LanguageModel
from lm.text import Text
from lm.tokenizers import Tokenizer

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
    seed: int = 0,
) -> str:
    """Returns the prompt and `length` tokens drawn after it; `<eos>` becomes a line feed.

    Arguments:
        prompt: any text, read as training text is; the last line is left open.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_k: draw among the `top_k` most probable tokens only.
        top_p: draw among the fewest most probable tokens that hold this much probability (Holtzman et al. 2020).
        seed: random seed; the same seed gives the same text, and no global random number is drawn.

    Raises:
        UserError: a temperature below 0, a top_k below 1, a length below 1 or above `LONGEST`, a top_p outside (0, 1],
            a prompt that is not text.
    """
    _check(length, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    prefix = _encode(prompt, tokenizer)
    drawn: list[int] = []
    with evaluating(model):
        hidden, state = model(torch.tensor([tokenizer.eos, *prefix], device=device)[:, None])
        while True:
            token = _draw(model.log_probs(hidden[-1, 0]).cpu(), temperature, top_k, top_p, generator)
            drawn.append(token)
            if len(drawn) == length:
                return tokenizer.decode([*prefix, *drawn])
            hidden, state = model(torch.tensor([[token]], device=device), state)


def next_tokens(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int) -> list[tuple[int, float]]:
    """Returns the `count` most probable tokens after a prompt and their log-probabilities, the most probable first.

    Raises:
        UserError: a count below 1, a prompt that is not text.
    """
    if count < 1:
        raise UserError(f"a count must be at least 1; got {count}; ask for one token or more")
    device = next(model.parameters()).device
    with evaluating(model):
        hidden, _ = model(torch.tensor([tokenizer.eos, *_encode(prompt, tokenizer)], device=device)[:, None])
        log_probs, order = model.log_probs(hidden[-1, 0]).double().cpu().sort(descending=True, stable=True)
    return list(zip(order[:count].tolist(), log_probs[:count].tolist(), strict=True))


def _check(length: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 1 <= length <= LONGEST:
        raise UserError(f"a length must be from 1 to {LONGEST:,}; got {length}; draw several texts by several seeds")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"a temperature must be at least 0; got {temperature}; 1 is the model's own, 0 is greedy")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1; got {top_k}; leave it out to draw among all")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be above 0 and at most 1; got {top_p}; leave it out to draw among all")


def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as fault:  # a byte of the command line that is not UTF-8 arrives as half a surrogate pair
        raise UserError(
            f"a prompt must be UTF-8 text; got {prompt[:60]!a}, whose character {fault.start + 1} is none; "
            "write it again"
        ) from None
    ids = [token for some in tokenizer.encode_text(Text(prompt.encode())) for token in some.tolist()]
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
