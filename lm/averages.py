"""Averaged weights with separate running statistics, as asgd validates, keeps and tests them."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from lm import stream
from lm.checkpoint import require_tensors
from lm.evaluator import evaluating
from lm.model import LanguageModel, State
from lm.stream import Columns
from rnnorm.norms import Online

_HORIZONS = 8  # after which exp(-8) is left of what the running statistics were before
_move_mean = get_swa_multi_avg_fn()


class Averages:
    """The mean of a model's weights after each step since averaging began: `mean += (weight - mean) / steps`.

    Arguments:
        model: as it is when averaging begins; copied.

    Attributes:
        steps: how many weights are averaged.
        model: holds the averages (the model's own weights until the first step), and the running statistics that
            were last estimated for them (until then those that the model had when averaging began).

    Source: Polyak and Juditsky 1992; begun late in Merity et al. 2017 (arXiv 1708.02182).
    """

    def __init__(self, model: LanguageModel) -> None:
        self.steps = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    def update(self, model: LanguageModel) -> None:
        """Takes in the weights that a step has left in the model."""
        _move_mean(list(self.model.parameters()), list(model.parameters()), self.steps)
        self.steps += 1

    @contextmanager
    def swapped_into(self, model: LanguageModel, estimate: Callable[[LanguageModel], None]) -> Iterator[None]:
        """Inside, the model holds the averages and running statistics for them; after, again what it held before.

        Arguments:
            estimate: moves the running statistics of the model, which begin as they were, to those of its weights.
        """
        own = copy.deepcopy(model.state_dict())
        try:
            with torch.no_grad():
                for parameter, mean in zip(model.parameters(), self.model.parameters(), strict=True):
                    parameter.copy_(mean)
            estimate(model)
            self.model.load_state_dict(model.state_dict())
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, those of `model` by its own names."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any], most: int) -> None:
        """Restores what `state_dict` returned after `most` steps of training.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is of another model or another run, or no such state.
        """
        steps = state["steps"]
        if type(steps) is not int or not 0 <= steps <= most:
            raise ValueError(f"averages.steps must be from 0 to the {most} steps of the run; got {steps!r:.50}")
        self.steps = steps
        require_tensors(state["model"], self.model.state_dict())
        self.model.load_state_dict(state["model"])


def estimate_statistics(model: LanguageModel, data: Columns, window: str) -> None:
    """Moves the running mean and variance of online normalization to those of the weights that the model holds now.

    Reads the first `min(8 / (1 - alpha_fwd), all)` samples of the text from the zero state, whole rows of the columns
    (a row of B columns is B samples of a layer), without gradient and dropout. Nothing else moves, `u` and `v`
    included; no random number is drawn. The result does not depend on `window`, by which the text is cut as for
    training, nor on how many processes train. Without online normalization there is nothing to do.
    """
    norms = {layer: norm for layer in model.modules() if isinstance(norm := getattr(layer, "norm", None), Online)}
    if not norms:
        return
    steps, width = data.steps, data.width
    rate = 1 - max(norm.alpha_fwd for norm in norms.values())
    rows = min(steps, math.ceil(_HORIZONS / rate / width)) if rate else steps
    if rows < steps:
        data = replace(data, steps=rows, last=width)  # a GPU gets no more than is read
    data = data.to(next(model.parameters()).device)
    state: State | None = None
    with evaluating(model), _moving(list(norms)):
        for start, stop in stream.plan(window, rows, seed=0, epoch=0):
            part = data.window(start, stop)
            _, state = model(part.inputs, state, part.lengths)


@contextmanager
def _moving(layers: list[Any]) -> Iterator[None]:
    """Inside, the layers' running statistics move as in training, and the layers drop nothing."""
    between = [layer.dropout for layer in layers]
    for layer in layers:
        layer.train()
        layer.dropout, layer.draws_masks = 0.0, False
    try:
        yield
    finally:
        for layer, rate in zip(layers, between, strict=True):
            layer.dropout, layer.draws_masks = rate, True
