"""The online stream without a loop over samples: a few tensor operations for n samples of C channels.

With samples in order, each recurrence `s <- a_k * s + b_k` is linear. Where `a` is constant (mean, variance, u) the
states before every sample are one product with a triangular matrix of decay powers; where it depends on the data
(v) they are a prefix scan by doubling. Every function here is also valid TorchScript.
Symbols as in Chiley et al., NeurIPS 2019 (arXiv 1905.05894): alpha the decay factor, u and v the control states.
"""

import torch
from torch import Tensor

# Rows of one triangular product: beyond it, the quadratic cost of the product outweighs one more block.
BLOCK = 64


def decay(alpha: float, gain: float, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [m+1, m] and powers [m+1, 1], m = min(n, BLOCK), of the recurrence `s <- alpha * s + gain * b_k`:

    the state before sample i, counted from a state `s`, is `powers[i] * s + weights[i] @ b`.
    """
    m = min(n, BLOCK)
    i = torch.arange(m + 1, dtype=torch.float64, device=like.device).unsqueeze(1)
    exponent = i - 1 - i[:m].t()
    weights = torch.where(exponent >= 0, gain * torch.pow(alpha, exponent.clamp(min=0)), 0.0)
    return weights.to(like.dtype), torch.pow(alpha, i).to(like.dtype)


def decayed_sums(b: Tensor, state: Tensor, weights: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """States before each of the n samples `b` [n, C], and after the last [C], by the weights of `decay`."""
    n, block = b.size(0), weights.size(1)
    if n <= block:
        states = torch.addmm(powers[: n + 1] * state, weights[: n + 1, :n], b)
        return states[:n], states[n]
    before: list[Tensor] = []
    for start in range(0, n, block):
        rows = b[start : start + block]
        m = rows.size(0)
        states = torch.addmm(powers[: m + 1] * state, weights[: m + 1, :m], rows)
        before.append(states[:m])
        state = states[m]
    return torch.cat(before), state


def _block_statistics(
    m: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, alpha: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = m.size(0)
    d = m - mean
    shift = torch.mm(weights[: n + 1, :n], d)
    d = d - shift[:n]
    b = torch.addcmul(-var, d, d, value=alpha)
    if w is not None:
        b = b + w
    variance = var + torch.mm(weights[: n + 1, :n], b)
    return d, variance[:n], mean + shift[n], variance[n]


def statistics(
    m: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, alpha: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deviations `d = m - mean` [n, C] and variances [n, C] that each sample is normalized with, then the new states.

    `m` [n, C] are the samples' own means, `w` [n, C] their own biased variances (None: one value per channel);
    `weights` are `decay(alpha, 1 - alpha, ...)`. Both states are averages `s <- s + (1 - alpha) * (b - s)`, summed
    relative to the state before the first sample: a large state costs no digits, and none drifts by rounded weights.
    """
    n, block = m.size(0), weights.size(1)
    if n <= block:
        return _block_statistics(m, w, mean, var, alpha, weights)
    ds: list[Tensor] = []
    variances: list[Tensor] = []
    for start in range(0, n, block):
        rows = None if w is None else w[start : start + block]
        d, variance, mean, var = _block_statistics(m[start : start + block], rows, mean, var, alpha, weights)
        ds.append(d)
        variances.append(variance)
    return torch.cat(ds), torch.cat(variances), mean, var


def scanned(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States of `s <- a_k * s + b_k` before each of the n samples `a`, `b` [n, C], and after the last [C]."""
    n = b.size(0)
    if n == 0:
        return b, state
    b = torch.cat((torch.addcmul(b[:1], a[:1], state), b[1:]))
    k = 1
    while k < n:
        b = torch.cat((b[:k], torch.addcmul(b[k:], a[k:], b[:-k])))
        a = torch.cat((a[:k], a[k:] * a[:-k]))
        k *= 2
    return torch.cat((state.unsqueeze(0), b[: n - 1])), b[n - 1]


def online_norm(
    x: Tensor, mean: Tensor, var: Tensor, alpha: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize samples `x` [N, C, D] in order: `y` [N, C, D], reciprocal deviations [N, C], new mean and var [C]."""
    weights, _ = decay(alpha, 1 - alpha, x.size(0), mean)
    m = x.mean(2)
    centred = x - m.unsqueeze(2)
    w = None if x.size(2) == 1 else (centred * centred).mean(2)
    d, variance, mean, var = statistics(m, w, mean, var, alpha, weights)
    rstd = (variance + eps).rsqrt()
    return (centred + d.unsqueeze(2)) * rstd.unsqueeze(2), rstd, mean, var


def online_norm_backward(
    g: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The control process for gradients `g` [N, C, D] of `y` [N, C, D]: `dx` [N, C, D], new u and v [C]."""
    weights, powers = decay(alpha, 1.0, g.size(0), u)
    v_before, v = scanned(1 - (1 - alpha) * (y * y).mean(2), (g * y).mean(2), v)
    e = (g - (1 - alpha) * v_before.unsqueeze(2) * y) * rstd.unsqueeze(2)
    u_before, u = decayed_sums(e.mean(2), u, weights, powers)
    return e - (1 - alpha) * u_before.unsqueeze(2), u, v
