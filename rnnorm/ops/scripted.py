"""The fused loop in TorchScript, with a hand-written backward pass, for any device and dtype with matrix products.

This is the only file that compiles TorchScript. Before the loop, one product computes the input parts of all steps; the
loop computes the recurrent product, norms, gates and states; after it, weight gradients are one product each. Samples
are compact, S = sum(lengths) rows in step order, so padding is neither computed nor enters the running statistics.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnorm._torch import unfused
from rnnorm.norms import Constants
from rnnorm.ops import channels, chunked
from rnnorm.ops.backend import Backend
from rnnorm.ops.call import (
    DIFFERENTIABLE,
    CallSpec,
    Operands,
    Results,
    mogrifier_rounds,
    results_like,
    statistics_dtype,
)
from rnnorm.ops.running_stats import BLOCK, backward_weights, controlled, forward_weights, scanned, statistics


class Norm(NamedTuple):
    """The normalization of some gates of H units. `mean var u v` [C] are copies, updated in place."""

    kind: str
    guard: str
    training: bool
    constants: Constants
    units: int
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    u: Tensor
    v: Tensor
    weights: Tensor  # decay weights of the pass, forward or backward
    grad_weight: Tensor  # [C], accumulated by the backward pass
    grad_bias: Tensor


class Kept(NamedTuple):
    """What a normalization keeps of every sample: `y` [S, C], `rstd` [S, C] or [S, G], the guard's `scale` [S, G]."""

    y: Tensor
    rstd: Tensor
    scale: Tensor


class Trace(NamedTuple):
    """What the loop keeps of every sample, apart from the norms."""

    gates: Tensor  # [S, G*H], the input parts, overwritten by the gates after their nonlinearities
    h: Tensor  # [S, P], the state before the step
    c: Tensor  # [S, H], LSTM: c before the step
    extra: Tensor  # [S, H], LSTM: tanh(c'); GRU: the recurrent part of n


class Steps(NamedTuple):
    """The steps of a sequence in processing order: step k has rows `start[k]:stop[k]` of the compact samples."""

    start: list[int]
    stop: list[int]
    rows: list[Tensor]  # the active sequences of each step; empty if dense
    dense: bool  # all N sequences are active at all steps
    save: bool  # keep the trace of every step, not only of the last


class Mogrifier(NamedTuple):
    """The rounds in which x and h gate each other, and the input part, which is then computed in the loop."""

    samples: Tensor  # [S, I]
    weight: Tensor  # [G*H, I], of the input
    bias: Tensor  # [G*H], both biases
    down: list[Tensor]  # of each round [rank, from]; without an element: full rank
    up: list[Tensor]  # [to, rank] or [to, from]
    biases: list[Tensor]  # [to]
    gates: list[Tensor]  # [S, to], kept
    grads: list[Tensor]  # [S, to], written by the backward pass: gradients of what the sigmoids are applied to
    grad: Tensor  # [S, I], the same: of the samples


class Recurrence(NamedTuple):
    """The weights of the recurrent part, in the dtype of the products, and the nonlinearity of an RNN."""

    weight: Tensor  # [G*H, P]
    bias: Tensor  # [G*H], used by cells with a separate recurrent part; otherwise the input part includes it
    projection: Tensor | None  # [P, H]
    relu: bool
    cap: bool  # LSTM: i = min(i, 1 - f)
    mogrifier: Mogrifier | None


def _affine(y: Tensor, norm: Norm) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight)
    return y


def _by_gate(values: Tensor, norm: Norm) -> Tensor:
    return values.reshape(values.size(0), values.size(1) // norm.units, norm.units)


def _inverse_rms(gates: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean_H(gates^2) + eps)` [n, G]."""
    return (gates * gates).sum(2).mul_(1.0 / gates.size(2)).add_(eps).rsqrt_()


def _normalize(pre: Tensor, norm: Norm, kept: Kept, start: int) -> Tensor:
    """Normalized, scaled and guarded pre-activations `pre` [n, k*H]; writes what the backward needs at row `start`."""
    if norm.kind == "none":
        return pre
    stop = start + pre.size(0)
    kept_rstd = kept.rstd[start:stop]
    if norm.kind == "online":
        if norm.training:
            d, variance = statistics(pre, None, norm.mean, norm.var, norm.constants.alpha_fwd, norm.weights)
            torch.add(variance, norm.constants.eps, out=kept_rstd).rsqrt_()
        else:
            d = pre - norm.mean
            kept_rstd.copy_((norm.var + norm.constants.eps).rsqrt_())
        y = torch.mul(d, kept_rstd, out=kept.y[start:stop])
    else:
        gates = _by_gate(pre, norm)
        if norm.kind == "layer":
            gates = torch.add(gates, gates.sum(2, keepdim=True), alpha=-1.0 / norm.units)
        rstd = _inverse_rms(gates, norm.constants.eps)
        kept_rstd.copy_(rstd)
        y = kept.y[start:stop].copy_((gates * rstd.unsqueeze(2)).reshape(pre.size()))
    z = _affine(y, norm)
    if norm.guard == "scale":
        gates = _by_gate(z, norm)
        scale = _inverse_rms(gates, norm.constants.scale_eps)
        kept.scale[start:stop].copy_(scale)
        z = (gates * scale.unsqueeze(2)).reshape(pre.size())
    elif norm.guard == "clamp":
        z = z.clamp(-norm.constants.clamp_limit, norm.constants.clamp_limit)
    return z


def _normalize_backward(grad: Tensor, norm: Norm, kept: Kept, start: int) -> Tensor:
    """Gradient of the pre-activations from `grad` [n, k*H] at row `start`; accumulates those of the affine map."""
    if norm.kind == "none":
        return grad
    stop = start + grad.size(0)
    y, rstd, g = kept.y[start:stop], kept.rstd[start:stop], grad
    if norm.guard == "scale":
        scale = kept.scale[start:stop].unsqueeze(2)
        q = _by_gate(_affine(y, norm), norm) * scale
        dq = _by_gate(g, norm)
        along = (q * dq).sum(2, keepdim=True)
        g = (torch.addcmul(dq, q, along, value=-1.0 / norm.units) * scale).reshape(grad.size())
    elif norm.guard == "clamp":
        g = g * (_affine(y, norm).abs() <= norm.constants.clamp_limit)
    gy = g * y
    weight = norm.weight
    if weight is not None:
        norm.grad_weight.add_(gy.sum(0))
        norm.grad_bias.add_(g.sum(0))
        g, gy = g * weight, gy * weight
    if norm.kind == "online":
        if not norm.training:
            return g * rstd
        rest = 1 - norm.constants.alpha_bwd
        one = torch.ones(1, dtype=y.dtype, device=y.device)
        carry = torch.addcmul(one, y, y, value=-rest)
        if norm.constants.control_floor > float("-inf"):
            carry.clamp_(min=norm.constants.control_floor)
        v_before = scanned(carry, gy, norm.v)
        e = torch.addcmul(g, v_before, y, value=-rest).mul_(rstd)
        return controlled(e, norm.u, norm.constants.alpha_bwd, norm.weights)
    along = _by_gate(gy, norm).sum(2, keepdim=True)
    gates, g = _by_gate(y, norm), _by_gate(g, norm)
    dx = torch.addcmul(g, gates, along, value=-1.0 / norm.units)
    if norm.kind == "layer":
        dx = torch.add(dx, g.sum(2, keepdim=True), alpha=-1.0 / norm.units)
    return (dx * rstd.unsqueeze(2)).reshape(grad.size())


class Masks(NamedTuple):
    """Dropout inside the recurrence, and where sequences begin."""

    recurrent: Tensor | None  # [N, P], factor of h in the recurrent product
    zoneout_h: Tensor | None  # [S, P], share of the old state that is kept
    zoneout_c: Tensor | None  # [S, H]
    reset: Tensor | None  # [S, 1] bool, true if the state before the step is zero


def _gather(state: Tensor, steps: Steps, k: int) -> Tensor:
    return state if steps.dense else state.index_select(0, steps.rows[k])


def _before(state: Tensor, steps: Steps, k: int, reset: Tensor | None) -> Tensor:
    """The active rows of the state before step k."""
    active = _gather(state, steps, k)
    if reset is not None:
        active = active.masked_fill(reset[steps.start[k] : steps.stop[k]], 0.0)
    return active


def _entering(h: Tensor, steps: Steps, k: int, mask: Tensor | None) -> Tensor:
    """h as it enters the recurrent product of step k; in the backward pass, the gradient of h from that product's."""
    return h if mask is None else h * _gather(mask, steps, k)


def _zoned(new: Tensor, old: Tensor, stays: Tensor | None, start: int, stop: int) -> Tensor:
    """A state after zoneout. `_to_new` and `_to_old` give the gradients of `new` and `old`."""
    if stays is None:
        return new
    share = stays[start:stop]
    return share * old + (1.0 - share) * new


def _to_new(grad: Tensor, stays: Tensor | None, start: int, stop: int) -> Tensor:
    return grad if stays is None else grad * (1.0 - stays[start:stop])


def _to_old(through: Tensor, grad: Tensor, stays: Tensor | None, masks: Masks, start: int, stop: int) -> Tensor:
    """The gradient of the state before a step: `through` the step and, with zoneout, past it."""
    if stays is not None:
        through = through + grad * stays[start:stop]
    reset = masks.reset
    if reset is not None:
        through = through.masked_fill(reset[start:stop], 0.0)
    return through


def _scatter(state: Tensor, steps: Steps, k: int, value: Tensor) -> Tensor:
    return value if steps.dense else state.index_copy(0, steps.rows[k], value)


def _plus_product(term: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`term + left @ right`, the product in the dtype of `right`, a weight."""
    if term.dtype == right.dtype:
        return torch.addmm(term, left, right)
    return term + torch.mm(left.to(right.dtype), right).to(term.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.to(right.dtype), right).to(left.dtype)


def _modulation(of: Tensor, m: Mogrifier, r: int) -> Tensor:
    """What round r applies the sigmoid to, [n, to]."""
    if len(m.down) > 0:
        of = _product(of, m.down[r].t())
    return _plus_product(m.biases[r].unsqueeze(0), of, m.up[r].t())


def _modulation_backward(grad: Tensor, m: Mogrifier, r: int) -> Tensor:
    of = _product(grad, m.up[r])
    return _product(of, m.down[r]) if len(m.down) > 0 else of


def _mogrified(x: Tensor, h: Tensor, m: Mogrifier, first: int, last: int) -> tuple[Tensor, Tensor]:
    """x [n, I] and h [n, P] after all rounds; keeps the gates."""
    for r in range(len(m.up)):
        gate = m.gates[r][first:last]
        torch.sigmoid(_modulation(h if r % 2 == 0 else x, m, r), out=gate).mul_(2.0)
        if r % 2 == 0:
            x = x * gate
        else:
            h = h * gate
    return x, h


def _mogrified_backward(
    dx: Tensor, dh: Tensor, x: Tensor, h: Tensor, m: Mogrifier, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and h before the rounds from those after; `x`, `h` are the values before."""
    values = _values(x, h, m, start, stop)
    for j in range(len(m.up)):
        r = len(m.up) - 1 - j
        gate = m.gates[r][start:stop]
        d = dx if r % 2 == 0 else dh
        dz = d * values[r] * torch.addcmul(gate, gate, gate, value=-0.5)
        m.grads[r][start:stop].copy_(dz)
        if r % 2 == 0:
            dx, dh = dx * gate, dh + _modulation_backward(dz, m, r)
        else:
            dx, dh = dx + _modulation_backward(dz, m, r), dh * gate
    return dx, dh


def _values(x: Tensor, h: Tensor, m: Mogrifier, start: int, stop: int) -> list[Tensor]:
    """x, h, then what each round makes of x and h in turn: round r makes value r + 2 of value r, gated by r + 1."""
    values = [x, h]
    for r in range(len(m.up)):
        values.append(values[r] * m.gates[r][start:stop])
    return values


def _span(steps: Steps, k: int) -> tuple[int, int, int, int]:
    """Rows of step k: start and stop among the samples, then in the trace."""
    start, stop = steps.start[k], steps.stop[k]
    first = start if steps.save else 0
    return start, stop, first, first + stop - start


def _lstm(
    states: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    y: Tensor,
) -> list[Tensor]:
    """Run all steps: write the output `y` [S, P], `trace` and `kepts`; return the last states. Other cells likewise."""
    h, c = states[0], states[1]
    weight, projection = recurrence.weight.t(), recurrence.projection
    H = c.size(1)
    for k in range(len(steps.start)):
        start, stop, first, last = _span(steps, k)
        h_k, c_k = _before(h, steps, k, masks.reset), _before(c, steps, k, masks.reset)
        if steps.save:
            trace.h[start:stop].copy_(h_k)
            trace.c[start:stop].copy_(c_k)
        x_part, entering = trace.gates[start:stop], _entering(h_k, steps, k, masks.recurrent)
        m = recurrence.mogrifier
        if m is not None:
            x_k, entering = _mogrified(m.samples[start:stop], entering, m, first, last)
            x_part = _plus_product(m.bias.unsqueeze(0), x_k, m.weight.t())
        q = _normalize(_plus_product(x_part, entering, weight), norms[0], kepts[0], first)
        i, f, g, o = torch.sigmoid(q, out=trace.gates[start:stop]).chunk(4, 1)
        torch.tanh(q[:, 2 * H : 3 * H], out=g)
        if recurrence.cap:
            i = torch.minimum(i, 1.0 - f)
        c_new = _normalize(torch.addcmul(f * c_k, i, g), norms[1], kepts[1], first)
        tanh_c = torch.tanh(c_new, out=trace.extra[first:last])
        if projection is None:
            h_new = torch.mul(o, tanh_c, out=y[start:stop])
        else:
            h_new = y[start:stop].copy_(_product(o * tanh_c, projection.t()))
        if masks.zoneout_h is not None:
            h_new = y[start:stop].copy_(_zoned(h_new, h_k, masks.zoneout_h, start, stop))
        c_new = _zoned(c_new, c_k, masks.zoneout_c, start, stop)
        h, c = _scatter(h, steps, k, h_new), _scatter(c, steps, k, c_new)
    return [h, c]


def _gru(
    states: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    y: Tensor,
) -> list[Tensor]:
    h = states[0]
    weight = recurrence.weight.t()
    H = h.size(1)
    for k in range(len(steps.start)):
        start, stop, first, last = _span(steps, k)
        h_k, x_k, gates = _before(h, steps, k, masks.reset), trace.gates[start:stop], trace.gates[start:stop]
        if steps.save:
            trace.h[start:stop].copy_(h_k)
        h_part = _plus_product(recurrence.bias, _entering(h_k, steps, k, masks.recurrent), weight)
        n_part = trace.extra[first:last].copy_(h_part[:, 2 * H :])
        q = _normalize(x_k[:, : 2 * H] + h_part[:, : 2 * H], norms[0], kepts[0], first)
        r, z = torch.sigmoid(q, out=gates[:, : 2 * H]).chunk(2, 1)
        q = _normalize(torch.addcmul(x_k[:, 2 * H :], r, n_part), norms[1], kepts[1], first)
        n = torch.tanh(q, out=gates[:, 2 * H :])
        h_new = torch.addcmul(n, z, h_k - n, out=y[start:stop])
        if masks.zoneout_h is not None:
            h_new = y[start:stop].copy_(_zoned(h_new, h_k, masks.zoneout_h, start, stop))
        h = _scatter(h, steps, k, h_new)
    return [h]


def _rnn(
    states: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    y: Tensor,
) -> list[Tensor]:
    h = states[0]
    weight = recurrence.weight.t()
    for k in range(len(steps.start)):
        start, stop, first, _ = _span(steps, k)
        h_k = _before(h, steps, k, masks.reset)
        if steps.save:
            trace.h[start:stop].copy_(h_k)
        entering = _entering(h_k, steps, k, masks.recurrent)
        q = _normalize(_plus_product(trace.gates[start:stop], entering, weight), norms[0], kepts[0], first)
        h_new = trace.gates[start:stop].copy_(q.relu() if recurrence.relu else q.tanh())
        h_new = y[start:stop].copy_(_zoned(h_new, h_k, masks.zoneout_h, start, stop))
        h = _scatter(h, steps, k, h_new)
    return [h]


def _lstm_backward(
    grad_y: Tensor,
    grads: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    parts: list[Tensor],
) -> list[Tensor]:
    """Run all steps, last first: write `parts`, the gradients of the input part, the recurrent part [S, G*H] (the same
    tensor except for a GRU) and the hidden values [S, P]; return those of the initial states. Other cells likewise.
    """
    grad_h, grad_c = grads[0], grads[1]
    projection = recurrence.projection
    H = grad_c.size(1)
    one = torch.ones(1, dtype=grad_c.dtype, device=grad_c.device)
    for j in range(len(steps.start)):
        k = len(steps.start) - 1 - j
        start, stop = steps.start[k], steps.stop[k]
        a, tanh_c = trace.gates[start:stop], trace.extra[start:stop]
        i, f, g, o = a.chunk(4, 1)
        dh_out, dc_out = _gather(grad_h, steps, k) + grad_y[start:stop], _gather(grad_c, steps, k)
        dh = _to_new(dh_out, masks.zoneout_h, start, stop)
        if projection is not None:
            parts[2][start:stop].copy_(dh)
            dh = _product(dh, projection)
        dc = _to_new(dc_out, masks.zoneout_c, start, stop)
        dc = torch.addcmul(dc, dh * o, torch.addcmul(one, tanh_c, tanh_c, value=-1.0))
        dc = _normalize_backward(dc, norms[1], kepts[1], start)
        slope = torch.addcmul(a, a, a, value=-1.0)
        torch.addcmul(one, g, g, value=-1.0, out=slope[:, 2 * H : 3 * H])
        di, df = dc * g, dc * trace.c[start:stop]
        if recurrence.cap:
            capped = torch.heaviside(i - (1.0 - f), torch.full_like(one, 0.5))  # at a tie a half each, as torch.minimum
            df = df - (capped * di).masked_fill(capped == 0.0, 0.0)
            di = ((1.0 - capped) * di).masked_fill(capped == 1.0, 0.0)
            i = torch.minimum(i, 1.0 - f)
        dq = torch.cat((di, df, dc * i, dh * tanh_c), 1).mul_(slope)
        d_pre = _normalize_backward(dq, norms[0], kepts[0], start)
        parts[0][start:stop].copy_(d_pre)
        dh = _product(d_pre, recurrence.weight)
        m = recurrence.mogrifier
        if m is not None:
            x_k, entering = m.samples[start:stop], _entering(trace.h[start:stop], steps, k, masks.recurrent)
            dx, dh = _mogrified_backward(_product(d_pre, m.weight), dh, x_k, entering, m, start, stop)
            m.grad[start:stop].copy_(dx)
        dh = _entering(dh, steps, k, masks.recurrent)
        grad_c = _scatter(grad_c, steps, k, _to_old(dc * f, dc_out, masks.zoneout_c, masks, start, stop))
        grad_h = _scatter(grad_h, steps, k, _to_old(dh, dh_out, masks.zoneout_h, masks, start, stop))
    return [grad_h, grad_c]


def _gru_backward(
    grad_y: Tensor,
    grads: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    parts: list[Tensor],
) -> list[Tensor]:
    grad_h = grads[0]
    H = grad_h.size(1)
    one = torch.ones(1, dtype=grad_h.dtype, device=grad_h.device)
    for j in range(len(steps.start)):
        k = len(steps.start) - 1 - j
        start, stop = steps.start[k], steps.stop[k]
        a = trace.gates[start:stop]
        r, z, n = a.chunk(3, 1)
        rz = a[:, : 2 * H]
        dh_out = _gather(grad_h, steps, k) + grad_y[start:stop]
        dh = _to_new(dh_out, masks.zoneout_h, start, stop)
        dn = (dh - dh * z) * torch.addcmul(one, n, n, value=-1.0)
        dn_pre = _normalize_backward(dn, norms[1], kepts[1], start)
        drz = torch.cat((dn_pre * trace.extra[start:stop], dh * (trace.h[start:stop] - n)), 1)
        drz = drz * torch.addcmul(rz, rz, rz, value=-1.0)
        drz_pre = _normalize_backward(drz, norms[0], kepts[0], start)
        torch.cat((drz_pre, dn_pre), 1, out=parts[0][start:stop])
        d_recurrent = torch.cat((drz_pre, dn_pre * r), 1, out=parts[1][start:stop])
        if masks.recurrent is None:
            dh = _plus_product(dh * z, d_recurrent, recurrence.weight)
        else:
            dh = dh * z + _entering(_product(d_recurrent, recurrence.weight), steps, k, masks.recurrent)
        grad_h = _scatter(grad_h, steps, k, _to_old(dh, dh_out, masks.zoneout_h, masks, start, stop))
    return [grad_h]


def _rnn_backward(
    grad_y: Tensor,
    grads: list[Tensor],
    recurrence: Recurrence,
    norms: list[Norm],
    kepts: list[Kept],
    trace: Trace,
    steps: Steps,
    masks: Masks,
    parts: list[Tensor],
) -> list[Tensor]:
    grad_h = grads[0]
    for j in range(len(steps.start)):
        k = len(steps.start) - 1 - j
        start, stop = steps.start[k], steps.stop[k]
        h = trace.gates[start:stop]
        dh_out = _gather(grad_h, steps, k) + grad_y[start:stop]
        dh = _to_new(dh_out, masks.zoneout_h, start, stop)
        dq = dh * (h > 0) if recurrence.relu else torch.addcmul(dh, dh * h, h, value=-1.0)
        d_pre = _normalize_backward(dq, norms[0], kepts[0], start)
        parts[0][start:stop].copy_(d_pre)
        dh = _entering(_product(d_pre, recurrence.weight), steps, k, masks.recurrent)
        grad_h = _scatter(grad_h, steps, k, _to_old(dh, dh_out, masks.zoneout_h, masks, start, stop))
    return [grad_h]


_LOOPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lstm": (_lstm, _lstm_backward),
    "gru": (_gru, _gru_backward),
    "rnn_tanh": (_rnn, _rnn_backward),
    "rnn_relu": (_rnn, _rnn_backward),
}


# Threads that need a loop at the same time compile it once: the others wait.
_compiling = threading.RLock()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    with _compiling:
        return _compiled_once(function)


@functools.cache
def _compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript as a whole; this backend is written in it.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        return torch.jit.script(function)


def _run(function: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    with unfused(device):
        return _compiled(function)(*arguments)


def _walk(o: Operands, spec: CallSpec, save: bool) -> tuple[Steps, Tensor | None]:
    """The steps in processing order, and the rows of the padded [T*N] samples that are real (None: all)."""
    T, N, _ = o.x.shape
    if o.lengths is None or bool((o.lengths == T).all()):
        order = range(T)[:: -1 if spec.reverse else 1]
        return Steps([t * N for t in order], [(t + 1) * N for t in order], [], True, save), None
    order = range(int(o.lengths.max()))[:: -1 if spec.reverse else 1]
    active = torch.arange(T, device="cpu")[:, None] < o.lengths.cpu()[None, :]
    stops = active.sum(1).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    rows = [active[t].nonzero()[:, 0].to(o.x.device) for t in order]
    real = active.flatten().nonzero()[:, 0].to(o.x.device)
    return Steps([starts[t] for t in order], [stops[t] for t in order], rows, False, save), real


def _real_rows(tensor: Tensor, real: Tensor | None) -> Tensor:
    rows = tensor.flatten(0, 1)
    return rows if real is None else rows.index_select(0, real)


def _masks(o: Operands, real: Tensor | None) -> Masks:
    """The masks, by sample in the order of the loop; the recurrent mask stays by sequence."""
    wide = statistics_dtype(o.x.dtype)
    zoneout_h, zoneout_c = (
        None if stays is None else _real_rows(stays, real).to(wide) for stays in (o.zoneout_h, o.zoneout_c)
    )
    reset = None if o.reset is None else _real_rows(o.reset.unsqueeze(2), real)
    return Masks(o.recurrent_mask, zoneout_h, zoneout_c, reset)


@functools.lru_cache(64)
@torch.inference_mode(False)
def _weights(backward: bool, alpha: float, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of `statistics`, or `backward_weights`, kept: a copy to a GPU would wait for it."""
    return (backward_weights if backward else forward_weights)(alpha, n, torch.empty(0, dtype=dtype, device=device))


def _norm(o: Operands, spec: CallSpec, prefix: str, on: bool, backward: bool) -> Norm:
    """The normalization with that prefix, on copies of its running statistics."""
    wide, N = statistics_dtype(o.x.dtype), o.x.size(1)
    empty = torch.empty(0, dtype=wide, device=o.x.device)
    parts: dict[str, Any] = {"weight": getattr(o, f"{prefix}_scale"), "bias": getattr(o, f"{prefix}_shift")}
    parts = {name: None if value is None else value.to(wide) for name, value in parts.items()}
    for name in ("mean", "var", "u", "v"):
        statistic = getattr(o, f"{prefix}_{name}")
        parts[name] = empty if statistic is None else statistic.clone()
    weights = empty
    if on and spec.controlled:
        alpha = spec.constants.alpha_bwd if backward else spec.constants.alpha_fwd
        weights = _weights(backward, alpha, min(N, BLOCK), wide, o.x.device)
    return Norm(
        kind=spec.norm if on else "none",
        guard=spec.guard,
        training=spec.training,
        constants=spec.constants,
        units=o.weight_ih.size(0) // spec.gates,
        weights=weights,
        grad_weight=empty if parts["weight"] is None else torch.zeros_like(parts["weight"]),
        grad_bias=empty if parts["bias"] is None else torch.zeros_like(parts["bias"]),
        **parts,
    )


def _columns(values: Tensor, first: int, last: int, gates: int) -> Tensor:
    """The columns of the gates `first:last` in values [..., G*H] or [..., G]; a view."""
    width = values.size(-1) // gates
    return values[..., first * width : last * width]


def _by_part(spec: CallSpec, values: tuple[Any, Any], narrow: Callable[[Any, int, int, int], Any]) -> list[Any]:
    """The `values` for each normalization of a step: of the gates normalized together, then of the cell state."""
    parts = [narrow(values[0], first, last, spec.gates) for first, last in spec.declared.together]
    return [*parts, values[1]]


def _norms(o: Operands, spec: CallSpec, backward: bool) -> tuple[Norm, Norm]:
    return _norm(o, spec, "norm", spec.norm != "none", backward), _norm(o, spec, "cell_norm", spec.cell_norm, backward)


def _narrow_norm(norm: Norm, first: int, last: int, gates: int) -> Norm:
    names = ("weight", "bias", "mean", "var", "u", "v", "grad_weight", "grad_bias")
    channels: dict[str, Any] = {
        name: _columns(value, first, last, gates) for name in names if (value := getattr(norm, name)) is not None
    }
    return norm._replace(**channels)


def _narrow_kept(kept: Kept, first: int, last: int, gates: int) -> Kept:
    return Kept(*(_columns(values, first, last, gates) for values in kept))


def _slabs(o: Operands, spec: CallSpec, save: bool) -> list[Tensor]:
    """Memory for the trace and what both norms keep, in the statistics dtype; for one step if nothing is saved."""
    S, N, C, P, G = o.x.size(0) * o.x.size(1), o.x.size(1), o.weight_ih.size(0), o.h.size(1), spec.gates
    H = C // G

    def slab(width: int, rows: int = S if save else N) -> Tensor:
        return o.x.new_empty((rows, width) if width else (0,), dtype=statistics_dtype(o.x.dtype))

    def kept(gates: int, on: bool) -> list[Tensor]:
        rstd = gates * H if spec.norm == "online" else gates
        scale = gates if spec.guard == "scale" else 0
        return [slab(width) for width in ((gates * H, rstd, scale) if on else (0, 0, 0))]

    has_c, apart = "c" in spec.declared.states, bool(spec.declared.apart)
    trace = [slab(C, S), slab(P), slab(H if has_c else 0), slab(H if has_c or apart else 0)]
    gates = [slab(P if number % 2 else o.x.size(2)) for number in range(spec.rounds)]
    return [*trace, *kept(G, spec.norm != "none"), *kept(1, spec.cell_norm), *gates]


def _mogrifier(o: Operands, spec: CallSpec, samples: Tensor, gates: list[Tensor], backward: bool) -> Mogrifier | None:
    """The rounds over the samples, with the gates that are kept; memory for the gradients in the backward pass."""
    if not spec.rounds:
        return None
    wide, rounds = statistics_dtype(o.x.dtype), mogrifier_rounds(o, spec)
    bias = samples.new_zeros(o.weight_ih.size(0), dtype=wide)
    for own in (o.bias_ih, o.bias_hh):
        bias = bias if own is None else bias + own
    return Mogrifier(
        samples.to(wide),
        o.weight_ih,
        bias,
        [each.down for each in rounds if each.down is not None],
        [each.up for each in rounds],
        [each.bias.to(wide) for each in rounds],
        gates,
        [torch.empty_like(gate) for gate in gates] if backward else [],
        torch.empty_like(samples, dtype=wide) if backward else samples.new_empty(0, dtype=wide),
    )


def _mogrifier_grads(m: Mogrifier, values: list[Tensor], S: int) -> Tensor:
    """The gradient of the rounds' weights, flat as they are."""
    found: list[Tensor] = []
    for r, (up, dz) in enumerate(zip(m.up, m.grads, strict=True)):
        of, dz = values[r + 1].to(up.dtype), dz[:S]
        if m.down:
            narrow = dz.to(up.dtype) @ up
            found.append(narrow.t() @ of)
            of = of @ m.down[r].t()
        found += [dz.to(up.dtype).t() @ of, dz.sum(0)]
    return torch.cat([grad.flatten().to(m.bias.dtype) for grad in found])


def _recurrence(o: Operands, spec: CallSpec, mogrifier: Mogrifier | None) -> Recurrence:
    C, wide = o.weight_hh.size(0), statistics_dtype(o.x.dtype)
    bias = o.x.new_zeros(C, dtype=wide) if o.bias_hh is None else o.bias_hh.to(wide)
    relu = spec.declared.gates[0].nonlinearity == "relu"
    return Recurrence(o.weight_hh, bias, o.weight_hr, relu, spec.cap, mogrifier)


def _input_part(samples: Tensor, o: Operands, spec: CallSpec, out: Tensor) -> None:
    """Write `samples @ W + b` [S, G*H] to `out`, plus the recurrent bias if no recurrent part is separate."""
    if samples.dtype == out.dtype:
        torch.mm(samples, o.weight_ih.t(), out=out)
    else:
        out.copy_(torch.mm(samples, o.weight_ih.t()))
    if o.bias_ih is not None:
        out += o.bias_ih
    if o.bias_hh is not None and not spec.declared.apart:
        out += o.bias_hh


def _padded(rows: Tensor, real: Tensor | None, T: int, N: int) -> Tensor:
    """Compact samples [S, *] as [T, N, *], zero where padded."""
    if real is not None:
        rows = rows.new_zeros(T * N, rows.size(1)).index_copy_(0, real, rows)
    return rows.view(T, N, rows.size(1))


class Scripted(Backend):
    name = "scripted"
    runs_special = True
    losses = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    linear_cross_entropy = staticmethod(chunked.linear_cross_entropy)
    online_norm = staticmethod(channels.online_norm)
    online_norm_backward = staticmethod(channels.online_norm_backward)

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None) -> str | None:
        return None if dtype.is_floating_point else f"it supports floating-point dtypes only; got {dtype}"

    def saved_like(self, operands: Operands, spec: CallSpec) -> list[Tensor]:
        return _slabs(operands, spec, save=True)

    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        o, wide = operands, statistics_dtype(operands.x.dtype)
        T, N, _ = o.x.shape
        steps, real = _walk(o, spec, save)
        saved = _slabs(o, spec, save)
        results = results_like(o, spec)
        norms = _norms(o, spec, backward=False)
        samples = _real_rows(o.x, real)
        S = samples.size(0)
        mogrifier = _mogrifier(o, spec, samples, saved[10:], backward=False)
        if mogrifier is None:
            _input_part(samples, o, spec, out=saved[0][:S])
        in_place = real is None and results.y.dtype == wide
        y = results.y.view(S, o.h.size(1)) if in_place else saved[0].new_empty(S, o.h.size(1))
        last = _run(
            _LOOPS[spec.cell][0],
            o.x.device,
            [state.to(wide) for state in (o.h, o.c) if state is not None],
            _recurrence(o, spec, mogrifier),
            _by_part(spec, norms, _narrow_norm),
            _by_part(spec, (Kept(*saved[4:7]), Kept(*saved[7:10])), _narrow_kept),
            Trace(*saved[:4]),
            steps,
            _masks(o, real),
            y,
        )
        if not in_place:
            results.y.copy_(_padded(y, real, T, N))
        for result, value in zip((results.h, results.c), last, strict=False):
            result.copy_(value)
        if spec.controlled:
            results.norm_mean.copy_(norms[0].mean)
            results.norm_var.copy_(norms[0].var)
            results.cell_norm_mean.copy_(norms[1].mean)
            results.cell_norm_var.copy_(norms[1].var)
        return results, saved if save else []

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: CallSpec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        o, dtype, wide = operands, operands.x.dtype, statistics_dtype(operands.x.dtype)
        T, N, _ = o.x.shape
        steps, real = _walk(o, spec, save=True)
        S, C, P = T * N if real is None else real.size(0), o.weight_ih.size(0), o.h.size(1)

        def widened(grad: Tensor | None, like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=wide) if grad is None else grad.to(wide)

        grad_y = o.x.new_zeros(1, 1, dtype=wide).expand(S, P)
        if grads[0] is not None:
            grad_y = _real_rows(grads[0], real).to(wide)
        norms = _norms(o, spec, backward=True)
        trace = Trace(*saved[:4])
        input_part = trace.gates.new_empty(S, C)
        recurrent_part = trace.gates.new_empty(S, C) if spec.declared.apart else input_part
        samples = _real_rows(o.x, real)
        mogrifier = _mogrifier(o, spec, samples, list(saved[10:]), backward=True)
        hidden_part = trace.gates.new_empty((S, P) if o.weight_hr is not None else (0,))
        first = _run(
            _LOOPS[spec.cell][1],
            o.x.device,
            grad_y,
            [widened(grad, like) for grad, like in zip(grads[1:], (o.h, o.c), strict=True) if like is not None],
            _recurrence(o, spec, mogrifier),
            _by_part(spec, norms, _narrow_norm),
            _by_part(spec, (Kept(*saved[4:7]), Kept(*saved[7:10])), _narrow_kept),
            trace,
            steps,
            _masks(o, real),
            [input_part, recurrent_part, hidden_part],
        )
        # of the states' own dtype in the end: cells under autocast carry them in float32
        found: dict[str, Tensor | None] = dict(zip(("h", "c"), first, strict=False))
        for prefix, norm in zip(("norm", "cell_norm"), norms, strict=True):
            if spec.controlled and norm.kind == "online":
                getattr(o, f"{prefix}_u").copy_(norm.u)
                getattr(o, f"{prefix}_v").copy_(norm.v)
            if need_weights:
                found[f"{prefix}_scale"], found[f"{prefix}_shift"] = norm.grad_weight, norm.grad_bias
        if need_input:
            grad_x = torch.mm(input_part.to(dtype), o.weight_ih) if mogrifier is None else mogrifier.grad.to(dtype)
            found["x"] = _padded(grad_x, real, T, N)
        if need_weights:
            entered = trace.h[:S]
            if o.recurrent_mask is not None:
                entered = entered * _real_rows(o.recurrent_mask.expand(T, N, P), real)
            if mogrifier is not None:
                values = _values(mogrifier.samples, entered, mogrifier, 0, S)
                found["weight_mogrify"] = _mogrifier_grads(mogrifier, values, S)
                last = len(values) - 1
                samples, entered = values[last - last % 2], values[last - 1 + last % 2]
            found["weight_ih"] = torch.mm(input_part.to(dtype).t(), samples.to(dtype))
            found["weight_hh"] = torch.mm(recurrent_part.to(dtype).t(), entered.to(dtype))
            found["bias_ih"], found["bias_hh"] = input_part.sum(0), recurrent_part.sum(0)
            if o.weight_hr is not None:
                hidden = _columns(trace.gates[:S], 3, 4, 4) * trace.extra[:S]
                found["weight_hr"] = torch.mm(hidden_part.to(dtype).t(), hidden.to(dtype))
        return [
            None if grad is None or operand is None else grad.to(operand.dtype)
            for grad, operand in zip((found.get(name) for name in DIFFERENTIABLE), operands, strict=False)
        ]
