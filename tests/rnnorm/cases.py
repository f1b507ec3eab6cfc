"""The product cell x norm x guard x options in one place: parity, mutation, gradient and golden tests all run over it.

`run(case, backend)` gives every named output, gradient and state of some windows with carried state;
`assert_close` compares two such records. A new row of `rnnorm.ops.registry.BACKENDS` is tested automatically.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm import norms
from rnnorm.ops import registry, running_stats

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm-cell_norm": ("LSTM", {"cell_norm": True}),
    "lstm-proj": ("LSTM", {"proj_size": 3}),
    "lstm-proj-cell_norm": ("LSTM", {"proj_size": 3, "cell_norm": True}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
NORMS: dict[str, norms.Spec] = {
    **{f"online-{guard}": norms.Online(0.9, 0.8, guard=guard) for guard in norms.GUARDS},
    "online-bare": norms.Online(0.95, 0.7, eps=1e-3, affine=False, guard="scale", control_floor=0.6),
    "layer": norms.Layer(),
    "layer-bare": norms.Layer(eps=1e-3, affine=False),
    "rms": norms.RMS(),
    "none": norms.resolve("none"),
}
UNSORTED = (3, 5, 1, 4, 5)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "lengths": {"bidirectional": True, "bias": False, "lengths": UNSORTED},
    "eval": {"training": False, "lengths": UNSORTED},
    "zoneout": {"zoneout": 0.3, "num_layers": 2, "training": False},
    "masked": {
        **{"bidirectional": True, "lengths": UNSORTED, "reset": True},
        **{"weight_dropout": 0.3, "recurrent_dropout": 0.4, "zoneout": 0.3},
    },
}


@dataclass(frozen=True)
class Case:
    id: str
    layer: str
    norm: norms.Spec
    options: dict[str, Any] = field(default_factory=dict)
    T: int = 5
    N: int = 5
    I: int = 4  # noqa: E741
    H: int = 6
    lengths: tuple[int, ...] | None = None
    reset: bool = False
    training: bool = True
    windows: int = 2
    spread: float = 1.0

    def build(self, backend: str, dtype: torch.dtype = torch.float64) -> Any:
        """The layer, with affine parameters and running statistics other than initial."""
        torch.manual_seed(1)
        made = getattr(rnnorm, self.layer)(self.I, self.H, norm=self.norm, backend=backend, dtype=dtype, **self.options)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, value in made.state_dict().items():
                if "norm_var" in name:
                    value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
                elif "norm" in name:
                    value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        return made.train(self.training)


def _case(cell: str, norm: str, option: str) -> Case:
    layer, own = CELLS[cell]
    more = dict(OPTIONS[option])
    fields = {name: more.pop(name) for name in ("lengths", "training", "reset") if name in more}
    return Case(f"{cell}-{norm}-{option}", layer, NORMS[norm], {**own, **more}, **fields)


PRODUCT = [
    _case(cell, norm, option)
    for cell in CELLS
    for norm in NORMS
    for option in OPTIONS
    if not (norm == "none" and "cell_norm" in cell)
]


def _sized(cell: str, norm: str, name: str, **sizes: Any) -> Case:
    return replace(_case(cell, norm, "plain"), id=f"{cell}-{norm}-{name}", **sizes)


# Sizes at the boundaries of loops, blocks and views.
ODD = [
    _sized(cell, norm, name, **sizes)
    for cell in ("lstm", "lstm-proj-cell_norm", "gru", "rnn_tanh")
    for norm in ("online-scale", "layer")
    for name, sizes in {
        "T1": {"T": 1},
        "N1": {"N": 1},
        "T1N1": {"T": 1, "N": 1},
        "I0": {"I": 0},
        "I1": {"I": 1},
        "H7": {"H": 7, "I": 7},
        "two_blocks": {"N": running_stats.BLOCK + 6, "T": 2},
        "one_block": {"N": running_stats.BLOCK, "T": 2, "H": 4},
        "ragged_blocks": {
            "N": running_stats.BLOCK + 6,
            "T": 3,
            "lengths": tuple(1 + n % 3 for n in range(running_stats.BLOCK + 6)),
        },
        "full_lengths": {"lengths": (5,) * 5},
        "three_windows": {"windows": 3, "lengths": (2, 5, 5, 3, 1)},
        "all_short": {"lengths": (2, 4, 3, 1, 4)},
    }.items()
]
ODD += [_sized(cell, "online-scale", "H1", H=1, I=1) for cell in ("lstm", "gru", "rnn_tanh")]
# Inputs large enough to be clamped.
ODD += [_sized(cell, "online-clamp", "far", spread=30.0) for cell in CELLS]

ALL = PRODUCT + ODD
BY_ID = {case.id: case for case in ALL}
assert len(BY_ID) == len(ALL)

CANDIDATES = [backend.name for backend in registry.BACKENDS if backend.name != "reference"]


def why_not(backend: str, device: str = "cpu") -> str | None:
    """Why this machine cannot run the backend, None if it can."""
    return registry.by_name(backend).why_not(torch.device(device), torch.float32, None)


def skip_unless_runs(backend: str, device: str = "cpu") -> None:
    """Skip, with the reason, if this machine cannot run the backend."""
    reason = why_not(backend, device)
    if reason is not None:
        pytest.skip(f"backend {backend!r}: {reason}")


def run(case: Case, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    """Every output, gradient and state of the case's windows, by name."""
    layer = case.build(backend, dtype).to(device)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    found: dict[str, Tensor] = {}
    rows = layer.num_layers * (1 + layer.bidirectional)
    out = layer.proj_size or case.H
    state = [draw(rows, case.N, width) for width in ((out, case.H) if case.layer == "LSTM" else (out,))]
    for w in range(case.windows):
        layer.zero_grad()
        x = (case.spread * draw(case.T, case.N, case.I)).requires_grad_()
        state = [value.detach().requires_grad_() for value in state]
        lengths = None if case.lengths is None else list(case.lengths)
        reset = (torch.rand(case.T, case.N, generator=generator) < 0.3).to(device) if case.reset else None
        torch.manual_seed(w)  # of the masks
        y, last = layer(x, tuple(state) if case.layer == "LSTM" else state[0], lengths=lengths, reset=reset)
        lasts = list(last) if case.layer == "LSTM" else [last]
        outputs = dict(zip(("y", "h", "c"), (y, *lasts), strict=False))
        torch.autograd.backward(list(outputs.values()), [draw(*value.shape) for value in outputs.values()])
        found |= {f"{name}[{w}]": value.detach() for name, value in outputs.items()}
        leaves = dict(zip(("x", "h_0", "c_0"), (x, *state), strict=False)) | dict(layer.named_parameters())
        for name, leaf in leaves.items():
            assert leaf.grad is not None, name
            found[f"grad {name}[{w}]"] = leaf.grad.clone()
        found |= {f"{name}[{w}]": value.clone() for name, value in layer.named_buffers()}
        state = lasts
    return found


def _pairs(row: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
    return {(a, row[a], b, row[b]) for a in row for b in row if a < b}


def pairwise(
    axes: dict[str, Sequence[Any]], possible: Callable[[dict[str, Any]], bool] = lambda row: True
) -> Iterator[dict[str, Any]]:
    """Rows that hold every possible pair of values of two axes, chosen greedily."""
    left = {(a, x, b, y) for a in axes for b in axes if a < b for x in axes[a] for y in axes[b]}
    left = {(a, x, b, y) for a, x, b, y in left if possible({a: x, b: y})}
    while left:
        a, x, b, y = min(left, key=str)
        row = {a: x, b: y}
        for axis in axes:
            if axis not in row:
                choices = [{**row, axis: value} for value in axes[axis]]
                row = max(filter(possible, choices), key=lambda choice: len(_pairs(choice) & left))
        left -= _pairs(row)
        yield {axis: row[axis] for axis in axes}


_AXES: dict[str, Sequence[Any]] = {
    "cell": list(CELLS),
    "norm": list(NORMS),
    "training": [True, False],
    "lengths": [None, (2, 3, 1)],
    "reset": [False, True],
    "recurrent_dropout": [0.0, 0.4],
    "zoneout": [0.0, 0.3],
    "bidirectional": [False, True],
    "bias": [True, False],
    "windows": [2, 1],
    "H": [5, 1, 40],
    "N": [3, 1],
    "T": [3, 1],
}


def _possible(row: dict[str, Any]) -> bool:
    cell = str(row.get("cell"))
    return not ("cell_norm" in cell and row.get("norm") == "none") and not ("proj" in cell and row.get("H") == 1)


def _chosen(row: dict[str, Any]) -> Case:
    layer, own = CELLS[row["cell"]]
    options = {name: row[name] for name in ("recurrent_dropout", "zoneout", "bidirectional", "bias")}
    sizes = {name: row[name] for name in ("T", "N", "H", "reset", "training", "windows")}
    lengths = row["lengths"] and tuple(min(length, row["T"]) for length in row["lengths"][: row["N"]])
    name = "-".join(str(value).replace(" ", "") for value in row.values())
    return Case(name, layer, NORMS[row["norm"]], {**own, **options}, I=2, lengths=lengths, **sizes)


# For backends that take long: every value of every axis meets every value of every other one.
CHOSEN = {case.id: case for case in map(_chosen, pairwise(_AXES, _possible))}

# Of the largest value of each tensor. Rounding grows with the length of the control process, not with the dtype alone.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
# The same for CHOSEN. Half precision: the largest relative error of a rounding (Triton's interpreter truncates
# bfloat16), times the roundings in a row of T = 3 steps: operand, product, input part and output, in both passes.
_ROUNDINGS = 2 * 4 * 3
CHOSEN_TOLERANCE = {**TOLERANCE, torch.bfloat16: _ROUNDINGS * 2.0**-7, torch.float16: _ROUNDINGS * 2.0**-11}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got = found[name]
        assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, expected {wanted.dtype}"
        if wanted.numel():
            error = (got - wanted).abs().max().item()
            bound = tolerance * max(wanted.abs().max().item(), 1e-3)
            assert error <= bound, f"{name}: off by {error:.3g}, more than {bound:.3g}"
