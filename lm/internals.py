"""The recurrence from inside: the running statistics of the normalization, and how far its gates are driven."""

from typing import Any

import torch
from torch import Tensor, nn

import rnnorm
from lm.evaluator import evaluating
from lm.model import LanguageModel, Stack, by_layer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
BINS = 20
STEPS = 64  # of the text that gates are looked at on
_SATURATED = 0.05  # of the whole range, at each end


class Internals:
    """Looks at a model on a few steps of text, once for each step of training.

    Arguments:
        inputs: [T, B] tokens; the first `STEPS` steps are read, from the zero state.
    """

    def __init__(self, model: LanguageModel, inputs: Tensor) -> None:
        self.model = model
        self.inputs = inputs[:STEPS].to(next(model.parameters()).device)
        self._seen: tuple[int, dict[str, Any]] | None = None

    def at(self, step: int) -> dict[str, Any]:
        """Returns what `look` finds; asked again at the same step, without looking again."""
        if self._seen is None or self._seen[0] != step:
            self._seen = step, look(self.model, self.inputs)
        return self._seen[1]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of a module by name, flat and on the CPU, in one copy: each would wait for the device."""
    found = dict(module.named_buffers())
    if not found:
        return {}
    flat = torch.cat([buffer.flatten() for buffer in found.values()]).cpu()
    return dict(zip(found, flat.split([buffer.numel() for buffer in found.values()]), strict=True))


@torch.no_grad()
def look(model: LanguageModel, inputs: Tensor) -> dict[str, Any]:
    """Returns the statistics and gates of each layer, as JSON can hold them. The model is left as it was.

    `statistics`: by names such as `norm_mean_l0`, the minimum, 10 %, 50 % and 90 % quantiles and maximum over
    channels. `gates`: by names such as `f_l0`, `counts` of values in 20 equal bins of `low` … `high`, and
    `saturated`, the share within 5 % of the range from an end. A gate without bounds (relu) is left out.
    `recurrent`: by names such as `weight_hh_l0`, the Frobenius norm of the recurrent weights of each layer.
    """
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    statistics = {
        name: [_short(value) for value in values.double().quantile(at)]
        for name, values in by_layer(buffers(model.layers).items())
    }
    named = by_layer(model.layers.named_parameters())
    weights = {name: value for name, value in named if name.startswith("weight_hh_")}
    recurrent = {name: _short(torch.linalg.vector_norm(value.double())) for name, value in weights.items()}
    bounds = {gate.name: gate.bounds for gate in rnnorm.CELLS[model.recurrent[0].cell].gates}
    values = _gates(model, inputs) if any(bounds.values()) else {}
    limited = {name: (value, bounds[name.partition("_")[0]]) for name, value in values.items()}
    gates = {name: _gate(value, *limits) for name, (value, limits) in limited.items() if limits is not None}
    return {"statistics": statistics, "gates": gates, "recurrent": recurrent}


def _gates(model: LanguageModel, inputs: Tensor) -> dict[str, Tensor]:
    x = model.embedding(inputs)
    if not isinstance(model.layers, Stack):
        return rnnorm.gates(model.layers, x)
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for number, layer in enumerate(model.recurrent):
            found.update(by_layer((f"{number}.{name}", gate) for name, gate in rnnorm.gates(layer, x).items()))
            x, _ = layer(x)
    return found


def _gate(values: Tensor, low: float, high: float) -> dict[str, Any]:
    edge = _SATURATED * (high - low)
    counts = torch.histc(values.float().cpu(), BINS, low, high)
    saturated = ((values < low + edge) | (values > high - edge)).double().mean()
    return {"low": low, "high": high, "counts": counts.long().tolist(), "saturated": _short(saturated)}


def _short(value: Tensor) -> float | None:
    return float(f"{float(value):.6g}") if value.isfinite() else None
