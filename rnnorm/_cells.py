"""The recurrent cells: for each, its gates, its states and one step as a pure function.

The time loop is in `rnnorm.ops`; the normalization of the pre-activations is passed in. Gate orders are torch's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


def _lstm_capped(x_part, h_part, h, c, normalize, normalize_cell):
    i, f, g, o = normalize(x_part + h_part, 0).chunk(4, 1)
    f = f.sigmoid()
    c = normalize_cell(f * c + torch.minimum(i.sigmoid(), 1 - f) * g.tanh())
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


class Gate(NamedTuple):
    """A pre-activation of H units."""

    name: str
    nonlinearity: str  # a key of NONLINEARITIES

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of the gate's values, None if unbounded."""
        return NONLINEARITIES[self.nonlinearity].bounds


class Nonlinearity(NamedTuple):
    """The function applied to a gate's normalized pre-activation."""

    function: Callable[[Tensor], Tensor]
    bounds: tuple[float, float] | None  # of its values; None: unbounded


NONLINEARITIES = {
    "sigmoid": Nonlinearity(torch.sigmoid, (0.0, 1.0)),
    "tanh": Nonlinearity(torch.tanh, (-1.0, 1.0)),
    "relu": Nonlinearity(torch.relu, None),
}


@dataclass(frozen=True)
class Cell:
    """The declaration of a cell. Tables elsewhere are derived from it."""

    gates: tuple[Gate, ...]  # in torch's order
    states: tuple[str, ...]
    step: Step
    # The last gates, if another gate multiplies their recurrent part `R h + b'` before it is added to the input part.
    apart: tuple[str, ...] = ()
    # The step with the option `cap_input_gate`, if the cell has it.
    capped: Step | None = None

    @property
    def together(self) -> tuple[tuple[int, int], ...]:
        """The ranges of gates that are normalized together."""
        joined, count = len(self.gates) - len(self.apart), len(self.gates)
        return ((0, joined), (joined, count)) if self.apart else ((0, count),)


def _gates(**nonlinearities: str) -> tuple[Gate, ...]:
    return tuple(Gate(name, kind) for name, kind in nonlinearities.items())


CELLS: dict[str, Cell] = {
    "lstm": Cell(_gates(i="sigmoid", f="sigmoid", g="tanh", o="sigmoid"), ("h", "c"), _lstm, capped=_lstm_capped),
    "gru": Cell(_gates(r="sigmoid", z="sigmoid", n="tanh"), ("h",), _gru, apart=("n",)),
    "rnn_tanh": Cell(_gates(h="tanh"), ("h",), _rnn_tanh),
    "rnn_relu": Cell(_gates(h="relu"), ("h",), _rnn_relu),
}


def rnn(nonlinearity: str) -> str:
    """The name of the RNN cell with this nonlinearity. Raises `ValueError` for any but tanh and relu."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu'; got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"
