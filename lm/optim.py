"""Optimizers by name; learning rates and averaging as pure functions of where the run stands."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lm.config import TrainConfig

_STATE: dict[type[Optimizer], set[str]] = {
    SGD: {"momentum_buffer"},
    Adam: {"step", "exp_avg", "exp_avg_sq"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
_LIKE_PARAMETER = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def build(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Returns the optimizer of `config.optimizer` over every parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = config.lr, config.weight_decay
    match config.optimizer:
        case "sgd" | "asgd":  # torch's own ASGD would take each step at the rate set for the step before
            sparse = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
            groups: list[dict[str, Any]] = [{"params": [p for p in parameters if all(p is not q for q in sparse)]}]
            groups += [{"params": sparse, "fused": False}] if sparse else []  # torch's fused SGD refuses them
            return SGD(groups, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
        case "adam":
            return Adam(parameters, lr=lr, weight_decay=decay, fused=True)
        case "rmsprop":  # as deepmind/lamb calls it: with Adam's correction of the bias
            return Adam(parameters, lr=lr, betas=(0.0, 0.999), weight_decay=decay, fused=True)
        case "adamw":
            return AdamW(parameters, lr=lr, weight_decay=decay, fused=True)


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores what `optimizer.state_dict()` returned.

    Raises:
        ValueError, KeyError, TypeError: it is of other parameters, another optimizer or other settings; torch itself
            would take the first wrong value at some later step.
    """
    built = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for before, after in zip(built, optimizer.param_groups, strict=True):
        for key in before.keys() - {"params"}:
            if type(after[key]) is not type(before[key]) or not (key == "lr" or after[key] == before[key]):
                raise ValueError(f"the optimizer's {key} is {after[key]!r} and must be {before[key]!r}")
    for parameter, values in optimizer.state.items():
        if values.keys() != (wanted := _STATE[type(optimizer)]):
            raise ValueError(f"the optimizer keeps {sorted(values)} and must keep {sorted(wanted)}")
        for name, value in values.items():
            shape = parameter.shape if name in _LIKE_PARAMETER else torch.Size()
            if value is not None and value.shape != shape:
                raise ValueError(f"the optimizer's {name} has shape {list(value.shape)} and must have {list(shape)}")


def learning_rate(config: TrainConfig, *, epoch: float, step: int, falls: int) -> float:
    """Returns the learning rate of a step.

    Arguments:
        epoch: epochs done, with the part of the present one done.
        step: steps done.
        falls: how many times the schedule `plateau` has lowered the rate.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    rate = config.lr * warm
    match config.schedule:
        case "exponential":
            return rate * config.schedule_factor ** max(0, math.floor(epoch) + 1 - config.schedule_hold)
        case "plateau":
            return rate * config.schedule_factor**falls
        case "cosine":
            done = max(epoch / config.epochs, step / config.max_steps if config.max_steps else 0.0)
            return rate * (1 + math.cos(math.pi * min(1.0, done))) / 2
        case _:
            return rate


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def averaging(config: TrainConfig, valid: Sequence[float]) -> bool:
    """Returns whether averaging has begun after these validations (nats per token, one for each epoch done).

    With asgd or `average` it begins after the first that is greater than the least of all before it but the last
    `average_patience`; where that is None, with the first step.

    Source: NT-ASGD, Merity et al. 2017 (arXiv 1708.02182), as their code has it.
    """
    if not config.averaging or config.average_patience is None:
        return config.averaging
    return worsened(valid, config.average_patience)


def worsened(valid: Sequence[float], patience: int) -> bool:
    """Returns whether any of these validations is greater than the least of all before it but the last `patience`."""
    least = itertools.accumulate(valid, min)  # of the first, of the first two, ...
    return any(nats > low for nats, low in zip(valid[patience + 1 :], least, strict=False))
