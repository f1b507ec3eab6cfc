"""Argument checks: each error says what was expected, what was got and how to fix it. Numbers may be numpy scalars."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_number(value: object, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def sizes(
    input_size: int, hidden_size: int, num_layers: int, dropout: float, proj_size: int
) -> tuple[int, int, int, float, int]:
    """The same values, checked, as Python's own numbers."""
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
        if not is_number(value, numbers.Integral):
            raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")
    for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if value <= 0:
            raise ValueError(f"{name} must be greater than 0; got {value}")
    if input_size < 0:
        raise ValueError(f"input_size must not be negative; got {input_size}")
    if not is_number(proj_size, numbers.Integral) or not 0 <= proj_size < hidden_size:
        raise ValueError(f"proj_size must be an int in [0, hidden_size={hidden_size}); got {proj_size!r}")
    return int(input_size), int(hidden_size), int(num_layers), probability("dropout", dropout), int(proj_size)


def count(name: str, value: Any) -> int:
    if not is_number(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0; got {value!r}")
    return int(value)


def probability(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1]; got {value!r}")
    return float(value)


def statistics_are_wide(held: Tensor) -> None:
    """Only a scripted module's may be narrow: torch converts them with it. TorchScript compiles this."""
    if held.dtype != torch.float32 and held.dtype != torch.float64:
        raise ValueError(
            "running statistics must be float32 or float64 in training; got those of a scripted module that was "
            "converted to half precision; convert the module before torch.jit.script"
        )


def zoneout(value: object, states: Sequence[str]) -> float | tuple[float, float]:
    """The checked rate for all states of the cell, or the rates of h and c."""
    if not isinstance(value, tuple | list):
        return probability("zoneout", value)
    if "c" not in states:
        raise ValueError(f"zoneout must be one probability for a cell without a state c; got {value!r}")
    if len(value) != 2:
        raise ValueError(f"zoneout must be a probability in [0, 1], or a pair of them for h and c; got {value!r}")
    return probability("zoneout of h", value[0]), probability("zoneout of c", value[1])


def cell_norm(value: bool, norm: str, states: Sequence[str]) -> bool:
    if value and "c" not in states:
        raise TypeError("cell_norm must be False for a cell without a state c; got True; leave it out, or use an LSTM")
    if value and norm == "none":
        raise ValueError("cell_norm must be False with norm='none'; got True; leave it out, or choose a norm")
    return bool(value)


def norm_init(value: Any, affine: bool) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"norm_init must be a finite number; got {value!r}")
    if value != 1 and not affine:
        raise ValueError(f"norm_init must be 1 for a norm without affine parameters; got {value}; leave it out")
    return float(value)


def reset_tensor(reset: Tensor, lead: Sequence[int], meaning: str, device: torch.device) -> Tensor:
    is_tensor("reset", reset)
    shape("reset", reset, lead, meaning)
    if reset.dtype != torch.bool:
        raise ValueError(f"reset must have dtype torch.bool; got {reset.dtype}; convert it with .bool()")
    if reset.device != device:
        raise ValueError(f"reset must be on the input's device {device}; got {reset.device}; move it with .to(device)")
    return reset.clone()  # kept for the backward, whatever the caller writes into it then


def is_tensor(name: str, value: object, kinds: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kinds}; got {value!r:.60} of type {type(value).__name__}")


def like_weights(name: str, tensor: Tensor, weight: Tensor, autocast: bool) -> None:
    if not tensor.is_floating_point() or (tensor.dtype != weight.dtype and not autocast):
        raise ValueError(
            f"{name} must have the weights' dtype {weight.dtype}; got {tensor.dtype}; convert one with .to(dtype)"
        )
    if tensor.device != weight.device:
        raise ValueError(
            f"{name} must be on the weights' device {weight.device}; got {tensor.device}; move one with .to(device)"
        )


def shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}; got {tuple(tensor.shape)}")


def lengths_tensor(lengths: "Tensor | Sequence[int]", T: int, N: int) -> Tensor:
    """`lengths` [N] as int64 on the CPU, each in 1..T."""
    found = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    if not isinstance(lengths, Tensor) and found.numel() == 0:
        found = found.long()  # an empty list has torch's default dtype
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"lengths must be integers; got {found.dtype}")
    found = found.to("cpu", torch.int64, copy=True)  # kept for the backward, whatever the caller writes into it then
    if tuple(found.shape) != (N,):
        raise ValueError(
            f"lengths must hold one length for each of the N = {N} sequences; got shape {tuple(found.shape)}"
        )
    # Values are data: a compiled graph cannot branch on them.
    if not torch.compiler.is_compiling() and N and not (int(found.min()) >= 1 and int(found.max()) <= T):
        raise ValueError(
            f"lengths must lie in 1..T = 1..{T}; got {int(found.min())}..{int(found.max())}; "
            "leave empty sequences out of the batch"
        )
    return found
