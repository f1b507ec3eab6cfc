"""Graphs captured in one grad mode and differentiated in another: what to save is decided when the graph runs."""

import io
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rnnorm
from rnnorm.functional import linear_cross_entropy
from rnnorm.ops import registry

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*",
    "ignore::torch.jit.TracerWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
)
OPERATORS = [name for name in registry.names() if not registry.by_name(name).differentiable]


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(0, 1)
        targets = torch.zeros(hidden.shape[0], dtype=torch.int64)
        return linear_cross_entropy(hidden, self.decoder.weight, self.decoder.bias, targets)[0]


class _Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[0])
        return self.cell(x[1], state)[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: rnnorm.LSTM(4, 5, bidirectional=True),
    "gru": lambda: rnnorm.GRU(4, 5, num_layers=2, norm="layer"),
    "rnn": lambda: rnnorm.RNN(4, 5, norm="none"),
    "lstm_cell": lambda: _Cells(rnnorm.LSTMCell(4, 5)),
    "gru_cell": lambda: _Cells(rnnorm.GRUCell(4, 5, norm="rms")),
    "loss": _Loss,
}


def _export(module: nn.Module, x: Tensor) -> Any:
    return torch.export.export(module, (x,), strict=False).module()


def _export_strict(module: nn.Module, x: Tensor) -> Any:
    return torch.export.export(module, (x,), strict=True).module()


def _decomposed(module: nn.Module, x: Tensor) -> Any:
    return torch.export.export(module, (x,), strict=False).run_decompositions().module()


def _loaded(module: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), strict=False), file)
    file.seek(0)
    return torch.export.load(file).module()


def _trace(module: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(module, (x,))  # runs its own check of the trace


def _fx(module: nn.Module, x: Tensor) -> Any:
    return make_fx(module, pre_dispatch=True)(x)


CAPTURES = [_export, _export_strict, _decomposed, _loaded, _trace, _fx]


def _first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else _first(found[0])


def _gradients(call: Any, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of the input and of all parameters that have one."""
    x = x.clone().requires_grad_()
    y = _first(call(x))
    y.square().sum().backward()
    assert x.grad is not None
    parameters = dict(call.named_parameters()) if isinstance(call, nn.Module) else {}
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("kind", MODULES)
def test_a_graph_captured_without_gradients_is_differentiated_later(
    kind: str, capture: Callable[..., Any], frozen: bool
) -> None:
    torch.manual_seed(3)
    module = MODULES[kind]().eval().requires_grad_(not frozen)
    x = torch.randn(6, 3, 4)
    with torch.no_grad():
        captured = capture(module, x)
    expected, found = _gradients(module, x), _gradients(captured, x)
    for name in ("y", "x"):
        torch.testing.assert_close(found[name], expected[name])
    if capture is not _fx:  # which holds parameters as constants
        assert len(found) == len(expected)
    with torch.no_grad():
        again = _first(captured(x))
    assert not again.requires_grad
    torch.testing.assert_close(again, expected["y"])


@pytest.mark.parametrize("kind", MODULES)
def test_a_graph_captured_with_gradients_saves_nothing_without_them(kind: str) -> None:
    module, x = MODULES[kind]().eval(), torch.randn(6, 3, 4)
    captured = _trace(module, x)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda found: found):
        assert not _first(captured(x)).requires_grad
    assert not saved


def test_a_scripted_layer_is_differentiated_after_a_call_without_gradients() -> None:
    layer = rnnorm.LSTM(4, 5).eval()
    scripted = torch.jit.script(layer)
    x = torch.randn(6, 3, 4)
    with torch.no_grad():
        scripted(x)
    expected, found = _gradients(layer, x), _gradients(scripted, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_captured_graph_does_not_hold_the_backend_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 3, 4)
    captured = [make(MODULES["lstm"]().eval(), x) for make in (_export, _trace)]
    calls: list[str] = []
    scripted = registry.by_name("scripted")
    own = type(scripted).forward
    monkeypatch.setattr(type(scripted), "forward", lambda *args: (calls.append("scripted"), own(*args))[1])
    monkeypatch.setattr(registry, "BACKENDS", [scripted])
    for call in captured:
        calls.clear()
        call(x)
        assert calls == ["scripted"] * 2


@pytest.mark.parametrize("backend", OPERATORS)
def test_a_captured_graph_runs_on_the_backend_that_was_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.skip_unless_runs(backend)
    x = torch.randn(6, 3, 4)
    captured = [make(rnnorm.GRU(4, 5, backend=backend).eval(), x) for make in (_export, _trace)]
    calls: list[str] = []
    for row in registry.BACKENDS:
        own = type(row).forward
        monkeypatch.setattr(
            type(row), "forward", lambda self, *args, own=own: (calls.append(self.name), own(self, *args))[1]
        )
    for call in captured:
        call(x)
    assert calls == [backend] * 2


def test_schemas_hold_no_decision_of_the_moment() -> None:
    for operator in (torch.ops.rnnorm.sequence, torch.ops.rnnorm.linear_cross_entropy, torch.ops.rnnorm.online_norm):
        names = {argument.name for argument in operator.default._schema.arguments}
        assert not names & {"save", "backend", "form", "need_hidden", "need_weight", "need_bias"}


def test_tensorboard_draws_the_graph(tmp_path: Any) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(rnnorm.LSTM(4, 5).eval(), torch.randn(6, 3, 4))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 1000


def _batched(kind: str, backend: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    x = torch.randn(4, 2, 4, requires_grad=True)
    module = {
        "layer": lambda: rnnorm.LSTM(4, 5, backend=backend),
        "cell": lambda: _Cells(rnnorm.GRUCell(4, 5, backend=backend)),
        "norm": lambda: rnnorm.OnlineNorm(2),
    }[kind]()
    return module, x, _first(module(x))


@pytest.mark.parametrize("kind", ["layer", "cell", "norm"])
@pytest.mark.parametrize("backend", registry.names())
def test_batched_gradients_are_refused_before_anything_moves(kind: str, backend: str) -> None:
    cases.skip_unless_runs(backend)
    module, x, y = _batched(kind, backend)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"transforms of torch.func .* are not supported by"):
        torch.autograd.grad(y, x, torch.randn(2, *y.shape), is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, x, direction)[0]  # the refused call has not spent the graph
    _, x, y = _batched(kind, backend)
    torch.testing.assert_close(found, torch.autograd.grad(y, x, direction)[0])


def test_batched_gradients_of_the_loss() -> None:
    x = torch.randn(4, 2, 4, requires_grad=True)
    total = _Loss()(x)
    scales = torch.tensor([1.0, 2.0], dtype=total.dtype)
    one, two = torch.autograd.grad(total, x, scales, is_grads_batched=True)[0]
    torch.testing.assert_close(two, 2 * one)
