"""Usage of programs written for torch's layers, which works here as it does there."""

import copy
import warnings
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Transformer, symbolic_trace

import rnnorm
from rnnorm import norms
from rnnorm.ops import registry

LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_that_drops_nothing_is_warned_of(kind: str) -> None:
    for dropout, layers, expected in ((0.5, 1, 1), (np.float32(0.25), 1, 1), (0.5, 2, 0), (0.0, 1, 0)):
        caught = []
        for library in (nn, rnnorm):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                getattr(library, kind)(3, 4, layers, dropout=dropout)
            caught.append(found)
        assert [(str(w.message), w.category) for w in caught[1]] == [(str(w.message), w.category) for w in caught[0]]
        assert [w.filename for w in caught[1]] == [__file__] * expected


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LSTM", (3, 4, 1, True, False, 0.0, False, 0)),
        ("LSTMCell", (3, 4, True)),
        ("GRUCell", (3, 4, True)),
        ("RNNCell", (3, 4, True, "tanh")),
    ],
)
def test_device_and_dtype_by_position(kind: str, arguments: tuple[Any, ...]) -> None:
    for library in (nn, rnnorm):
        for parameter in getattr(library, kind)(*arguments, "meta", torch.float64).parameters():
            assert parameter.is_meta
            assert parameter.dtype == torch.float64


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_numpy_scalars_are_taken(kind: str) -> None:
    def made(integer: Any, real: Any, flag: Any) -> Any:
        torch.manual_seed(0)
        spec = norms.Online(real(0.5), real(0.25), real(0.125), True, "scale", real(-2))
        own = {"bias": flag(False)}
        if kind in LAYERS:
            own |= {
                "num_layers": integer(2),
                "dropout": real(0.5),
                "bidirectional": flag(True),
                "batch_first": flag(True),
            }
        if kind == "LSTM":
            own["proj_size"] = integer(2)
        return getattr(rnnorm, kind)(integer(3), integer(4), norm=spec, **own)

    plain = made(int, float, bool)
    for integer, real in ((np.int64, np.float32), (np.int8, np.float64), (np.uint16, np.float16)):
        layer = made(integer, real, np.bool_)
        assert repr(layer) == repr(plain)
        torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
        options = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "norm"}
        assert {type(value) for value in options.values()} <= {int, float, bool, str}
        assert {type(value) for value in vars(layer.norm).values()} <= {float, bool, str}
        x = torch.randn(2, 3) if kind in CELLS else torch.randn(2, 5, 3)
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=0, atol=0)
    assert hash(norms.Online(np.float64(0.5))) == hash(norms.Online(0.5))
    for spec in (norms.Layer, norms.RMS):
        assert type(spec(np.float32(0.25)).eps) is float


def test_numpy_scalars_are_taken_by_a_norm() -> None:
    real = np.float32
    norm = rnnorm.OnlineNorm(
        np.int32(3), alpha_fwd=real(0.5), alpha_bwd=real(0.25), eps=real(0.125), control_floor=real(0)
    )
    assert repr(norm) == repr(rnnorm.OnlineNorm(3, alpha_fwd=0.5, alpha_bwd=0.25, eps=0.125, control_floor=0.0))
    norm(torch.randn(5, 3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_names_of_all_weights_are_torchs(kind: str, options: dict[str, Any]) -> None:
    for more in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
        ours, theirs = (getattr(library, kind)(3, 4, **options, **more) for library in (rnnorm, nn))
        assert ours._all_weights == theirs._all_weights
        shapes = [[[weight.shape for weight in weights] for weights in layer.all_weights] for layer in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_forget_biases_are_set_by_their_names() -> None:
    layer = rnnorm.LSTM(3, 4, 2)
    for names in layer._all_weights:
        for name in filter(lambda name: "bias" in name, names):
            bias = getattr(layer, name)
            bias.data[bias.size(0) // 4 : bias.size(0) // 2].fill_(1.0)
    assert all(getattr(layer, f"bias_{of}_l{k}")[4:8].eq(1).all() for of in ("ih", "hh") for k in (0, 1))
    assert layer.norm_shift_l0.eq(0).all()


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"lstm": rnnorm.LSTM(3, 4), "gru": rnnorm.GRU(4, 4, batch_first=True)})
        self.cell = rnnorm.LSTMCell(4, 4)
        self.norm = rnnorm.OnlineNorm(4)

    def forward(self, x: Tensor, first: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, c) = self.layers["lstm"](x, (first, first))
        y, _ = self.layers["gru"](y, lengths=lengths)
        h, c = self.cell(y[0], (h[0], c[0]))
        return self.norm(h + c), y


def test_torch_fx_takes_layers_cells_and_norms_for_leaves() -> None:
    model = _Model()
    twin = copy.deepcopy(model)
    traced = symbolic_trace(model)
    assert all(torch.equal(value, twin.get_buffer(name)) for name, value in model.named_buffers())  # nothing was run
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["layers.lstm", "layers.gru", "cell", "norm"]
    assert "get_attr" not in {node.op for node in traced.graph.nodes}
    again = Transformer(copy.deepcopy(traced)).transform()
    given = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.tensor([2, 1, 2, 2, 1])
    expected = twin(*given)
    expected[0].sum().backward()
    for found in (traced(*given), again(*given)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found[0].sum().backward()
    torch.testing.assert_close(dict(traced.named_parameters()), dict(twin.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "module", [rnnorm.GRU(3, 4), rnnorm.GRUCell(3, 4), rnnorm.OnlineNorm(3)], ids=lambda m: m._get_name()
)
def test_torch_fx_is_told_that_a_leaf_is_no_root(module: nn.Module) -> None:
    with pytest.raises(
        TypeError, match=r"torch.fx must be given a module that holds the .*; got the .* itself; make it"
    ):
        symbolic_trace(module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["online", "layer"])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("backend", registry.names())
def test_mutation_of_saved_tensors_may_be_allowed(backend: str, kind: str, norm: str, training: bool) -> None:
    module = getattr(rnnorm, kind)(3, 4, norm=norm, backend=backend).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(5, 3) if kind in CELLS else torch.randn(5, 2, 3)
    gradients = []
    for one, mutate in ((twin, False), (module, True)):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            given = x.clone()
            found = one(given)
            if mutate:
                given.zero_()
                with torch.no_grad():
                    # Torch does not see that a part of a vector was saved, as by the reference's GRU.
                    for parameter in (p for p in one.parameters() if p.dim() == 2 or backend != "reference"):
                        parameter.add_(1)
            (found[0] if isinstance(found, tuple) else found).square().sum().backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert all(torch.equal(value, twin.get_buffer(name)) for name, value in module.named_buffers())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantization_of_torchs_layers_does_not_reach_ours() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4), rnnorm.LSTM(3, 4)])
    found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert type(found[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert type(found[1]) is rnnorm.LSTM


@pytest.mark.parametrize("kind", LAYERS)
def test_mode_is_torchs(kind: str) -> None:
    for options in ({}, {"nonlinearity": "relu"}) if kind == "RNN" else ({},):
        assert getattr(rnnorm, kind)(3, 4, **options).mode == getattr(nn, kind)(3, 4, **options).mode


@pytest.mark.parametrize("backend", registry.names())
def test_the_default_device_is_for_new_tensors_only(backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer, x = rnnorm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3)
    with torch.device("meta"):
        assert layer(x, lengths=[5, 2])[0].device == x.device
        assert layer(x[:, 0], lengths=3)[0].device == x.device
