"""Gate values of a recurrent layer at every step, for inspection."""

import itertools

import torch
from torch import Tensor

from rnnorm import _check, ops
from rnnorm._cells import CELLS, NONLINEARITIES
from rnnorm._layers import Recurrent
from rnnorm._module import State, in_evaluation


@torch.no_grad()
def gates(layer: Recurrent, input: Tensor, hx: State | None = None) -> dict[str, Tensor]:
    """Returns the values of every gate at every step, after its nonlinearity, in evaluation mode.

    Running statistics are frozen and dropout is off, whatever the layer's mode; the layer is not changed. Values are
    computed step by step by the backend `"reference"`, which is slow, in the dtype of the statistics: float64 for
    float64, float32 otherwise.

    Arguments:
        layer: an `LSTM`, `GRU` or `RNN`.
        input: [T, N, I], or [N, T, I] with `batch_first`.
        hx: initial state, as the layer takes it; zeros if None.

    Returns:
        [T, N, H] for each gate and layer, by names such as `f_l0`: i, f, g, o of an LSTM, r, z, n of a GRU, h of an
        RNN; `_reverse` at the end for the reverse direction.

    Raises:
        TypeError: the layer is none of these, or the input is not a tensor.
        ValueError: wrong shape, dtype or device of the input or state.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            f"layer must be an LSTM, GRU or RNN of rnnorm; got {type(layer).__name__}; give the layer itself"
        )
    _check.is_tensor("input", input)
    if input.dim() != 3 or not input.numel():
        raise ValueError(f"input must be [T, N, I] with at least one step; got shape {tuple(input.shape)}")
    with in_evaluation(layer):
        return _gates(layer, input.transpose(0, 1) if layer.batch_first else input, hx)


def _gates(layer: Recurrent, x: Tensor, hx: State | None) -> dict[str, Tensor]:
    own = layer._own_by_row()
    x, state = layer._prepared(x, hx, False, own)
    gates = CELLS[layer.cell].gates
    found: dict[str, Tensor] = {}
    rows = itertools.count()
    for suffixes in layer._suffixes():
        outputs = []
        for reverse, suffix in enumerate(suffixes):
            row = next(rows)
            h, c = state[0][row], state[1][row] if len(state) == 2 else None
            seen: list[Tensor] = []
            operands = layer._operands(own[row], x, h, c, None)
            outputs.append(ops.watched(operands, layer._spec(reverse == 1), seen.append).y)
            calls = len(seen) // x.size(0)
            steps = [torch.cat(seen[i : i + calls], 1) for i in range(0, len(seen), calls)]
            values = torch.stack(steps[::-1] if reverse else steps).chunk(len(gates), 2)
            for gate, value in zip(gates, values, strict=True):
                found[gate.name + suffix] = NONLINEARITIES[gate.nonlinearity].function(value)
        x = torch.cat(outputs, 2)
    return found
