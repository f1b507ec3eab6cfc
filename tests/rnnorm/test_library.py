"""The operators under torch's own checks, `torch.compile` and `torch.export`, and backward passes that are refused."""

import contextlib
import copy
from typing import Any, ClassVar

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rnnorm
from rnnorm import norms
from rnnorm.ops import CallSpec, Operands, registry
from rnnorm.ops.call import DIFFERENTIABLE, MOVED_IN_BACKWARD

_ONLINE = norms.Online(0.9, 0.8)
_SOME = [
    "lstm-proj-cell_norm-online-scale-lengths",
    "gru-online-clamp-plain",
    "rnn_relu-rms-plain",
    "lstm-online-scale-eval",
]


def _call(name: str, backend: str, grad: bool) -> tuple[Operands, CallSpec]:
    """One direction of a case, as the layer passes it to the operator."""
    case = cases.BY_ID[name]
    layer = case.build(backend, torch.float64).requires_grad_(grad)
    x = torch.randn(case.T, case.N, case.I, dtype=torch.float64, requires_grad=grad)
    h = torch.randn(case.N, layer.proj_size or case.H, dtype=torch.float64, requires_grad=grad)
    c = torch.randn(case.N, case.H, dtype=torch.float64, requires_grad=grad) if case.layer == "LSTM" else None
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    operands = layer._operands(layer._own("_l0"), x, h, c, lengths)
    return operands, layer._spec()._replace(wanted=backend)


@pytest.mark.parametrize("name", _SOME)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_opcheck_of_sequence(backend: str, name: str) -> None:
    cases.skip_unless_runs(backend)
    operands, spec = _call(name, backend, grad=True)
    result = torch.library.opcheck(torch.ops.rnnorm.sequence.default, (*operands, *spec))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", _SOME)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_opcheck_of_sequence_backward(backend: str, name: str) -> None:
    cases.skip_unless_runs(backend)
    operands, spec = _call(name, backend, grad=False)
    results = torch.ops.rnnorm.sequence_saving(*operands, *spec)
    grads = [torch.randn_like(value) for value in results[:3]]
    if operands.c is None:
        grads[2] = None
    absent = [name for name in MOVED_IN_BACKWARD if getattr(operands, name) is None]
    operands = operands._replace(**{name: operands.x.new_empty(0) for name in absent})
    backward = torch.ops.rnnorm.sequence_backward.default
    result = torch.library.opcheck(backward, (*grads, results[-1], True, True, *operands, *spec))
    assert set(result.values()) == {"SUCCESS"}
    for needs in ((False, True), (True, False)):
        arguments = (*grads, results[-1], *needs, *operands, *spec)
        result = torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", [(5, 3, 1), (70, 3, 4)])
@pytest.mark.parametrize("backend", ["auto", "scripted"])
def test_opcheck_of_online_norm(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    mean, u, v = (torch.randn(3) for _ in range(3))
    var = 0.5 + torch.rand(3)
    constants = [*norms.Online(0.9, 0.8, control_floor=0.5).constants]
    weight, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    for affine in ((weight, bias), (None, None)):
        for given in (x, x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()):
            arguments = (given, *affine, mean, var, u, v, "clamp", constants, backend)
            result = torch.library.opcheck(torch.ops.rnnorm.online_norm.default, arguments)
            assert set(result.values()) == {"SUCCESS"}
            backward = torch.ops.rnnorm.online_norm_backward.default
            plain = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
            result = torch.library.opcheck(backward, (torch.randn(shape), *plain, True))
            assert set(result.values()) == {"SUCCESS"}


def test_operators_arguments_are_the_fields_of_the_call() -> None:
    forward = [a.name for a in torch.ops.rnnorm.sequence.default._schema.arguments]
    assert forward == [*Operands._fields, *CallSpec._fields]
    schema = torch.ops.rnnorm.sequence_backward.default._schema
    assert [a.name for a in schema.arguments][6:] == forward
    moved = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert moved == {"norm_u", "norm_v", "cell_norm_u", "cell_norm_v"}
    assert Operands._fields[:13] == DIFFERENTIABLE


class _Model(nn.Module):
    def __init__(self, cell: str, **options: Any) -> None:
        super().__init__()
        self.inner = getattr(rnnorm, cell)(4, 5, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
        self.norm = rnnorm.OnlineNorm(10, dtype=torch.float64)
        self.out = nn.Linear(10, 3, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        y, _ = self.inner(torch.tanh(x), lengths=lengths)
        return self.out(self.norm(y[-1]))


def _train(model: Any, module: nn.Module, lengths: Tensor | None) -> list[Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(4)
    record = []
    for _ in range(3):
        x = torch.randn(6, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
        optimizer.zero_grad()
        loss = model(x, lengths).square().sum()
        loss.backward()
        record += [loss.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]
        optimizer.step()
    return record + [value.clone() for value in module.state_dict().values()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_compiled_training_equals_eager(cell: str, compiler: str) -> None:
    options = {"LSTM": {"cell_norm": True, "proj_size": 0}}.get(cell, {})
    eager = _Model(cell, norm=_ONLINE, **options)
    compiled = copy.deepcopy(eager)
    lengths = torch.tensor([6, 2, 4]) if cell == "GRU" else None
    torch._dynamo.reset()
    found = _train(torch.compile(compiled, fullgraph=True, backend=compiler), compiled, lengths)
    for got, expected in zip(found, _train(eager, eager, lengths), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "capture", [torch.export.export, lambda layer, args: torch.compile(layer, backend="eager", fullgraph=True)(*args)]
)
def test_the_control_process_of_the_reference_is_not_captured(capture: Any) -> None:
    with pytest.raises(RuntimeError, match=r"'reference' cannot run this call: torch.compile and torch.export cannot"):
        capture(_layer("reference"), (torch.randn(3, 2, 3),))


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", _ONLINE), ("GRU", _ONLINE), ("RNN", "layer")], ids=str)
def test_compiled_cells(cell: str, norm: Any) -> None:
    torch._dynamo.reset()
    made = getattr(rnnorm, f"{cell}Cell")(4, 5, norm=norm)
    twin = copy.deepcopy(made)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(made.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("cell", "norm"), [("LSTM", _ONLINE), ("GRU", _ONLINE), ("RNN", "layer"), ("LSTM", "none")], ids=str
)
def test_export_with_a_dynamic_batch(cell: str, norm: Any) -> None:
    model = _Model(cell, norm=norm).eval()
    model(torch.randn(6, 3, 4, dtype=torch.float64))
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: batch}})
    for N in (3, 7, 40):
        x = torch.randn(6, N, 4, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), model(x))


def _layer(backend: str, norm: Any = _ONLINE) -> Any:
    return rnnorm.LSTM(3, 4, norm=norm, backend=backend)


@pytest.mark.parametrize("backend", registry.names())
def test_second_backward_is_refused(backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _layer(backend)
    y, _ = layer(torch.randn(5, 2, 3))
    y.sum().backward(retain_graph=True)
    kept = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"can be run backward once: .* run the forward again instead"):
        y.sum().backward()
    torch.testing.assert_close(layer.state_dict(), kept)


@pytest.mark.parametrize("backend", cases.CANDIDATES)  # on the reference torch's own error comes first
def test_a_state_that_is_carried_with_its_graph_is_named(backend: str) -> None:
    layer = _layer(backend)
    _, state = layer(torch.randn(5, 2, 3))
    state[0].sum().backward()
    y, _ = layer(torch.randn(5, 2, 3), state)
    with pytest.raises(RuntimeError, match="detach the state that you carry from an earlier call"):
        y.sum().backward()


@pytest.mark.parametrize("norm", ["layer", "none", norms.Online(0.9, 1.0)], ids=["layer", "none", "uncontrolled"])
@pytest.mark.parametrize("backend", registry.names())
def test_second_backward_is_the_first_where_nothing_moves(backend: str, norm: Any) -> None:
    cases.skip_unless_runs(backend)
    layer = _layer(backend, norm)
    y, _ = layer(torch.randn(5, 2, 3))
    first = torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(layer.parameters()))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_second_backward_of_online_norm_is_refused() -> None:
    y = rnnorm.OnlineNorm(3)(torch.randn(5, 3, requires_grad=True))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be run backward once"):
        y.sum().backward()


@pytest.mark.parametrize("make", [lambda b: _layer(b), lambda b: rnnorm.OnlineNorm(3)], ids=["layer", "norm"])
@pytest.mark.parametrize("backend", registry.names())
def test_double_backward_is_refused(backend: str, make: Any) -> None:
    cases.skip_unless_runs(backend)
    x = torch.randn(5, 2, 3, requires_grad=True)
    made = make(backend)
    y = made(x)[0] if isinstance(made, rnnorm.LSTM) else made(x[0])
    with pytest.raises(RuntimeError, match=r"double backward .* call backward without create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", registry.names())
def test_recomputation_is_refused(backend: str, reentrant: bool) -> None:
    cases.skip_unless_runs(backend)
    layer, norm = _layer(backend), rnnorm.OnlineNorm(3)
    x = torch.randn(5, 2, 3, requires_grad=True)
    for function in (lambda x: layer(x)[0], lambda x: norm(x[0])):
        y = checkpoint(function, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="cannot be recomputed during backward"):
            y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", registry.names())
def test_recomputation_works_where_nothing_moves(backend: str, reentrant: bool) -> None:
    cases.skip_unless_runs(backend)
    for layer in (_layer(backend, "layer"), _layer(backend).eval()):
        x = torch.randn(5, 2, 3, requires_grad=True)
        expected = torch.autograd.grad(layer(x)[0].square().sum(), x)
        y = checkpoint(lambda x, layer=layer: layer(x)[0], x, use_reentrant=reentrant)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x) if not reentrant else _grad(y, x), expected)


def _grad(y: Tensor, x: Tensor) -> tuple[Tensor]:
    y.square().sum().backward()
    assert x.grad is not None
    return (x.grad,)


@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_two_uses_of_one_layer_in_one_graph(backend: str) -> None:
    """The backward of the later call comes first, as on the reference."""
    cases.skip_unless_runs(backend)
    records = []
    for name in (backend, "reference"):
        torch.manual_seed(2)
        layer = rnnorm.GRU(4, 4, norm=_ONLINE, backend=name, dtype=torch.float64)
        x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
        y, h = layer(x)
        z, _ = layer(y, h)
        z.square().sum().backward()
        records.append([z.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for found, expected in zip(*records, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_nothing_is_saved_for_a_backward_that_cannot_come() -> None:
    layer = rnnorm.LSTM(3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        with torch.no_grad():
            layer(torch.randn(5, 2, 3))
        layer.requires_grad_(False)(torch.randn(5, 2, 3))
    assert not saved


class _Watch(TorchDispatchMode):
    """Context that records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_operators_are_what_a_mode_sees_and_change_nothing(backend: str) -> None:
    cases.skip_unless_runs(backend)
    records = []
    for watch in (_Watch(), None):
        torch.manual_seed(3)
        layer = rnnorm.LSTM(3, 4, norm=_ONLINE, backend=backend)
        x = torch.randn(5, 2, 3, requires_grad=True)
        with watch or contextlib.nullcontext():
            y, _ = layer(x)
            y.square().sum().backward()
        if watch is not None:
            ours = [name for name in watch.seen if name.startswith("rnnorm.")]
            assert ours == ["rnnorm.sequence_saving.default", "rnnorm.sequence_backward.default"]
        records.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for found, expected in zip(*records, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("before_dispatch", [False, True])
def test_operators_are_what_a_tracer_sees(before_dispatch: bool) -> None:
    layer = rnnorm.GRU(3, 4).eval()
    with torch.no_grad():
        traced = make_fx(lambda x: layer(x)[0], pre_dispatch=before_dispatch)(torch.randn(5, 2, 3))
        x = torch.randn(5, 2, 3)
        assert torch.equal(traced(x), layer(x)[0])
    assert "rnnorm.sequence.default" in [str(node.target) for node in traced.graph.nodes]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_operators_are_what_torch_jit_trace_sees() -> None:
    layer = rnnorm.GRU(3, 4).eval().requires_grad_(False)
    traced = torch.jit.trace(layer, (torch.randn(5, 2, 3),))
    x = torch.randn(7, 4, 3)
    assert torch.equal(traced(x)[0], layer(x)[0])
    assert "rnnorm::sequence" in str(traced.inlined_graph)


def test_operators_are_what_a_subclass_sees() -> None:
    class Named(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    with torch.no_grad():
        rnnorm.RNN(3, 4)(torch.randn(5, 2, 3).as_subclass(Named))
    assert any("rnnorm.sequence" in name for name in Named.seen)


@pytest.mark.parametrize("backend", ["auto", "scripted", "reference"])
def test_shapes_without_memory(backend: str) -> None:
    layer = rnnorm.GRU(3, 4, device="meta", backend=backend)
    y, h = layer(torch.zeros(5, 2, 3, device="meta"), lengths=[5, 2])
    assert (y.device.type, y.shape, h.shape) == ("meta", (5, 2, 4), (1, 2, 4))
    y.sum().backward()
    assert layer.weight_hh_l0.grad is not None
    assert layer.weight_hh_l0.grad.is_meta


@pytest.mark.parametrize("name", ["sequence", "sequence_saving", "sequence_backward"])
def test_torch_compile_keeps_the_operators_out_of_its_cuda_graphs(name: str) -> None:
    """There the buffers that the Triton backend keeps between calls would lie in memory that is used again."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.rnnorm, name).default.tags
