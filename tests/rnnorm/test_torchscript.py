"""Layers and cells under `torch.jit.script`: equal to eager in every option, saved, loaded elsewhere, trained."""

import copy
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import rnnorm
from rnnorm._torch import unfused
from rnnorm.ops import BackendUnavailable, scripted

pytestmark = [
    pytest.mark.usefixtures("double"),
    # torch 2.13 deprecates TorchScript as a whole.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]
_CASES = [
    "lstm-cell_norm-online-scale-deep",
    "lstm-proj-online-clamp-lengths",
    "lstm-layer-plain",
    "gru-online-bare-lengths",
    "gru-none-deep",
    "rnn_tanh-online-none-plain",
    "rnn_relu-rms-deep",
    "gru-online-scale-eval",
]
_TENSOR_ERROR = torch.jit.Error


def _record(module: Any, layer: Any, case: cases.Case, backward: bool = True) -> dict[str, Tensor]:
    """Two windows with carried state: outputs, gradients, running statistics."""
    generator = torch.Generator().manual_seed(3)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    found: dict[str, Tensor] = {}
    state = None
    for w in range(2):
        x = torch.randn(case.T, case.N, case.I, generator=generator, requires_grad=True)
        y, state = module(x, state, lengths=lengths)
        found[f"y{w}"] = y.detach()
        lasts = state if isinstance(state, tuple) else (state,)
        found |= {f"state{w}.{k}": value.detach() for k, value in enumerate(lasts)}
        if backward:
            y.backward(torch.randn(y.shape, generator=generator))
            found[f"grad x{w}"] = x.grad
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    if backward:
        found |= {f"grad {name}": p.grad.clone() for name, p in layer.named_parameters()}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("backend", ["auto", *cases.CANDIDATES])
def test_scripted_equals_eager(backend: str, name: str) -> None:
    if backend != "auto":
        cases.skip_unless_runs(backend)
    case = cases.BY_ID[name]
    eager, layer = case.build(backend), case.build(backend)
    scripted = torch.jit.script(layer)
    assert list(scripted.state_dict()) == list(eager.state_dict())
    cases.assert_close(_record(scripted, layer, case), _record(eager, eager, case), 1e-12)


def test_scripting_shares_weights_and_statistics() -> None:
    layer = rnnorm.LSTM(3, 4)
    scripted = torch.jit.script(layer)
    scripted(torch.randn(5, 2, 3))[0].sum().backward()
    assert layer.norm_mean_l0.abs().sum() > 0
    assert layer.norm_u_l0.abs().sum() > 0
    assert layer.weight_hh_l0.grad is scripted.weight_hh_l0.grad is not None
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.zero_()
    assert scripted.eval()(torch.randn(5, 2, 3))[1][0].std(1).abs().max() < 1


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_forms_of_input(cell: str, first: bool) -> None:
    layer = getattr(rnnorm, cell)(3, 4, 2, batch_first=first, bidirectional=True, norm="layer")
    scripted = torch.jit.script(layer)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(scripted(x), layer(x))
    torch.testing.assert_close(scripted(x[:, 0]), layer(x[:, 0]))
    _, state = layer(x)
    torch.testing.assert_close(scripted(x, state), layer(x, state))
    single = tuple(s[:, 0] for s in state) if cell == "LSTM" else state[:, 0]
    torch.testing.assert_close(scripted(x[:, 0], single), layer(x[:, 0], single))


def test_dropout_draws_as_eager_does() -> None:
    layer = rnnorm.GRU(3, 4, 3, dropout=0.5, norm="layer")
    scripted = torch.jit.script(layer)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    found = scripted(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, layer(x))
    torch.testing.assert_close(scripted.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("norm", ["online", "rms", "none"])
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str, norm: str) -> None:
    layer = getattr(rnnorm, cell)(3, 4, norm=norm)
    twin = copy.deepcopy(layer)
    scripted = torch.jit.script(layer)
    state = twin_state = None
    for _ in range(3):
        x = torch.randn(2, 3)
        state, twin_state = scripted(x, state), twin(x, twin_state)
        torch.testing.assert_close(state, twin_state)
    torch.testing.assert_close(scripted(x[0]), twin(x[0]))
    assert list(scripted.state_dict()) == list(twin.state_dict())
    torch.testing.assert_close(dict(scripted.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("guard", rnnorm.norms.GUARDS)
def test_online_norm(guard: str) -> None:
    norm = rnnorm.OnlineNorm(3, guard=guard)
    twin = copy.deepcopy(norm)
    scripted = torch.jit.script(norm)
    for _ in range(2):
        x = torch.randn(5, 3, 2)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        scripted(left).square().sum().backward()
        twin(right).square().sum().backward()
        torch.testing.assert_close(left.grad, right.grad)
    torch.testing.assert_close(dict(scripted.state_dict()), dict(twin.state_dict()))
    torch.testing.assert_close(scripted.eval()(x), twin.eval()(x))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.rnn = rnnorm.LSTM(3, 4, 2, bidirectional=True, dropout=0.1)
        self.out = nn.Linear(8, 11)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.rnn(self.embedding(ids), lengths=lengths)
        return self.out(y)


def test_scripting_a_parent_leaves_it_as_it_was() -> None:
    """torch.jit.script puts substitutes into the eager parent: they must behave as the layer."""
    model = _Model()
    keys = list(model.state_dict())
    scripted = torch.jit.script(model)
    assert isinstance(model.rnn, rnnorm.LSTM)
    assert list(model.state_dict()) == keys == list(scripted.state_dict())
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    assert isinstance(model.rnn(packed)[0], nn.utils.rnn.PackedSequence)
    model.rnn(torch.randn(5, 2, 3), lengths=[2, 5])
    assert isinstance(pickle.loads(pickle.dumps(model)).rnn, type(model.rnn))
    twin = copy.deepcopy(model)
    assert twin.rnn.weight_hh_l0.data_ptr() != model.rnn.weight_hh_l0.data_ptr()
    ids, lengths = torch.randint(11, (5, 2)), torch.tensor([5, 3])
    expected = twin.eval()(ids, lengths)
    torch.testing.assert_close(torch.jit.script(model).eval()(ids, lengths), expected)
    model.rnn.reset_running_stats()
    assert model.rnn.norm_var_l1.eq(1).all()


_LOAD = """
import sys, torch, rnnorm
path, out = sys.argv[1:]
model = torch.jit.load(path)
ids, lengths = torch.arange(10).view(5, 2), torch.tensor([5, 3])
model.train()
before = model.state_dict()["rnn.norm_mean_l0"].clone()
y = model(ids, lengths)
y.sum().backward()
assert model.rnn.weight_hh_l1_reverse.grad.abs().sum() > 0
assert not torch.equal(model.state_dict()["rnn.norm_mean_l0"], before)
assert model.state_dict()["rnn.norm_u_l0"].abs().sum() > 0
torch.save({"y": model.eval()(ids, lengths), "state": dict(model.state_dict())}, out)
"""


def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Model()
    model.rnn.dropout = 0.0
    torch.jit.script(copy.deepcopy(model)).save(str(tmp_path / "model.pt"))
    arguments = [sys.executable, "-c", _LOAD, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    root = str(Path(rnnorm.__file__).parents[1])
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    ids, lengths = torch.arange(10).view(5, 2), torch.tensor([5, 3])
    model(ids, lengths).sum().backward()
    torch.testing.assert_close(found["state"], dict(model.state_dict()))
    torch.testing.assert_close(found["y"], model.eval()(ids, lengths))


def test_loaded_module_converts_weights_and_statistics() -> None:
    """Converting a scripted module to another dtype converts what its forward uses."""
    scripted = torch.jit.script(rnnorm.GRU(3, 4)).float()
    y, _ = scripted(torch.randn(5, 2, 3, dtype=torch.float32))
    assert y.dtype == torch.float32
    assert scripted.norm_mean_l0.abs().sum() > 0


def test_half_precision_input_is_widened() -> None:
    layer = rnnorm.GRU(3, 4, norm="layer", dtype=torch.float32)
    scripted = torch.jit.script(layer)
    x = torch.randn(5, 2, 3).bfloat16()
    torch.testing.assert_close(scripted(x), layer(x.float()))


def test_reference_is_refused() -> None:
    with pytest.raises(
        BackendUnavailable, match="backend 'reference' cannot run under TorchScript: it is not an operator"
    ):
        torch.jit.script(rnnorm.LSTM(3, 4, backend="reference"))


@pytest.mark.parametrize("make", [lambda: rnnorm.GRUCell(4, 6), lambda: rnnorm.OnlineNorm(4)])
def test_a_scripted_module_in_half_precision_does_not_train(make: Any) -> None:
    """Its statistics were converted too, and would not move."""
    plain, scripted = make(), torch.jit.script(make()).to(torch.bfloat16)
    plain.load_state_dict(scripted.state_dict())
    x = torch.randn(3, 4).bfloat16()
    with pytest.raises(torch.jit.Error, match="running statistics must be float32 or float64 in training"):
        scripted(x)
    plain.bfloat16().eval(), scripted.eval()
    torch.testing.assert_close(scripted(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_trace_of_packed_sequences_is_for_any_number_of_them(bidirectional: bool) -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnorm.GRU(4, 6, num_layers=2, bidirectional=bidirectional, norm="layer").eval()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return torch.nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]

    module = Packed()
    traced = torch.jit.trace(module, (torch.randn(5, 3, 4), torch.tensor([2, 5, 3])), check_trace=False)
    for lengths in ([5, 1, 3, 5], [4], [7, 2]):
        x = torch.randn(max(lengths), len(lengths), 4)
        torch.testing.assert_close(traced(x, torch.tensor(lengths)), module(x, torch.tensor(lengths)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["layer", "norm"])
def test_reference_is_not_traced(kind: str) -> None:
    options = {"backend": "reference"}
    module = rnnorm.LSTM(3, 4, norm="layer", **options) if kind == "layer" else rnnorm.OnlineNorm(3, **options)
    with pytest.raises(BackendUnavailable, match=r"torch.jit.trace would record its loop for this number of steps"):
        torch.jit.trace(module, (torch.randn(5, 3),))


def test_subclass_with_its_own_forward_is_refused() -> None:
    class Own(rnnorm.GRU):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input)[0]

    with pytest.raises(TypeError, match=r"forward must be rnnorm's own .*; got Own.* hold the layer as a member"):
        torch.jit.script(Own(3, 4))


def test_computed_weights_are_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = rnnorm.LSTM(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "norm_scale_l0", Doubled())
    with pytest.raises(TypeError, match=r"norm_scale_l0 must be a parameter .*; got a computed weight"):
        torch.jit.script(layer)


def test_bad_input_is_refused() -> None:
    scripted = torch.jit.script(rnnorm.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    for arguments, text in [
        ((torch.randn(5),), "input must have 3 dimensions"),
        ((torch.randn(5, 2, 7),), "input must have T > 0 steps of input_size = 3"),
        ((x.float(),), "input must have the weights' dtype"),
        ((x, (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))), "the state c must have shape"),
        ((x, None, torch.tensor([5, 6])), "lengths must lie in 1..T = 1..5"),
        ((x, None, torch.tensor([5, 0])), "lengths must lie in 1..T = 1..5"),
        ((x, None, torch.tensor([5])), "lengths must hold one integer for each of the N = 2"),
    ]:
        with pytest.raises(_TENSOR_ERROR, match=text):
            scripted(*arguments)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor' for argument 'input'"):
        scripted(packed)
    cell = torch.jit.script(rnnorm.GRUCell(3, 4))
    with pytest.raises(_TENSOR_ERROR, match="input's last dimension must be input_size = 3"):
        cell(torch.randn(2, 5))


def test_threads_compile_a_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    own, started = torch.jit.script, threading.Barrier(4)

    def slow(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is scripted._LOOPS["rnn_tanh"][0]:  # compiling it compiles what it calls in the same way
            calls.append(function)
            time.sleep(0.05)  # long enough for the other threads to ask
        return own(function, *args, **kwargs)

    def call(_: int) -> Tensor:
        started.wait()
        with torch.no_grad():
            return rnnorm.RNN(3, 4, backend="scripted")(torch.randn(5, 2, 3))[0]

    monkeypatch.setattr(torch.jit, "script", slow)
    scripted._compiled_once.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(call, range(4)))) == 4
    assert len(calls) == 1


def _fusers() -> tuple[bool, bool]:
    return torch._C._jit_texpr_fuser_enabled(), torch._C._jit_can_fuse_on_gpu()


def test_nothing_is_fused_on_a_gpu_while_a_thread_runs_a_loop() -> None:
    """The fusers are settings of the process, so the last thread that leaves restores them."""
    before, gpu = _fusers(), torch.device("cuda")
    assert before[0]
    with unfused(torch.device("cpu")):
        assert _fusers() == before
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with unfused(gpu):
            entered.set()
            assert left.wait(10)
            assert _fusers() == (False, False)

    with ThreadPoolExecutor(1) as pool:
        with suppress(ZeroDivisionError), unfused(gpu):
            done = pool.submit(other)
            assert entered.wait(10)
            assert _fusers() == (False, False)
            raise ZeroDivisionError
        left.set()
        done.result()
    assert _fusers() == before


def test_both_loops_run_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def noted(device: torch.device) -> Any:
        found.append(device.type)
        return unfused(device)

    monkeypatch.setattr(scripted, "unfused", noted)
    rnnorm.LSTM(3, 4, backend="scripted")(torch.randn(2, 2, 3))[0].sum().backward()
    assert found == ["cpu", "cpu"]
