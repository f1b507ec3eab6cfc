"""`norm="none"` equals torch's layer: outputs, states, every gradient, every option, conversion of weights."""

import itertools
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnorm
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
T, N, I, H = 6, 4, 3, 5  # noqa: E741
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def _pair(name: str, backend: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Torch's layer and ours, both made from one seed."""
    cell, own = LAYERS[name]
    torch.manual_seed(5)
    theirs = getattr(nn, cell)(I, H, **own, **options)
    torch.manual_seed(5)
    ours = getattr(rnnorm, cell)(I, H, **own, **options, norm="none", backend=backend)
    return theirs, ours


def _first_state(layer: Any, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    rows = layer.num_layers * (1 + layer.bidirectional)
    widths = (layer.proj_size or H, H) if isinstance(layer, nn.LSTM | rnnorm.LSTM) else (H,)
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(rows, *shape, width, generator=generator).requires_grad_() for width in widths)


def _packed(x: Tensor, lengths: tuple[int, ...]) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths == tuple(sorted(lengths)[::-1]))


def _record(
    layer: Any, x: Tensor, shape: tuple[int, ...] | None, lengths: tuple[int, ...] | None = None, seed: int = 7
) -> list[Tensor]:
    """Output, last states, and the gradients of input, first states and parameters, after one call."""
    input = x if lengths is None else _packed(x, lengths)
    states = () if shape is None else _first_state(layer, shape)
    torch.manual_seed(seed)
    y, last = layer(input, None if not states else states if len(states) == 2 else states[0])
    outputs = [y.data if isinstance(y, PackedSequence) else y, *(last if isinstance(last, tuple) else (last,))]
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(8)) for out in outputs]
    leaves = [x, *states, *layer.parameters()]
    grads = torch.autograd.grad(sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), leaves)
    return [out.detach() for out in outputs] + list(grads)


def _assert_equal(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for expected, found in zip(theirs, ours, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


_OPTIONS = [
    {"num_layers": layers, "bias": bias, "bidirectional": both, "batch_first": not bias}
    for layers, bias, both in itertools.product((1, 2), (True, False), (False, True))
]


@pytest.mark.parametrize("options", _OPTIONS, ids=lambda o: "-".join(f"{k[:3]}{int(v)}" for k, v in o.items()))
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", registry.names())
def test_padded(backend: str, name: str, options: dict[str, Any]) -> None:
    cases.skip_unless_runs(backend)
    x = torch.randn(*((N, T) if options["batch_first"] else (T, N)), I, requires_grad=True)
    theirs, ours = _pair(name, backend, **options)
    _assert_equal(_record(theirs, x, (N,)), _record(ours, x, (N,)))
    _assert_equal(_record(theirs, x, None), _record(ours, x, None))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_unbatched(name: str, both: bool, first: bool) -> None:
    x = torch.randn(T, I, requires_grad=True)
    theirs, ours = _pair(name, bidirectional=both, batch_first=first, num_layers=2)
    _assert_equal(_record(theirs, x, ()), _record(ours, x, ()))
    assert ours(x)[0].shape == theirs(x)[0].shape


@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (2, 6, 1, 5), (3, 3, 3, 3)], ids=["sorted", "unsorted", "equal"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str, both: bool, lengths: tuple[int, ...]) -> None:
    x = torch.randn(T, N, I, requires_grad=True)
    theirs, ours = _pair(name, bidirectional=both, num_layers=2)
    _assert_equal(_record(theirs, x, (N,), lengths), _record(ours, x, (N,), lengths))
    packed = _packed(x, lengths)
    out = ours(packed)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        expected = getattr(packed, field)
        assert getattr(out, field) is expected or torch.equal(getattr(out, field), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_equal_packed(name: str) -> None:
    lengths = torch.tensor((2, 6, 1, 5))
    x = torch.randn(T, N, I)
    theirs, ours = _pair(name, bidirectional=True, num_layers=2)
    y, last = ours(x, lengths=lengths)
    packed, expected = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(y, pad_packed_sequence(packed, total_length=T)[0], **CLOSE)
    torch.testing.assert_close(last, expected, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_the_same_seed(name: str, packed: bool) -> None:
    x = torch.randn(T, N, I, requires_grad=True)
    lengths = (2, 6, 1, 5) if packed else None
    theirs, ours = _pair(name, num_layers=3, dropout=0.4, bidirectional=True)
    dropped = _record(ours, x, (N,), lengths)
    _assert_equal(_record(theirs, x, (N,), lengths), dropped)
    assert not torch.equal(_record(ours, x, (N,), lengths, seed=9)[0], dropped[0])
    theirs.eval()
    ours.eval()
    _assert_equal(_record(theirs, x, (N,), lengths), _record(ours, x, (N,), lengths))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("norm", ["none", "online"])
def test_same_seed_gives_the_same_weights(name: str, norm: str) -> None:
    cell, own = LAYERS[name]
    torch.manual_seed(3)
    theirs = getattr(nn, cell)(I, H, 2, bidirectional=True, **own)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = getattr(rnnorm, cell)(I, H, 2, bidirectional=True, norm=norm, **own)
    assert torch.equal(torch.rand(1), after)
    for key, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    theirs, ours = _pair(name, num_layers=2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    nn.init.normal_(theirs.weight_hh_l1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.weight_hh_l1, theirs.weight_hh_l1)
    nn.init.normal_(ours.weight_hh_l0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.weight_hh_l0, theirs.weight_hh_l0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_from_and_to_torch(name: str, training: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.25, "bias": False}
    theirs, _ = _pair(name, **options)
    theirs.train(training).float()
    ours = getattr(rnnorm, LAYERS[name][0]).from_torch(theirs, norm="none")
    assert ours.training is training
    assert all(getattr(ours, option) == value for option, value in options.items())
    assert ours.weight_ih_l0.dtype == torch.float32
    back = ours.to_torch()
    assert back.training is training
    assert type(back) is type(theirs)
    assert back.extra_repr() == theirs.extra_repr()
    for key, expected in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], expected)
        assert back.state_dict()[key].data_ptr() != ours.state_dict()[key].data_ptr() != expected.data_ptr()


@pytest.mark.parametrize("name", LAYERS)
def test_from_torch_initializes_the_norm(name: str) -> None:
    theirs, _ = _pair(name)
    ours = getattr(rnnorm, LAYERS[name][0]).from_torch(theirs, norm="online")
    assert torch.equal(ours.weight_hh_l0, theirs.weight_hh_l0)
    assert ours.norm_scale_l0.eq(1).all()
    assert ours.norm_var_l0.eq(1).all()
    with pytest.raises(ValueError, match=r"norm must be 'none' for to_torch.*; got Online"):
        ours.to_torch()


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_cells(cell: str, bias: bool, single: bool, given: bool) -> None:
    torch.manual_seed(5)
    theirs = getattr(nn, cell)(I, H, bias)
    torch.manual_seed(5)
    ours = getattr(rnnorm, cell)(I, H, bias, norm="none")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shape = () if single else (N,)
    x = torch.randn(*shape, I, requires_grad=True)
    states = [torch.randn(*shape, H, requires_grad=True) for _ in range(2 if cell == "LSTMCell" else 1)]
    records = []
    for module in (theirs, ours):
        last = module(x, (tuple(states) if len(states) == 2 else states[0]) if given else None)
        outputs = list(last) if isinstance(last, tuple) else [last]
        leaves = [x, *module.parameters(), *(states if given else [])]
        loss = sum((out * torch.arange(out.numel()).view_as(out)).sum() for out in outputs)
        records.append([*outputs, *torch.autograd.grad(loss, leaves)])
    _assert_equal(*records)


def test_rnn_cell_with_relu() -> None:
    torch.manual_seed(5)
    theirs = nn.RNNCell(I, H, nonlinearity="relu")
    torch.manual_seed(5)
    ours = rnnorm.RNNCell(I, H, nonlinearity="relu", norm="none")
    x = torch.randn(N, I)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str) -> None:
    x = torch.zeros(T, 0, I, requires_grad=True)
    theirs, ours = _pair(name, bidirectional=True)
    _assert_equal(_record(theirs, x, (0,)), _record(ours, x, (0,)))


def test_constructors_take_torch_positional_arguments() -> None:
    for cell, arguments in (
        ("LSTM", (I, H, 2, False, True, 0.1, True, 3)),
        ("GRU", (I, H, 2, False, True, 0.1, True)),
        ("RNN", (I, H, 2, "relu", False, True, 0.1, True)),
    ):
        theirs, ours = getattr(nn, cell)(*arguments), getattr(rnnorm, cell)(*arguments, norm="none")
        for option in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
            assert getattr(ours, option) == getattr(theirs, option)
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_cells_take_torch_positional_arguments() -> None:
    for cell, arguments in (("LSTMCell", (True,)), ("GRUCell", (False,)), ("RNNCell", (True, "relu"))):
        theirs = getattr(nn, cell)(I, H, *arguments, "cpu", torch.float64)
        ours = getattr(rnnorm, cell)(I, H, *arguments, "cpu", torch.float64, norm="none")
        assert ours.weight_hh.dtype == theirs.weight_hh.dtype == torch.float64
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_subclasses_convert() -> None:
    class Mine(rnnorm.GRU):
        pass

    theirs = nn.GRU(I, H, dtype=torch.float64)
    theirs.weight_hh_l0.requires_grad_(False)
    ours = Mine.from_torch(theirs, norm="none", dtype=torch.float32)
    assert (type(ours), ours.weight_ih_l0.dtype, ours.weight_hh_l0.requires_grad) == (Mine, torch.float32, False)
    assert type(ours.to_torch()) is nn.GRU
    with pytest.raises(TypeError, match=r"must be a torch.nn.GRU for Mine.from_torch; got LSTM"):
        Mine.from_torch(nn.LSTM(I, H))


def test_all_weights_are_listed_as_torch_does() -> None:
    for options in ({"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 2}):
        theirs = nn.LSTM(I, H, **options)
        ours = rnnorm.LSTM.from_torch(theirs, norm="online")
        for own, expected in zip(ours.all_weights, theirs.all_weights, strict=True):
            assert len(own) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
