"""The recurrent cells: one step of math each, pure, and the table that says what their gates and states are.

The time loop is elsewhere (`rnnorm.ops`); how a pre-activation is normalized is passed in. Gate orders are torch's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# normalize(pre [n, k*H], first gate index) -> the same shape; normalize_cell([n, H]) -> [n, H]
Normalize = Callable[[Tensor, int], Tensor]
# step(x_part [n, G*H], h_part [n, G*H], h [n, H], c [n, H] or None, normalize, normalize_cell) -> (h', c')
Step = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Normalize, Callable[[Tensor], Tensor]],
    tuple[Tensor, Tensor | None],
]


def _lstm(x_part, h_part, h, c, normalize, normalize_cell):
    i, f, g, o = normalize(x_part + h_part, 0).chunk(4, 1)
    c = normalize_cell(f.sigmoid() * c + i.sigmoid() * g.tanh())
    return o.sigmoid() * c.tanh(), c


def _gru(x_part, h_part, h, c, normalize, normalize_cell):
    H = h.size(1)
    r, z = normalize(x_part[:, : 2 * H] + h_part[:, : 2 * H], 0).sigmoid().chunk(2, 1)
    n = normalize(x_part[:, 2 * H :] + r * h_part[:, 2 * H :], 2).tanh()
    return (1 - z) * n + z * h, None


def _rnn_tanh(x_part, h_part, h, c, normalize, normalize_cell):
    return normalize(x_part + h_part, 0).tanh(), None


def _rnn_relu(x_part, h_part, h, c, normalize, normalize_cell):
    return normalize(x_part + h_part, 0).relu(), None


@dataclass(frozen=True)
class Cell:
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Step
    torch_layer: type[torch.nn.RNNBase]


CELLS: dict[str, Cell] = {
    "lstm": Cell(("i", "f", "g", "o"), ("h", "c"), _lstm, torch.nn.LSTM),
    "gru": Cell(("r", "z", "n"), ("h",), _gru, torch.nn.GRU),
    "rnn_tanh": Cell(("h",), ("h",), _rnn_tanh, torch.nn.RNN),
    "rnn_relu": Cell(("h",), ("h",), _rnn_relu, torch.nn.RNN),
}
