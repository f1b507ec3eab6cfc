"""The operator `rnnorm::linear_cross_entropy`: a linear decoder, its cross entropy and their gradients in one pass.

Gradients are formed in the forward, where the logits are at hand block by block; the backward only scales them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnorm.ops import native

_LEAST_ROWS, _MOST_ROWS = 64, 256  # a chunk: products of full speed, and below 1/8 of the logits of 1,000 rows

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> Found:
    """The definition in torch's own operations, chunk by chunk, on any device."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keep = slice(None) if weights is None else weights.nonzero().squeeze(1)
    rows, wanted = hidden[keep], targets[keep]
    factors = rows.new_ones(len(rows), dtype=wide) if weights is None else weights[keep].to(wide)
    narrow_weight = weight.to(dtype)
    counted = hidden.new_empty(len(rows), dtype=torch.float64)
    grad_rows = torch.empty_like(rows, dtype=wide) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else hidden.new_empty(0)
    grad_bias = hidden.new_zeros(len(weight), dtype=wide) if needs[2] else hidden.new_empty(0)
    chunk = min(_MOST_ROWS, max(_LEAST_ROWS, len(rows) // 12))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        narrow, index = rows[part].to(dtype), wanted[part, None]
        product = narrow @ narrow_weight.t() if bias is None else torch.addmm(bias.to(dtype), narrow, narrow_weight.t())
        logits = product.to(wide)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, index)
        sums = logits.exp_().sum(1, keepdim=True)
        counted[part] = (sums.log() - chosen).squeeze(1)
        # The gradient of the logits is what follows / sums; dividing the narrow factors saves a pass over [R, V].
        gradient = logits.scatter_add_(1, index, -sums)
        scale = factors[part, None] / sums
        if grad_rows is not None:
            grad_rows[part] = (gradient.to(dtype) @ narrow_weight).to(wide) * scale
        if needs[1]:
            grad_weight += gradient.to(dtype).t() @ (narrow * scale).to(dtype)
        if needs[2]:
            grad_bias.addmv_(gradient.t(), scale.squeeze(1))
        del product, logits, gradient  # before the next chunk's, not after
    nats = hidden.new_zeros(len(hidden), dtype=torch.float64)
    nats[keep] = counted
    grad_hidden = hidden.new_empty(0)
    if grad_rows is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[keep] = grad_rows.to(hidden.dtype)
    return nats, grad_hidden, grad_weight, grad_bias


def _native(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> Found:
    def ready(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).contiguous()

    return torch.ops.rnnorm_cpu.linear_cross_entropy(
        *(ready(hidden), ready(weight), ready(bias), targets.contiguous(), ready(weights)),
        *(*needs, native.use_micro_kernel, native.threads),
    )


_FORMS: dict[str, Callable[..., Found]] = {"cpu": _native, "reference": _chunked}


def form(hidden: Tensor, dtype: torch.dtype) -> str:
    """`"cpu"`, the fused C++ form, where it can run; else `"reference"`, torch's own operations in chunks."""
    if hidden.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return "reference"
    return "cpu" if native.Native().why_not(hidden.device, dtype, None) is None else "reference"


# As with the registry's choice: a constant for torch.compile.
form._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_targets(targets: Tensor, weights: Tensor | None, V: int) -> None:
    counted = targets if weights is None else targets[weights != 0]
    if counted.numel():
        low, high = (int(bound) for bound in counted.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"targets must lie in 0 … {V - 1}; {low} … {high} came")


@torch.library.custom_op("rnnorm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    form: str,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum of nats, nats [M], and the gradients of the sum; what is not needed is empty."""
    _check_targets(targets, weights, len(weight))
    needs = (need_hidden, need_weight, need_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        nats, *grads = _FORMS[form](hidden, weight, bias, targets, weights, dtype, needs)
    total = nats.sum() if weights is None else nats @ weights.to(nats.dtype)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return total, nats, grads[0].to(hidden.dtype), grads[1].to(weight.dtype), grads[2].to(bias_dtype)


@linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Any, form: str, dtype: Any, *needs: bool):
    nats = hidden.new_empty(len(hidden), dtype=torch.float64)
    inputs = (hidden, weight, hidden.new_empty(len(weight)) if bias is None else bias)
    grads = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    )
    return nats.new_empty(()), nats, *grads


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.inputs = inputs[-3:], len(inputs)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_total: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # that is create_graph=True; what was formed in the forward has no graph
        raise RuntimeError("linear_cross_entropy has first derivatives only; call backward without create_graph=True")
    grads: list[Tensor | None] = [None] * ctx.inputs
    if grad_total is not None:
        for k, (grad, need) in enumerate(zip(ctx.saved_tensors, ctx.needs, strict=True)):
            grads[k] = grad * grad_total.to(grad.dtype) if need else None
    return tuple(grads)


linear_cross_entropy.register_autograd(_gradient, setup_context=_context)
