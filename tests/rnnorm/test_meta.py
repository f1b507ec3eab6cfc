"""Backends broken on purpose: the comparison of test_parity must fail for each of these faults.

Faults at the interface are tried on every backend; faults in the source of the scripted loop on that one.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from rnnorm.ops import CallSpec, Operands, Results, registry
from rnnorm.ops.call import DIFFERENTIABLE

_TOLERANCE = cases.TOLERANCE[torch.float64]


class _Broken:
    """A backend whose calls go through `forward(call, operands, spec)` and `backward(call, grads, ...)`."""

    differentiable = False

    def __init__(self, sound: Any, forward: Callable[..., Results] | None, backward: Callable[..., Any] | None) -> None:
        self._sound, self._forward, self._backward = sound, forward, backward

    def __getattr__(self, name: str) -> Any:  # all else
        return getattr(self._sound, name)

    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        if self._forward is None:
            return self._sound.forward(operands, spec, save)
        saved: list[Tensor] = []

        def call(operands: Operands, spec: CallSpec) -> Results:
            results, kept = self._sound.forward(operands, spec, save)
            saved.extend([] if saved else kept)  # of the first call
            return results

        return self._forward(call, operands, spec), saved

    def backward(self, grads: Any, operands: Operands, saved: Any, spec: CallSpec, *needs: bool) -> list[Tensor | None]:
        if self._backward is None:
            return self._sound.backward(grads, operands, saved, spec, *needs)
        return self._backward(self._sound.backward, grads, operands, saved, spec, *needs)


def _reversed_samples(call: Any, o: Operands, spec: CallSpec) -> Results:
    c = None if o.c is None else o.c.flip(0)
    found = call(o._replace(x=o.x.flip(1).contiguous(), h=o.h.flip(0), c=c), spec)
    return found._replace(y=found.y.flip(1), h=found.h.flip(0), c=found.c.flip(0))


def _padding_counted(call: Any, o: Operands, spec: CallSpec) -> Results:
    return call(o._replace(lengths=None), spec)


def _variance_without_factor(call: Any, o: Operands, spec: CallSpec) -> Results:
    found = call(o, spec)
    return found._replace(norm_var=found.norm_var / spec.constants.alpha_fwd)


def _mean_of_last_step_lost(call: Any, o: Operands, spec: CallSpec) -> Results:
    return call(o, spec)._replace(norm_mean=call(o._replace(x=o.x[:-1]), spec).norm_mean)


def _direction_ignored(call: Any, o: Operands, spec: CallSpec) -> Results:
    return call(o, spec._replace(reverse=False))


def _state_not_zero_padded(call: Any, o: Operands, spec: CallSpec) -> Results:
    found = call(o, spec)
    return found._replace(y=found.y + 1e-7 * (found.y == 0))


def _u_dropped(call: Any, grads: Any, o: Operands, *rest: Any) -> Any:
    return call(grads, o._replace(norm_u=torch.zeros_like(o.norm_u)), *rest)


def _v_dropped(call: Any, grads: Any, o: Operands, *rest: Any) -> Any:
    return call(grads, o._replace(norm_v=torch.zeros_like(o.norm_v)), *rest)


def _control_off(call: Any, grads: Any, o: Operands, saved: Any, spec: CallSpec, *needs: bool) -> Any:
    return call(grads, o, saved, spec._replace(constants=spec.constants._replace(alpha_bwd=1.0)), *needs)


def _guard_not_differentiated(call: Any, grads: Any, o: Operands, saved: Any, spec: CallSpec, *needs: bool) -> Any:
    return call(grads, o, saved, spec._replace(guard="none"), *needs)


def _last_state_gradient_lost(call: Any, grads: Any, *rest: Any) -> Any:
    return call((grads[0], None, *grads[2:]), *rest)


def _slightly_wrong(name: str) -> Callable[..., Any]:
    def broken(call: Any, *args: Any) -> Any:
        found = list(call(*args))
        found[DIFFERENTIABLE.index(name)] = found[DIFFERENTIABLE.index(name)] * (1 + 1e-7)
        return found

    return broken


_FORWARD = {
    "reversed_samples": (_reversed_samples, "lstm-online-none-plain"),
    "padding_counted": (_padding_counted, "gru-online-scale-lengths"),
    "variance_without_factor": (_variance_without_factor, "lstm-online-clamp-plain"),
    "mean_of_last_step_lost": (_mean_of_last_step_lost, "rnn_tanh-online-scale-plain"),
    "direction_ignored": (_direction_ignored, "lstm-none-deep"),
    "not_zero_padded": (_state_not_zero_padded, "gru-none-lengths"),
}
_BACKWARD = {
    "u_dropped": (_u_dropped, "lstm-online-none-plain"),
    "v_dropped": (_v_dropped, "gru-online-bare-plain"),
    "control_off": (_control_off, "lstm-cell_norm-online-clamp-plain"),
    "guard_not_differentiated": (_guard_not_differentiated, "rnn_tanh-online-clamp-far"),
    "last_state_gradient_lost": (_last_state_gradient_lost, "lstm-rms-plain"),
    **{
        f"slightly_wrong_{name}": (_slightly_wrong(name), case)
        for name, case in (
            ("x", "gru-layer-plain"),
            ("h", "lstm-none-lengths"),
            ("c", "lstm-online-scale-plain"),
            ("weight_hh", "rnn_relu-layer-plain"),
            ("bias_hh", "gru-none-plain"),
            ("weight_hr", "lstm-proj-layer-plain"),
            ("norm_scale", "gru-rms-plain"),
            ("cell_norm_shift", "lstm-cell_norm-layer-plain"),
        )
    },
}


def _assert_found(monkeypatch: pytest.MonkeyPatch, broken: Any, name: str) -> None:
    """The comparison passes with the sound backend and fails with the broken one in its place."""
    case = cases.BY_ID[name]
    expected = cases.run(case, "reference")
    cases.assert_close(cases.run(case, broken.name), expected, _TOLERANCE)
    rows = [broken if row.name == broken.name else row for row in registry.BACKENDS]
    monkeypatch.setattr(registry, "BACKENDS", rows)
    found = cases.run(case, broken.name)
    with pytest.raises(AssertionError, match="off by"):
        cases.assert_close(found, expected, _TOLERANCE)


@pytest.mark.parametrize("fault", _FORWARD)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_broken_forward_is_found(monkeypatch: pytest.MonkeyPatch, backend: str, fault: str) -> None:
    cases.skip_unless_runs(backend)
    change, name = _FORWARD[fault]
    _assert_found(monkeypatch, _Broken(registry.by_name(backend), change, None), name)


@pytest.mark.parametrize("fault", _BACKWARD)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_broken_backward_is_found(monkeypatch: pytest.MonkeyPatch, backend: str, fault: str) -> None:
    cases.skip_unless_runs(backend)
    change, name = _BACKWARD[fault]
    _assert_found(monkeypatch, _Broken(registry.by_name(backend), None, change), name)


# (file, sound text, broken text, case)
_TEXT = {
    "variance_without_alpha": ("running_stats", "d, d, value=alpha)", "d, d, value=1.0)", "lstm-online-none-plain"),
    "mean_not_moved_inside_a_step": (
        "running_stats",
        "d, full[:k], d, alpha=-1.0",
        "d, full[:k], d, alpha=0.0",
        "gru-online-none-plain",
    ),
    "u_left_out_inside_a_step": ("running_stats", "alpha=alpha - 1)", "alpha=0.0)", "lstm-online-none-plain"),
    "odd_sample_left_out_of_v": (
        "running_stats",
        "torch.cat((before, states[pairs:]))",
        "torch.cat((before, firsts[:1]))",
        "rnn_tanh-online-none-plain",
    ),
    "u_of_one_block_only": (
        "running_stats",
        "out.sum(0))",
        "out.sum(0) * float(start == 0))",
        "gru-online-scale-two_blocks",
    ),
    "factor_clamped": ("scripted", "y, y, value=-rest)", "y, y, value=-rest).clamp(min=0.5)", "lstm-online-none-plain"),
    "steps_in_forward_order": ("scripted", "k = len(steps.start) - 1 - j", "k = j", "gru-none-plain"),
    "reset_gate_outside": ("scripted", "r, n_part)", "torch.ones_like(r), n_part)", "gru-none-plain"),
    "layer_mean_not_differentiated": (
        "scripted",
        "dx = torch.add(dx,",
        "dx = torch.add(dx, 0 *",
        "rnn_tanh-layer-plain",
    ),
    "clamp_not_differentiated": (
        "scripted",
        ".abs() <= norm.constants.clamp_limit",
        ".abs() <= 9 * norm.constants.clamp_limit",
        "lstm-online-clamp-far",
    ),
    "v_not_written_back": (
        "scripted",
        '_v").copy_(norm.v)',
        '_v").copy_(norm.v * 1.0000001)',
        "gru-online-scale-plain",
    ),
    "eval_statistics_of_unit": (
        "scripted",
        "(norm.var + norm.constants.eps)",
        "(norm.var * 0 + 1)",
        "gru-online-scale-eval",
    ),
}


def _with_text(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, sound: str, broken: str) -> Any:
    """The scripted backend, compiled from a changed source of its two files."""
    for name in ("running_stats", "scripted"):
        text = Path(str(importlib.util.find_spec(f"rnnorm.ops.{name}").origin)).read_text()  # type: ignore[union-attr]
        if name == file:
            assert sound in text, f"{name}.py no longer holds {sound!r}: adapt the fault"
            text = text.replace(sound, broken)
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"rnnorm.ops.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"rnnorm.ops.{name}", module)
        spec.loader.exec_module(module)
    return module.Scripted()


@pytest.mark.parametrize("fault", _TEXT)
def test_broken_text_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    file, sound, broken, name = _TEXT[fault]
    _assert_found(monkeypatch, _with_text(tmp_path, monkeypatch, file, sound, broken), name)


def test_unbroken_text_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = _with_text(tmp_path, monkeypatch, "scripted", "Scripted", "Scripted")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        _assert_found(monkeypatch, row, "lstm-online-scale-deep")
