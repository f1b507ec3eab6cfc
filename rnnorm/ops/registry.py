"""The backends, in order of preference, and the only place that chooses between them."""

import functools
import warnings
from typing import Any

import torch

from rnnorm.ops import native
from rnnorm.ops.backend import Backend
from rnnorm.ops.call import CallSpec
from rnnorm.ops.errors import Failure
from rnnorm.ops.native import Native
from rnnorm.ops.reference import Reference
from rnnorm.ops.scripted import Scripted
from rnnorm.ops.triton import Triton


class BackendUnavailable(RuntimeError):  # noqa: N818
    """A backend that was chosen by name cannot run this call."""


BACKENDS: list[Backend] = [Native(), Triton(), Scripted(), Reference()]


def names() -> list[str]:
    return [backend.name for backend in BACKENDS]


def by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend must be one of {', '.join(map(repr, ['auto', *names()]))}; got {name!r}")


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"rnnorm runs without its faster backend {name!r}: {reason}", RuntimeWarning, stacklevel=2)


def _why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, spec: CallSpec | None, units: int | None
) -> str | None:
    if spec is not None and spec.special and not backend.runs_special:
        return "it does not run mogrifier_rounds and cap_input_gate"
    reason = backend.why_not(device, dtype, spec)
    return backend.fault(device, dtype, spec, units) if reason is None and units is not None else reason


def choose(
    wanted: str, device: torch.device, dtype: torch.dtype, spec: CallSpec | None, units: int | None = None
) -> Backend:
    """The backend of that name, or for `"auto"` the first that can run the call. `units`: H or C of one to run."""
    if wanted == "auto":
        for backend in BACKENDS:
            reason = _why_not(backend, device, dtype, spec, units)
            if reason is None:
                return backend
            if isinstance(reason, Failure):
                _warn_once(backend.name, reason)
    backend = by_name(wanted)
    reason = _why_not(backend, device, dtype, spec, units)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {wanted!r} cannot run this call: {reason}; backend='auto' chooses one that can"
        )
    return backend


def choose_loss(device: torch.device, dtype: torch.dtype) -> Any:
    """The first backend that can compute `linear_cross_entropy` in this dtype."""
    for backend in BACKENDS:
        if backend.why_not(device, dtype, None) is None and dtype in backend.losses:
            return backend
    raise ValueError(f"hidden must have a floating-point dtype; got {dtype}; convert it with .to(dtype)")


def why_not_bfloat16(device: str | torch.device = "cpu") -> str | None:
    """None if `device` has instructions for products in bfloat16, else the reason why not.

    The layers use them for bfloat16 input and under autocast.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return native.why_not_bfloat16()
    if (absent := _why_absent(device)) is not None:
        return absent
    if device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "the GPU is older than compute capability 8.0"
    return None


def backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each backend's name, with None if it can run on `device` here, else with the reason why it cannot."""
    device = torch.device(device)
    absent = _why_absent(device)
    return {b.name: b.why_not(device, dtype, None) if absent is None else absent for b in BACKENDS}


def _why_absent(device: torch.device) -> str | None:
    """None if tensors can be on a device here, else the reason why not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as fault:
        return f"device {device} is not available: {str(fault).splitlines()[0]}"
    return None
