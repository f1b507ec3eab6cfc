"""The operator `rnnorm::online_norm`: online normalization of C independent channels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm import _torch
from rnnorm.norms import Constants
from rnnorm.ops import library, running_stats


def _forward(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    library.refuse_recomputation()
    with library.without_autocast(x.device.type):
        y, rstd, *after = running_stats.online_norm(x.to(mean.dtype), mean, var, Constants(*constants))
        new_mean, new_var = library.finite_or([mean, var], after)
        return y.contiguous(), rstd, new_mean, new_var


def _fake(x: Tensor, mean: Tensor, var: Tensor, u: Any, v: Any, constants: Any) -> tuple[Tensor, ...]:
    y = torch.empty(x.shape, dtype=mean.dtype, device=x.device)
    return y, y.new_empty(x.shape[:2]), torch.empty_like(mean), torch.empty_like(var)


def _backward(grad: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, constants: Sequence[float]) -> Tensor:
    with library.without_autocast(grad.device.type), library.kept_finite((u, v)):
        dx = running_stats.online_norm_backward(grad.to(y.dtype), y, rstd, u, v, Constants(*constants))
        return dx.contiguous()


def _backward_fake(grad: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, constants: Any) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


class _OnlineNorm(torch.autograd.Function):
    """A recorded call, whose backward pass is the control process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        with _torch.below_autograd():
            y, rstd, mean, var = online_norm(x, *args)
        _mean, _var, *ctx.control, constants = args
        ctx.constants = Constants(*constants)
        ctx.dtype = x.dtype
        ctx.save_for_backward(y, rstd)
        ctx.spent = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd, mean, var)
        return y, rstd, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        library.begin_backward(ctx, (grad,), controlled=True, repeatable=ctx.constants.alpha_bwd == 1)
        y, rstd = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(y)
        dx = online_norm_backward(grad, y, rstd, *ctx.control, ctx.constants)
        return dx.to(ctx.dtype), *([None] * 5)


def _recorded(x: Tensor, *args: Any) -> Any:
    library.refuse_transforms([x])
    if library.needs_gradient([x]):
        return _OnlineNorm.apply(x, *args)
    with _torch.below_autograd():
        return online_norm(x, *args)


online_norm = library.operator(
    "online_norm",
    "(Tensor x, Tensor mean, Tensor var, Tensor u, Tensor v, float[] constants) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _recorded,
)
online_norm_backward = library.operator(
    "online_norm_backward",
    "(Tensor grad, Tensor y, Tensor rstd, Tensor(a!) u, Tensor(b!) v, float[] constants) -> Tensor",
    _backward,
    _backward_fake,
)
