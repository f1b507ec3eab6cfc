"""The C++ backend on the CPU: one call of `rnnorm_cpu::forward` or `backward` for a whole sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm import _torch
from rnnorm.ops.backend import Backend
from rnnorm.ops.call import DIFFERENTIABLE, CallSpec, Operands, Results, statistics_dtype

# The operands in C++: all but the last differentiable one, as the registry gives calls with a Mogrifier to others.
_APART = DIFFERENTIABLE.index("weight_mogrify")
OPERANDS = Operands._fields[:_APART] + Operands._fields[_APART + 1 :]

# False: all products by BLAS, as on processors without the micro-kernel; for tests.
use_micro_kernel = True
# Threads of a call; 0: the kernel chooses, up to torch.get_num_threads().
threads = 0


def in_cpp(operands: Operands) -> tuple[Tensor | None, ...]:
    """The values of `OPERANDS`."""
    return operands[:_APART] + operands[_APART + 1 :]


def widths(operands: Operands, spec: CallSpec) -> dict[str, int]:
    """Columns of each tensor kept of all samples, by its name in C++ and in that order; 0 if it does not apply."""
    G, C, P = spec.gates, operands.weight_ih.size(0), operands.h.size(1)
    H = C // G
    normed, online, scaled = spec.norm != "none", spec.norm == "online", spec.guard == "scale"
    return {
        "hidden": P,
        "cell_state": H if "c" in spec.declared.states else 0,
        "cell_new": H if operands.zoneout_c is not None else 0,
        "apart": H if spec.declared.apart else 0,
        "y": C,
        "rstd": (C if online else G) if normed else 0,
        "scale": G if scaled else 0,
        "cell_y": H if spec.cell_norm else 0,
        "cell_rstd": (H if online else 1) if spec.cell_norm else 0,
        "cell_scale": 1 if spec.cell_norm and scaled else 0,
    }


def why_not_bfloat16() -> str | None:
    """Why products in bfloat16 run in float32 here, None if they do not."""
    from rnnorm.ops import build

    reason = build.load()
    if reason is None and "bfloat16" not in torch.ops.rnnorm_cpu.micro_kernels():
        if not _torch.may_use_onednn():
            return "torch's oneDNN, which computes products in bfloat16, is switched off (torch.backends.mkldnn)"
        return "the processor, or torch's oneDNN, has no instructions for products in bfloat16 (AVX512-BF16)"
    return reason


class Native(Backend):
    name = "cpu"
    keeps_finite = True
    wide_weights = True

    @property
    def losses(self) -> tuple[torch.dtype, ...]:
        half = use_micro_kernel and why_not_bfloat16() is None
        return (torch.float32, torch.float64, *([torch.bfloat16] if half else []))

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU only; got {device}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it supports floating-point dtypes only; got {dtype}"
        # Not at import: the compiler runs only when it is needed.
        from rnnorm.ops import build

        return build.load()

    def saved_like(self, operands: Operands, spec: CallSpec) -> list[Tensor]:
        x = operands.x
        S, dtype = x.size(0) * x.size(1), statistics_dtype(x.dtype)
        kept = [x.new_empty((S, width) if width else (0,), dtype=dtype) for width in widths(operands, spec).values()]
        return [*kept, x.new_empty(1, dtype=torch.int64)]  # partition: the number of threads

    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        found = torch.ops.rnnorm_cpu.forward(
            in_cpp(operands),
            *(spec.cell, spec.norm, spec.guard, spec.constants),
            *(spec.cell_norm, spec.training, spec.reverse, save, use_micro_kernel, threads),
        )
        return Results._make(found[:7]), found[7:]

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: CallSpec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        found = torch.ops.rnnorm_cpu.backward(
            grads,
            in_cpp(operands),
            saved,
            *(spec.cell, spec.norm, spec.guard, spec.constants),
            *(spec.cell_norm, spec.training, spec.reverse, use_micro_kernel, threads, need_input, need_weights),
        )
        return [
            grad if operand is not None and (grad.numel() or not operand.numel()) else None
            for grad, operand in zip(found, operands[:_APART], strict=True)
        ] + [None]

    def online_norm(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.rnnorm_cpu.online_norm(*args, threads)

    def online_norm_backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.rnnorm_cpu.online_norm_backward(*args, threads)

    def online_norm_recorded(self, *args: Any) -> Tensor:
        return torch.ops.rnnorm_cpu.online_norm_recorded(*args, threads)

    def linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
        needs: Sequence[bool],
    ) -> Sequence[Tensor]:
        wide = statistics_dtype(dtype)

        def ready(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(wide).contiguous()

        return torch.ops.rnnorm_cpu.linear_cross_entropy(
            *(ready(hidden), ready(weight), ready(bias), targets.contiguous(), ready(weights)),
            *(*needs, use_micro_kernel, dtype == torch.bfloat16, threads),
        )
