"""Every bad argument has one clear error: what was expected, what was got, how to fix it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnorm
from rnnorm import norms
from rnnorm.ops import BackendUnavailable

_X = torch.zeros(5, 2, 3)
_PACKED = pack_padded_sequence(_X, torch.tensor([5, 3]))


def _lstm(**options: Any) -> Any:
    return rnnorm.LSTM(3, 4, **options)


def _without_biases() -> Any:
    layer = rnnorm.GRU(3, 4, norm="none")
    layer.bias_ih_l0 = layer.bias_hh_l0 = None
    return layer


def _state(*shape: int, **options: Any) -> Any:
    return torch.zeros(*shape, **options), torch.zeros(*shape, **options)


_CONSTRUCTION: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: _lstm(norm="batch"),
        ValueError,
        "norm must be one of 'online', 'layer', 'rms', 'none' or a specification",
    ),
    (lambda: _lstm(norm=None), ValueError, "norm must be one of .*; got None"),
    (lambda: _lstm(norm=norms.Online), ValueError, "norm must be one of .*; got <class"),
    (lambda: setattr(_lstm(), "norm", "batch"), ValueError, "norm must be one of .*; got 'batch'"),
    (lambda: setattr(_lstm(), "norm", nn.LayerNorm(4)), ValueError, "norm must be one of .*; got LayerNorm"),
    (
        lambda: setattr(_lstm(), "norm", "layer"),
        ValueError,
        "norm must have the parameters and statistics of the layer's Online.*; got Layer.*; make a new layer",
    ),
    (lambda: setattr(_lstm(norm="none"), "norm", "rms"), ValueError, "of the layer's Identity.*; got RMS"),
    (lambda: setattr(_lstm(norm="rms"), "norm", norms.RMS(affine=False)), ValueError, "got RMS.*affine=False"),
    (lambda: _lstm(backend="cuddn"), ValueError, "backend must be one of 'auto', .*'scripted', .*; got 'cuddn'"),
    (lambda: _lstm(cell_norm=True, norm="none"), ValueError, "cell_norm must be False with norm='none'; got True"),
    (lambda: rnnorm.GRU(3, 4, cell_norm=True), TypeError, "cell_norm must be False .* without a state c; got True"),
    (lambda: rnnorm.GRU(3, 4, proj_size=2), TypeError, "options of GRU must be among norm, .*; got 'proj_size'"),
    (lambda: _lstm(proj_size=4), ValueError, r"proj_size must be an int in \[0, hidden_size=4\); got 4"),
    (lambda: _lstm(proj_size=-1), ValueError, "proj_size must be an int"),
    (lambda: _lstm(proj_size=True), ValueError, "proj_size must be an int .*; got True"),
    (lambda: _lstm(dropout=1.5), ValueError, r"dropout must be a probability in \[0, 1\]; got 1.5"),
    (lambda: _lstm(dropout=True), ValueError, "dropout must be a probability"),
    (lambda: _lstm(num_layers=0), ValueError, "num_layers must be greater than 0; got 0"),
    (lambda: rnnorm.LSTM(3, 0), ValueError, "hidden_size must be greater than 0; got 0"),
    (lambda: rnnorm.LSTM(3, 4.0), TypeError, "hidden_size must be an int; got 4.0 of type float"),
    (lambda: rnnorm.LSTM("3", 4), TypeError, "input_size must be an int; got '3' of type str"),
    (lambda: rnnorm.LSTM(-3, 4), ValueError, "input_size must not be negative; got -3"),
    (lambda: rnnorm.RNN(3, 4, nonlinearity="gelu"), ValueError, "nonlinearity must be 'tanh' or 'relu'; got 'gelu'"),
    (lambda: rnnorm.RNNCell(3, 4, nonlinearity="gelu"), ValueError, "nonlinearity must be 'tanh' or 'relu'"),
    (lambda: rnnorm.GRUCell(3, 0), ValueError, "hidden_size must be greater than 0"),
    (lambda: norms.Online(alpha_fwd=0), ValueError, r"alpha_fwd must lie in \(0, 1\]; got 0; the horizon is"),
    (lambda: norms.Online(alpha_bwd=1.01), ValueError, r"alpha_bwd must lie in \(0, 1\]; got 1.01"),
    (lambda: norms.Online(alpha_fwd=float("nan")), ValueError, r"alpha_fwd must lie in \(0, 1\]; got nan"),
    (lambda: norms.Online(alpha_fwd="0.9"), TypeError, "alpha_fwd must be a number; got '0.9' of type str"),
    (lambda: norms.Online(guard="clip"), ValueError, "guard must be one of 'none', 'scale', 'clamp'; got 'clip'"),
    (lambda: norms.Online(control_floor=1), ValueError, "control_floor must be less than 1; got 1; -inf sets no"),
    (lambda: norms.Online(control_floor=float("nan")), ValueError, "control_floor must be less than 1; got nan"),
    (lambda: norms.Online(control_floor=None), TypeError, "control_floor must be a number; got None"),
    (lambda: norms.Online(eps=0), ValueError, "eps must be greater than 0; got 0"),
    (lambda: norms.Layer(eps=-1e-5), ValueError, "eps must be greater than 0"),
    (lambda: norms.RMS(eps=None), TypeError, "eps must be a number; got None"),
    (lambda: rnnorm.OnlineNorm(0), ValueError, "num_features must be an int greater than 0; got 0"),
    (lambda: rnnorm.OnlineNorm(3, alpha_fwd=2), ValueError, r"alpha_fwd must lie in \(0, 1\]"),
    (lambda: rnnorm.OnlineNorm(3, guard="relu"), ValueError, "guard must be one of"),
    (lambda: rnnorm.OnlineNorm(3, eps=-1), ValueError, "eps must be greater than 0"),
    (lambda: rnnorm.LSTM.from_torch(nn.GRU(3, 4)), TypeError, "layer must be a torch.nn.LSTM for LSTM.*; got GRU"),
    (lambda: rnnorm.RNN.from_torch(nn.Linear(3, 4)), TypeError, "layer must be a torch.nn.RNN for RNN.*; got Linear"),
    (
        lambda: _lstm(norm="none", zoneout=(0.0, 0.1)).to_torch(),
        ValueError,
        r"zoneout must be 0 for .*; got \(0.0, 0.1\)",
    ),
    (lambda: _without_biases().to_torch(), ValueError, "bias_ih_l0 must be a tensor to be copied; got None; make the"),
    (lambda: _lstm().to_torch(), ValueError, "norm must be 'none' for to_torch: torch.nn.LSTM .*; got Online"),
]
_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: _lstm()(torch.zeros(3)),
        ValueError,
        r"input must have 3 dimensions, or 2 for one sequence; got shape \(3,\)",
    ),
    (lambda: _lstm()(torch.zeros(1, 5, 2, 3)), ValueError, "input must have 3 dimensions"),
    (lambda: _lstm()(torch.zeros(5, 2, 4)), ValueError, "input's last dimension must be input_size = 3; got 4"),
    (lambda: _lstm()(torch.zeros(0, 2, 3)), ValueError, "input must hold at least one step; got T = 0"),
    (lambda: _lstm(batch_first=True)(torch.zeros(2, 0, 3)), ValueError, "at least one step; got T = 0"),
    (lambda: _lstm()(_X.double()), ValueError, "input must have the weights' dtype torch.float32; got torch.float64"),
    (lambda: _lstm()(_X.long()), ValueError, "input must have the weights' dtype torch.float32; got torch.int64"),
    (lambda: _lstm()(_X.to("meta")), ValueError, "input must be on the weights' device cpu; got meta; move one"),
    (
        lambda: _lstm()(_X, torch.zeros(1, 2, 4)),
        ValueError,
        r"the state hx must be a pair \(h_0, c_0\); got one tensor",
    ),
    (lambda: _lstm()(_X, (torch.zeros(1, 2, 4),)), ValueError, r"must be a pair \(h_0, c_0\); got a tuple of 1"),
    (
        lambda: rnnorm.GRU(3, 4)(_X, _state(1, 2, 4)),
        ValueError,
        "the state hx must be one tensor h_0; got a tuple of 2",
    ),
    (
        lambda: _lstm()(_X, _state(1, 3, 4)),
        ValueError,
        r"h_0 must have shape \(layers \* directions, N, H\) = \(1, 2, 4\)",
    ),
    (lambda: _lstm(num_layers=2)(_X, _state(1, 2, 4)), ValueError, r"= \(2, 2, 4\); got \(1, 2, 4\)"),
    (
        lambda: _lstm()(_X[:, 0], _state(1, 2, 4)),
        ValueError,
        r"\(layers \* directions, H\) = \(1, 4\); got \(1, 2, 4\)",
    ),
    (lambda: _lstm(proj_size=2)(_X, _state(1, 2, 4)), ValueError, r"h_0 must have shape .*N, P\) = \(1, 2, 2\)"),
    (
        lambda: _lstm(proj_size=2)(_X, (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))),
        ValueError,
        r"c_0 must have shape \(layers \* directions, N, H\) = \(1, 2, 4\); got \(1, 2, 2\)",
    ),
    (lambda: _lstm()(_X, _state(1, 2, 4, dtype=torch.float64)), ValueError, "h_0 must have the weights' dtype"),
    (lambda: _lstm()(_X, _state(1, 2, 4, device="meta")), ValueError, "h_0 must be on the weights' device cpu"),
    (lambda: _lstm()(_X, lengths=[5]), ValueError, r"one length for each of the N = 2 sequences; got shape \(1,\)"),
    (lambda: _lstm()(_X, lengths=[5, 0]), ValueError, r"lengths must lie in 1..T = 1..5; got 0..5; leave empty"),
    (lambda: _lstm()(_X, lengths=[6, 2]), ValueError, r"lengths must lie in 1..T = 1..5; got 2..6"),
    (lambda: _lstm()(_X, lengths=[5.0, 2.0]), ValueError, "lengths must be integers; got torch.float32"),
    (
        lambda: _lstm()(_X, lengths=torch.ones(2, dtype=torch.bool)),
        ValueError,
        "lengths must be integers; got torch.bool",
    ),
    (lambda: _lstm()(_PACKED, lengths=[5, 3]), ValueError, "lengths must be None for a PackedSequence"),
    (lambda: _lstm()(_PACKED._replace(data=_X)), ValueError, r"must have 2 dimensions; got shape \(5, 2, 3\)"),
    (lambda: _lstm()(_PACKED, _state(1, 3, 4)), ValueError, r"= \(1, 2, 4\); got \(1, 3, 4\)"),
    (lambda: rnnorm.LSTMCell(3, 4)(_X), ValueError, r"input must have shape \(N, I\) or \(I,\); got \(5, 2, 3\)"),
    (lambda: rnnorm.LSTMCell(3, 4)(_X[0, :, :2]), ValueError, "input's last dimension must be input_size = 3; got 2"),
    (
        lambda: rnnorm.LSTMCell(3, 4)(_X[0], torch.zeros(2, 4)),
        ValueError,
        "the state hx must be a pair .*; got one tensor",
    ),
    (
        lambda: rnnorm.GRUCell(3, 4)(_X[0], _state(2, 4)),
        ValueError,
        "the state hx must be one tensor.*; got a tuple of 2",
    ),
    (lambda: rnnorm.GRUCell(3, 4)(_X[0], torch.zeros(3, 4)), ValueError, r"h_0 must have shape \(N, H\) = \(2, 4\)"),
    (lambda: rnnorm.GRUCell(3, 4)(_X[0, 0], torch.zeros(2, 4)), ValueError, r"h_0 must have shape \(H\) = \(4,\)"),
    (lambda: rnnorm.GRUCell(3, 4)(_X[0].half()), ValueError, "input must have the weights' dtype"),
    (lambda: _lstm()([[1.0]]), TypeError, r"input must be a tensor or a PackedSequence; got \[\[1.0\]\] of type list"),
    (lambda: _lstm()(_X, "hc"), ValueError, r"the state hx must be a pair \(h_0, c_0\); got a str of 0"),
    (lambda: _lstm()(_X, (None, 3)), ValueError, r"must be a pair \(h_0, c_0\); got a tuple of 2 \(NoneType, int\)"),
    (lambda: rnnorm.GRUCell(3, 4)(None), TypeError, "input must be a tensor; got None of type NoneType"),
    (lambda: rnnorm.OnlineNorm(3)("x"), TypeError, "input must be a tensor; got 'x' of type str"),
    (lambda: rnnorm.OnlineNorm(3)(torch.zeros(3)), ValueError, r"input must have shape \(N, C = 3, \*\); got \[3\]"),
    (lambda: rnnorm.OnlineNorm(3)(torch.zeros(5, 4)), ValueError, r"got \[5, 4\]"),
    (
        lambda: rnnorm.OnlineNorm(3)(torch.zeros(5, 3).long()),
        ValueError,
        "must have a dtype for statistics in torch.float32",
    ),
    (lambda: rnnorm.OnlineNorm(3)(torch.zeros(5, 3).double()), ValueError, "got torch.float64; convert one"),
    (lambda: rnnorm.OnlineNorm(3)(torch.zeros(5, 3, device="meta")), ValueError, "device cpu; got meta; move one"),
]


@pytest.mark.parametrize(
    ("call", "kind", "text"), _CONSTRUCTION + _CALLS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refusal(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_refused_call_leaves_the_statistics_unchanged() -> None:
    layer = _lstm()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for arguments in ({"lengths": [5, 0]}, {"hx": _state(1, 3, 4)}):
        with pytest.raises(ValueError, match="must"):
            layer(torch.randn(5, 2, 3), **arguments)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnorm.ops import registry

    scripted = registry.by_name("scripted")
    monkeypatch.setattr(type(scripted), "why_not", lambda self, device, dtype, spec: "it is broken today")
    expected = "backend 'scripted' cannot run this call: it is broken today; backend='auto' chooses one that can"
    with pytest.raises(BackendUnavailable, match=re.escape(expected)):
        _lstm(backend="scripted")(_X)
    _lstm(backend="auto")(_X)


def test_state_of_another_norm_is_not_loaded() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_mean_l0"):
        _lstm().load_state_dict(nn.LSTM(3, 4).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*norm_scale_l0"):
        _lstm(norm="none").load_state_dict(_lstm().state_dict())
