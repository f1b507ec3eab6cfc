"""The C++ backend beyond the parity tests: sizes that do not divide, threads, both products, extreme values."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm import norms
from rnnorm._cells import CELLS
from rnnorm.ops import build, native

pytestmark = pytest.mark.skipif(build.load() is not None, reason=f"the C++ backend cannot run here: {build.load()}")

NORMS = {
    "online-scale": norms.Online(0.99, 0.9, guard="scale"),
    "online-clamp": norms.Online(0.99, 0.9, guard="clamp"),
    "online-plain": norms.Online(0.99, 0.9, guard="none", affine=False),
    **{name: norms.resolve(name) for name in ("layer", "rms", "none")},
}
LAYERS = {"LSTM": {}, "GRU": {}, "RNN": {}}


def _run(kind: str, backend: str, dtype: torch.dtype, H: int, norm: norms.Spec, T: int = 4, N: int = 3, **options):
    """Outputs, gradients and states of two windows, by name."""
    torch.manual_seed(1)
    layer = getattr(rnnorm, kind)(5, H, norm=norm, backend=backend, **options).to(dtype)
    found: dict[str, Tensor] = {}
    state = None
    for window in range(2):
        x = torch.randn(T, N, 5).to(dtype).requires_grad_()
        y, state = layer(x, state)
        y.backward(torch.randn(y.shape).to(dtype))
        state = state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)
        found |= {f"y{window}": y.detach(), f"grad_x{window}": x.grad}
    found |= {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().clamp(min=1e-3)
        error = (found[name].double() - want.double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_threads_and_products(monkeypatch, kind, norm, threads, micro):
    monkeypatch.setattr(native, "threads", threads)
    monkeypatch.setattr(native, "use_micro_kernel", micro)
    for H in (7, 41):
        expected = _run(kind, "scripted", torch.float64, H, NORMS[norm])
        _compare(_run(kind, "cpu", torch.float32, H, NORMS[norm]), expected, 5e-5)
        _compare(_run(kind, "cpu", torch.float64, H, NORMS[norm]), expected, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [("LSTM", {}), ("LSTM", {"cell_norm": True}), ("GRU", {})], ids=str)
def test_other_threads_in_the_backward(monkeypatch, options, norm):
    kind, more = options
    if norm == "none" and more:
        pytest.skip("no norm, no cell norm")
    found = []
    for counts in ((2, 2), (3, 2), (1, 3)):
        torch.manual_seed(1)
        layer = getattr(rnnorm, kind)(5, 19, norm=NORMS[norm], backend="cpu", dtype=torch.float64, **more)
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        monkeypatch.setattr(native, "threads", counts[0])
        y, _ = layer(x, lengths=[4, 2, 3])
        monkeypatch.setattr(native, "threads", counts[1])
        y.backward(torch.randn(y.shape, dtype=torch.float64))
        found.append(
            {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}, **dict(layer.named_buffers())}
        )
    for other in found[1:]:
        _compare(other, found[0], 1e-10)


@pytest.mark.parametrize("H", [1, 17, 200, 257])
@pytest.mark.parametrize("kind", LAYERS)
def test_odd_sizes(monkeypatch, kind, H):
    monkeypatch.setattr(native, "threads", 2)
    for norm in ("online-scale", "layer"):
        expected = _run(kind, "scripted", torch.float64, H, NORMS[norm])
        _compare(_run(kind, "cpu", torch.float64, H, NORMS[norm]), expected, 1e-9)
        if H > 1:  # a single unit is normalized to 1 or 0: its gradient is all rounding
            _compare(_run(kind, "cpu", torch.float32, H, NORMS[norm]), expected, 1e-4)


def test_more_samples_than_a_block_of_input_products():
    expected = _run("LSTM", "scripted", torch.float64, 5, NORMS["online-scale"], T=3, N=300)
    _compare(_run("LSTM", "cpu", torch.float64, 5, NORMS["online-scale"], T=3, N=300), expected, 1e-9)


@pytest.mark.parametrize("options", [{"cell_norm": True}, {"proj_size": 3}, {"bias": False}, {"bidirectional": True}])
def test_lstm_options_on_several_threads(monkeypatch, options):
    monkeypatch.setattr(native, "threads", 3)
    expected = _run("LSTM", "scripted", torch.float64, 19, NORMS["online-scale"], **options)
    _compare(_run("LSTM", "cpu", torch.float64, 19, NORMS["online-scale"], **options), expected, 1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_to_the_bit(monkeypatch, threads):
    monkeypatch.setattr(native, "threads", threads)
    first, second = (_run("LSTM", "cpu", torch.float32, 40, NORMS["online-scale"]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("kind", LAYERS)
def test_extreme_values_saturate(kind, size):
    """The nonlinearities do not overflow: without a norm the gates get the values unchanged."""
    torch.manual_seed(0)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        layer = getattr(rnnorm, kind)(3, 4, norm="none", backend=backend).to(dtype)
        x = (size * torch.randn(3, 2, 3)).to(dtype)
        results.append(layer(x)[0].detach())
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-6)


def test_nonlinearities_within_a_millionth():
    """A 1x1 RNN without norm is tanh of its input; an LSTM's output gate shows the sigmoid."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, 1e-20, -1e-20, 90.0, -90.0])])[None, :, None]
    rnn = rnnorm.RNN(1, 1, norm="none", bias=False, backend="cpu")
    lstm = rnnorm.LSTM(1, 1, norm="none", bias=False, backend="cpu")
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0)
        lstm.weight_ih_l0.copy_(torch.tensor([[0.0], [0.0], [100.0], [1.0]]))
        tanh = rnn(x)[0].double()
        assert (tanh - x.double().tanh()).abs().max() < 1e-6
        small = x.abs() < 0.5
        assert ((tanh - x.double().tanh()).abs()[small] <= 1e-6 * x.double().abs()[small]).all()
        h = lstm(x.abs())[0].double()
    expected = x.double().abs().sigmoid() * (0.5 * (100 * x.double().abs()).tanh()).tanh()
    assert (h - expected).abs().max() < 1e-6


def test_large_normalized_values_in_the_control_process():
    """|y| far above 8 makes 1 - (1 - alpha) y^2 negative: it must not be clamped."""
    spec = norms.Online(0.999, 0.9, guard="none")
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        layer = rnnorm.RNN(3, 4, norm=spec, backend=backend, dtype=torch.float64)
        x = (20 * torch.randn(3, 2, 3, dtype=torch.float64)).requires_grad_()
        layer(x)[0].sum().backward()
        results.append({"x": x.grad, "v": layer.norm_v_l0, "u": layer.norm_u_l0})
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-9, atol=1e-12)


def test_backward_keeps_at_most_12_tnh():
    T, N, H = 6, 5, 32
    layer = rnnorm.LSTM(H, H, backend="cpu")
    held = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal held
        parameters = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
        if tensor.data_ptr() not in parameters and tensor.numel() >= T * N:
            held += tensor.numel()
        return tensor

    x = torch.randn(T, N, H)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert 9 * T * N * H <= held <= 12 * T * N * H


def test_names_are_those_of_the_python_side():
    layer = rnnorm.LSTM(2, 3)
    operands = layer._operands(layer._own("_l0"), torch.zeros(1, 1, 2), *torch.zeros(2, 1, 3), None)
    assert torch.ops.rnnorm_cpu.names() == {
        "operands": list(native.OPERANDS),
        "kept": [*native.widths(operands, layer._spec()), "partition"],
        "constants": list(norms.Constants._fields),
        "cells": list(CELLS),
        "norms": list(norms.KINDS),
        "guards": list(norms.GUARDS),
    }


@pytest.mark.parametrize("case", [case for case in cases.PRODUCT if case.id.endswith(("plain", "eval"))], ids=str)
def test_kept_tensors_equal_those_of_the_fake_kernel(case):
    layer = case.build("cpu")
    operands, spec = _given(layer, case.T, case.N)
    found = native.Native().forward(operands, spec, True)[1]
    expected = native.Native().saved_like(operands, spec)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def test_unsupported_devices_and_dtypes_are_refused():
    cpu = native.Native()
    assert "on the CPU only; got meta" in str(cpu.why_not(torch.device("meta"), torch.float32, None))
    assert "int64" in str(cpu.why_not(torch.device("cpu"), torch.int64, None))


@pytest.mark.parametrize("length", [0, 5])
def test_lengths_past_the_modules_are_still_checked(length):
    layer = rnnorm.LSTM(2, 3, backend="cpu")
    x, h = torch.randn(4, 1, 2), torch.zeros(1, 3)
    operands = layer._operands(layer._own("_l0"), x, h, h, torch.tensor([length]))
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.T = 1\.\.4; got"):
        native.Native().forward(operands, layer._spec(), True)


def test_long_horizons_keep_their_precision():
    """1 - alpha is computed in double: in float32 a horizon of a million samples would be off by a hundredth."""
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        layer = rnnorm.RNN(3, 5, norm=norms.Online(1 - 1e-6, 1 - 1e-6), backend=backend)
        layer(torch.randn(50, 4, 3))[0].sum().backward()
        results.append((layer.norm_mean_l0, layer.norm_u_l0))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-9)


def _given(
    layer: rnnorm.LSTM | rnnorm.GRU | rnnorm.RNN, T: int, N: int, lengths: Tensor | None = None, reset: bool = False
):
    """Operands and specification of a call of the layer's first direction, as the backend gets them."""
    h = torch.zeros(N, getattr(layer, "proj_size", 0) or layer.hidden_size)
    c = torch.zeros(N, layer.hidden_size) if layer.cell == "lstm" else None
    x = torch.randn(T, N, layer.input_size)
    begins = torch.zeros(T, N, dtype=torch.bool) if reset else None
    operands = layer._operands(layer._own("_l0"), x.to(layer.weight_ih_l0), h.to(x), c, lengths, begins)
    return operands, layer._spec()


# All optional operands of each cell; for the RNN, none.
FUZZED = {
    "lstm": lambda: _given(
        rnnorm.LSTM(2, 5, norm="online", cell_norm=True, proj_size=3), 4, 3, torch.tensor([3, 1, 2])
    ),
    "lstm-masked": lambda: _given(
        rnnorm.LSTM(2, 5, norm="layer", proj_size=3, recurrent_dropout=0.5, zoneout=0.5), 4, 3, reset=True
    ),
    "gru-masked": lambda: _given(rnnorm.GRU(2, 5, norm="none", recurrent_dropout=0.5, zoneout=0.5), 4, 3, reset=True),
    "lstm-eval": lambda: _given(rnnorm.LSTM(2, 5, norm="online").eval(), 4, 3),
    "gru": lambda: _given(rnnorm.GRU(2, 5, norm="layer"), 4, 3),
    "rnn": lambda: _given(rnnorm.RNN(2, 5, norm="none"), 4, 3),
}
# Operands that may be None without a counterpart.
OPTIONAL = {"lengths", "reset", "recurrent_mask", "zoneout_h", "zoneout_c"}


def _wrong(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that are invalid in its place."""
    return {
        "empty": tensor.new_empty(0),
        "no rows": tensor[:0],
        "scalar": tensor.new_zeros(()),
        "a row less": tensor[:-1],
        "a row more": torch.cat([tensor, tensor[:1]]),
        "a dimension more": tensor.unsqueeze(0),
        "a column more": torch.cat([tensor, tensor[..., :1]], -1),
        "int32": tensor.int(),
        "complex": tensor.to(torch.complex64),
        "meta": tensor.to("meta"),
        "sparse": tensor.to_sparse(),
    }


def _replaced(tensors: list[Tensor | None], k: int) -> dict[str, list[Tensor | None]]:
    """The list with its k-th tensor replaced by each invalid one."""
    tensor = tensors[k]
    assert tensor is not None
    return {name: [*tensors[:k], wrong, *tensors[k + 1 :]] for name, wrong in _wrong(tensor).items()}


def _miscounted(tensors: list[Tensor | None]) -> dict[str, list[Tensor | None]]:
    return {"none": [], "one less": tensors[:-1], "one more": [*tensors, tensors[0]]}


class Raw:
    """The operators themselves, with the arguments of a call."""

    def __init__(self, case: str) -> None:
        operands, spec = FUZZED[case]()
        with torch.no_grad():
            results, self.saved = native.Native().forward(operands, spec, True)
        self.operands = list(native.in_cpp(operands))
        self.grads = [torch.ones_like(t) if t.numel() else None for t in results[:3]]
        self.names = {"cell": spec.cell, "norm": spec.norm, "guard": spec.guard}
        self.constants = list(spec.constants)
        self.flags = (spec.cell_norm, spec.training, spec.reverse)

    def forward(self, **changed) -> list[Tensor]:
        a = {**vars(self), "threads": 0, **changed}
        names, cell_norm, *rest = a["names"], *a["flags"]
        return torch.ops.rnnorm_cpu.forward(
            a["operands"], *names.values(), a["constants"], cell_norm, *rest, True, True, a["threads"]
        )

    def backward(self, **changed) -> list[Tensor]:
        a = {**vars(self), "threads": 0, **changed}
        return torch.ops.rnnorm_cpu.backward(
            *(a["grads"], a["operands"], a["saved"], *a["names"].values(), a["constants"], *a["flags"]),
            *(True, a["threads"], True, True),
        )


def _refused(call, *labels: object, **changed) -> None:
    fault = None
    with torch.no_grad():
        try:
            call(**changed)
        except RuntimeError as raised:
            fault = raised
    assert "rnnorm" in str(fault), (labels, fault)


@pytest.mark.parametrize("case", FUZZED)
def test_wrong_operands_are_refused(case):
    raw = Raw(case)
    for call in (raw.forward, raw.backward):
        for k, (name, operand) in enumerate(zip(native.OPERANDS, raw.operands, strict=True)):
            if operand is None:
                continue
            wrong = _replaced(raw.operands, k)
            if name not in OPTIONAL:
                wrong["missing"] = [*raw.operands[:k], None, *raw.operands[k + 1 :]]
            if name == "x" and call == raw.forward:
                del wrong["a row less"], wrong["a row more"]  # another T is another call
            for how, operands in wrong.items():
                _refused(call, call.__name__, name, how, operands=operands)
        for how, operands in _miscounted(raw.operands).items():
            _refused(call, call.__name__, how, operands=operands)


@pytest.mark.parametrize("case", FUZZED)
def test_wrong_kept_tensors_and_gradients_are_refused(case):
    raw = Raw(case)
    for k, saved in enumerate(raw.saved):
        wrong = _replaced(raw.saved, k)
        wrong["double"] = [*raw.saved[:k], saved.double(), *raw.saved[k + 1 :]]
        wrong["not contiguous"] = [*raw.saved[:k], torch.stack([saved, saved], -1)[..., 0], *raw.saved[k + 1 :]]
        if saved.numel() == 0:  # an empty tensor has no wrong shape or order
            wrong = {
                how: wrong[how]
                for how in ("scalar", "a dimension more", "int32", "complex", "meta", "sparse", "double")
            }
        if saved.numel() == 1:
            del wrong["not contiguous"]
        for how, tensors in wrong.items():
            _refused(raw.backward, torch.ops.rnnorm_cpu.names()["kept"][k], how, saved=tensors)
    for how, tensors in _miscounted(raw.saved).items():
        _refused(raw.backward, how, saved=tensors)
    for k, grad in enumerate(raw.grads):
        if grad is not None:
            for how, grads in _replaced(raw.grads, k).items():
                _refused(raw.backward, "gradient", k, how, grads=grads)
    for how, grads in _miscounted(raw.grads).items():
        _refused(raw.backward, "gradient", how, grads=grads)
    for threads in (0, -1, 1.5, 6, 1e30, float("nan")):
        _refused(raw.backward, "partition", threads, saved=[*raw.saved[:-1], torch.tensor([threads]).to(raw.saved[0])])
    assert all(grad.isfinite().all() for grad in raw.backward())


@pytest.mark.parametrize("case", FUZZED)
def test_wrong_names_and_constants_are_refused(case):
    raw = Raw(case)
    for call in (raw.forward, raw.backward):
        for name in raw.names:
            for wrong in ("", "x", "LSTM", "none "):
                _refused(call, name, wrong, names={**raw.names, name: wrong})
        for constants in ([], raw.constants[:-1], [*raw.constants, 1.0]):
            _refused(call, constants, constants=constants)
        for threads in (-1, 10**9):
            _refused(call, threads, threads=threads)
    kept_by_others = Raw("rnn" if case != "rnn" else "gru").saved
    _refused(raw.backward, "kept by another cell", saved=kept_by_others)
    if raw.names["norm"] != "online":
        _refused(raw.forward, "guard", names={**raw.names, "guard": "scale"})
    if raw.names["cell"] != "lstm":
        _refused(raw.forward, "cell norm", flags=(True, True, False))


def test_errors_say_what_was_expected_and_got():
    raw = Raw("gru")
    operands = list(raw.operands)
    operands[1] = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match=re.escape("rnnorm: operand h must have shape [3, 5]; got [2, 5]")):
        raw.forward(operands=operands)
    kept = torch.ops.rnnorm_cpu.names()["kept"]
    k = kept.index("y")
    saved = [*raw.saved[:k], raw.saved[k][:-1], *raw.saved[k + 1 :]]
    with pytest.raises(RuntimeError, match=re.escape("rnnorm: kept tensor y must have shape [12, 15]; got [11, 15]")):
        raw.backward(saved=saved)
    with pytest.raises(RuntimeError, match=f"rnnorm: there must be {len(kept)} kept tensors; got 0"):
        raw.backward(saved=[])


@pytest.mark.parametrize("M", [0, 3])
@pytest.mark.parametrize("half", [False, True])
def test_linear_cross_entropy_refuses_what_it_cannot_read(M, half):
    given = {
        "hidden": torch.randn(M, 4),
        "weight": torch.randn(7, 4),
        "bias": torch.randn(7),
        "targets": torch.randint(7, (M,)),
        "weights": torch.rand(M),
    }

    def call(**changed):
        tensors = {**given, **changed}.values()
        return torch.ops.rnnorm_cpu.linear_cross_entropy(*tensors, True, True, True, True, half, 0)

    assert all(found.isfinite().all() for found in call())
    for name, tensor in given.items():
        wrong = {**_wrong(tensor), "half": tensor.half()}
        if M == 0 and name in ("hidden", "targets", "weights"):
            wrong = {
                how: wrong[how] for how in ("scalar", "a dimension more", "int32", "complex", "meta", "sparse", "half")
            }
        if tensor.dim() == 2 and tensor.numel():
            wrong["not contiguous"] = torch.stack([tensor, tensor], -1)[..., 0]
        for how, replacement in wrong.items():
            _refused(call, name, how, **{name: replacement})
    if M:
        for target in (-1, 7, 2**62):
            with pytest.raises(ValueError, match=f"targets must lie in 0..6; got {target}"):
                call(targets=torch.full((M,), target))


@pytest.mark.parametrize("case", FUZZED)
@pytest.mark.parametrize("save", [True, False])
def test_results_are_not_shared(case, save):
    operands, spec = FUZZED[case]()
    with torch.no_grad():
        results, saved = native.Native().forward(operands, spec, save)
    returned = [tensor for tensor in results if tensor.numel()]
    others = [tensor for tensor in (*operands, *saved) if tensor is not None and tensor.numel()]
    places = [tensor.untyped_storage().data_ptr() for tensor in (*returned, *others)]
    for k in range(len(returned)):
        assert places.count(places[k]) == 1
        assert returned[k]._base is None
        assert returned[k].untyped_storage().nbytes() == returned[k].nbytes


@pytest.mark.parametrize("lengths", [None, [4, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_can_be_changed_in_place(kind, lengths):
    grads = []
    for change in (False, True):
        torch.manual_seed(0)
        layer = getattr(rnnorm, kind)(2, 3, backend="cpu")
        x = torch.randn(4, 3, 2, requires_grad=True)
        y = layer(x, lengths=lengths)[0]
        (y.mul_(2) if change else y * 2).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# Large enough for its memory to come from the pool.
def _large_window(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, its input, and the gradient that goes with it; no two share anything."""
    generator = torch.Generator().manual_seed(seed)
    layer = getattr(rnnorm, kind)(40, 72, norm="layer", backend="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    x = torch.randn(31, 17, 40, generator=generator).requires_grad_()
    return layer(x)[0], x, torch.randn(31, 17, 72, generator=generator)


def _large_gradient(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    y, x, grad = _large_window(kind, seed)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", LAYERS)
def test_two_graphs_never_share_a_block(kind):
    seeds = range(4)
    expected = [_large_gradient(kind, seed) for seed in seeds]
    alive = [_large_window(kind, seed) for seed in seeds]
    for seed in (2, 0, 3, 1):
        y, x, grad = alive[seed]
        y.backward(grad)
        assert torch.equal(y, expected[seed][0])
        assert torch.equal(x.grad, expected[seed][1])


def test_two_threads_never_share_a_block(monkeypatch):
    monkeypatch.setattr(native, "threads", 1)
    seeds = list(range(24))
    expected = [_large_gradient("LSTM", seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: _large_gradient("LSTM", seed), seeds))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def _sanitized() -> bool:
    return "-fsanitize" in os.environ.get("RNNORM_CXXFLAGS", "")


@pytest.mark.skipif(_sanitized(), reason="the sanitizers' build has no pool: it would hide what runs over an end")
def test_blocks_go_from_call_to_call():
    layer = rnnorm.LSTM(40, 72)
    operands = layer._operands(layer._own("_l0"), torch.randn(31, 17, 40), *torch.zeros(2, 17, 72), None)
    spec = layer._spec()

    def places() -> set[int]:
        with torch.no_grad():
            return {t.data_ptr() for t in native.Native().forward(operands, spec, True)[1] if t.nbytes >= 2**17}

    found = places()
    assert len(found) == 4  # h, c, y, rstd
    assert places() == found


_CORES = """
import os, sys, torch, rnnorm
from rnnorm.ops import build, native
build.load()
torch.set_num_threads(2)
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[: int(sys.argv[1])])
layer = rnnorm.LSTM(200, 200, norm="none", backend="cpu")
x, h, c = torch.zeros(2, 20, 200), torch.zeros(20, 200), torch.zeros(20, 200)
operands = layer._operands(layer._own("_l0"), x, h, c, None)
with torch.no_grad():
    print(native.Native().forward(operands, layer._spec(), True)[1][-1].item())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
@pytest.mark.parametrize("cores", [1, 2])
def test_no_more_threads_than_cores_that_the_process_may_use(cores):
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip("there are fewer cores here")
    found = subprocess.run(
        [sys.executable, "-c", _CORES, str(cores)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert int(found.stdout) == cores


# A child with too little memory for the backward pass, at several places of it. Forked before any thread exists; with
# BLAS, since oneDNN itself crashes if it has no memory for a micro-kernel.
_OUT_OF_MEMORY = """
import os, resource, sys
import torch, rnnorm
from rnnorm.ops import build, native
build.load()
native.threads, native.use_micro_kernel = int(sys.argv[1]), False
torch.set_num_threads(native.threads)
for extra in range(44, 60, 4):
    child = os.fork()
    if not child:
        module = rnnorm.LSTM(4, 16, norm="online", backend="cpu")
        module(torch.randn(3, 1, 4))[0].sum().backward()
        y = module(torch.randn(60000, 1, 4))[0]
        grad, before = torch.ones_like(y), [module.norm_u_l0.clone(), module.norm_v_l0.clone()]
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (extra << 20),) * 2)
        try:
            y.backward(grad)
            os._exit(0)
        except (MemoryError, RuntimeError):
            os._exit(10 if all(map(torch.equal, before, [module.norm_u_l0, module.norm_v_l0])) else 11)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's memory can be limited on Linux only")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_backward_without_memory_raises_and_moves_nothing(threads: int) -> None:
    """Not a crash of the threads that wait for the one which failed."""
    done = subprocess.run([sys.executable, "-c", _OUT_OF_MEMORY, str(threads)], capture_output=True, text=True)
    codes = set(done.stdout.split())
    assert codes <= {"0", "10"}, (done.stdout, done.stderr[-2000:])
    assert "10" in codes


def test_concurrent_backwards_through_one_graph_with_other_threads() -> None:
    """The kept tensors are arranged by the threads of the forward pass; each backward must arrange its own copy."""
    torch.manual_seed(0)
    module, x = rnnorm.LSTM(8, 64, norm="layer", backend="cpu"), torch.randn(200, 16, 8, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", 2)
        y = module(x)[0].sum()
        patch.setattr(native, "threads", 1)
        (expected,) = torch.autograd.grad(y, x, retain_graph=True)
        for _ in range(10):
            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(lambda _: torch.autograd.grad(y, x, retain_graph=True)[0], range(3)))
            for gradient in found:
                torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
            patch.setattr(native, "threads", 2)
            torch.autograd.grad(y, x, retain_graph=True)
            patch.setattr(native, "threads", 1)


def test_large_inputs_have_no_gradient() -> None:
    """tanh in float32 is exactly 1 where its derivative vanishes; an error there would grow with the input."""
    module = rnnorm.RNN(1, 40, bias=False, norm="none", backend="cpu")
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0.copy_(torch.logspace(1, 30, 40)[:, None] * (-1) ** torch.arange(40)[:, None])
    y = module(torch.ones(1, 1, 1))[0]
    y.sum().backward()
    torch.testing.assert_close(y.flatten(), module.weight_ih_l0.flatten().sign(), rtol=0, atol=0)
    assert not module.weight_ih_l0.grad.any()


def test_tanh_is_precise() -> None:
    module = rnnorm.RNN(1, 1, bias=False, norm="none", backend="cpu")
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0.fill_(1)
        x = torch.cat([torch.linspace(-10, 10, 100_001), torch.logspace(-30, 1, 1000)])
        y = module(x[None, :, None])[0].flatten()
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=6 * 2**-24, atol=0)
