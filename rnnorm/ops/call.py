"""One call of a recurrent layer and direction over a whole sequence: its operands, specification and results.

The field order is the argument order of the operators `rnnorm::sequence`, `sequence_saving` and `sequence_backward`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnorm._cells import CELLS, Cell
from rnnorm.norms import Constants


class Operands(NamedTuple):
    """The tensors of one call. Axes: T steps, N sequences, I inputs, H units, P = H or the projected size, C = G*H."""

    x: Tensor  # [T, N, I]; its dtype is that of products
    h: Tensor  # [N, P]
    c: Tensor | None  # [N, H], LSTM only
    weight_ih: Tensor  # [C, I]; weights and biases may be wider than x, as under autocast
    weight_hh: Tensor  # [C, P]
    bias_ih: Tensor | None  # [C]
    bias_hh: Tensor | None  # [C]
    weight_hr: Tensor | None  # [P, H]
    norm_scale: Tensor | None  # [C]
    norm_shift: Tensor | None  # [C]
    cell_norm_scale: Tensor | None  # [H]
    cell_norm_shift: Tensor | None  # [H]
    weight_mogrify: Tensor | None  # flat, as `mogrifier_rounds` reads it
    # The following fields are not differentiated.
    lengths: Tensor | None  # [N] int64 on the CPU, each in 1..T; None: all T
    reset: Tensor | None  # [T, N] bool, true if the state before the step is zero
    recurrent_mask: Tensor | None  # [N, P], factor of h in the recurrent product; statistics dtype
    zoneout_h: Tensor | None  # [T, N, P], share of the old h that is kept; bool or statistics dtype
    zoneout_c: Tensor | None  # [T, N, H], the same for c
    # The following fields are buffers, which are updated between the forward and the backward pass.
    norm_mean: Tensor | None  # [C], statistics dtype, as the following seven
    norm_var: Tensor | None
    norm_u: Tensor | None  # updated in place by the backward operator
    norm_v: Tensor | None
    cell_norm_mean: Tensor | None  # [H]
    cell_norm_var: Tensor | None
    cell_norm_u: Tensor | None
    cell_norm_v: Tensor | None

    def in_product_dtype(self) -> "Operands":
        """The same with weights and biases in the dtype of x, which is that of products."""
        dtype = self.x.dtype
        given = {name: getattr(self, name) for name in _OF_PRODUCTS}
        changed: dict[str, Any] = {
            name: value.to(dtype) for name, value in given.items() if value is not None and value.dtype != dtype
        }
        return self._replace(**changed) if changed else self


_OF_PRODUCTS = tuple(name for name in Operands._fields if name.startswith(("weight", "bias")))
DIFFERENTIABLE = Operands._fields[: Operands._fields.index("lengths")]
SAVED = Operands._fields[: Operands._fields.index("norm_mean")]
HELD = DIFFERENTIABLE[3:] + Operands._fields[len(SAVED) :]  # the tensors that a module holds, under these names
MOVED_IN_BACKWARD = ("norm_u", "norm_v", "cell_norm_u", "cell_norm_v")


class CallSpec(NamedTuple):
    """Everything about one call that is not a tensor."""

    cell: str
    norm: str
    guard: str
    constants: Constants
    cell_norm: bool
    training: bool  # online: update the statistics, and run the control process in the backward pass
    reverse: bool
    wanted: str  # the backend: `"auto"` or a name
    rounds: int = 0  # of a Mogrifier
    rank: int = 0  # of a round's weight; 0: full
    cap: bool = False  # of an LSTM: i = min(i, 1 - f)

    @property
    def declared(self) -> Cell:
        """The declaration of the cell."""
        return CELLS[self.cell]

    @property
    def gates(self) -> int:
        """G, the number of gates."""
        return len(self.declared.gates)

    @property
    def special(self) -> bool:
        """True for what a backend must say that it can run: `runs_special`."""
        return self.rounds > 0 or self.cap

    @property
    def controlled(self) -> bool:
        """True if the backward pass runs the control process, which updates u and v and cannot be repeated."""
        return self.norm == "online" and self.training


class Results(NamedTuple):
    """What a call returns. Tensors that do not apply are empty."""

    y: Tensor  # [T, N, P], zero at padded positions
    h: Tensor  # [N, P]
    c: Tensor  # [N, H]
    norm_mean: Tensor  # [C], the statistics after the sequence, as the following three
    norm_var: Tensor
    cell_norm_mean: Tensor  # [H]
    cell_norm_var: Tensor


class Round(NamedTuple):
    """One round of a Mogrifier: `to = 2 sigmoid(up (down from) + bias) * to`, of x by h if even, else of h by x."""

    down: Tensor | None  # [rank, from]; None: full rank
    up: Tensor  # [to, rank] or [to, from]
    bias: Tensor  # [to]


def mogrifier_shapes(inputs: int, state: int, rounds: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of `down` (of low rank only), `up` and `bias` of each round, one round after another."""
    shapes: list[tuple[int, ...]] = []
    for number in range(rounds):
        to, of = (inputs, state) if number % 2 == 0 else (state, inputs)
        shapes += [(rank, of), (to, rank), (to,)] if rank else [(to, of), (to,)]
    return shapes


def mogrifier_rounds(operands: Operands, spec: CallSpec) -> list[Round]:
    """The rounds, as views of `weight_mogrify`."""
    if operands.weight_mogrify is None:
        return []
    shapes = mogrifier_shapes(operands.x.size(2), operands.h.size(1), spec.rounds, spec.rank)
    parts = operands.weight_mogrify.split([math.prod(shape) for shape in shapes])
    views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    if not spec.rank:
        return [Round(None, *views[k : k + 2]) for k in range(0, len(views), 2)]
    return [Round(*views[k : k + 3]) for k in range(0, len(views), 3)]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, carried values and nonlinearities: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def results_like(operands: Operands, spec: CallSpec) -> Results:
    """Uninitialized results of the right shapes; new statistics only if the call updates them."""
    x, h, c = operands.x, operands.h, operands.c

    def moved(statistic: Tensor | None) -> Tensor:
        return x.new_empty(0) if statistic is None or not spec.controlled else torch.empty_like(statistic)

    return Results(
        x.new_empty(x.size(0), x.size(1), h.size(1)),
        torch.empty_like(h, memory_format=torch.contiguous_format),
        x.new_empty(0) if c is None else torch.empty_like(c, memory_format=torch.contiguous_format),
        moved(operands.norm_mean),
        moved(operands.norm_var),
        moved(operands.cell_norm_mean),
        moved(operands.cell_norm_var),
    )
