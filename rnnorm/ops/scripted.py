"""The fused loop under TorchScript, forward and backward written by hand: any device and dtype torch has products for.

This is the only file that compiles TorchScript. One product makes the input parts of all steps before the loop; the
loop does the recurrent product, norms, gates and states; weight gradients are one product each after it. Samples
are kept compact, S = sum(lengths) rows in step order, so that padding is neither computed nor seen by a stream.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnorm.norms import CLAMP_LIMIT, SCALE_EPS
from rnnorm.ops.call import DIFFERENTIABLE, Operands, Results, Spec, results_like, statistics_dtype
from rnnorm.ops.stream import decay, decayed_sums, scanned, statistics


class Norm(NamedTuple):
    """One layer's normalization, for a range of its gates. `mean var u v` [C] are moved in place."""

    kind: str
    guard: str
    training: bool
    eps: float
    alpha_fwd: float
    alpha_bwd: float
    scale_eps: float
    limit: float
    units: int
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    u: Tensor
    v: Tensor
    weights: Tensor  # decay weights and powers of the direction that runs
    powers: Tensor


class Kept(NamedTuple):
    """What a normalization keeps of every sample: `y` [S, C], `rstd` [S, C] or [S, G], guard's `scale` [S, G]."""

    y: Tensor
    rstd: Tensor
    scale: Tensor


class Steps(NamedTuple):
    """The walk over a sequence: rows `start[k]:stop[k]` of the compact samples are step k, in processing order."""

    start: list[int]
    stop: list[int]
    rows: list[Tensor]  # which sequences are active; empty tensors when all N are
    dense: bool


def _narrow(norm: Norm, start: int, stop: int) -> Norm:
    weight, bias = norm.weight, norm.bias
    return Norm(
        norm.kind,
        norm.guard,
        norm.training,
        norm.eps,
        norm.alpha_fwd,
        norm.alpha_bwd,
        norm.scale_eps,
        norm.limit,
        norm.units,
        None if weight is None else weight[start:stop],
        None if bias is None else bias[start:stop],
        norm.mean[start:stop],
        norm.var[start:stop],
        norm.u[start:stop],
        norm.v[start:stop],
        norm.weights,
        norm.powers,
    )


def _keep(kept: Kept, start: int, stop: int, left: int, right: int) -> Kept:
    """Views on the rows of one step and the channels (gates) of one part."""
    if kept.y.numel() == 0:
        return kept
    H = kept.y.size(1) // kept.scale.size(1)
    per_gate = kept.rstd.size(1) == kept.scale.size(1)
    first, last = (left // H, right // H) if per_gate else (left, right)
    return Kept(
        kept.y[start:stop, left:right],
        kept.rstd[start:stop, first:last],
        kept.scale[start:stop, left // H : right // H],
    )


def _affine(y: Tensor, norm: Norm) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight)
    return y


def _normalize(pre: Tensor, norm: Norm, kept: Kept) -> Tensor:
    """Normalized, scaled and guarded pre-activations `pre` [n, k*H], keeping what the backward needs."""
    if norm.kind == "none":
        return pre
    save = kept.y.numel() > 0
    n, C = pre.size(0), pre.size(1)
    if norm.kind == "online":
        if norm.training:
            d, variance, mean, var = statistics(pre, None, norm.mean, norm.var, norm.alpha_fwd, norm.weights)
            norm.mean.copy_(mean)
            norm.var.copy_(var)
        else:
            d, variance = pre - norm.mean, norm.var
        rstd = (variance + norm.eps).rsqrt_()
        y = torch.mul(d, rstd, out=kept.y) if save else d * rstd
    else:
        x = pre.reshape(n, C // norm.units, norm.units)
        if norm.kind == "layer":
            x = x - x.mean(2, keepdim=True)
        r = ((x * x).mean(2, keepdim=True) + norm.eps).rsqrt()
        y = (x * r).reshape(n, C)
        rstd = r.squeeze(2)
        if save:
            kept.y.copy_(y)
    if save:
        kept.rstd.copy_(rstd)
    z = _affine(y, norm)
    if norm.guard == "scale":
        gates = z.reshape(n, C // norm.units, norm.units)
        scale = ((gates * gates).mean(2, keepdim=True) + norm.scale_eps).rsqrt()
        if save:
            kept.scale.copy_(scale.squeeze(2))
        z = (gates * scale).reshape(n, C)
    elif norm.guard == "clamp":
        z = z.clamp(-norm.limit, norm.limit)
    return z


def _normalize_backward(grad: Tensor, norm: Norm, kept: Kept, grad_z: Tensor) -> Tensor:
    """Gradient of the pre-activations for `grad` [n, k*H]; `grad_z` receives that of the affine map's output."""
    if norm.kind == "none":
        return grad
    n, C = grad.size(0), grad.size(1)
    y = kept.y
    g = grad
    if norm.guard == "scale":
        scale = kept.scale.unsqueeze(2)
        q = _affine(y, norm).reshape(n, C // norm.units, norm.units) * scale
        dq = g.reshape(n, C // norm.units, norm.units)
        g = (torch.addcmul(dq, q, (q * dq).mean(2, keepdim=True), value=-1.0) * scale).reshape(n, C)
    elif norm.guard == "clamp":
        g = g * (_affine(y, norm).abs() <= norm.limit)
    weight = norm.weight
    if weight is not None:
        grad_z.copy_(g)
        g = g * weight
    if norm.kind == "online":
        if not norm.training:
            return g * kept.rstd
        rest = 1 - norm.alpha_bwd
        one = torch.ones(1, dtype=y.dtype, device=y.device)
        v_before, v = scanned(torch.addcmul(one, y, y, value=-rest), g * y, norm.v)
        e = torch.addcmul(g, v_before, y, value=-rest) * kept.rstd
        u_before, u = decayed_sums(e, norm.u, norm.weights, norm.powers)
        norm.v.copy_(v)
        norm.u.copy_(u)
        return torch.sub(e, u_before, alpha=rest)
    gates, g = y.reshape(n, C // norm.units, norm.units), g.reshape(n, C // norm.units, norm.units)
    dx = g - gates * (g * gates).mean(2, keepdim=True)
    if norm.kind == "layer":
        dx = dx - g.mean(2, keepdim=True)
    return (dx * kept.rstd.unsqueeze(2)).reshape(n, C)


def _gather(state: Tensor, steps: Steps, k: int) -> Tensor:
    return state if steps.dense else state.index_select(0, steps.rows[k])


def _scatter(state: Tensor, steps: Steps, k: int, value: Tensor) -> Tensor:
    return value if steps.dense else state.index_copy(0, steps.rows[k], value)


def _forward(
    cell: str,
    x_part: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor,
    weight_hr: Tensor | None,
    norm: Norm,
    cell_norm: Norm | None,
    steps: Steps,
    save: bool,
    y: Tensor,
    gates: Tensor,
    h_before: Tensor,
    c_before: Tensor,
    extra: Tensor,
    kept: Kept,
    cell_kept: Kept,
) -> tuple[Tensor, Tensor]:
    """All steps. `y` [S, P], and if `save` `gates` [S, G*H] (after their nonlinearities), the states before each step
    and `extra` [S, H] (LSTM: c' as it enters tanh; GRU: the recurrent part of n) are written. Returns the last h, c.
    """
    narrow = weight_hh.dtype
    w_hh = weight_hh.t()
    H = weight_hh.size(0)
    if cell == "lstm":
        H = H // 4
    elif cell == "gru":
        H = H // 3
    reset_norm, new_norm = norm, norm
    if cell == "gru" and norm.kind != "none":
        reset_norm, new_norm = _narrow(norm, 0, 2 * H), _narrow(norm, 2 * H, 3 * H)
    for k in range(len(steps.start)):
        start, stop = steps.start[k], steps.stop[k]
        h_k = _gather(h, steps, k)
        h_part = torch.mm(h_k.to(narrow), w_hh).to(x_part.dtype)
        x_k = x_part[start:stop]
        if save:
            h_before[start:stop].copy_(h_k)
        if cell == "lstm":
            c_k = _gather(c, steps, k)
            q = _normalize(x_k + h_part, norm, _keep(kept, start, stop, 0, 4 * H))
            a = torch.sigmoid(q, out=gates[start:stop]) if save else q.sigmoid()
            g = torch.tanh(q[:, 2 * H : 3 * H], out=a[:, 2 * H : 3 * H])
            c_new = torch.addcmul(a[:, H : 2 * H] * c_k, a[:, :H], g)
            if cell_norm is not None:
                c_new = _normalize(c_new, cell_norm, _keep(cell_kept, start, stop, 0, H))
            h_new = a[:, 3 * H :] * c_new.tanh()
            if weight_hr is not None:
                h_new = torch.mm(h_new.to(narrow), weight_hr.t()).to(x_part.dtype)
            if save:
                c_before[start:stop].copy_(c_k)
                extra[start:stop].copy_(c_new)
            c = _scatter(c, steps, k, c_new)
        elif cell == "gru":
            h_part = h_part + bias_hh
            pre = x_k[:, : 2 * H] + h_part[:, : 2 * H]
            a = _normalize(pre, reset_norm, _keep(kept, start, stop, 0, 2 * H)).sigmoid()
            pre = torch.addcmul(x_k[:, 2 * H :], a[:, :H], h_part[:, 2 * H :])
            n = _normalize(pre, new_norm, _keep(kept, start, stop, 2 * H, 3 * H)).tanh()
            h_new = torch.addcmul(n, a[:, H:], h_k - n)
            if save:
                gates[start:stop, : 2 * H].copy_(a)
                gates[start:stop, 2 * H :].copy_(n)
                extra[start:stop].copy_(h_part[:, 2 * H :])
        else:
            q = _normalize(x_k + h_part, norm, _keep(kept, start, stop, 0, H))
            h_new = q.tanh() if cell == "rnn_tanh" else q.relu()
            if save:
                gates[start:stop].copy_(h_new)
        y[start:stop].copy_(h_new)
        h = _scatter(h, steps, k, h_new)
    return h, c


def _backward(
    cell: str,
    grad_y: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    norm: Norm,
    cell_norm: Norm | None,
    steps: Steps,
    gates: Tensor,
    h_before: Tensor,
    c_before: Tensor,
    extra: Tensor,
    kept: Kept,
    cell_kept: Kept,
    grad_x_part: Tensor,
    grad_h_part: Tensor,
    grad_hidden: Tensor,
    grad_z: Tensor,
    grad_cell_z: Tensor,
) -> tuple[Tensor, Tensor]:
    """All steps, last first. Writes the gradients of the input and recurrent parts [S, G*H], of the hidden values
    [S, P] and of the affine outputs. Returns those of the first h, c.
    """
    narrow = weight_hh.dtype
    H = gates.size(1)
    if cell == "lstm":
        H = H // 4
    elif cell == "gru":
        H = H // 3
    reset_norm, new_norm = norm, norm
    if cell == "gru" and norm.kind != "none":
        reset_norm, new_norm = _narrow(norm, 0, 2 * H), _narrow(norm, 2 * H, 3 * H)
    for j in range(len(steps.start)):
        k = len(steps.start) - 1 - j
        start, stop = steps.start[k], steps.stop[k]
        a = gates[start:stop]
        dh = _gather(grad_h, steps, k) + grad_y[start:stop]
        if cell == "lstm":
            if weight_hr is not None:
                grad_hidden[start:stop].copy_(dh)
                dh = torch.mm(dh.to(narrow), weight_hr).to(grad_y.dtype)
            i, f, g, o = a[:, :H], a[:, H : 2 * H], a[:, 2 * H : 3 * H], a[:, 3 * H :]
            tanh_c = extra[start:stop].tanh()
            dc = torch.addcmul(_gather(grad_c, steps, k), dh * o, 1 - tanh_c * tanh_c)
            if cell_norm is not None:
                step_z = grad_cell_z if grad_cell_z.numel() == 0 else grad_cell_z[start:stop]
                dc = _normalize_backward(dc, cell_norm, _keep(cell_kept, start, stop, 0, H), step_z)
            dq = torch.cat((dc * g, dc * c_before[start:stop], dc * i, dh * tanh_c), 1)
            slope = torch.addcmul(a, a, a, value=-1.0)
            slope[:, 2 * H : 3 * H].copy_(1 - g * g)
            step_z = grad_z if grad_z.numel() == 0 else grad_z[start:stop]
            d_pre = _normalize_backward(dq * slope, norm, _keep(kept, start, stop, 0, 4 * H), step_z)
            grad_x_part[start:stop].copy_(d_pre)
            grad_c = _scatter(grad_c, steps, k, dc * f)
            d_recurrent = d_pre
            dh_direct = torch.zeros(0)
        elif cell == "gru":
            rz, n = a[:, : 2 * H], a[:, 2 * H :]
            r, z = a[:, :H], a[:, H : 2 * H]
            left = grad_z if grad_z.numel() == 0 else grad_z[start:stop, : 2 * H]
            right = grad_z if grad_z.numel() == 0 else grad_z[start:stop, 2 * H :]
            dn = dh * (1 - z) * (1 - n * n)
            dn_pre = _normalize_backward(dn, new_norm, _keep(kept, start, stop, 2 * H, 3 * H), right)
            drz = torch.cat((dn_pre * extra[start:stop], dh * (h_before[start:stop] - n)), 1) * rz * (1 - rz)
            drz_pre = _normalize_backward(drz, reset_norm, _keep(kept, start, stop, 0, 2 * H), left)
            grad_x_part[start:stop, : 2 * H].copy_(drz_pre)
            grad_x_part[start:stop, 2 * H :].copy_(dn_pre)
            d_recurrent = torch.cat((drz_pre, dn_pre * r), 1)
            grad_h_part[start:stop].copy_(d_recurrent)
            dh_direct = dh * z
        else:
            dq = dh * (1 - a * a) if cell == "rnn_tanh" else dh * (a > 0)
            step_z = grad_z if grad_z.numel() == 0 else grad_z[start:stop]
            d_recurrent = _normalize_backward(dq, norm, _keep(kept, start, stop, 0, H), step_z)
            grad_x_part[start:stop].copy_(d_recurrent)
            dh_direct = torch.zeros(0)
        dh_before = torch.mm(d_recurrent.to(narrow), weight_hh).to(grad_y.dtype)
        if cell == "gru":
            dh_before = dh_before + dh_direct
        grad_h = _scatter(grad_h, steps, k, dh_before)
    return grad_h, grad_c


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript as a whole; it is this backend's purpose.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        return torch.jit.script(function)


def _walk(lengths: Tensor | None, T: int, N: int, reverse: bool, device: torch.device) -> tuple[Steps, Tensor | None]:
    """The steps in processing order, and which rows of the padded [T*N] samples are real (None: all)."""
    order = range(T - 1, -1, -1) if reverse else range(T)
    if lengths is None or bool((lengths == T).all()):
        return Steps([t * N for t in order], [(t + 1) * N for t in order], [], True), None
    active = torch.arange(T)[:, None] < lengths.cpu()[None, :]
    stops = active.sum(1).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    rows = [active[t].nonzero()[:, 0].to(device) for t in order]
    real = active.flatten().nonzero()[:, 0].to(device)
    return Steps([starts[t] for t in order], [stops[t] for t in order], rows, False), real


def _real_rows(tensor: Tensor, real: Tensor | None) -> Tensor:
    rows = tensor.flatten(0, 1)
    return rows if real is None else rows.index_select(0, real)


def _norm(operands: Operands, spec: Spec, prefix: str, units: int, wide: torch.dtype, backward: bool) -> Norm:
    """The normalization with that prefix, with copies of its mean and var (the buffers move in the module)."""
    device = operands.x.device
    empty = torch.empty(0, dtype=wide, device=device)
    parts = {name: getattr(operands, f"{prefix}_{name}") for name in ("weight", "bias", "mean", "var", "u", "v")}
    online = parts["mean"] is not None
    weight, bias = (None if parts[name] is None else parts[name].to(wide) for name in ("weight", "bias"))
    weights, powers = empty, empty
    if online and spec.training:
        alpha, gain = (spec.alpha_bwd, 1.0) if backward else (spec.alpha_fwd, 1 - spec.alpha_fwd)
        weights, powers = decay(alpha, gain, operands.x.size(1), parts["mean"])
    return Norm(
        spec.norm,
        spec.guard,
        spec.training,
        spec.eps,
        spec.alpha_fwd,
        spec.alpha_bwd,
        SCALE_EPS,
        CLAMP_LIMIT,
        units,
        weight,
        bias,
        parts["mean"].clone() if online else empty,
        parts["var"].clone() if online else empty,
        parts["u"] if online else empty,
        parts["v"] if online else empty,
        weights,
        powers,
    )


def _affine_gradients(grad_z: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if weight is None:
        return None, None
    return (grad_z * y).sum(0).to(weight.dtype), grad_z.sum(0).to(weight.dtype)


class _Saved(NamedTuple):
    """What the backward needs, in the statistics dtype; S rows of at most T*N are used."""

    gates: Tensor
    h_before: Tensor
    c_before: Tensor
    extra: Tensor
    y: Tensor
    rstd: Tensor
    scale: Tensor
    cell_y: Tensor
    cell_rstd: Tensor
    cell_scale: Tensor

    @property
    def kept(self) -> Kept:
        return Kept(self.y, self.rstd, self.scale)

    @property
    def cell_kept(self) -> Kept:
        return Kept(self.cell_y, self.cell_rstd, self.cell_scale)


class Scripted:
    name = "scripted"
    differentiable = False

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: Spec | None) -> str | None:
        return None if dtype.is_floating_point else f"it computes in floating point, not in {dtype}"

    def saved_like(self, operands: Operands, spec: Spec) -> list[Tensor]:
        x, G = operands.x, spec.gates
        S, C, P = x.size(0) * x.size(1), operands.weight_ih.size(0), operands.h.size(1)
        H = C // G

        def rows(width: int) -> Tensor:
            shape = (S, width) if width else (0,)
            return x.new_empty(shape, dtype=statistics_dtype(x.dtype))

        def kept(gates: int, on: bool) -> list[Tensor]:
            if not on:
                return [rows(0) for _ in range(3)]
            return [rows(gates * H), rows(gates * H if spec.norm == "online" else gates), rows(gates)]

        lstm = spec.cell == "lstm"
        return [
            *(rows(C), rows(P), rows(H if lstm else 0), rows(H if lstm or spec.cell == "gru" else 0)),
            *kept(G, spec.norm != "none"),
            *kept(1, spec.cell_norm),
        ]

    def forward(self, operands: Operands, spec: Spec) -> Results:
        o = operands
        T, N, _ = o.x.shape
        wide = statistics_dtype(o.x.dtype)
        H = o.weight_ih.size(0) // spec.gates
        steps, real = _walk(o.lengths, T, N, spec.reverse, o.x.device)
        samples = _real_rows(o.x, real)
        x_part = torch.mm(samples, o.weight_ih.t()).to(wide)
        gru = spec.cell == "gru"
        bias_hh = x_part.new_zeros(x_part.size(1)) if o.bias_hh is None else o.bias_hh.to(wide)
        if o.bias_ih is not None:
            # The GRU's recurrent bias stays with the recurrent part, inside the reset gate's product.
            x_part += o.bias_ih.to(wide) if gru else o.bias_ih.to(wide) + bias_hh
        saved = self.saved_like(o, spec) if spec.save else [x_part.new_empty(0)] * len(_Saved._fields)
        keep = _Saved(*saved)
        norm = _norm(o, spec, "norm", H, wide, backward=False)
        cell_norm = _norm(o, spec, "cell_norm", H, wide, backward=False) if spec.cell_norm else None
        y = x_part.new_empty(samples.size(0), o.h.size(1))
        c = x_part.new_empty(0) if o.c is None else o.c.to(wide)
        h, c = _compiled(_forward)(
            *(spec.cell, x_part, o.h.to(wide), c, o.weight_hh, bias_hh, o.weight_hr),
            *(norm, cell_norm, steps, spec.save, y),
            *(keep.gates, keep.h_before, keep.c_before, keep.extra, keep.kept, keep.cell_kept),
        )
        results = results_like(o, spec, saved if spec.save else [])
        if real is None:
            results.y.view(y.shape).copy_(y)
        else:
            results.y.zero_().view(-1, y.size(1)).index_copy_(0, real, y.to(results.y.dtype))
        results.h.copy_(h)
        if o.c is not None:
            results.c.copy_(c)
        if spec.controlled:
            results.norm_mean.copy_(norm.mean)
            results.norm_var.copy_(norm.var)
            if cell_norm is not None:
                results.cell_norm_mean.copy_(cell_norm.mean)
                results.cell_norm_var.copy_(cell_norm.var)
        return results

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: Spec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        o, keep = operands, _Saved(*saved)
        T, N, _ = o.x.shape
        dtype, wide = o.x.dtype, statistics_dtype(o.x.dtype)
        H = o.weight_ih.size(0) // spec.gates
        steps, real = _walk(o.lengths, T, N, spec.reverse, o.x.device)
        S = T * N if real is None else real.size(0)

        def widened(grad: Tensor | None, like: Tensor | None) -> Tensor:
            if like is None:
                return o.x.new_empty(0, dtype=wide)
            return torch.zeros_like(like, dtype=wide) if grad is None else grad.to(wide).contiguous()

        grad_y = o.x.new_zeros(1, 1, dtype=wide).expand(S, o.h.size(1))
        if grads[0] is not None:
            grad_y = _real_rows(grads[0], real).to(wide)
        norm = _norm(o, spec, "norm", H, wide, backward=True)
        cell_norm = _norm(o, spec, "cell_norm", H, wide, backward=True) if spec.cell_norm else None
        grad_x_part = torch.empty(S, H * spec.gates, dtype=wide, device=o.x.device)
        empty = grad_x_part.new_empty(0)
        grad_h_part = torch.empty_like(grad_x_part) if spec.cell == "gru" else grad_x_part
        grad_hidden = empty if o.weight_hr is None else grad_x_part.new_empty(S, o.h.size(1))
        grad_z = empty if o.norm_weight is None else torch.empty_like(grad_x_part)
        grad_cell_z = empty if o.cell_norm_weight is None else grad_x_part.new_empty(S, H)
        grad_h, grad_c = _compiled(_backward)(
            *(spec.cell, grad_y, widened(grads[1], o.h), widened(grads[2], o.c)),
            *(o.weight_hh, o.weight_hr, norm, cell_norm, steps),
            *(keep.gates, keep.h_before, keep.c_before, keep.extra, keep.kept, keep.cell_kept),
            *(grad_x_part, grad_h_part, grad_hidden, grad_z, grad_cell_z),
        )
        found: dict[str, Tensor | None] = {
            "h": grad_h.to(dtype),
            "c": grad_c.to(dtype) if o.c is not None else None,
        }
        from_input = grad_x_part.to(dtype)
        if need_input:
            grad_x = torch.mm(from_input, o.weight_ih)
            if real is not None:
                grad_x = grad_x.new_zeros(T * N, grad_x.size(1)).index_copy_(0, real, grad_x)
            found["x"] = grad_x.view_as(o.x)
        if need_weights:
            from_hidden = grad_h_part.to(dtype)
            found["weight_ih"] = torch.mm(from_input.t(), _real_rows(o.x, real))
            found["weight_hh"] = torch.mm(from_hidden.t(), keep.h_before[:S].to(dtype))
            if o.bias_ih is not None and o.bias_hh is not None:
                found["bias_ih"] = grad_x_part.sum(0).to(dtype)
                found["bias_hh"] = grad_h_part.sum(0).to(dtype)
            if o.weight_hr is not None:
                hidden = keep.gates[:S, 3 * H :] * keep.extra[:S].tanh()
                found["weight_hr"] = torch.mm(grad_hidden.to(dtype).t(), hidden.to(dtype))
            found["norm_weight"], found["norm_bias"] = _affine_gradients(grad_z, keep.y[:S], o.norm_weight)
            found["cell_norm_weight"], found["cell_norm_bias"] = _affine_gradients(
                grad_cell_z, keep.cell_y[:S], o.cell_norm_weight
            )
        return [found.get(name) for name in DIFFERENTIABLE]
