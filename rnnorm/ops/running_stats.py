"""Online normalization without a loop over samples: a few tensor operations for n samples of C channels.

With samples in order, each recurrence `s <- a_k * s + b_k` is linear. Where `a` is constant (mean, variance, u) the
states before every sample are one product with a triangular matrix of decay powers; where it depends on the data
(v) they are a scan. Every function here is also valid TorchScript, and updates its states in place.
Symbols as in Chiley et al., NeurIPS 2019 (arXiv 1905.05894): alpha the decay factor, u and v the control states.
"""

import torch
from torch import Tensor

from rnnorm.norms import Constants

# Rows of one triangular product: with more, its quadratic cost exceeds that of another block.
BLOCK = 64
# Samples up to which a scan runs row by row: with more, doubling is faster in spite of its redundant work.
ROW_BY_ROW = 32


def _decay(alpha: float, n: int) -> tuple[Tensor, Tensor]:
    """For the recurrence `s <- alpha * s + b_k`: powers [m, 1] and weights [m, m], m = n + 1, such that the state
    before sample i is `powers[i] * s + weights[i] @ b`. For fewer samples, use the upper left corners."""
    i = torch.arange(n + 1, dtype=torch.float64, device="cpu").unsqueeze(1)
    exponent = i - 1 - i.t()
    return torch.pow(alpha, i), torch.where(exponent >= 0, torch.pow(alpha, exponent.clamp(min=0)), 0.0)


def forward_weights(alpha: float, n: int, like: Tensor) -> Tensor:
    """The weights for `statistics`: [m+1, m], of m = min(n, BLOCK) samples in the averages."""
    _, weights = _decay(alpha, max(1, min(n, BLOCK)))
    return ((1 - alpha) * weights[:, :-1]).to(like.device, like.dtype)


def backward_weights(alpha: float, n: int, like: Tensor) -> Tensor:
    """The weights for `controlled`: [m, 1+m], of the state u and of m = min(n, BLOCK) values in the sums."""
    powers, weights = _decay(alpha, max(1, min(n, BLOCK)))
    return torch.cat((powers, weights[:, :-1]), 1)[:-1].to(like.device, like.dtype)


def statistics(
    m: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, alpha: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Deviations `d = m - mean` and variances [n, C] for normalizing each sample; updates `mean`, `var` [C].

    `m` [n, C] are the samples' own means, `w` [n, C] their own biased variances (None: one value per channel);
    `weights` are `forward_weights`. Both states are averages `s <- s + (1 - alpha) * (b - s)`, summed relative to the
    state before the first sample: large states lose no precision, and rounded weights cause no drift.
    """
    n, block = m.size(0), weights.size(1)
    ds: list[Tensor] = []
    variances: list[Tensor] = []
    for start in range(0, max(n, 1), block):
        rows = m if n <= block else m[start : start + block]
        k = rows.size(0)
        d = rows - mean
        full = weights if k == block else weights[: k + 1, :k]
        d = torch.addmm(d, full[:k], d, alpha=-1.0)
        mean.add_(d.sum(0), alpha=1 - alpha)
        b = torch.addcmul(-var, d, d, value=alpha)
        if w is not None:
            b = b + w[start : start + block]
        variance = torch.addmm(var, full, b).clamp_(min=0.0)  # with fast decay, cancellation may give less
        var.copy_(variance[k])
        ds.append(d)
        variances.append(variance[:k])
    if len(ds) == 1:
        return ds[0], variances[0]
    return torch.cat(ds), torch.cat(variances)


def _finite(products: Tensor) -> Tensor:
    """Clamp products of factors, which overflow in a diverging control process: inf times a 0 would be NaN."""
    most = 3.4e38 if products.dtype == torch.float32 else 1.7e308
    return products.clamp(-most, most)


def _walked(a: Tensor, b: Tensor, state: Tensor, row_by_row: int = ROW_BY_ROW) -> Tensor:
    """States of `s <- a_k * s + b_k` before each of the n samples `a`, `b` [n, C] and after the last [n+1, C]."""
    n = b.size(0)
    if n <= row_by_row:
        states = [state]
        factors, terms = a.unbind(0), b.unbind(0)
        for k in range(n):
            states.append(torch.addcmul(terms[k], factors[k], states[k]))
        return torch.stack(states)
    b = torch.cat((torch.addcmul(b[:1], a[:1], state), b[1:]))
    k = 1
    while k < n:
        b = torch.cat((b[:k], torch.addcmul(b[k:], a[k:], b[:-k])))
        a = torch.cat((a[:k], _finite(a[k:] * a[:-k])))
        k *= 2
    return torch.cat((state.unsqueeze(0), b))


def scanned(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """States of `s <- a_k * s + b_k` before each of the n samples `a`, `b` [n, C]; updates `state` [C]."""
    n = b.size(0)
    pairs = n // 2
    # Joining samples in pairs leaves half as many.
    first_a, first_b, second_a = a[: 2 * pairs : 2], b[: 2 * pairs : 2], a[1::2]
    states = _walked(_finite(second_a * first_a), torch.addcmul(b[1::2], second_a, first_b), state)
    firsts = states[:pairs]
    before = torch.stack((firsts, torch.addcmul(first_b, first_a, firsts)), 1).flatten(0, 1)
    if n % 2 == 0:
        state.copy_(states[pairs])
        return before
    state.copy_(torch.addcmul(b[n - 1], a[n - 1], states[pairs]))
    return torch.cat((before, states[pairs:]))


def controlled(e: Tensor, u: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """`e - (1 - alpha) * u` [n, C] with the u before each sample of `u <- u + e - (1 - alpha) * u`; updates `u` [C].

    `weights` are `backward_weights`.
    """
    n, block = e.size(0), weights.size(0)
    blocks: list[Tensor] = []
    for start in range(0, max(n, 1), block):
        rows = e if n <= block else e[start : start + block]
        m = rows.size(0)
        full = weights if m == block else weights[:m, : m + 1]
        out = torch.addmm(rows, full, torch.cat((u.unsqueeze(0), rows)), alpha=alpha - 1)
        u.add_(out.sum(0))
        blocks.append(out)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def online_norm(x: Tensor, mean: Tensor, var: Tensor, constants: Constants) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize samples `x` [N, C, D] in order: `y` [N, C, D], reciprocal deviations [N, C], new mean and var [C]."""
    alpha = constants.alpha_fwd
    weights = forward_weights(alpha, x.size(0), mean)
    mean, var = mean.clone(), var.clone()
    m = x.mean(2)
    centred = x - m.unsqueeze(2)
    w = None if x.size(2) == 1 else (centred * centred).mean(2)
    d, variance = statistics(m, w, mean, var, alpha, weights)
    rstd = (variance + constants.eps).rsqrt()
    return (centred + d.unsqueeze(2)) * rstd.unsqueeze(2), rstd, mean, var


def online_norm_backward(g: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, constants: Constants) -> Tensor:
    """The control process for gradients `g` [N, C, D] of `y` [N, C, D]: `dx` [N, C, D]; updates `u`, `v` [C]."""
    alpha = constants.alpha_bwd
    carry = (1 - (1 - alpha) * (y * y).mean(2)).clamp(min=constants.control_floor)
    v_before = scanned(carry, (g * y).mean(2), v)
    e = (g - (1 - alpha) * v_before.unsqueeze(2) * y) * rstd.unsqueeze(2)
    own = e.mean(2)
    shift = controlled(own, u, alpha, backward_weights(alpha, g.size(0), u)) - own
    return e + shift.unsqueeze(2)
