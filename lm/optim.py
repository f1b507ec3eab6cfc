"""Optimizers by name, learning rates as a pure function of where the run stands, averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer

from lm.config import TrainConfig

_NEVER = float(2**53)


def build(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Returns the optimizer of `config.optimizer` over every parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = config.lr, config.weight_decay
    match config.optimizer:
        case "sgd":
            return SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
        case "asgd":
            # Merity et al. 2017 (arXiv 1708.02182): plain sgd, averaged from step t0 on.
            return ASGD(parameters, lr=lr, lambd=0.0, alpha=0.0, t0=_NEVER, weight_decay=decay)
        case "adam":
            return Adam(parameters, lr=lr, weight_decay=decay, fused=True)
        case "adamw":
            return AdamW(parameters, lr=lr, weight_decay=decay, fused=True)


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


def start_averaging(optimizer: Optimizer, step: int) -> None:
    """Lets ASGD average the weights after each step from `step` on; a second call changes nothing."""
    for group in optimizer.param_groups:
        if group.get("t0") == _NEVER:
            group["t0"] = float(step - 1)  # torch leaves the weights of step t0 + 1 out of the average


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters hold ASGD's averages (the weights themselves until averaging starts)."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            if "ax" in state:
                kept.append((parameter, parameter.clone()))
                parameter.copy_(state["ax"])
        try:
            yield
        finally:
            for parameter, value in kept:
                parameter.copy_(value)
