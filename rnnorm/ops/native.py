"""The C++ backend on the CPU: one call of `rnnorm_cpu::forward` or `backward` for a whole sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnorm.norms import CLAMP_LIMIT, SCALE_EPS
from rnnorm.ops.call import DIFFERENTIABLE, Operands, Results, Spec, statistics_dtype

# False sends every product through BLAS: the path of processors without the micro-kernel, for tests.
use_micro_kernel = True
# Threads of a call; 0 leaves it to the kernel, up to torch.get_num_threads().
threads = 0


def _ready(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and in the dtype that the kernels compute in; counts stay integers."""
    if tensor is None:
        return None
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _ready_operands(operands: Operands) -> list[Tensor | None]:
    dtype = statistics_dtype(operands.x.dtype)
    return [_ready(tensor, dtype) for tensor in operands]


def _constants(spec: Spec) -> list[float]:
    return [spec.eps, spec.alpha_fwd, spec.alpha_bwd, SCALE_EPS, CLAMP_LIMIT]


class Native:
    name = "cpu"
    differentiable = False

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: Spec | None) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it computes in floating point, not in {dtype}"
        # Not at import: nothing is compiled, or looked for, before it is needed.
        from rnnorm.ops import build

        return build.load()

    def saved_like(self, operands: Operands, spec: Spec) -> list[Tensor]:
        x, G = operands.x, spec.gates
        S, C, P = x.size(0) * x.size(1), operands.weight_ih.size(0), operands.h.size(1)
        H = C // G
        normed, online = spec.norm != "none", spec.norm == "online"
        scaled = normed and spec.guard == "scale"
        widths = {
            "hidden": P,
            "cell_state": H if spec.cell == "lstm" else 0,
            "new_part": H if spec.cell == "gru" else 0,
            "y": C,
            "rstd": (C if online else G) if normed else 0,
            "scale": G if scaled else 0,
            "cell_y": H if spec.cell_norm else 0,
            "cell_rstd": (H if online else 1) if spec.cell_norm else 0,
            "cell_scale": 1 if spec.cell_norm and scaled else 0,
        }
        dtype = statistics_dtype(x.dtype)
        return [x.new_empty((S, width) if width else (0,), dtype=dtype) for width in widths.values()]

    def forward(self, operands: Operands, spec: Spec) -> Results:
        found = torch.ops.rnnorm_cpu.forward(
            _ready_operands(operands),
            *(spec.cell, spec.norm, spec.guard, _constants(spec)),
            *(spec.cell_norm, spec.training, spec.reverse, spec.save, use_micro_kernel, threads),
        )
        dtype = operands.x.dtype
        y, h, c = (state.to(dtype) for state in found[:3])
        mean, var, cell_mean, cell_var = (s if spec.controlled else s.new_empty(0) for s in found[3:7])
        return Results(y, h, c, mean, var, cell_mean, cell_var, found[7:])

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: Spec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        dtype = statistics_dtype(operands.x.dtype)
        ready = _ready_operands(operands)
        found = torch.ops.rnnorm_cpu.backward(
            [_ready(grad, dtype) for grad in grads],
            ready,
            list(saved),
            *(spec.cell, spec.norm, spec.guard, _constants(spec)),
            *(spec.cell_norm, spec.training, spec.reverse, use_micro_kernel, threads, need_input, need_weights),
        )
        for name in ("norm_u", "norm_v", "cell_norm_u", "cell_norm_v"):
            buffer, moved = getattr(operands, name), ready[Operands._fields.index(name)]
            if buffer is not None and moved is not None and moved.data_ptr() != buffer.data_ptr():
                buffer.copy_(moved)
        return [
            grad.to(operand.dtype) if operand is not None and (grad.numel() or not operand.numel()) else None
            for grad, operand in zip(found, operands[: len(DIFFERENTIABLE)], strict=True)
        ]
