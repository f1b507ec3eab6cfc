"""Averaged weights, as asgd validates, keeps and tests them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from lm.checkpoint import MOST_STEPS
from lm.model import LanguageModel

_move_mean = get_swa_multi_avg_fn()


class Averages:
    """The mean of a model's weights after each step since averaging began: `mean += (weight - mean) / steps`.

    Arguments:
        model: as it is when averaging begins; copied.

    Attributes:
        steps: how many weights are averaged.
        model: holds the averages; the model's own weights until the first step.

    Source: Polyak and Juditsky 1992; begun late in Merity et al. 2017 (arXiv 1708.02182), there with the weights
        themselves moved by plain sgd.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.steps = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    def update(self, model: LanguageModel) -> None:
        """Takes in the weights that a step has left in the model."""
        _move_mean(list(self.model.parameters()), list(model.parameters()), self.steps)
        self.steps += 1

    @contextmanager
    def lent(self, model: LanguageModel) -> Iterator[None]:
        """Inside, the model holds the averages; after, again what it held before."""
        own = copy.deepcopy(model.state_dict())
        try:
            with torch.no_grad():
                for parameter, mean in zip(model.parameters(), self.model.parameters(), strict=True):
                    parameter.copy_(mean)
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, those of `model` by its own names."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is of another model, or of none.
        """
        steps = state["steps"]
        if type(steps) is not int or not 0 <= steps <= MOST_STEPS:
            raise ValueError(f"averages.steps must be from 0 to {MOST_STEPS}; got {steps!r:.50}")
        self.steps = steps
        self.model.load_state_dict(state["model"])
