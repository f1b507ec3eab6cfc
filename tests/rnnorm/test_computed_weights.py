"""Weights that torch computes at each call: pruned, weight- and spectral-normalized, parametrized. Code that reads a
layer's weights gets those of its next call, computed once, without side effects."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnorm

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

T, N, INPUTS, H = 5, 3, 4, 6
LAYERS: dict[str, dict[str, Any]] = {
    "LSTM": {"proj_size": 5, "num_layers": 2},
    "GRU": {"bidirectional": True},
    "RNN": {"nonlinearity": "relu", "bias": False},
}
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


class _Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight / 2


def _parametrized(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, _Counted())


WAYS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm, hook": nn.utils.weight_norm,
    "spectral_norm, hook": nn.utils.spectral_norm,
    "pruned": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "pruned twice": lambda module, name: [prune.random_unstructured(module, name, 0.3) for _ in range(2)],
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": _parametrized,
}


def _made(kind: Any, way: str, **options: Any) -> Any:
    """A layer or cell with computed weight matrices, one training step after its last call."""
    module = kind(INPUTS, H, **options)
    for name in [name for name, parameter in module.named_parameters() if parameter.dim() == 2]:
        WAYS[way](module, name)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    found = module(torch.randn(N, INPUTS) if "Cell" in kind.__name__ else torch.randn(T, N, INPUTS))
    (found[0] if isinstance(found, tuple) else found).square().sum().backward()
    optimizer.step()
    return module


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _first(module: Any, N: int = N) -> Any:
    """An initial state, as the module takes it."""
    lead = () if "Cell" in type(module).__name__ else (module.num_layers * (1 + module.bidirectional),)
    h = torch.randn(*lead, N, module.proj_size or H)
    return (h, torch.randn(*lead, N, H)) if module.cell == "lstm" else h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_plain_copies_and_gates_are_those_of_the_next_call(kind: str, way: str, training: bool) -> None:
    layer = _made(getattr(rnnorm, kind), way, **LAYERS[kind]).train(training)
    modes = [part.training for part in layer.modules()]
    before, x, first = _state(layer), torch.randn(T, N, INPUTS), _first(layer)
    plain = layer.to_plain()
    found = rnnorm.gates(layer, x, first)
    assert [part.training for part in layer.modules()] == modes
    torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)
    y, last = layer.eval()(x, first)
    states, expected = (first, (y, *last)) if kind == "LSTM" else ((first,), (y, last))
    torch.testing.assert_close(plain(x, *states), expected, rtol=0, atol=1e-6)
    if kind == "RNN":
        torch.testing.assert_close(found["h_l0"], y, rtol=0, atol=1e-6)
    if kind == "GRU":
        h = (1 - found["z_l0"][0]) * found["n_l0"][0] + found["z_l0"][0] * first[0]
        torch.testing.assert_close(h, y[0, :, :H], rtol=0, atol=1e-6)


def _calls(module: nn.Module) -> list[int]:
    return [part.calls for part in module.modules() if isinstance(part, _Counted)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_parametrized_weight_is_computed_once_a_call(kind: str, training: bool, autocast: bool) -> None:
    module = _made(getattr(rnnorm, kind), "parametrized", **LAYERS.get(kind, {})).train(training)
    first, single = _first(module), _first(module, 1)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, N, INPUTS), [5, 3, 1])
    x = torch.randn(N, INPUTS) if kind in CELLS else torch.randn(T, N, INPUTS)
    reads: list[Callable[[], Any]] = [lambda: module(x), lambda: module(x, first)]
    if kind in LAYERS:
        reads += [lambda: module(packed, first), lambda: module(x, first, lengths=[5, 3, 1])]
        reads += [lambda: module.all_weights, lambda: rnnorm.gates(module, x, first), module.to_plain]
        alone = tuple(state.squeeze(1) for state in single) if kind == "LSTM" else single.squeeze(1)
        reads += [lambda: module(x[:, 0], alone)]
    for read in reads:
        before = _calls(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            read()
        assert _calls(module) == [count + 1 for count in before] != []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_torchscript_refuses_them_and_moves_nothing(kind: str, way: str) -> None:
    module = _made(getattr(rnnorm, kind), way)
    before = _state(module)
    with pytest.raises(TypeError, match=r"weight_ih.* must be a parameter .*; got a computed weight; remove its"):
        torch.jit.script(module)
    torch.testing.assert_close(_state(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_conversions_copy_what_is_computed(kind: str, way: str, training: bool) -> None:
    x = torch.randn(T, N, INPUTS)
    ours, theirs = getattr(rnnorm, kind), getattr(nn, kind)
    for layer, convert in (
        (_made(theirs, way, **LAYERS[kind]), lambda layer: ours.from_torch(layer, norm="none")),
        (_made(ours, way, **LAYERS[kind], norm="none"), lambda layer: layer.to_torch()),
    ):
        layer.train(training)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("weight_hh_l0" not in name)
        before = _state(layer)
        new = convert(layer)
        torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)
        assert new.training is training
        assert {name for name, _ in new.named_parameters()} == {name for names in new._all_weights for name in names}
        for name, parameter in new.named_parameters():
            assert parameter.requires_grad is ("weight_hh_l0" not in name)
        torch.testing.assert_close(new.eval()(x), layer.eval()(x), rtol=0, atol=1e-6)


def test_conversions_that_cannot_be_say_why() -> None:
    layer = nn.LSTM(INPUTS, H)
    for name, value in {
        "input_size": 3,
        "hidden_size": 7,
        "num_layers": 2,
        "bias": False,
        "bidirectional": True,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be the given layer's, .*; got {value}; leave it out"):
            rnnorm.LSTM.from_torch(layer, **{name: value})
    with pytest.raises(ValueError, match="proj_size must be the given layer's, 0; got 2; leave it out"):
        rnnorm.LSTM.from_torch(layer, proj_size=2)
    assert rnnorm.LSTM.from_torch(layer, hidden_size=H, batch_first=True).batch_first
    layer.register_parameter("peephole", nn.Parameter(torch.zeros(H)))
    with pytest.raises(ValueError, match="of a LSTM must be those of its class; got peephole; remove it"):
        rnnorm.LSTM.from_torch(layer)


def test_reset_draws_what_weights_are_computed_from() -> None:
    layer = rnnorm.LSTM(INPUTS, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    direction = layer.parametrizations.weight_hh_l0.original1
    with torch.no_grad():
        direction.fill_(7)
    layer.reset_parameters()
    assert 0 < float(direction.detach().abs().max()) <= H**-0.5
