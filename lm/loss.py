"""The decoder and its cross entropy as one function that never holds all the logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LEAST_ROWS, _MOST_ROWS = (
    128,
    256,
)  # a chunk: products of full speed, and at most 1/8 of the logits of 1,024 rows


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of a linear decoder, with M rows, E units and V classes.

    `sum_m mask[m] * -log_softmax(hidden[m] @ weight.T + bias)[targets[m]]`, computed chunk by chunk; where
    gradients are wanted they are formed in the forward pass, so no logits are kept.

    Arguments:
        hidden: [M, E].
        weight: [V, E], tied to an embedding or not.
        bias: [V] or None.
        targets: [M] int64 in 0 … V - 1.
        mask: [M] bool, true where a row counts, or None for all; other rows cost nothing.

    Returns:
        The sum in nats, a float64 scalar, and the number of rows that counted.

    Products run in the dtype of `hidden`, or of autocast where that is on; log-softmax, sums and gradients
    of the weights accumulate in float32 (float64 for float64 input).

    Raises:
        ValueError: a wrong shape, or a target outside 0 … V - 1.
        RuntimeError: in backward with create_graph=True.
    """
    _check(hidden, weight, bias, targets, mask)
    if mask is not None:
        hidden, targets = hidden[mask], targets[mask]
    total = _LinearCrossEntropy.apply(hidden, weight, bias, targets, _product_dtype(hidden), torch.is_grad_enabled())
    return total, targets.numel()


@torch.no_grad()
def token_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row: [M] in nats, float32 (float64 for float64 input).

    The same arguments, arithmetic and errors as `linear_cross_entropy`.
    """
    _check(hidden, weight, bias, targets, None)
    parts = [nll for *_, nll in _score(hidden, weight, bias, targets, _product_dtype(hidden))]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None) -> None:
    rows = hidden.shape[:1]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [M, E] and weight [V, E]; {list(hidden.shape)} and {list(weight.shape)} came")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}]; {list(bias.shape)} came")
    if targets.shape != rows or (mask is not None and mask.shape != rows):
        raise ValueError(f"targets and mask must be [M] = [{rows[0]}]; {list(targets.shape)} came for targets")
    if targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets must lie in 0 … {weight.shape[0] - 1}; {low} … {high} came")


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each chunk: its rows, `exp(logits - max)` [R, V], its sums over V [R, 1], and the nats [R]."""
    columns = weight.to(dtype).t()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chunk = min(_MOST_ROWS, max(_LEAST_ROWS, len(targets) // 8))
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = hidden[rows].to(dtype)
            logits = narrow @ columns if bias is None else torch.addmm(bias.to(dtype), narrow, columns)
        logits = logits.to(wide)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, targets[rows, None])
        sums = logits.exp_().sum(1, keepdim=True)
        yield rows, logits, sums, (sums.log() - chosen).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs[2] else None
        narrow_weight = weight.to(dtype)
        for rows, grad, sums, nll in _score(hidden, weight, bias, targets, dtype):
            total += nll.sum(dtype=torch.float64)
            if not any(needs):
                continue
            # The gradient of the logits is grad / sums; dividing the narrow factors saves a pass over [R, V].
            grad.scatter_add_(1, targets[rows, None], -sums)
            narrow_grad = grad.to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                if grad_hidden is not None:
                    grad_hidden[rows] = (narrow_grad @ narrow_weight).to(wide) / sums
                if grad_weight is not None:
                    scaled = (hidden[rows] / sums).to(dtype)
                    if dtype == wide:
                        grad_weight.addmm_(narrow_grad.t(), scaled)
                    else:
                        grad_weight += narrow_grad.t() @ scaled
                if grad_bias is not None:
                    grad_bias.addmv_(grad.t(), sums.squeeze(1).reciprocal())
        ctx.needs = needs
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # that is create_graph=True; what was formed in the forward has no graph
            raise RuntimeError("linear_cross_entropy has first derivatives only; do without create_graph=True")
        (grad_total,) = grad_outputs
        grads = (
            None if grad is None else (grad * grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None
