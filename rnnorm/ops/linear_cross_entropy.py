"""The operator `rnnorm::linear_cross_entropy`: a linear decoder, its cross entropy and their gradients in one pass.

The forward pass computes the gradients, while it has the logits block by block; the backward pass only scales them.
"""

from typing import Any

import torch
from torch import Tensor

from rnnorm import _torch
from rnnorm.ops import library
from rnnorm.ops.call import statistics_dtype
from rnnorm.ops.registry import choose_loss

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? weights"


def _assert_in_range(targets: Tensor, weights: Tensor | None, V: int) -> None:
    inside = (targets >= 0) & (targets < V)
    if weights is not None:
        inside |= weights == 0
    _torch.assert_on_device(inside.all(), f"targets must lie in 0..V-1 = 0..{V - 1}; mask the rows that do not count")


def _check_targets(targets: Tensor, weights: Tensor | None, V: int) -> None:
    if targets.is_cuda:  # on the device, as torch's cross entropy does: to read the bounds back would wait for it
        _assert_in_range(targets, weights, V)
        return
    counted = targets if weights is None else targets[weights != 0]
    if counted.numel():
        low, high = (int(bound) for bound in counted.aminmax())
        if low < 0 or high >= V:
            raise ValueError(
                f"targets must lie in 0..V-1 = 0..{V - 1}; got {low}..{high}; mask the rows that do not count"
            )


def _saving(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    *needs: bool,
) -> tuple[Tensor, ...]:
    _check_targets(targets, weights, len(weight))
    backend = choose_loss(hidden.device, dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        nats, *grads = backend.linear_cross_entropy(hidden, weight, bias, targets, weights, dtype, needs)
        total = nats.sum() if weights is None else nats @ weights.to(nats.dtype)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return total, nats, grads[0].to(hidden.dtype), grads[1].to(weight.dtype), grads[2].to(bias_dtype)


def _saving_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Any, dtype: Any, *needs: bool
) -> tuple[Tensor, ...]:
    nats = hidden.new_empty(len(hidden), dtype=torch.float64)
    inputs = (hidden, weight, hidden.new_empty(len(weight)) if bias is None else bias)
    grads = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    )
    return nats.new_empty(()), nats, *grads


linear_cross_entropy_saving = library.operator(
    "linear_cross_entropy_saving",
    f"({_TENSORS}, ScalarType dtype, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _saving,
    _saving_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """A recorded call: the forward pass computes the gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tensors = args[:3]
        needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
        if library.is_unobserved(args[:5]):
            total, nats, *grads = _saving(*args, *needs)
        else:
            with _torch.below_autograd():
                total, nats, *grads = linear_cross_entropy_saving(*args, *needs)
        ctx.needs, ctx.inputs, ctx.spent = needs, len(args), False
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nats)
        ctx.set_materialize_grads(False)
        return total, nats

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients of the forward pass have no graph
            raise RuntimeError(
                "double backward through linear_cross_entropy is not supported: it has first derivatives only; "
                "call backward without create_graph=True"
            )
        grads: list[Tensor | None] = [None] * ctx.inputs
        if grad_total is not None:
            for k, (grad, need) in enumerate(zip(ctx.saved_tensors, ctx.needs, strict=True)):
                # A loss scale may exceed the range of float16.
                wide = statistics_dtype(grad.dtype)
                grads[k] = (grad.to(wide) * grad_total.to(wide)).to(grad.dtype) if need else None
        return tuple(grads)


def _plain(*args: Any) -> tuple[Tensor, Tensor]:
    return _saving(*args, False, False, False)[:2]  # type: ignore[return-value]


def _plain_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _saving_fake(*args, False, False, False)[:2]  # type: ignore[return-value]


def _recorded(*args: Any) -> Any:
    library.refuse_transforms([value for value in args if isinstance(value, Tensor)])
    if library.needs_gradient(args[:3]):
        return _LinearCrossEntropy.apply(*args)
    with _torch.below_autograd():
        return linear_cross_entropy(*args)


linear_cross_entropy = library.operator(
    "linear_cross_entropy",
    f"({_TENSORS}, ScalarType dtype) -> (Tensor, Tensor)",
    _plain,
    _plain_fake,
    _recorded,
)


def run(*args: Any) -> Any:
    """Call `rnnorm::linear_cross_entropy`, without the dispatcher if nothing observes the call."""
    if not library.is_unobserved(args[:5]):
        return linear_cross_entropy(*args)
    library.refuse_transforms(args[:5])
    return _LinearCrossEntropy.apply(*args) if library.needs_gradient(args[:3]) else _plain(*args)
