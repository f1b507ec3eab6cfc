"""The operator `rnnorm::online_norm`: online normalization of C independent channels, the affine map and the guard.

Nothing is kept for the backward pass but the input, the parameters and the statistics before the call: a backend
repeats the recurrence of the statistics beside that of the control process, which sees the samples in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm import _torch
from rnnorm.norms import Constants
from rnnorm.ops import library
from rnnorm.ops.channels import like
from rnnorm.ops.registry import by_name, choose

_TENSORS = "Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var"


def _widened(weight: Tensor | None, bias: Tensor | None, mean: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The affine map in the dtype of the statistics; None unless both are given."""
    if weight is None or bias is None:
        return None, None
    return weight.to(mean.dtype), bias.to(mean.dtype)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    guard: str,
    constants: Sequence[float],
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    library.refuse_recomputation()
    backend = choose(wanted, x.device, x.dtype, None, x.size(1))
    return backend.online_norm(x, *_widened(weight, bias, mean), mean, var, guard, constants)


def _operator(*args: Any) -> tuple[Tensor, ...]:
    """The results, and copies of the statistics before the call, which the module moves before the backward pass.

    Results of the same operator: a compiler would make the copies of another one in the backward pass.
    """
    mean, var = args[3:5]
    return *_forward(*args), mean.clone(), var.clone()


def _fake(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return like(x), *(torch.empty_like(of) for of in (mean, var, mean, var))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    guard: str,
    constants: Sequence[float],
    wanted: str,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose(wanted, x.device, x.dtype, None, x.size(1))
    tensors = grad.to(x.dtype), x, *_widened(weight, bias, mean), mean, var, u, v
    return backend.online_norm_backward(*tensors, guard, constants, need_input)


def _backward_fake(grad: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, *args: Any) -> tuple[Tensor, ...]:
    affine = (torch.empty_like(mean) if weight is not None else mean.new_empty(0) for _ in range(2))
    return like(x) if args[-1] else x.new_empty(0), *affine


class _OnlineNorm(torch.autograd.Function):
    """A recorded call, whose backward pass is the control process.

    The arguments without gradients are one, `rest`: each one takes time in every call. `unobserved`: no dispatcher.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: Sequence[Any], unobserved: bool
    ) -> tuple[Tensor, ...]:
        if unobserved:
            results = _operator(x, weight, bias, *rest)
        else:
            with _torch.below_autograd():
                results = online_norm(x, weight, bias, *rest)
        ctx.rest = rest[2:]
        ctx.save_for_backward(x, weight, bias, *results[3:])
        ctx.unobserved, ctx.spent = unobserved, False
        ctx.set_materialize_grads(False)
        results = results[:3] if unobserved else results  # each one takes time
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        need_input, *need_affine = ctx.needs_input_grad[:3]
        repeatable = not need_input or Constants(*ctx.rest[3]).alpha_bwd == 1
        library.begin_backward(ctx, (grad,), controlled=need_input, repeatable=repeatable)
        tensors = ctx.saved_tensors  # read once: non-reentrant checkpointing unpacks at each read
        if grad is None:
            grad = torch.zeros_like(tensors[0])
        unobserved = ctx.unobserved and library.is_unobserved((grad,))
        run: Any = _backward if unobserved else online_norm_backward
        dx, *affine = run(grad, *tensors, *ctx.rest, need_input)
        gradients = [
            of.to(parameter.dtype) if need else None
            for of, parameter, need in zip(affine, tensors[1:3], need_affine, strict=True)
        ]
        return dx if need_input else None, *gradients, None, None


def _recorded(*args: Any) -> Any:
    library.refuse_transforms(args[:3])
    if library.needs_gradient(args[:3]):
        return _OnlineNorm.apply(*args[:3], args[3:], False)
    with _torch.below_autograd():
        return online_norm(*args)


# Not only what the forward pass reads: its gradient needs u and v, and its choice of a backend.
_OPTIONS = "str guard, float[] constants, str wanted"
online_norm = library.operator(
    "online_norm",
    f"({_TENSORS}, Tensor u, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator,
    _fake,
    _recorded,
)
online_norm_backward = library.operator(
    "online_norm_backward",
    f"(Tensor grad, {_TENSORS}, Tensor(a!) u, Tensor(b!) v, {_OPTIONS}, bool need_input) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def run_online_norm(*args: Any) -> Tensor:
    """Call `rnnorm::online_norm`, without the dispatcher if nothing observes the call, and move `mean` and `var`."""
    x, wanted = args[0], args[-1]
    library.refuse_transforms(args[:3])
    if wanted != "auto" and by_name(wanted).differentiable:
        library.refuse_recomputation()
        y, *moved = choose(wanted, x.device, x.dtype, None).online_norm(*args[:-1])
    elif not library.is_unobserved(args[:7]):
        y, *moved = online_norm(*args)[:3]
    elif library.needs_gradient(args[:3]):
        library.refuse_recomputation()
        backend = choose(wanted, x.device, x.dtype, None, x.size(1))
        if backend.online_norm_recorded is not None:
            return backend.online_norm_recorded(*args[:-1])
        y, *moved = _OnlineNorm.apply(*args[:3], args[3:], True)[:3]
    else:
        y, *moved = _forward(*args)
    for held, new in zip(args[3:5], moved, strict=True):
        held.copy_(new.detach())
    return y
