"""The linear decoder and its cross entropy in torch's own operations, chunk by chunk, on any device."""

import torch
from torch import Tensor

_LEAST_ROWS, _MOST_ROWS = (
    64,
    256,
)  # of a chunk: full speed of the products, and memory below 1/8 of the logits of 1,000 rows


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats [M] and the gradients of their weighted sum with respect to `hidden`, `weight`, `bias`; empty if not needed.

    `dtype` is that of the products; `needs` says which gradients are needed.
    """
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
        del product, logits, gradient  # before the next chunk allocates its own
    nats = hidden.new_zeros(len(hidden), dtype=torch.float64)
    nats[keep] = counted
    grad_hidden = hidden.new_empty(0)
    if grad_rows is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[keep] = grad_rows.to(hidden.dtype)
    return nats, grad_hidden, grad_weight, grad_bias
