"""The Triton backend in Triton's interpreter. `test_triton` runs this file in a process with TRITON_INTERPRET=1.

The whole product of `cases`, half an hour: `TRITON_INTERPRET=1 python -m pytest tests/rnnorm -k triton`.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import test_online_norm as channels
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnorm
import rnnorm.ops
from rnnorm import norms
from rnnorm.ops import CallSpec, Operands, graphs, registry, triton_check, triton_online_norm, triton_steps
from rnnorm.ops.triton import Triton

TOLERANCE = cases.CHOSEN_TOLERANCE


@pytest.fixture(autouse=True)
def _nothing_reads_what_nothing_wrote() -> Iterator[None]:
    """Uninitialized memory is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _compare(case: cases.Case, dtype: torch.dtype = torch.float64) -> None:
    expected = cases.run(case, "reference", dtype)
    cases.assert_close(cases.run(case, "triton", dtype), expected, TOLERANCE[dtype])


def test_memory_is_filled() -> None:
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-2, 0.07, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_signals_keep_their_digits(dtype: torch.dtype, scale: float) -> None:
    layer = rnnorm.RNN(1, 4, norm="none", bias=False, backend="triton").to(dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[0.9], [1.0], [1.1], [-1.0]]))
        found = layer(torch.full((1, 1, 1), scale, dtype=dtype))[0].flatten().double()
    exact = (layer.weight_ih_l0.detach().flatten() * torch.tensor(scale, dtype=dtype)).double().tanh()
    assert ((found - exact).abs() <= 3 * torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("name", cases.CHOSEN)
def test_equals_reference(name: str) -> None:
    _compare(cases.CHOSEN[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(cases.CHOSEN)[::6])
def test_equals_reference_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    _compare(cases.CHOSEN[name], dtype)


def test_without_a_gradient_of_the_output() -> None:
    found = []
    for backend in ("reference", "triton"):
        layer = replace(cases.BY_ID["lstm-online-scale-lengths"], T=3, N=3, lengths=(2, 3, 1)).build(backend)
        x = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
        _, (h, c) = layer(x, lengths=[2, 3, 1])
        (h.sum() + c.square().sum()).backward()
        found.append({"x": x.grad, **{name: value.grad for name, value in layer.named_parameters()}})
    cases.assert_close(found[1], found[0], TOLERANCE[torch.float64])


@pytest.mark.parametrize("cell", ["lstm-cell_norm", "gru", "rnn_tanh"])
def test_without_recording(cell: str) -> None:
    """Without autograd nothing is kept; the statistics move."""
    found = []
    for backend in ("reference", "triton"):
        layer = replace(cases.BY_ID[f"{cell}-online-scale-lengths"], N=3).build(backend)
        x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            y, _ = layer(x, lengths=[2, 5, 3])
        found.append({"y": y, **dict(layer.named_buffers())})
    cases.assert_close(found[1], found[0], TOLERANCE[torch.float64])


@pytest.mark.parametrize("cell", ["lstm-proj-cell_norm", "gru"])
def test_several_programs_of_a_kernel(cell: str) -> None:
    """More sequences than one program takes, channels of several blocks, samples of several loads."""
    _compare(
        replace(
            cases.BY_ID[f"{cell}-online-scale-masked"], T=2, N=34, H=12, lengths=tuple(1 + n % 2 for n in range(34))
        )
    )


class _Bands(TorchDispatchMode):
    """Every new tensor lies between bands of NaN."""

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__()
        self.bands: list[Tensor] = []

    def embed(self, tensor: Tensor) -> Tensor:
        count = tensor.numel()
        around = tensor.new_full((count + 2 * self.WIDTH,), math.nan if tensor.is_floating_point() else 1)
        self.bands += [around[: self.WIDTH], around[self.WIDTH + count :]]
        return around[self.WIDTH : self.WIDTH + count].view(tensor.shape).copy_(tensor)

    def operands(self, o: Operands) -> Operands:
        names = ("x", "weight_hh", "reset", "zoneout_h", "zoneout_c")
        return o._replace(**{n: self.embed(getattr(o, n)) for n in names if getattr(o, n) is not None})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = any(word in func.__name__ for word in ("empty", "clone", "zeros", "full"))
        return self.embed(result) if new and result.numel() else result

    def assert_unharmed(self) -> None:
        assert len(self.bands) > 50
        for band in self.bands:
            assert bool((band.isnan() if band.is_floating_point() else band == 1).all())


@pytest.mark.parametrize(
    "name",
    [
        *("lstm-proj-cell_norm-online-bare-masked", "lstm-cell_norm-layer-masked", "lstm-online-scale-eval"),
        *("gru-online-clamp-masked", "rnn_relu-rms-masked"),
    ],
)
def test_nothing_outside_of_a_tensor_is_touched(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bands = _Bands()
    forward, backward = triton_steps.forward, triton_steps.backward

    def forward_within(o: Operands, *rest: Any) -> Any:
        o = bands.operands(o)
        with bands:
            return forward(o, *rest)

    def backward_within(grads: Any, o: Operands, *rest: Any) -> Any:
        o, grads = bands.operands(o), tuple(grad if grad is None else bands.embed(grad) for grad in grads)
        with bands:
            return backward(grads, o, *rest)

    monkeypatch.setattr(triton_steps, "forward", forward_within)
    monkeypatch.setattr(triton_steps, "backward", backward_within)
    _compare(replace(cases.BY_ID[name], T=3, N=3, lengths=(2, 3, 1)))
    bands.assert_unharmed()


def test_a_write_outside_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(tmp_path, monkeypatch, "kernels", "direct + n * P + h, tl.where", "direct + (n + 1) * P + h, tl.where")
    bands = _Bands()
    backward = rnnorm.ops.triton_steps.backward

    def within(*rest: Any) -> Any:
        with bands:
            return backward(*rest)

    monkeypatch.setattr(rnnorm.ops.triton_steps, "backward", within)
    cases.run(_small("rnn_tanh-none-plain"), "triton")
    with pytest.raises(AssertionError):
        bands.assert_unharmed()


class _Recorder:
    """Graphs of a device without one: a recorded graph runs its launches again, with the arguments they had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, launches: Sequence[graphs.Launch]) -> graphs.Launch:
        held = list(launches)
        self.sizes.append(len(held))

        def replay() -> None:
            for launch in held:
                launch()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    found = _Recorder()
    monkeypatch.setattr(triton_steps, "_recorder", lambda device: found)
    monkeypatch.setattr(triton_steps, "_LOOPS", graphs.Cache(graphs.BOUND))
    return found


@pytest.mark.parametrize(
    "name", ["lstm-proj-cell_norm-online-scale-masked", "gru-online-clamp-deep", "rnn_tanh-layer-eval"]
)
def test_replayed_graphs_equal_reference(recorder: _Recorder, name: str) -> None:
    """Later windows have other tensors, and layers and directions of equal size share a loop and its graphs."""
    _compare(replace(cases.BY_ID[name], T=3, N=3, lengths=(2, 3, 1), windows=3))
    assert recorder.sizes
    assert len(recorder.sizes) <= 2 * len(triton_steps._LOOPS._held)  # graphs of two steps and of one


@pytest.mark.usefixtures("recorder")
def test_a_loop_serves_every_mode() -> None:
    """Its buffers are made in inference mode here, and written to in other modes later."""
    layer, x = rnnorm.LSTM(2, 2, backend="triton", norm="layer").eval(), torch.randn(1, 1, 2)
    with torch.inference_mode():
        expected = layer(x)[0]
    with torch.no_grad():
        assert torch.equal(layer(x)[0], expected)
    layer(x)[0].sum().backward()


@pytest.mark.usefixtures("recorder")
def test_the_loops_of_the_check_are_not_kept() -> None:
    assert triton_check.compare(torch.device("cpu"), torch.float32, _spec("gru", "layer", True), 2) is None
    assert len(triton_steps._LOOPS) == 0


def test_window_lengths_make_no_new_graphs(recorder: _Recorder) -> None:
    layer = cases.BY_ID["rnn_tanh-online-scale-N1"].build("triton")
    scripted = cases.BY_ID["rnn_tanh-online-scale-N1"].build("scripted")
    for T in (41, 7, 9, 33, 12, 40, 3):
        x = torch.randn(T, 1, 4, dtype=torch.float64)
        found = []
        for built in (layer, scripted):
            built.zero_grad()
            y, _ = built(x)
            y.square().sum().backward()
            with torch.no_grad():  # other values in the same memory
                built.weight_hh_l0.mul_(0.9)
            found.append({"y": y.detach(), "grad": built.weight_hh_l0.grad, **dict(built.named_buffers())})
        cases.assert_close(*found, TOLERANCE[torch.float64])
    assert len(triton_steps._LOOPS) == 2
    assert len(recorder.sizes) <= 2 * len(graphs.SIZES)


def test_a_capture_by_the_user_launches_one_by_one(monkeypatch: pytest.MonkeyPatch, recorder: _Recorder) -> None:
    """A captured call uses no loop that others use, nor graphs; the first call of its kind must not be one."""
    monkeypatch.setattr(triton_steps, "_SEEN", graphs.Cache(graphs.BOUND))
    case = cases.BY_ID["rnn_tanh-layer-plain"]
    layer, x = case.build("triton"), torch.randn(5, 5, 4, dtype=torch.float64)

    def call(**options: Any) -> Tensor:
        layer.zero_grad()
        y, _ = layer(x, **options)
        y.sum().backward()
        return layer.weight_hh_l0.grad

    with monkeypatch.context() as patched:
        patched.setattr(triton_steps, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="run the layer once, forward and backward, before the capture"):
            call()
    expected = call()
    call(lengths=[5, 4, 3, 2, 1])
    loops = dict(triton_steps._LOOPS._held)
    recorder.sizes.clear()
    with monkeypatch.context() as patched:
        patched.setattr(triton_steps, "capturing", lambda device: True)
        patched.setattr(triton_steps._LOOPS, "get", None)
        assert torch.equal(call(), expected)
        with pytest.raises(RuntimeError, match="lengths must be None in a call that a CUDA graph"):
            call(lengths=[5, 4, 3, 2, 1])
    assert triton_steps._LOOPS._held == loops
    assert not recorder.sizes


# (file, sound text, broken text, case)
_FAULTS = {
    "statistic_moved_before_its_sample": (
        *("kernels", "actives[i], d * r, 0.0", "actives[i], (1.0 - K.alpha) * d * r, 0.0"),
        "gru-online-none-plain",
    ),
    "variance_without_alpha": ("kernels", "K.alpha * v + (K.alpha", "v + (K.alpha", "rnn_tanh-online-scale-plain"),
    "padding_counted": ("kernels", "m = tl.where(actives[i], ", "m = tl.where(first >= 0, ", "gru-online-none-lengths"),
    "clamped_too_late": ("kernels", "tl.where(q > limit,", "tl.where(q > 2.0 * limit,", "rnn_tanh-online-clamp-far"),
    "clamp_not_differentiated": ("kernels", "tl.abs(z) <= ", "tl.abs(z) <= 9.0 * ", "rnn_relu-online-clamp-far"),
    "v_left_out": ("kernels", "e = g - K.rest * v * y", "e = g", "rnn_tanh-online-none-plain"),
    "u_left_out": ("kernels", "e * r - K.rest * u", "e * r", "gru-online-scale-plain"),
    "floor_left_out": ("kernels", "decay < K.floor,", "decay < -9.0,", "rnn_tanh-online-bare-plain"),
    "floor_in_float32": ("kernels", "K.floor, decay.dtype", "K.floor, tl.float32", "rnn_tanh-online-bare-plain"),
    "reset_ignored": (
        "kernels",
        "mask=active, other=1) == 0)\n    return",
        "mask=active, other=1) < 9)\n    return",
        "lstm-none-masked",
    ),
    "gradient_stops_at_padding": ("kernels", "through, 0.0), later)", "through, 0.0), 0.0)", "rnn_tanh-none-lengths"),
    "zoneout_the_other_way": (
        "kernels",
        "stay * old + (1.0 - stay) * new",
        "stay * new + (1.0 - stay) * old",
        "gru-layer-zoneout",
    ),
    "recurrent_mask_not_differentiated": (
        "kernels",
        "recurrent = recurrent * tl.load",
        "recurrent = recurrent + 0.0 * tl.load",
        "rnn_tanh-none-masked",
    ),
    "layer_mean_not_differentiated": (
        "kernels",
        "d = d - tl.sum(d, 1",
        "d = d - 0.0 * tl.sum(d, 1",
        "rnn_relu-layer-plain",
    ),
    "guard_as_a_constant": ("kernels", "d = (d - q * (tl.sum", "d = (d - 0.0 * q * (tl.sum", "gru-online-scale-plain"),
    "reset_gate_outside": ("kernels", "x + r * apart", "x + apart", "gru-none-plain"),
    "old_cell_gradient_lost": ("kernels", "dc = dc_new + dh", "dc = dh", "lstm-none-plain"),
    "step_not_counted": ("steps", "add_(count * self.plan.direction)", "add_(0)", "rnn_tanh-none-plain"),
    "padding_not_zeroed": ("kernels", "old, mask=cells)", "old, mask=ok)", "rnn_tanh-none-lengths"),
    "row_of_another_sequence": (
        "kernels",
        "n = tl.program_id(0).to(tl.int64) * ROWS +",
        "n = 0 * ROWS +",
        "gru-rms-ragged",
    ),
}


def _changed(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, sound: str, broken: str) -> None:
    """Let the backend use a changed source of its two files."""
    for name in ("triton_kernels", "triton_steps"):
        text = (Path(rnnorm.ops.__file__).parent / f"{name}.py").read_text()
        if name == f"triton_{file}":
            assert sound in text, f"{name}.py no longer holds {sound!r}: adapt the fault"
            text = text.replace(sound, broken)
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"rnnorm.ops.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, f"rnnorm.ops.{name}", module)
        monkeypatch.setattr(rnnorm.ops, name, module)


def _small(name: str) -> cases.Case:
    if name.endswith("-ragged"):  # two programs of sequences
        return replace(cases.BY_ID[name.replace("ragged", "plain")], T=2, N=34, windows=1)
    case = cases.BY_ID[name]
    return replace(case, T=3, N=3, lengths=case.lengths and (2, 3, 1))


@pytest.mark.parametrize("fault", _FAULTS)
def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    file, sound, broken, name = _FAULTS[fault]
    _changed(tmp_path, monkeypatch, file, sound, broken)
    with pytest.raises(AssertionError, match="off by"):
        _compare(_small(name))


def test_the_sound_source_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(tmp_path, monkeypatch, "steps", "Forward", "Forward")
    _compare(_small("gru-rms-ragged"))


_CHECKED = [("lstm", "online", True), ("lstm", "online", False), ("gru", "layer", True), ("rnn_relu", "none", True)]


@pytest.mark.parametrize(("cell", "norm", "training"), _CHECKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backend_checks_itself(cell: str, norm: str, training: bool, dtype: torch.dtype) -> None:
    assert triton_check.compare(torch.device("cpu"), dtype, _spec(cell, norm, training), 7) is None


def test_no_two_results_are_one_tensor() -> None:
    """torch.compile refuses an operator whose outputs share memory; a caller may change a gradient in place."""
    layer, x = rnnorm.LSTM(2, 3, backend="triton"), torch.randn(1, 2, 2)
    spec = layer._spec()
    operands = triton_check._operands(torch.device("cpu"), torch.float32, spec, 3)
    saved = triton_steps.slabs(operands, spec, save=True)
    assert len({id(tensor) for tensor in saved}) == len(saved)
    biases = [layer.bias_ih_l0, layer.bias_hh_l0]
    one, other = torch.autograd.grad(layer(x)[0].sum(), biases)
    before = other.clone()
    one.mul_(0.5)
    assert torch.equal(other, before)


def test_tensors_of_another_device_are_refused() -> None:
    spec = rnnorm.GRU(2, 3, norm="layer")._spec()
    operands = triton_check._operands(torch.device("cpu"), torch.float32, spec, 3)
    reset = torch.zeros(triton_check.T, triton_check.N, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="on one device; got meta and cpu"):
        triton_steps.forward(operands._replace(reset=reset), spec, False)


def test_the_settings_of_products_decide_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for value in (False, True):
        settings = SimpleNamespace(fp32_precision="none", allow_fp16_accumulation=value)
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
        found.add(triton_steps._precision())
    assert len(found) == 2


def test_the_check_allows_for_rounding_where_nothing_is_left_but_rounding() -> None:
    def fault(found: float, wanted: float) -> Any:
        pair = ([("a gradient", torch.tensor([value]))] for value in (found, wanted))
        return triton_check._difference(*pair, 2e-2, "a layer")

    assert fault(-5e-8, 0.0) is None  # as an H100 rounds the gradient of one unit under layer normalization
    assert fault(1.01, 1.0) is None
    assert all(fault(found, wanted) for found, wanted in ((1e-3, 0.0), (1.05, 1.0), (math.nan, 0.0)))


def _spec(cell: str, norm: str, training: bool) -> CallSpec:
    declared = norms.resolve(norm)
    cell_norm = cell == "lstm" and norm != "none"
    return CallSpec(cell, norm, declared.guard, declared.constants, cell_norm, training, False, "auto")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been checked, and every device is checked."""
    monkeypatch.setattr(triton_check, "_REASONS", {})
    registry._warn_once.cache_clear()
    monkeypatch.setattr(registry, "BACKENDS", [row for row in registry.BACKENDS if row.name != "cpu"])
    monkeypatch.setattr(Triton, "fault", lambda self, *call: triton_check.reason(*call))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("broken", ["e * r", "e * r - K.rest * u + unknown"])
def test_a_fault_on_a_device_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Wrong numbers and errors: "auto" warns and goes on without the kernels, the backend by its name raises."""
    _changed(tmp_path, monkeypatch, "kernels", "e * r - K.rest * u", broken)
    monkeypatch.setattr(triton_check, "triton_steps", rnnorm.ops.triton_steps)
    calls: list[str] = []
    monkeypatch.setattr(triton_check, "compare", _counted(triton_check.compare, calls))
    expected = r"it must be [-\d.e]+; got [-\d.e]+" if broken == "e * r" else "failed with InterpreterError.*unknown"
    layer, x = rnnorm.LSTM(2, 7), torch.randn(3, 2, 2)
    with pytest.warns(RuntimeWarning, match=f"without its faster backend 'triton': .*{expected}"):
        y, _ = layer(x)
    y.sum().backward()
    layer(x)  # warns no more
    with pytest.raises(rnnorm.BackendUnavailable, match=expected):
        rnnorm.LSTM(2, 7, backend="triton")(x)
    assert len(calls) == 1


@pytest.mark.usefixtures("fresh")
def test_a_check_without_memory_says_nothing_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer, x = rnnorm.GRU(2, 7), torch.randn(3, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(triton_check, "_run", full)
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
    layer(x)
    assert [*triton_check._REASONS.values()] == [None]


@pytest.mark.usefixtures("fresh")
def test_a_check_sees_nothing_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also runs while a graph is captured from tensors without memory."""
    calls: list[str] = []
    monkeypatch.setattr(triton_check, "compare", _counted(triton_check.compare, calls))
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        y, _ = rnnorm.GRU(2, 7)(torch.randn(3, 2, 2))
    assert y.shape == (3, 2, 7)
    assert len(calls) == 1
    assert [*triton_check._REASONS.values()] == [None]


def _counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("layout", [None, channels._channels_last])
@pytest.mark.parametrize("options", channels.OPTIONS)
@pytest.mark.parametrize("shape", [(9, 3), (3, 2, 7)], ids=str)
def test_online_norm_equals_the_definition(shape: tuple[int, ...], options: str, layout: Any) -> None:
    if layout is not None and len(shape) == 2:
        pytest.skip("one order in memory")
    expected = channels._run(shape, "reference", **channels.OPTIONS[options])
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        found = channels._run(shape, "triton", dtype, layout=layout, **channels.OPTIONS[options])
        channels._assert_close(found, expected, tolerance)


@pytest.mark.parametrize("shape", [(2, 70), (1, 1), (1, 1, 1), (2, 1, 1030)], ids=str)
def test_online_norm_of_other_sizes(shape: tuple[int, ...]) -> None:
    """More channels than a program's, more values than a tile's, and one."""
    for layout in (None, channels._channels_last):
        found, expected = (channels._run(shape, name, guard="scale", layout=layout) for name in ("triton", "reference"))
        channels._assert_close(found, expected, 1e-11)
    layout, shape = channels._channels_last, (2, 40, 2)
    found, expected = (channels._run(shape, name, guard="clamp", layout=layout) for name in ("triton", "reference"))
    channels._assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_online_norm_in_narrow_dtypes(dtype: torch.dtype) -> None:
    channels.test_narrow_dtypes_round_inputs_and_outputs_alone("triton", (3, 5, 3), "scale", dtype)


@pytest.mark.parametrize("frozen", [("x",), ("weight", "bias")], ids=str)
def test_online_norm_of_what_needs_no_gradient(frozen: tuple[str, ...]) -> None:
    channels.test_what_needs_no_gradient("triton", frozen)


def test_online_norm_moves_statistics_that_are_columns_of_a_table() -> None:
    channels.test_statistics_may_be_columns_of_a_table("triton")


# (sound text, broken text, guard)
_FAULTS_OF_ONLINE_NORM = {
    "mean before its sample": ("tl.store(before + at, mu", "tl.store(before + at, own", "none"),
    "variance without a": ("(K.alpha * (1.0 - K.alpha)) * d * d", "(1.0 - K.alpha) * d * d", "none"),
    "own variance": ("moved += (1.0 - K.alpha) * wide", "moved += 0.0 * wide", "none"),
    "clamped above alone": ("tl.where(z < -limit, -limit, z)", "z", "clamp"),
    "clamp not differentiated": ("given, tl.zeros_like(z)", "given, given", "clamp"),
    "pull": ("factor * given - pull * z", "factor * given", "scale"),
    "v moved too early": ("factor = -(K.rest * vs) * r * r", "factor = -(K.rest * (vs + gd_mean)) * r * r", "none"),
    "u without its decay": (
        "us + scale * r * g_mean + factor * d + moved",
        "us + scale * r * g_mean + factor * d",
        "none",
    ),
    "y squared": ("(r * r * dd)", "(r * dd)", "none"),
    "gradient of the weight": ("sum_weight += r * gd_mean * D", "sum_weight += gd_mean * D", "none"),
    "channels last": ("d.to(tl.int64) * C + c if", "d * C + C - 1 - c if", "none"),
}


@pytest.mark.parametrize("fault", _FAULTS_OF_ONLINE_NORM)
def test_a_fault_in_the_kernels_of_online_norm_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    sound, broken, guard = _FAULTS_OF_ONLINE_NORM[fault]
    text = Path(triton_online_norm.__file__).read_text()
    assert sound in text
    changed = tmp_path / "changed.py"
    changed.write_text(text.replace(sound, broken))
    spec = importlib.util.spec_from_file_location("changed", changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"guard": guard, "spread": 5.0, "layout": channels._channels_last}
    expected = channels._run((4, 3, 2), "reference", **options)
    channels._assert_close(channels._run((4, 3, 2), "triton", **options), expected, 1e-11)
    monkeypatch.setattr(rnnorm.ops, "triton_online_norm", module)
    monkeypatch.setitem(sys.modules, "rnnorm.ops.triton_online_norm", module)
    with pytest.raises(AssertionError, match="off by"):
        channels._assert_close(channels._run((4, 3, 2), "triton", **options), expected, 1e-11)


@pytest.mark.usefixtures("fresh")
def test_a_fault_in_online_norm_on_a_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_check.compare_online_norm(torch.device("cpu"), torch.float32) is None
    normalize = triton_online_norm.online_norm
    broken = lambda *args: (lambda y, *rest: (y + 1, *rest))(*normalize(*args))  # noqa: E731
    monkeypatch.setattr(triton_online_norm, "online_norm", broken)
    triton_check._REASONS.clear()
    norm, x = rnnorm.OnlineNorm(3, guard="none"), torch.randn(4, 3)
    with pytest.warns(RuntimeWarning, match="'triton': its kernels do not compute y of OnlineNorm with guard 'none'"):
        y = norm(x)
    torch.testing.assert_close(y[0], x[0] / (1 + 1e-5) ** 0.5)
    with pytest.raises(rnnorm.BackendUnavailable, match="it must be"):
        rnnorm.OnlineNorm(3, backend="triton")(x)
