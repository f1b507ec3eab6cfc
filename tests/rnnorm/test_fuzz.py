"""Random shapes, options and lengths: every backend equals the reference; invalid ones raise a clear error.

`RNNORM_FUZZ=5000` tries that many random examples of each; without it a few, always the same.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnorm
from rnnorm import norms

EXAMPLES = int(os.environ.get("RNNORM_FUZZ", "25"))
_FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="RNNORM_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

_SIZES = some.one_of(some.integers(1, 7), some.sampled_from([8, 15, 16, 17, 33]))
_COLUMNS = some.one_of(some.integers(0, 6), some.sampled_from([63, 64, 65, 67, 129]))
_NORMS = some.one_of(
    some.builds(
        norms.Online,
        alpha_fwd=some.sampled_from([0.5, 0.9, 0.999, 8191 / 8192, 1.0]),
        alpha_bwd=some.sampled_from([0.8, 0.9, 31 / 32, 1.0]),
        eps=some.sampled_from([1e-5, 1e-2]),
        affine=some.booleans(),
        guard=some.sampled_from(norms.GUARDS),
        control_floor=some.sampled_from([float("-inf"), -0.5, 1e-5, 0.9]),
    ),
    some.builds(norms.Layer, eps=some.sampled_from([1e-5, 1e-2]), affine=some.booleans()),
    some.builds(norms.RMS, eps=some.sampled_from([1e-5, 1e-2]), affine=some.booleans()),
    some.just(norms.resolve("none")),
)


@dataclass(frozen=True)
class Call:
    """A layer and its calls, over some windows."""

    layer: str
    options: dict[str, Any]
    I: int  # noqa: E741
    H: int
    T: int
    N: int
    lengths: tuple[int, ...] | None
    packed: str  # "no", "sorted" or "unsorted"
    single: bool
    with_state: bool
    training: bool
    frozen: tuple[str, ...]  # name parts of what needs no gradient
    windows: int
    seed: int


@some.composite
def _calls(draw: Any) -> Call:
    cell = draw(some.sampled_from(list(cases.CELLS)))
    layer, own = cases.CELLS[cell]
    H = draw(_SIZES)
    options = dict(own)
    norm = draw(_NORMS)
    if "proj_size" in options:
        options["proj_size"] = draw(some.integers(0, H - 1))
    if norm.kind == "none":
        options.pop("cell_norm", None)
    options |= {
        "norm": norm,
        "num_layers": draw(some.integers(1, 3)),
        "bidirectional": draw(some.booleans()),
        "bias": draw(some.booleans()),
        "batch_first": draw(some.booleans()),
        "dropout": draw(some.sampled_from([0.0, 0.0, 0.5])),
    }
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    single = draw(some.integers(0, 9)) == 0
    N = 1 if single else draw(_COLUMNS)
    T = draw(some.integers(1, 3 if N > 6 else 7))
    packed = "no" if single or N == 0 else draw(some.sampled_from(["no", "no", "sorted", "unsorted"]))
    ragged = packed != "no" or draw(some.booleans())
    lengths = tuple(draw(some.lists(some.integers(1, T), min_size=N, max_size=N))) if ragged else None
    if packed == "sorted":
        assert lengths is not None
        lengths = tuple(sorted(lengths, reverse=True))
    I = draw(some.integers(int(packed != "no"), 9))  # noqa: E741
    if I == 0 and norm.kind != "none":
        # Without input a variance decays to zero, and each normalization in a chain multiplies rounding by eps**-0.5.
        options["norm"] = replace(norm, eps=1e-2)
    return Call(
        *(layer, options, I, H, T, N, lengths, packed, single),
        with_state=draw(some.booleans()),
        training=draw(some.integers(0, 4)) > 0,
        frozen=tuple(draw(some.lists(some.sampled_from(["weight_ih", "weight_hh", "bias", "norm", "x"]), max_size=2))),
        windows=draw(some.integers(1, 3)),
        seed=draw(some.integers(0, 2**32)),
    )


def _layer(call: Call, backend: str) -> Any:
    torch.manual_seed(1)
    layer = getattr(rnnorm, call.layer)(call.I, call.H, backend=backend, dtype=torch.float64, **call.options)
    generator = torch.Generator().manual_seed(call.seed)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            if "norm_var" in name:
                value.copy_(0.5 + noise)
            elif "norm" in name:
                value.add_(0.3 * (noise - 0.5))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not any(part in name for part in call.frozen))
    return layer.train(call.training)


def _record(call: Call, backend: str) -> dict[str, Tensor]:
    """Every output, gradient and running statistic, by name."""
    layer, found = _layer(call, backend), {}
    generator = torch.Generator().manual_seed(call.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = layer.num_layers * (1 + layer.bidirectional)
    columns = () if call.single else (call.N,)
    widths = (layer.proj_size or call.H, call.H)[: 1 + (call.layer == "LSTM")]
    state: list[Tensor] | None = [draw(rows, *columns, width) for width in widths] if call.with_state else None
    for window in range(call.windows):
        layer.zero_grad()
        leaves: dict[str, Tensor] = {}
        shape = (call.N, call.T, call.I) if layer.batch_first and not call.single else (call.T, *columns, call.I)
        leaves["x"] = draw(*shape).requires_grad_("x" not in call.frozen)
        given: Any = leaves["x"]
        options: dict[str, Any] = {}
        if call.packed != "no":
            assert call.lengths is not None
            order = call.packed == "sorted"
            given = pack_padded_sequence(given, torch.tensor(call.lengths), layer.batch_first, enforce_sorted=order)
        elif call.lengths is not None:
            options["lengths"] = list(call.lengths)
        hx: Any = None
        if state is not None:
            leaves |= {f"state{k}": value.detach().requires_grad_() for k, value in enumerate(state)}
            parts = [leaves[f"state{k}"] for k in range(len(state))]
            hx = tuple(parts) if call.layer == "LSTM" else parts[0]
        torch.manual_seed(call.seed + window)  # of the dropout
        y, last = layer(given, hx, **options)
        state = list(last) if call.layer == "LSTM" else [last]
        outputs = {"y": y.data if call.packed != "no" else y, **{f"last{k}": value for k, value in enumerate(state)}}
        grads = {name: draw(*value.shape) for name, value in outputs.items()}
        wanting = {name: value for name, value in outputs.items() if value.requires_grad}
        if wanting:
            torch.autograd.backward(list(wanting.values()), [grads[name] for name in wanting])
        leaves |= dict(layer.named_parameters())
        found |= {f"{name}[{window}]": value.detach() for name, value in outputs.items()}
        found |= {f"grad {name}[{window}]": leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
        found |= {f"{name}[{window}]": value.clone() for name, value in layer.named_buffers()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_every_backend_equals_the_reference(backend: str) -> None:
    cases.skip_unless_runs(backend)

    @_FUZZ
    @given(_calls())
    def check(call: Call) -> None:
        event(call.layer)
        cases.assert_close(_record(call, backend), _record(call, "reference"), 1e-8)

    check()


_NOT_SIZES = some.sampled_from([0, -1, 2.5, "4", None, True, float("nan"), [3]])
_BAD_OPTIONS: dict[str, some.SearchStrategy[Any]] = {
    "input_size": some.sampled_from([-1, 2.5, "4", None, True]),
    "hidden_size": _NOT_SIZES,
    "num_layers": _NOT_SIZES,
    "dropout": some.sampled_from([-0.1, 1.1, "half", None, True, float("nan"), float("inf")]),
    "proj_size": some.sampled_from([-1, 4, 99, 1.5, "2", None, True]),
    "norm": some.one_of(
        some.text(max_size=8).filter(lambda t: t not in norms.KINDS), some.sampled_from([None, 3, int])
    ),
    "backend": some.one_of(some.text(max_size=8).filter(lambda t: t != "auto"), some.sampled_from([None, 3])),
    "nonlinearity": some.one_of(some.text(max_size=5).filter(lambda t: t not in ("tanh", "relu")), some.none()),
    "alpha_fwd": some.sampled_from([0, -0.5, 1.5, "x", None, True, float("nan"), float("inf")]),
    "alpha_bwd": some.sampled_from([0, -0.5, 1.5, "x", None, True, float("nan"), float("inf")]),
    "eps": some.sampled_from([0, -1e-5, "x", None, True, float("nan")]),
    "guard": some.sampled_from(["", "clip", None, 3]),
    "control_floor": some.sampled_from([1, 2.5, "x", None, True, float("nan"), float("inf")]),
}


@_FUZZ
@given(some.data(), some.sampled_from(list(_BAD_OPTIONS)))
def test_bad_options_are_refused_with_a_text(data: Any, name: str) -> None:
    value = data.draw(_BAD_OPTIONS[name])
    options: dict[str, Any] = {"input_size": 3, "hidden_size": 4}
    make: Any = rnnorm.RNN if name == "nonlinearity" else rnnorm.LSTM
    if name in ("alpha_fwd", "alpha_bwd", "eps", "guard", "control_floor"):
        make, options = norms.Online, {}
    with pytest.raises((ValueError, TypeError)) as refusal:
        make(**{**options, name: value})
    assert name in str(refusal.value)


def _bad_calls() -> dict[str, some.SearchStrategy[tuple[Any, ...]]]:
    """Arguments (input, state, lengths) of a layer of 3 inputs, 4 units, for T = 5 and N = 2."""
    x, state = torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    shape = some.lists(some.integers(0, 4), max_size=4).map(tuple)
    dtypes = [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
    states = shape.filter(lambda s: s != (1, 2, 4)).map(torch.zeros)
    bad_lengths = some.one_of(
        some.lists(some.integers(-3, 9), max_size=4).filter(lambda n: len(n) != 2 or min(n) < 1 or max(n) > 5),
        some.sampled_from([[1.0, 2.0], torch.ones(2, dtype=torch.bool), torch.ones(1, 2).long(), 3]),
    )
    return {
        "shape": shape.filter(lambda s: len(s) not in (2, 3) or s[-1] != 3 or s[0] == 0).map(
            lambda s: (torch.zeros(s), None, None)
        ),
        "dtype": some.sampled_from(dtypes).map(lambda dtype: (x.to(dtype), None, None)),
        "kind": some.sampled_from([None, "text", [[1.0]], 3]).map(lambda value: (value, None, None)),
        "state": some.tuples(states, some.booleans()).map(
            lambda s: (x, (s[0], state[1]) if s[1] else (state[0], s[0]), None)
        ),
        "state's form": some.sampled_from([state[0], (state[0],), (*state, state[0]), [], "hc", 3]).map(
            lambda hx: (x, hx, None)
        ),
        "state's dtype": some.sampled_from(dtypes).map(lambda d: (x, (state[0], state[1].to(d)), None)),
        "lengths": bad_lengths.map(lambda lengths: (x, None, lengths)),
    }


_LAYERS = {name: rnnorm.LSTM(3, 4, backend=name) for name in ("auto", "reference")}


@_FUZZ
@given(some.sampled_from(list(_bad_calls())).flatmap(lambda name: _bad_calls()[name]), some.sampled_from(list(_LAYERS)))
def test_bad_calls_are_refused_with_a_text(arguments: tuple[Any, ...], backend: str) -> None:
    layer = _LAYERS[backend]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    given_input, hx, lengths = arguments
    with pytest.raises((ValueError, TypeError)) as refusal:
        layer(given_input, hx, lengths=lengths)
    assert "must" in str(refusal.value)
    assert "got" in str(refusal.value)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
