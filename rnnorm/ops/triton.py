"""The Triton backend: a step as one product and a few fused kernels, for CUDA devices.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs the kernels on the CPU, for tests.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm.ops.backend import Backend
from rnnorm.ops.call import CallSpec, Operands, Results
from rnnorm.ops.errors import Failure


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be imported here, None if it can."""
    try:
        import triton  # noqa: F401
    except Exception as fault:  # a broken installation raises anything
        return f"triton cannot be imported: {fault}; it comes with torch's CUDA builds for Linux"
    return None


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton(Backend):
    name = "triton"

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None) -> str | None:
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"it runs on CUDA devices only; got {device}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it supports floating-point dtypes only; got {dtype}"
        return _missing()

    def fault(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None, units: int) -> Failure | None:
        """As in `Backend`: they are compared with another backend's."""
        if device.type != "cuda":
            return None
        from rnnorm.ops import triton_check

        return triton_check.reason(device, dtype, spec, units)

    def saved_like(self, operands: Operands, spec: CallSpec) -> list[Tensor]:
        from rnnorm.ops import triton_steps

        return triton_steps.slabs(operands, spec, save=True)

    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        from rnnorm.ops import triton_steps

        with torch.cuda.device_of(operands.x):
            return triton_steps.forward(operands, spec, save)

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: CallSpec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        from rnnorm.ops import triton_steps

        with torch.cuda.device_of(operands.x):
            return triton_steps.backward(grads, operands, saved, spec, need_input, need_weights)

    def online_norm(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        from rnnorm.ops import triton_online_norm

        with torch.cuda.device_of(x):
            return triton_online_norm.online_norm(x, *rest)

    def online_norm_backward(self, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        from rnnorm.ops import triton_online_norm

        with torch.cuda.device_of(grad):
            return triton_online_norm.online_norm_backward(grad, *rest)
