"""Layers in real programs: copies, checkpoints, precisions, frozen parameters, unusual gradients."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import rnnorm
from rnnorm import norms
from rnnorm.ops import registry

_ONLINE = norms.Online(0.9, 0.8)
_STREAMS = ("mean", "var", "u", "v")


def _make(kind: str = "LSTM", **options: Any) -> Any:
    torch.manual_seed(1)
    if kind == "OnlineNorm":
        return rnnorm.OnlineNorm(3, **options)
    options = {"norm": _ONLINE, **options}
    if kind == "LSTM":
        options = {"cell_norm": True, **options}
    return getattr(rnnorm, kind)(3, 4, **options)


def _call(module: nn.Module, x: Tensor, call: Any = None) -> Tensor:
    """The output of a module, or of what was made of it, for layers' input."""
    call = module if call is None else call
    if isinstance(module, rnnorm.OnlineNorm):
        return call(x.flatten(0, -2))
    if isinstance(module, rnnorm.LSTMCell | rnnorm.GRUCell | rnnorm.RNNCell):
        last = call(x[0])
        return last[0] if isinstance(last, tuple) else last
    return call(x)[0]


def _train(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    _call(module, x).square().sum().backward()
    assert x.grad is not None
    return x.grad


KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "OnlineNorm"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_whole_and_apart(kind: str, duplicate: Any) -> None:
    module = _make(kind)
    _train(module)  # a copy after a backward, too
    twin = duplicate(module)
    before = copy.deepcopy(module.state_dict())
    torch.testing.assert_close(twin.state_dict(), before, rtol=0, atol=0)
    found = _train(twin, 1)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(found, _train(module, 1), rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_without_clone_stays_consistent(kind: str) -> None:
    module = _make(kind)
    held = module.state_dict()
    addresses = {name: value.data_ptr() for name, value in held.items()}
    _train(module)
    for name, value in module.state_dict().items():
        assert value.data_ptr() == addresses[name], name
        assert torch.equal(value, held[name]), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_from_a_checkpoint(kind: str, assign: bool) -> None:
    module = _make(kind)
    _train(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = _make(kind)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    torch.testing.assert_close(_train(fresh, 1), _train(module, 1), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict(), module.state_dict(), rtol=0, atol=0)


_OLD_NAMES = {"norm_scale": "norm_weight", "norm_shift": "norm_bias"}


def _with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in _OLD_NAMES.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "OnlineNorm"])
def test_state_dicts_with_the_old_names_of_affine_parameters_load(kind: str, assign: bool) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(_make(kind), nn.Linear(3, 3))})
    nn.utils.parametrizations.weight_norm(model["encoder"][0], "norm_scale" + "_l0" * ("Cell" not in kind), dim=None)
    for module in (model, _make(kind)):
        expected = {name: torch.rand_like(value) for name, value in module.state_dict().items()}
        old = _with_old_names(expected)
        assert not old.keys() & {name for name in expected if "scale" in name or "shift" in name}
        kept = dict(old)
        module.load_state_dict(old, assign=assign)
        torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)
        assert old.keys() == kept.keys()


def test_a_subclass_may_use_the_old_names() -> None:
    class Own(rnnorm.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(4)), nn.Linear(2, 2)
            self.norm_weights = nn.ParameterList([torch.ones(1)])

    layer = Own()
    expected = {name: torch.rand_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(expected)
    torch.testing.assert_close(dict(layer.state_dict()), expected, rtol=0, atol=0)
    names = {"norm_scale_l0": "norm_weight_l0", "norm_shift_l0": "norm_bias_l0"}
    layer.load_state_dict({names.get(name, name): value for name, value in expected.items()})
    layer.load_state_dict({**expected, "norm_weight_l0": torch.zeros(16)})
    assert not layer.norm_scale_l0.any(), "as in {**layer.state_dict(), **old_names}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "OnlineNorm"])
def test_initialization_loops_of_other_programs_leave_norms_alone(kind: str) -> None:
    layer = _make(kind)
    affine = {name: value.clone() for name, value in layer.named_parameters() if "norm" in name}
    assert len(affine) == (4 if kind == "LSTM" else 2)
    for name, parameter in layer.named_parameters():
        if "weight" in name:
            nn.init.orthogonal_(parameter)
        elif "bias" in name:
            nn.init.constant_(parameter, 0.5)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, affine[name]) if name in affine else not parameter.eq(0).any()
    # The layers draw what torch's do, and nothing for the norm.
    torch.manual_seed(1)
    layer.reset_parameters()
    drawn = _make(kind).state_dict()
    assert all(torch.equal(value, drawn[name]) for name, value in layer.named_parameters())


def test_state_does_not_hold_the_batch_size() -> None:
    layer = _make()
    sizes = {name: value.shape for name, value in layer.state_dict().items()}
    layer(torch.randn(5, 7, 3))
    layer(torch.randn(5, 2, 3))
    assert {name: value.shape for name, value in layer.state_dict().items()} == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_double(kind: str) -> None:
    module = _make(kind).double()
    assert all(value.dtype == torch.float64 for value in module.state_dict().values())
    assert _train(module, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", registry.names())
def test_half_keeps_statistics_in_float32(backend: str, kind: str, dtype: torch.dtype) -> None:
    cases.skip_unless_runs(backend)
    full = _make(kind, **({} if kind == "OnlineNorm" else {"backend": backend}))
    half = copy.deepcopy(full).to(dtype)
    if dtype == torch.float16:
        half = copy.deepcopy(full).half()
    for name, value in half.named_buffers():
        assert value.dtype == torch.float32, name
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    found, expected = _call(half, x.to(dtype)), _call(full, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=0.1, atol=0.1 * q.grad.abs().max().item(), msg=name)
    for (name, value), exact in zip(half.named_buffers(), full.buffers(), strict=True):
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact, rtol=0.1, atol=0.1, msg=name)


def test_half_and_back_keeps_the_precision_of_the_statistics() -> None:
    module = _make()
    _train(module)
    before = {name: value.clone() for name, value in module.named_buffers()}
    module.half().float()
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind: str, backend: str) -> None:
    """As torch's LSTM and RNN: output and state in autocast's dtype. Gradients and statistics as the parameters."""
    cases.skip_unless_runs(backend)
    layer = _make(kind, backend=backend, num_layers=2)
    exact = copy.deepcopy(layer)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = layer(x)
        _, theirs = nn.LSTM(3, 4)(x)
    for value in (y, *(last if kind == "LSTM" else (last,))):
        assert value.dtype == theirs[0].dtype == theirs[1].dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact(x)[0], rtol=0, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all(value.dtype == torch.float32 for value in layer.buffers())
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, last)  # the returned state goes back in
        wide = layer(x, (last[0].float(), last[1].float()) if kind == "LSTM" else last.float())
    assert wide[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell", "OnlineNorm"])
def test_autocast_of_cells_and_norm(kind: str) -> None:
    module = _make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = _call(module, torch.randn(5, 2, 3))
        theirs = torch.ones(1) if kind == "OnlineNorm" else _call(module, torch.randn(5, 2, 3), getattr(nn, kind)(3, 4))
    # OnlineNorm has no product, so autocast leaves it alone, as batch norm.
    assert found.dtype == theirs.dtype
    found.float().sum().backward()


def test_float64_is_left_alone_by_autocast() -> None:
    layer = _make().double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 2, 3).double())[0].dtype == torch.float64


@pytest.mark.parametrize("backend", registry.names())
def test_backward_in_eval_mode_moves_nothing(backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _make(backend=backend)
    _train(layer)
    layer.eval()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    first = _train(layer, 1)
    torch.testing.assert_close(_train(layer, 1), first, rtol=0, atol=0)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_between_forward_and_backward_of_an_evaluation(kind: str) -> None:
    """Updates of statistics after a forward pass in evaluation mode do not affect its backward pass."""
    module = _make(kind).eval()
    x = torch.randn(5, 2, 3, requires_grad=True)
    expected = torch.autograd.grad(_call(module, x).square().sum(), x)[0]
    y = _call(module, x)
    module.train()
    with torch.no_grad():
        _call(module, 3 + torch.randn(5, 2, 3))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("frozen", ["all", "recurrent", "norm", "input"])
@pytest.mark.parametrize("backend", registry.names())
def test_frozen_parameters(backend: str, frozen: str) -> None:
    cases.skip_unless_runs(backend)
    layer, free = _make(backend=backend), _make(backend=backend)
    for name, parameter in layer.named_parameters():
        if frozen == "all" or (frozen == "recurrent" and "_hh" in name) or (frozen == "norm" and "norm" in name):
            parameter.requires_grad_(False)
    x = torch.randn(5, 2, 3)
    left, right = (x.clone().requires_grad_(frozen != "input") for _ in range(2))
    layer(left)[0].square().sum().backward()
    free(right)[0].square().sum().backward()
    if frozen != "input":
        torch.testing.assert_close(left.grad, right.grad)
    for (name, parameter), other in zip(layer.named_parameters(), free.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
        else:
            assert parameter.grad is None, name
    torch.testing.assert_close(dict(layer.named_buffers()), dict(free.named_buffers()))


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("used", ["h", "c", "last_output", "expanded", "strided", "y_of_one"])
def test_gradients_of_all_kinds(backend: str, used: str) -> None:
    """Undefined, expanded and non-contiguous gradients give what their dense equals give."""
    cases.skip_unless_runs(backend)
    records = []
    for dense in (False, True):
        layer = _make(backend=backend).double()
        x = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y, (h, c) = layer(x)
        grads: list[Tensor | None] = [None, None, None]
        if used in "hc":
            grads["yhc".index(used)] = torch.ones_like(h)
        elif used == "last_output":
            grads[0] = torch.zeros_like(y).index_fill_(0, torch.tensor(4), 1.0)
        elif used == "expanded":
            grads[0] = torch.ones((), dtype=torch.float64).expand_as(y)
        elif used == "strided":
            grads[0] = torch.arange(40.0, dtype=torch.float64).view(4, 2, 5).permute(2, 1, 0)
        else:
            grads[0] = torch.ones(5, 1, 1, dtype=torch.float64).expand(5, 2, 4)
        outputs = (y, h, c)
        if dense:
            grads = [torch.zeros_like(o) if g is None else g.contiguous() for o, g in zip(outputs, grads, strict=True)]
        given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        torch.autograd.backward([o for o, _ in given], [g for _, g in given])
        records.append([x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(records[0], records[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", registry.names())
def test_inputs_of_all_layouts(backend: str) -> None:
    cases.skip_unless_runs(backend)
    x = torch.randn(3, 2, 5).permute(2, 1, 0)
    state = tuple(torch.randn(4, 2, 1).permute(2, 1, 0) for _ in range(2))
    expanded = torch.randn(1, 1, 3).expand(5, 2, 3)
    for input in (x, expanded, x[::2]):
        strided, dense = _make(backend=backend), _make(backend=backend)
        found, expected = strided(input, state), dense(input.contiguous(), tuple(s.contiguous() for s in state))
        torch.testing.assert_close(found, expected)
        found[0].sum().backward()
        expected[0].sum().backward()
        torch.testing.assert_close(strided.weight_hh_l0.grad, dense.weight_hh_l0.grad)


@pytest.mark.parametrize("backend", registry.names())
def test_inference_mode(backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _make(backend=backend)
    with torch.inference_mode():
        y = layer(torch.randn(5, 2, 3))[0]
        assert y.is_inference()
    assert layer.norm_mean_l0.abs().sum() > 0, "training mode moves the statistics without gradients, too"
    _train(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", registry.names())
def test_gradients_enabled_in_inference_mode(backend: str, kind: str) -> None:
    module = _make(kind, backend=backend)
    for training in (True, False):
        module.train(training)
        with torch.inference_mode(), torch.enable_grad():
            assert _call(module, torch.randn(5, 2, 3)).is_inference()
    _train(module.train())


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_moves_the_statistics_as_training_does(kind: str) -> None:
    one, other = _make(kind), _make(kind)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        found = _call(one, x)
    torch.testing.assert_close(found, _call(other, x))
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", registry.names())
def test_arguments_are_not_changed(backend: str, kind: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _make(kind, backend=backend, dropout=0.9, num_layers=2)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([3, 5])
    state = tuple(torch.randn(2, 2, 4) for _ in range(2 if kind == "LSTM" else 1))
    copies = [value.clone() for value in (x, lengths, *state)]
    y, last = layer(x, state if kind == "LSTM" else state[0], lengths=lengths)
    y.sum().backward()
    for value, before in zip((x, lengths, *state), copies, strict=True):
        assert torch.equal(value, before)
    # Dropout stands between layers alone: never in the output, nor in the state that is carried.
    assert (y[-1, 1] != 0).all()
    assert all((value != 0).all() for value in (last if kind == "LSTM" else (last,)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", registry.names())
def test_results_share_no_memory(backend: str, kind: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _make(kind, backend=backend)
    state = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    for T in (1, 5):
        y, last = layer(torch.randn(T, 2, 3), state if kind == "LSTM" else state[0])
        values = [y, *(last if kind == "LSTM" else (last,)), *state]
        assert len({value.untyped_storage().data_ptr() for value in values}) == len(values)


def test_nothing_is_warned_of() -> None:
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, rnnorm\n"
        "for cell in ('LSTM', 'GRU', 'RNN'):\n"
        "    layer = getattr(rnnorm, cell)(3, 4, 1, dropout=0.0)\n"
        "    layer(torch.randn(5, 2, 3))[0].sum().backward()\n"
        "    getattr(rnnorm, cell + 'Cell')(3, 4)(torch.randn(2, 3))\n"
        "rnnorm.OnlineNorm(3)(torch.randn(2, 3)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=_ROOT)
    assert (done.returncode, done.stderr) == (0, "")


_ROOT = str(Path(rnnorm.__file__).parents[1])


def test_functional_call() -> None:
    """Gradients with respect to a dictionary of parameters, as torch.func has them."""
    layer = _make(norm="layer", cell_norm=False)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(5, 2, 3)
    y = torch.func.functional_call(layer, parameters, (x,))[0]
    grads = torch.autograd.grad(y.sum(), list(parameters.values()))
    layer(x)[0].sum().backward()
    for found, parameter in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_meta_and_later_materialization() -> None:
    layer = rnnorm.LSTM(3, 4, device="meta")
    assert layer.norm_mean_l0.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), _make(norm="online", cell_norm=False).state_dict())


def _on_meta(module: Any, *names: str) -> Any:
    for name in names:
        setattr(module, name, nn.Parameter(getattr(module, name).to("meta")))
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", registry.names())
def test_a_module_that_is_partly_on_meta_is_refused(backend: str, training: bool) -> None:
    """Torch would run the fake kernels, whose results are uninitialized memory."""
    with torch.device("meta"):
        loaded = rnnorm.LSTM(3, 4, norm="layer", backend=backend)
    loaded.load_state_dict(nn.LSTM(3, 4).state_dict(), strict=False, assign=True)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])
    calls = [
        (loaded, lambda layer: layer(x, lengths=lengths), "norm_scale, norm_shift"),
        (_on_meta(rnnorm.GRU(3, 4, 2, backend=backend), "weight_hh_l1"), lambda layer: layer(x), "weight_hh"),
        (_on_meta(rnnorm.GRUCell(3, 4, backend=backend), "bias_ih", "bias_hh"), lambda cell: cell(x[0]), "bias_ih"),
    ]
    if training and backend != "reference":  # there, and in evaluation mode, torch's own operations refuse it
        calls.append((_on_meta(rnnorm.OnlineNorm(3, backend=backend), "weight"), lambda norm: norm(x[0]), "weight"))
    for module, call, names in calls:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"on cpu; got {names}.* on meta"):
                call(module.train(training))


@pytest.mark.parametrize(
    "pair", [("bias_ih", "bias_hh"), ("norm_scale", "norm_shift"), ("cell_norm_scale", "cell_norm_shift")]
)
@pytest.mark.parametrize("backend", registry.names())
def test_half_a_pair_of_parameters_is_refused(backend: str, pair: tuple[str, ...]) -> None:
    for name in pair:
        layer = _make(backend=backend)
        setattr(layer, name + "_l0", None)
        with pytest.raises(ValueError, match="must both be tensors or both None; got one of each"):
            layer(torch.randn(5, 2, 3))


def _stream_values(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell", "OnlineNorm"])
@pytest.mark.parametrize("backend", ["cpu", "scripted"])
def test_a_gradient_that_is_not_finite_leaves_the_control_as_it_was(backend: str, kind: str, bad: float) -> None:
    module = _make(kind) if kind == "OnlineNorm" else _make(kind, backend=backend)
    _train(module)
    before = _stream_values(module)
    y = _call(module, torch.randn(5, 2, 3))
    y.backward(torch.full_like(y, bad))
    for name, value in module.named_buffers():
        assert torch.isfinite(value).all()
        if name.split("_")[-2 if "_l0" in name else -1] in ("u", "v"):
            assert torch.equal(value, before[name]), name
    assert torch.isfinite(_train(module)).all()
    assert all(not torch.equal(value, before[name]) for name, value in module.named_buffers())


def _as_script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


_FORMS: dict[str, Any] = {
    "eager": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
    "scripted": _as_script,
}
_OVERFLOWS = [("eager", backend, kind) for backend in registry.names() for kind in KINDS if kind != "OnlineNorm"]
_OVERFLOWS += [("scripted", "cpu", kind) for kind in KINDS]
_OVERFLOWS += [("compiled", "cpu", kind) for kind in ("LSTM", "GRUCell", "OnlineNorm")]
_OVERFLOWS += [("eager", "auto", "OnlineNorm")]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("form", "backend", "kind"), _OVERFLOWS)
def test_an_input_that_is_not_finite_leaves_the_statistics_as_they_were(
    form: str, backend: str, kind: str, bad: float
) -> None:
    module = _make(kind) if kind == "OnlineNorm" else _make(kind, backend=backend)
    twin = copy.deepcopy(module)
    call = _FORMS[form](module)
    for _ in range(2):  # also with statistics other than initial
        before = _stream_values(module)
        x = torch.randn(5, 2, 3)
        x[0, 0, 2] = bad
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert not _call(module, x, call).isfinite().all()
            assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
        x = torch.randn(5, 2, 3)
        assert torch.equal(_call(module, x, call), _call(twin, x))
        assert all(torch.equal(value, twin.get_buffer(name)) for name, value in module.named_buffers())
        assert all(not torch.equal(value, before[name]) for name, value in module.named_buffers() if "mean" in name)


@pytest.mark.parametrize("backend", registry.names())
def test_the_statistics_of_a_layer_and_direction_move_together_or_not_at_all(backend: str) -> None:
    layer = _make(backend=backend, num_layers=2, bidirectional=True)
    with torch.no_grad():
        layer.weight_ih_l1_reverse[2] = float("inf")  # one of 16 channels
    before = _stream_values(layer)
    layer(torch.randn(5, 2, 3))
    for name, value in layer.named_buffers():
        moved = name.split("_l")[0].endswith(("mean", "var")) and not name.endswith("_l1_reverse")
        assert torch.equal(value, before[name]) != moved, name


def test_a_scaler_of_gradients_finds_its_scale() -> None:
    layer = rnnorm.LSTM(16, 16)
    optimizer = torch.optim.SGD(layer.parameters(), 0.001)
    scaler = torch.amp.GradScaler("cpu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y, _ = layer(torch.randn(20, 8, 16, generator=generator))
        scaler.scale((y.float() - 1).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 1
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_transforms_are_refused_not_ignored(backend: str, kind: str) -> None:
    module = _make(kind, backend=backend).requires_grad_(False)
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        torch.func.vmap(lambda x: _call(module, x))(x[None])
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        torch.func.jvp(lambda x: _call(module, x), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        torch.func.grad(lambda x: _call(module, x).sum())(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"backend='reference'"),
    ):
        _call(module, torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    _call(module, x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_transforms_reach_through_the_reference(norm: str) -> None:
    layer = _make("GRU", norm=norm, backend="reference").requires_grad_(False)
    x = torch.randn(5, 2, 3)
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(x)
    torch.testing.assert_close(jacobian.sum((-1, -2, -3)), tangent)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own look
@pytest.mark.parametrize("norm", ["none", "online"])
def test_compiled_evaluation_may_be_called_again_before_backward(norm: str) -> None:
    cell = rnnorm.LSTMCell(3, 4, norm=norm).eval()
    step = torch.compile(cell, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (step, cell):
        cell.zero_grad()
        state = None
        for x in torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)):
            state = run(x, state)
        state[0].sum().backward()
        grads.append(cell.weight_hh.grad.clone())
    torch.testing.assert_close(*grads)


def test_statistics_of_a_half_file_become_float32() -> None:
    half = {name: value.half() for name, value in _make().state_dict().items()}
    layer = _make()
    layer.load_state_dict(half, assign=True)
    assert layer.weight_ih_l0.dtype == torch.float16
    assert layer.norm_mean_l0.dtype == layer.cell_norm_v_l0.dtype == torch.float32


def test_buffers_of_a_subclass_are_its_own() -> None:
    class Mine(rnnorm.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.register_buffer("mean", torch.full((2,), 7.0))

    layer = Mine().half()
    layer.reset_running_stats()
    assert layer.mean.dtype == torch.float16
    assert layer.mean.tolist() == [7.0, 7.0]
    assert [tuple(stream.shape) for stream in layer._statistics_by_kind()["mean"]] == [(16,)]


def test_packed_sequences_under_another_default_device() -> None:
    layer = _make()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    expected = layer.eval()(packed)[0].data
    with torch.device("meta"):
        found = layer(packed)[0].data
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("backend", registry.names())
def test_lengths_and_reset_may_be_changed_after_the_call(backend: str, scripted: bool) -> None:
    """Also by the array that they share their memory with, of which autograd does not know."""
    cases.skip_unless_runs(backend)
    if scripted and backend == "reference":
        pytest.skip("TorchScript runs operators only")
    x, found = torch.randn(5, 2, 3), []
    for change in (False, True):
        torch.manual_seed(0)
        layer = _make(backend=backend, norm="layer")
        module = torch.jit.script(layer) if scripted else layer
        lengths, reset = torch.tensor([5, 3]), torch.zeros(5, 2, dtype=torch.bool)
        reset[2] = True
        y, _ = module(x, lengths=lengths, reset=reset)
        if change:
            lengths.numpy()[:] = 1
            reset.numpy()[:] = False
        y.sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    assert all(map(torch.equal, *found))


def test_a_float64_layer_under_autocast_wants_float64() -> None:
    layer = _make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 2, 3).double())[0].dtype == torch.float64
        with pytest.raises(ValueError, match=r"input must have the weights' dtype torch\.float64"):
            layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("backend", registry.names())
def test_lazily_negated_and_zero_tensors(backend: str) -> None:
    """Such as the imaginary part of a conjugate, whose memory holds the negative of its values."""
    cases.skip_unless_runs(backend)
    layer = _make(backend=backend, norm="layer")
    x, grad = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    found = []
    for one in (torch._neg_view(-x).requires_grad_(), x.clone().requires_grad_()):
        y = layer(one)[0]
        y.backward(torch._neg_view(-grad) if not found else grad)
        found.append((y, one.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    y = layer(x)[0]
    y.backward(torch._efficientzerotensor(y.shape, dtype=y.dtype))


@pytest.mark.parametrize("backend", registry.names())
def test_a_layer_that_raises_leaves_those_below_as_they_were(backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _make(backend=backend, num_layers=2)
    layer.weight_ih_l1 = nn.Parameter(torch.randn(16, 5))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, 2, 3))
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [name for name in registry.names() if name != "reference"])
@pytest.mark.parametrize("trained", ["norm_scale", "weight_hr"])
def test_the_control_process_counts_every_sample(backend: str, trained: str) -> None:
    """Also those whose pre-activation depends on nothing that needs a gradient."""
    cases.skip_unless_runs(backend)
    found = []
    for name in (backend, "reference"):
        layer = _make(backend=name, proj_size=3, cell_norm=True).double()
        for other, parameter in layer.named_parameters():
            parameter.requires_grad_(other.startswith(trained))
        torch.manual_seed(2)
        for _ in range(2):
            layer.zero_grad()
            y = layer(torch.randn(4, 2, 3, dtype=torch.float64))[0]
            (y * torch.randn_like(y)).sum().backward()
        found.append([layer.norm_u_l0, layer.norm_v_l0, layer.cell_norm_v_l0, getattr(layer, f"{trained}_l0").grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_cells_carry_small_changes_under_autocast(kind: str, backend: str) -> None:
    """A state rounded to bfloat16 at each step would stop at the first change below its precision."""
    cases.skip_unless_runs(backend)
    torch.manual_seed(0)
    exact, cell = getattr(nn, kind)(1, 1), getattr(rnnorm, kind)(1, 1, norm="none", backend=backend)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.zero_()
        exact.bias_ih.copy_(torch.tensor([-6.0, 20, 20, 1] if kind == "LSTMCell" else [0.0, 6, 20]))
    cell.load_state_dict(exact.state_dict())

    def last(cell: nn.Module, autocast: bool) -> Any:
        state = None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(400):
                state = cell(torch.ones(1, 1), state)
        return state[1] if isinstance(state, tuple) else state

    torch.testing.assert_close(last(cell, True), last(exact, False), rtol=1e-2, atol=0)


def test_a_scripted_backward_that_raises_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _make(backend="scripted")
    y = layer(torch.randn(5, 2, 3))[0]
    before = {name: value.clone() for name, value in layer.named_buffers()}
    backend = type(registry.by_name("scripted"))
    sound = backend.backward

    def moves_and_raises(*given: Any) -> None:
        sound(*given)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(backend, "backward", moves_and_raises)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        y.sum().backward()
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
