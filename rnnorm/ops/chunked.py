"""The linear decoder and its cross entropy in torch's own operations, chunk by chunk, on any device."""

import torch
from torch import Tensor

# The least and the most rows of a chunk on the CPU: enough for the speed of the products. Between, rows / rows of a
# chunk: a value of a chunk takes 6 bytes in half precision and one of the logits 2, so that chunks of 1/12 would take a
# quarter of their memory; it is less from 512 rows on.
_ROWS = (64, 256)
_PART = 16
# Logits of a chunk on other devices, where a launch costs as much as a product of some hundred rows: 128 MiB in
# float32, in half precision another 64 MiB, of the rounded ones.
_LOGITS = 2**25
_LEAST_ROWS = 32


def _place(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else "cuda"


def _chunk(rows: int, classes: int, place: str) -> int:
    """Rows of a chunk."""
    if place == "cpu":
        least, most = _ROWS
        return min(most, max(least, rows // _PART))
    return max(_LEAST_ROWS, _LOGITS // classes)


def _counted(
    hidden: Tensor, targets: Tensor, weights: Tensor | None, place: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The rows that count, their targets and weights, and their numbers. Elsewhere than on the CPU all rows, of zeros
    where they do not count: to number them would wait for the device."""
    if weights is None:
        return hidden, targets, None, None
    if place == "cpu":
        keep = weights.nonzero().squeeze(1)
        return hidden[keep], targets[keep], weights[keep], keep
    off = weights == 0
    return hidden.masked_fill(off.unsqueeze(1), 0.0), targets.masked_fill(off, 0), weights, None


def _product(one: Tensor, other: Tensor, wide: torch.dtype) -> Tensor:
    """`one @ other` in `wide`, on CUDA not rounded to a narrower dtype before; elsewhere torch has no such product."""
    if one.is_cuda and one.dtype != wide and torch.version.hip is None:
        return torch.mm(one, other, out_dtype=wide)
    return (one @ other).to(wide)


def _plus(total: Tensor | None, one: Tensor, other: Tensor, wide: torch.dtype) -> Tensor:
    """`total + one @ other` in `wide`, the total changed in place."""
    if total is None:
        return _product(one, other, wide)
    return total.addmm_(one, other) if one.dtype == wide else total.add_(_product(one, other, wide))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    if bias is not None and rows.dtype == wide:
        return torch.addmm(bias.to(wide), rows, weight.t())
    logits = _product(rows, weight.t(), wide)
    return logits if bias is None else logits.add_(bias)


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
    wide, place = torch.float64 if dtype == torch.float64 else torch.float32, _place(hidden)
    rows, wanted, own, keep = _counted(hidden, targets, weights, place)
    factors = rows.new_ones(len(rows), dtype=wide) if own is None else own.to(wide)
    narrow_weight = weight.to(dtype)
    counted = hidden.new_empty(len(rows), dtype=torch.float64)
    grad_rows = torch.empty_like(rows, dtype=wide) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] and not len(rows) else hidden.new_empty(0)
    grad_bias = hidden.new_zeros(len(weight), dtype=wide) if needs[2] else hidden.new_empty(0)
    chunk = _chunk(len(rows), len(weight), place)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        narrow, index = rows[part].to(dtype), wanted[part, None]
        logits = _logits(narrow, narrow_weight, bias, wide)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, index)
        sums = logits.exp_().sum(1, keepdim=True)
        counted[part] = (sums.log() - chosen).squeeze(1)
        # The gradient of the logits is what follows / sums; dividing the narrow factors saves a pass over [R, V].
        # Before a rounding to half precision it is divided itself: sums reach V, which may be beyond float16.
        gradient = logits.scatter_add_(1, index, -sums)
        scale = factors[part, None] / sums
        if dtype != wide:
            gradient, scale = gradient.div_(sums), factors[part, None]
        rounded = gradient.to(dtype)
        if grad_rows is not None:
            grad_rows[part] = _product(rounded, narrow_weight, wide) * scale
        if needs[1]:
            grad_weight = _plus(grad_weight if start else None, rounded.t(), (narrow * scale).to(dtype), wide)
        if needs[2]:
            grad_bias.addmv_(gradient.t(), scale.squeeze(1))
        del logits, gradient, rounded  # before the next chunk allocates its own
    grad_hidden = hidden.new_empty(0) if grad_rows is None else grad_rows.to(hidden.dtype)
    if keep is not None:
        counted = hidden.new_zeros(len(hidden), dtype=torch.float64).index_copy_(0, keep, counted)
        if grad_rows is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, keep, grad_hidden)
    elif weights is not None:
        counted = counted.masked_fill(weights == 0, 0.0)
    return counted, grad_hidden, grad_weight, grad_bias
