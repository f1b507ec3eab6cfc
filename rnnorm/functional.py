"""Functions: a linear decoder fused with its cross entropy, without storing all logits."""

import torch
from torch import Tensor

from rnnorm import ops
from rnnorm._torch import autocast_dtype


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of a linear decoder, for M rows, E units and V classes.

    `sum_m mask[m] * -log_softmax(hidden[m] @ weight.T + bias)[targets[m]]`, block by block. Gradients are computed in
    the forward pass. On the CPU one C++ operator computes all: from some hundred rows on, its memory beyond inputs and
    gradients stays below an eighth of the logits [M, V], in bfloat16 plus two rounded copies of `weight`. Elsewhere
    torch's own operators run on chunks of rows: on the CPU in less than a quarter of the logits from 1,000 rows on, on
    other devices of some 32 million logits each, 128 MiB in float32 and 192 MiB in half precision, where `weight` takes
    its size again, and twice as much in float32 for its gradient from the second chunk on.

    Arguments:
        hidden: [M, E].
        weight: [V, E], may be tied to an embedding.
        bias: [V] or None.
        targets: [M] int64 in 0 … V - 1.
        mask: [M] bool, true for the rows to count, or floating-point weights of the rows, which get no gradient; all
            rows if None. Rows of weight 0 are skipped, and their targets may be anything.

    Returns:
        The sum in nats, a float64 scalar, and the number of rows with a weight other than 0.

    Products run in the dtype of `hidden`, or in autocast's; log-softmax, sums and gradients of the weights accumulate
    in float32 (float64 for float64 input), the sum of nats in float64. In float16 gradients are rounded before a loss
    scale multiplies them: keep the rows' weights near 1, and divide the sum instead.

    Raises:
        ValueError: wrong shape or dtype, or the target of a counted row outside 0 … V - 1. On a GPU, where looking
            would wait for it, the device asserts that instead, as in torch's own loss.
        RuntimeError: backward with create_graph=True.
    """
    total = summed_nll(hidden, weight, bias, targets, mask)
    return total, targets.numel() if mask is None else int(torch.count_nonzero(mask))


def summed_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The sum of `linear_cross_entropy` alone: to count the rows of a mask, that one waits for a GPU.

    Arguments, arithmetic and errors as there.
    """
    weights = None if mask is None else mask.to(ops.statistics_dtype(hidden.dtype))
    return _call(hidden, weight, bias, targets, weights)[0]


def token_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row, `-log_softmax(hidden[m] @ weight.T + bias)[targets[m]]`, without gradient.

    Returns [M] in nats, float64. Arguments, arithmetic and errors as in `linear_cross_entropy`.
    """
    with torch.no_grad():
        return _call(hidden, weight, bias, targets, None)[1]


def _call(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, bias, targets, weights)
    return ops.linear_cross_entropy(hidden, weight, bias, targets, weights, autocast_dtype(hidden) or hidden.dtype)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None) -> None:
    rows = hidden.shape[:1]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [M, E] and weight [V, E]; got {list(hidden.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}]; got {list(bias.shape)}")
    if targets.shape != rows or (weights is not None and weights.shape != rows):
        found = f"{list(targets.shape)} and {None if weights is None else list(weights.shape)}"
        raise ValueError(f"targets and mask must be [M] = [{rows[0]}]; got {found}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; got {targets.dtype}; convert them with .long()")
