"""Evaluation that adapts to the text it has scored: temperature, dynamic evaluation, a neural cache.

Every token is scored before it is used, so the scores are those of a model that reads the text once, in order.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from lm.config import EvalConfig
from lm.errors import UserError
from lm.evaluator import evaluating, perplexity
from lm.model import detach
from lm.stream import Columns, columns

if TYPE_CHECKING:
    from lm.model import LanguageModel, State

Kind = TypeVar("Kind")
_STATISTICS_COLUMNS = 100  # that the gradients' mean squares are taken over, as in the authors' program
_ROWS, _PAIRS = 256, 2**20  # of the cache computed at once, at most
_LEAST_GAIN = 1e-4  # nats per token for which a constant is moved on
_LEAST_TEMPERATURE = 1e-30  # float32 holds logits divided by it
_WEIGHTS = tuple(percent / 100 for percent in range(100))  # of the cache that are tried


@dataclass(frozen=True)
class Dynamic:
    """Dynamic evaluation: after each segment is scored, the weights take a step on it.

    `w += min(1, decay * r / mean(r)) * (w0 - w) - lr * g / (r + eps)` for each weight: `g` is the gradient of the mean
    nats of the segment, `r` the root mean square of such gradients over the training text, `w0` the trained weight.
    `mean(r)` is over all weights; the authors' program averages the means of the parameters instead, so a `decay` of
    theirs is not comparable with one here.

    Raises:
        UserError: a rate, decay or eps below 0 or not finite, a segment below 1.

    Source: Krause et al., ICML 2018 (arXiv 1709.07432).
    """

    lr: float
    decay: float
    eps: float
    segment: int

    def __post_init__(self) -> None:
        for name in ("lr", "decay", "eps"):
            _require("dynamic", name, getattr(self, name), 0, math.inf)
        _require("dynamic", "segment", self.segment, 1, math.inf)


@dataclass(frozen=True)
class Cache:
    """Neural cache: `p = (1 - weight) p_model + weight sum_i softmax_i(theta h_t . h_i) [w_i = w]`.

    i runs over the last `window` tokens w_i before t, each with the output h_i of the last layer that predicted it; for
    the first token p is that of the model.

    Raises:
        UserError: a weight outside 0 … 1, a theta below 0 or not finite, a window below 1.

    Source: Grave et al., ICLR 2017 (arXiv 1612.04426).
    """

    weight: float
    theta: float
    window: int

    def __post_init__(self) -> None:
        _require("cache", "weight", self.weight, 0, 1)
        _require("cache", "theta", self.theta, 0, math.inf)
        _require("cache", "window", self.window, 1, math.inf)


def _require(kind: str, name: str, value: float, least: float, most: float) -> None:
    """Raises UserError where a constant is outside its range; an infinite end is not in it."""
    if not (least <= value <= most and value < math.inf):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise UserError(f"the {name} of {kind} must be at least {least:g}{limit}, and finite; got {value}; correct it")


@dataclass(frozen=True)
class Adaptation:
    """What a model is evaluated with. The temperature divides the logits; gradients are taken without it.

    Raises:
        UserError: a temperature below 1e-30, or not finite.
    """

    temperature: float = 1.0
    dynamic: Dynamic | None = None
    cache: Cache | None = None

    def __post_init__(self) -> None:
        if not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"a temperature of evaluation must be above 0 and finite; got {self.temperature}; 1 is the model's own"
                + (f", {_LEAST_TEMPERATURE} the least that float32 allows" if self.temperature > 0 else "")
            )

    @property
    def protocol(self) -> str:
        """The whole of it as text, so that a score is never compared with one of another kind."""
        parts = ["exact"]
        if self.temperature != 1:
            parts.append(f"temperature({_text(self.temperature)})")
        for name, kind in (("dynamic", self.dynamic), ("cache", self.cache)):
            if kind is not None:
                parts.append(f"{name}({', '.join(f'{key} {_text(value)}' for key, value in vars(kind).items())})")
        return " + ".join(parts)


def of_settings(settings: EvalConfig, *, temperature: float = 1.0, dynamic: bool, cache: bool) -> Adaptation:
    """Returns the means that are asked for, with the constants of the settings."""
    return Adaptation(
        temperature,
        Dynamic(settings.dynamic_lr, settings.dynamic_decay, settings.dynamic_eps, settings.dynamic_segment)
        if dynamic
        else None,
        Cache(settings.cache_weight, settings.cache_theta, settings.cache_window) if cache else None,
    )


def given(means: Adaptation) -> list[str]:
    """Returns the options of the command `eval` that give these means again."""
    options = [f"--temperature={_text(means.temperature)}"]
    for name, kind in (("dynamic", means.dynamic), ("cache", means.cache)):
        if kind is not None:
            options += [f"--{name}", *(f"--set eval.{name}_{key}={_text(value)}" for key, value in vars(kind).items())]
    return options


def _text(value: float) -> str:
    """The number with all that tells it from any other: 1, 0.05, 1234567."""
    return str(value).removesuffix(".0")


@torch.inference_mode(False)
@torch.enable_grad()
def gradient_rms(model: "LanguageModel", ids: np.ndarray, eos: int, segment: int) -> list[Tensor]:
    """Returns the root mean square of each weight's gradient over a text, read in segments of 100 columns (fewer where
    it is short), in evaluation mode. The model is left as it was.

    Arguments:
        ids: [N], the training text.
        segment: steps of each gradient, the mean over its tokens.

    Raises:
        UserError: a segment below 1; a text of fewer than 2 tokens.
    """
    _require("dynamic", "segment", segment, 1, math.inf)
    net: LanguageModel = _copy(model)
    state: State | None = None
    parameters = [*net.parameters()]
    device = parameters[0].device
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    width = max(1, min(_STATISTICS_COLUMNS, len(ids) // 2))
    windows = _windows(columns(ids, width, eos), len(ids) // width, segment, device)  # without a ragged last row
    for count, (inputs, targets) in enumerate(windows, 1):  # noqa: B007
        hidden, state = net(inputs, None if state is None else detach(state))
        loss, tokens = net.loss(hidden, targets)
        for total, gradient in zip(squares, _gradients(loss / tokens, parameters), strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)
    return [total.div_(count).sqrt_() for total in squares]


@torch.inference_mode(False)
def token_nlls(
    model: "LanguageModel",
    ids: np.ndarray,
    eos: int,
    adaptation: Adaptation,
    rms: Sequence[Tensor] | None = None,
    chunk: int = 1024,
) -> np.ndarray:
    """Returns the nats of each of the N tokens in order, [N] float64. The model is left as it was.

    Arguments:
        rms: for `dynamic`: what `gradient_rms` returned.
        chunk: steps computed at once without `dynamic`.
    """
    cache = adaptation.cache
    nll, hidden = _read_once(model, ids, eos, adaptation, rms, chunk, keep=cache is not None)
    if cache is None:
        return nll
    return _mixed(nll, cached(hidden, torch.from_numpy(ids.astype(np.int64)), cache.theta, cache.window), cache.weight)


def cached(hidden: Tensor, targets: Tensor, theta: float, window: int) -> np.ndarray:
    """Returns the cache's probability of each target, [N] float64; 0 for the first, which has no pairs.

    Arguments:
        hidden: [N, H], the last layer's output that each target is predicted from.
        targets: [N] int64.
    """
    found = torch.zeros(len(targets), dtype=torch.float64)
    rows = max(1, min(_ROWS, _PAIRS // min(window, len(targets) + 1)))
    for start in range(1, len(targets), rows):
        stop = min(start + rows, len(targets))
        first = max(0, start - window)
        t, i = torch.arange(start, stop)[:, None], torch.arange(first, stop - 1)
        scores = theta * (hidden[start:stop] @ hidden[first : stop - 1].T).double()
        scores.masked_fill_((i >= t) | (i < t - window), -torch.inf)
        same = targets[i] == targets[t]
        found[start:stop] = (scores.softmax(1) * same).sum(1)
    return found.numpy()


@torch.inference_mode(False)
def tune(
    model: "LanguageModel",
    ids: np.ndarray,
    eos: int,
    adaptation: Adaptation,
    rms: Sequence[Tensor] | None = None,
    *,
    chunk: int = 1024,
    temperature: bool = True,
    say: Callable[[str], None] = print,
) -> Adaptation:
    """Returns the adaptation with the constants that score a text best, found one after another.

    Temperature, without the other means; `lr` and `decay` of dynamic evaluation; `theta`, `window` and `weight` of the
    cache, on what dynamic evaluation left. All hundredths are tried of the weight; each other one is moved by a factor
    as long as that gains 0.0001 nats per token, so one that is 0 stays.

    Arguments:
        ids: [N], the validation text or a part of it.
        temperature: whether it is chosen too.
    """

    @functools.cache
    def mean(tried: Adaptation) -> float:
        value = float(token_nlls(model, ids, eos, tried, rms, chunk).mean())
        say(f"{perplexity(value, 1):10.3f}  {tried.protocol}")
        return value

    found = Adaptation(adaptation.temperature)
    if temperature:
        found = _moved(found, "temperature", 1.05, mean)
    if adaptation.dynamic is not None:
        dynamic = adaptation.dynamic
        for name, factor in (("lr", 2.0), ("decay", 2.0), ("lr", 2**0.5)):
            dynamic = _moved(dynamic, name, factor, lambda tried: mean(replace(found, dynamic=tried)))
        found = replace(found, dynamic=dynamic)
    if adaptation.cache is None:
        return found
    nll, hidden = _read_once(model, ids, eos, found, rms, chunk, keep=True)
    weights = [*_WEIGHTS, adaptation.cache.weight]
    targets = torch.from_numpy(ids.astype(np.int64))

    @functools.cache
    def weighed(tried: Cache) -> tuple[float, Cache]:
        pointed = cached(hidden, targets, tried.theta, tried.window)
        scores = [float(_mixed(nll, pointed, weight).mean()) for weight in weights]
        least = int(np.argmin(scores))
        best = replace(tried, weight=weights[least])
        say(f"{perplexity(scores[least], 1):10.3f}  {replace(found, cache=best).protocol}")
        return scores[least], best

    kept = replace(adaptation.cache, weight=0.0)
    for name, factor in (("theta", 1.5), ("window", 2.0), ("theta", 1.2)):
        kept = _moved(kept, name, factor, lambda tried: weighed(tried)[0])
    return replace(found, cache=weighed(kept)[1])


def _moved(kind: Kind, name: str, factor: float, score: Callable[[Kind], float]) -> Kind:
    """`kind` with one of its numbers moved by the factor, up or else down, as long as that scores less."""
    best = score(kind)
    for step in (factor, 1 / factor):
        begun = kind
        while True:
            value = getattr(kind, name) * step
            whole = isinstance(getattr(kind, name), int)
            # short enough to be read and typed
            tried = replace(kind, **{name: max(1, round(value)) if whole else float(f"{value:.6g}")})  # type: ignore[type-var]
            if not (found := score(tried)) < best - _LEAST_GAIN:
                break
            best, kind = found, tried
        if kind != begun:
            break
    return kind


def _mixed(nll: np.ndarray, pointed: np.ndarray, weight: float) -> np.ndarray:
    """The nats of each token under the mixture; of the first, the model's own."""
    with np.errstate(divide="ignore"):
        rest = -np.logaddexp(np.log1p(-weight) - nll[1:], np.log(weight) + np.log(pointed[1:]))
    return np.concatenate([nll[:1], rest])


def _read_once(
    model: "LanguageModel",
    ids: np.ndarray,
    eos: int,
    adaptation: Adaptation,
    rms: Sequence[Tensor] | None,
    chunk: int,
    *,
    keep: bool,
) -> tuple[np.ndarray, Tensor]:
    """The model's own nats [N] float64 of each token, and the last layer's outputs [N, H], on the CPU; [0] where they
    are not kept."""
    cut = columns(ids, 1, eos)
    if adaptation.dynamic is not None:
        assert rms is not None
        with torch.enable_grad():
            return _read_dynamic(model, cut, len(ids), adaptation.temperature, adaptation.dynamic, rms, keep)
    device = next(model.parameters()).device
    nlls, outputs, state = [], [], None
    with evaluating(model):
        for inputs, targets in _windows(cut, len(ids), chunk, device):
            hidden, state = model(inputs, state)
            nlls.append(model.token_nll(hidden, targets, adaptation.temperature).cpu())
            if keep:
                outputs.append(hidden.cpu())
    return _joined(nlls, outputs)


def _read_dynamic(
    model: "LanguageModel",
    cut: Columns,
    steps: int,
    temperature: float,
    dynamic: Dynamic,
    rms: Sequence[Tensor],
    keep: bool,
) -> tuple[np.ndarray, Tensor]:
    net: LanguageModel = _copy(model)
    state: State | None = None
    parameters = [*net.parameters()]
    device = parameters[0].device
    trained = [parameter.detach().clone() for parameter in parameters]
    mean = sum(float(r.double().sum()) for r in rms) / sum(r.numel() for r in rms) or 1.0
    pulls = [(dynamic.decay / mean * r).clamp_(max=1) for r in rms]
    rates = [dynamic.lr / (r + dynamic.eps) for r in rms]
    nlls, outputs = [], []
    for inputs, targets in _windows(cut, steps, dynamic.segment, device):
        hidden, state = net(inputs, None if state is None else detach(state))
        log_probs, wanted = net.log_probs(hidden), targets[..., None]
        gradients = _gradients(-log_probs.gather(2, wanted).mean(), parameters)
        with torch.no_grad():
            log_probs = log_probs if temperature == 1 else (log_probs / temperature).log_softmax(2)
            nlls.append(-log_probs.gather(2, wanted).double().cpu())
            if keep:
                outputs.append(hidden.detach().cpu())
            for weight, start_weight, pull, rate, gradient in zip(
                parameters, trained, pulls, rates, gradients, strict=True
            ):
                weight.lerp_(start_weight, pull)
                if gradient is not None:
                    weight.addcmul_(gradient, rate, value=-1)
    return _joined(nlls, outputs)


def _joined(nlls: list[Tensor], outputs: list[Tensor]) -> tuple[np.ndarray, Tensor]:
    return torch.cat(nlls).flatten().numpy(), torch.cat(outputs).flatten(0, 1) if outputs else torch.empty(0)


def _windows(cut: Columns, rows: int, length: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs and targets of the first rows, so many at a time."""
    for start in range(0, rows, length):
        window = cut.window(start, min(start + length, rows))
        yield window.inputs.to(device), window.targets.to(device)


def _copy(model: "LanguageModel") -> "LanguageModel":
    return copy.deepcopy(model).eval().requires_grad_(True)


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter; None where the loss does not depend on it."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]
