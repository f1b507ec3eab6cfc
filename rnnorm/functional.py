"""Functions: the linear decoder and its cross entropy as one, without ever holding all the logits."""

import torch
from torch import Tensor

from rnnorm import ops


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of a linear decoder, with M rows, E units and V classes.

    `sum_m mask[m] * -log_softmax(hidden[m] @ weight.T + bias)[targets[m]]`, block by block: what is held beyond
    inputs and gradients stays below an eighth of the logits [M, V] from some hundred rows on. Where gradients are
    wanted they are formed in the forward pass. On the CPU one C++ operator does it all; elsewhere, and under
    autocast, torch's own operations on chunks of rows.

    Arguments:
        hidden: [M, E].
        weight: [V, E], tied to an embedding or not.
        bias: [V] or None.
        targets: [M] int64 in 0 … V - 1.
        mask: [M] bool, true where a row counts, or floating-point weights of the rows (a constant: they get no
            gradient), or None for all; rows of weight 0 cost nothing, and their targets may be anything.

    Returns:
        The sum in nats, a float64 scalar, and the number of rows that counted.

    Products run in the dtype of `hidden`, or of autocast where that is on; log-softmax, sums and gradients of the
    weights accumulate in float32 (float64 for float64 input), the sum of nats in float64.

    Raises:
        ValueError: a wrong shape, or a counted target outside 0 … V - 1.
        RuntimeError: in backward with create_graph=True.
    """
    weights = None if mask is None else mask.to(hidden.dtype)
    total = _call(hidden, weight, bias, targets, weights)[0]
    count = targets.numel() if mask is None else int(torch.count_nonzero(mask))
    return total, count


def token_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row: [M] in nats, float64, without gradient.

    The same arguments, arithmetic and errors as `linear_cross_entropy`.
    """
    with torch.no_grad():
        return _call(hidden, weight, bias, targets, None)[1]


def _call(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, bias, targets, weights)
    return ops.linear_cross_entropy(hidden, weight, bias, targets, weights, _product_dtype(hidden))


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None) -> None:
    rows = hidden.shape[:1]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [M, E] and weight [V, E]; {list(hidden.shape)} and {list(weight.shape)} came")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}]; {list(bias.shape)} came")
    if targets.shape != rows or (weights is not None and weights.shape != rows):
        came = f"{list(targets.shape)} and {None if weights is None else list(weights.shape)} came"
        raise ValueError(f"targets and mask must be [M] = [{rows[0]}]; {came}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; {targets.dtype} came")


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
