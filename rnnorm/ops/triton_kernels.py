# mypy: ignore-errors
# Triton's language: what looks like Python's types here is not.
"""Triton kernels of one step of a recurrent layer.

`stream_*` walk the samples of a step in order, for a block of channels; the others take a block of sequences, all H
units of each. Samples are padded: sample `s = t * N + n`. Padded positions change no state, and every kernel writes
zeros for them, so nothing that is kept depends on uninitialized memory.

Tensors with a time axis are found through `table`, their addresses on the device, and the step through `counter`, so
that a captured graph serves every call and every step. A program never reads what it or another program of the same
launch has written; there are no atomics, so runs repeat to the bit.

Loads stand before stores: the compiler moves none across a store, and each that waits behind one costs the time of a
trip to memory. In programs of several warps a barrier stands between them: the warp that loads a value, such as a state
or a gradient that the step replaces, need not be the one that stores it. Those of `stream_*` are one warp, whose lanes
load and store what is theirs.

A float constant is rounded to float32 unless it stands in the same expression as a tensor of float64: constants are
used where they are needed, never held in a variable, and `tl.maximum` and `tl.minimum`, which also drop NaN, are not
used.
"""

import re
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Code(NamedTuple):
    """What decides the code of the kernels of a call.

    Triton 3.6 passes a field from one function to another only as `tl.constexpr(field)`, unless it is a dtype or None.
    """

    kind: str  # of the gates' norm: none, layer, rms, frozen (online, evaluation) or streamed (online, training)
    cell_kind: str  # of the cell state's norm
    guard: str
    eps: float
    scale_eps: float
    limit: float  # of the guard "clamp"
    alpha: float  # decay factor of the statistics
    rest: float  # 1 - decay factor of the control process
    floor: float | None  # bound on the decay of v
    wide: Any  # dtype of states and statistics
    narrow: Any  # dtype of inputs, outputs and products
    save: bool  # keep what the backward pass needs
    relu: bool
    reset: bool
    stay_h: Any  # zoneout: dtype of the shares of the old state, None without
    stay_c: Any
    grad_y: bool


# Slots of the table: tensors with a time axis, [T, N, *]. `C = G * H` channels; kept by a norm: y, rstd, scale.
GATES = tl.constexpr(0)  # [C] input part, then the gates
OLD_H = tl.constexpr(1)  # [P] state before the step
OLD_C = tl.constexpr(2)  # [H]
EXTRA = tl.constexpr(3)  # [H] LSTM: tanh(c'); GRU: recurrent part of n
NORM = tl.constexpr(4)  # three slots: y [C], rstd [C] or [G], scale of the guard [G]
CELL = tl.constexpr(7)  # three slots, as NORM, with G = 1
OUT = tl.constexpr(10)  # [P]
RESET = tl.constexpr(11)  # int8, true if the state before the step is zero
STAY_H = tl.constexpr(12)  # [P] share of the old state that is kept
STAY_C = tl.constexpr(13)  # [H]
GRAD_Y = tl.constexpr(14)  # [P]
D_PRE = tl.constexpr(15)  # [C] gradient of the input part
D_Z = tl.constexpr(16)  # [C] gradient after the norm's scale and shift, if no stream sums it
D_CELL = tl.constexpr(17)  # [H] streamed: gradient of the cell state before its norm; else as D_Z
D_APART = tl.constexpr(18)  # GRU [H] gradient of the recurrent part of n; LSTM [P] that of the projected h
SLOTS = 19

# Parts of a step, if a stream comes between them.
WHOLE = tl.constexpr(0)
FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)


def _kernel(function: Any) -> Any:
    """A kernel that is not compiled again for other sizes, positions or addresses."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    sizes = r"offset|direction|first|low|high|N|H|P|C|a\d+"
    return triton.jit(do_not_specialize=[name for name in names if re.fullmatch(sizes, name)])(function)


@_kernel
def publish(
    table, counter, first, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18
):  # fmt: skip
    """Write the addresses and the first step to the device, as arguments of a launch: no copy from the host."""
    tl.store(counter, first.to(tl.int64))
    addresses = (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18)
    for slot in tl.static_range(19):
        tl.store(table + slot, addresses[slot].to(tl.int64))


@triton.jit
def _addresses(table):
    """All addresses, loaded before anything is stored; those without use cost nothing."""
    found = ()
    for slot in tl.static_range(19):
        found += (tl.load(table + slot),)
    return found


@triton.jit
def _at(addresses, slot: tl.constexpr, dtype: tl.constexpr):
    return addresses[slot].to(tl.pointer_type(dtype))


@triton.jit
def _tanh(x):
    """Of small x the power series: the quotient loses their digits."""
    z = x * x
    series = 62 / 2835 + z * (-1382 / 155925)
    series = 2 / 15 + z * (-17 / 315 + z * series)
    series = x * (1.0 + z * (-1 / 3 + z * series))
    t = tl.exp(-2.0 * tl.abs(x))
    r = (1.0 - t) / (1.0 + t)
    # Where the next term, 0.0036 x^12, is below the rounding.
    small = tl.abs(x) < (0.07 if x.dtype == tl.float64 else 0.3)
    return tl.where(small, series, tl.where(x < 0, -r, r))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _step(table, counter, lengths, offset, direction, N, K: tl.constexpr, ROWS: tl.constexpr):
    """Samples, sequences, and which of these exist, are not padding, and have a state before the step; [ROWS, 1]."""
    t = tl.load(counter) + offset * direction
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    s = t * N + n
    inside = n < N
    active = inside
    if lengths is not None:
        active = inside & (t < tl.load(lengths + n, mask=inside, other=0))
    carries = active
    if K.reset:
        carries = active & (tl.load(_at(table, RESET, tl.int8) + s, mask=active, other=1) == 0)
    return s, n, inside, active, carries


@_kernel
def stream(
    table, counter, part, mean, var, lengths, offset, direction, low, high, N, C,
    SOURCE: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize the channels low..high of a step, sample by sample; update mean and var.

    `d = x - mean`, `y = d / sqrt(var + eps)`, then `var = a var + a (1 - a) d^2`, `mean = mean + (1 - a) d`.
    """
    table, t = _addresses(table), tl.load(counter) + offset * direction
    c = low + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = c < high
    source, y_kept, rstd_kept = _at(table, SOURCE, K.wide), _at(table, KEPT, K.wide), _at(table, KEPT + 1, K.wide)
    m = tl.load(mean + c, mask=lanes, other=0.0)
    v = tl.load(var + c, mask=lanes, other=1.0)
    for first in range(0, N, UNROLL):
        xs = ()
        actives = ()
        for i in tl.static_range(UNROLL):  # all loads before the chain that depends on them
            n = first + i
            active = n < N
            if lengths is not None:
                active = active & (t < tl.load(lengths + n, mask=active, other=0))
            x = tl.load(source + (t * N + n) * C + c, mask=lanes & active, other=0.0)
            if part is not None:
                carries = active
                if K.reset:
                    carries = active & (tl.load(_at(table, RESET, tl.int8) + t * N + n, mask=active, other=1) == 0)
                x += tl.load(part + n * C.to(tl.int64) + c, mask=lanes & carries, other=0.0).to(K.wide)
            xs += (x,)
            actives += (active,)
        for i in tl.static_range(UNROLL):
            d = xs[i] - m
            r = 1.0 / tl.sqrt(v + K.eps)
            at = (t * N + first + i) * C + c
            inside = lanes & (first + i < N)
            tl.store(y_kept + at, tl.where(actives[i], d * r, 0.0), mask=inside)
            if K.save:
                tl.store(rstd_kept + at, tl.where(actives[i], r, 0.0), mask=inside)
            v = tl.where(actives[i], K.alpha * v + (K.alpha * (1.0 - K.alpha)) * d * d, v)
            m = tl.where(actives[i], m + (1.0 - K.alpha) * d, m)
    tl.store(mean + c, m, mask=lanes)
    tl.store(var + c, v, mask=lanes)


@triton.jit
def _controlled(u, v, g, y, r, active, K: tl.constexpr):
    """The gradient of one sample and the states of the control process after it."""
    e = g - K.rest * v * y
    decay = 1.0 - K.rest * y * y
    if K.floor is not None:
        decay = tl.where(decay < K.floor, tl.full(decay.shape, K.floor, decay.dtype), decay)
    dx = e * r - K.rest * u
    return tl.where(active, u + dx, u), tl.where(active, decay * v + g * y, v), tl.where(active, dx, 0.0)


@_kernel
def stream_backward(
    table, counter, u, v, scale, grad_scale, grad_shift, operand, lengths, offset, direction, low, high, N, C,
    D: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The control process: replace the gradients after scale and shift by those of the pre-activations; update u and v.

    `e = g - (1 - a) v y`, `v = (1 - (1 - a) y^2) v + g y`, `dx = e / s - (1 - a) u`, `u = u + dx`. Sums the gradients
    of scale and shift; writes those of the recurrent part to `operand`.
    """
    table, t = _addresses(table), tl.load(counter) + offset * direction
    c = low + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = c < high
    grads, y_kept, rstd_kept = _at(table, D, K.wide), _at(table, KEPT, K.wide), _at(table, KEPT + 1, K.wide)
    us, vs = tl.load(u + c, mask=lanes, other=0.0), tl.load(v + c, mask=lanes, other=0.0)
    weight, gw, gb = us, tl.zeros_like(us), tl.zeros_like(us)
    if scale is not None:
        weight = tl.load(scale + c, mask=lanes, other=0.0)
    for first in range(0, N, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            n = first + i
            active = n < N
            if lengths is not None:
                active = active & (t < tl.load(lengths + n, mask=active, other=0))
            carries = active
            if K.reset:
                carries = active & (tl.load(_at(table, RESET, tl.int8) + t * N + n, mask=active, other=1) == 0)
            at, ok = (t * N + n) * C + c, lanes & active
            g, y = tl.load(grads + at, mask=ok, other=0.0), tl.load(y_kept + at, mask=ok, other=0.0)
            loaded += ((g, y, tl.load(rstd_kept + at, mask=ok, other=0.0), active, carries),)
        for i in tl.static_range(UNROLL):
            g, y, r, active, carries = loaded[i]
            inside = lanes & (first + i < N)
            if scale is not None:
                gw += g * y
                gb += g
                g = g * weight
            us, vs, dx = _controlled(us, vs, g, y, r, active, K)
            tl.store(grads + (t * N + first + i) * C + c, dx, mask=inside)
            if operand is not None:
                at = operand + (first + i) * C.to(tl.int64) + c
                tl.store(at, tl.where(carries, dx, 0.0).to(K.narrow), mask=inside)
    tl.store(u + c, us, mask=lanes)
    tl.store(v + c, vs, mask=lanes)
    if scale is not None:
        tl.store(grad_scale + c, tl.load(grad_scale + c, mask=lanes, other=0.0) + gw, mask=lanes)
        tl.store(grad_shift + c, tl.load(grad_shift + c, mask=lanes, other=0.0) + gb, mask=lanes)


@triton.jit
def _normalized(x, g, h, ok, H, scale, shift, mean, rstd, KIND: tl.constexpr, K: tl.constexpr):
    """y, rstd, the guard's scale and the normalized, scaled and guarded values of one gate; `x` is y if streamed."""
    c, lanes = g * H + h, h < H
    y, r, guard, q = x, x, x, x
    if KIND == "layer" or KIND == "rms":
        if KIND == "layer":
            x = tl.where(ok, x - tl.sum(x, 1, keep_dims=True) / H, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / H + K.eps)
        y = x * r
    if KIND == "frozen":
        y = (x - tl.load(mean + c, mask=lanes, other=0.0)) * tl.load(rstd + c, mask=lanes, other=0.0)
        y = tl.where(ok, y, 0.0)
    if KIND != "none":
        q = y
        if scale is not None:
            q = y * tl.load(scale + c, mask=lanes, other=0.0) + tl.load(shift + c, mask=lanes, other=0.0)
        if K.guard == "scale":
            guard = 1.0 / tl.sqrt(tl.sum(q * q, 1, keep_dims=True) / H + K.scale_eps)
            q = q * guard
        if K.guard == "clamp":
            limit = tl.full(q.shape, K.limit, q.dtype)
            q = tl.where(q > limit, limit, tl.where(q < -limit, -limit, q))
    return y, r, guard, q


@triton.jit
def _keep(table, s, g, G, h, H, y, r, guard, rows, cells, SLOT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr):
    """Write what the backward pass of `_normalized` needs. `rows` [ROWS, 1] and `cells` [ROWS, BLOCK] exist."""
    if K.save and KIND != "none":
        if KIND != "streamed":
            tl.store(_at(table, SLOT, K.wide) + (s * G + g) * H + h, y, mask=cells)
        if KIND == "layer" or KIND == "rms":
            tl.store(_at(table, SLOT + 1, K.wide) + s * G + g, r, mask=rows)
        if K.guard == "scale":
            tl.store(_at(table, SLOT + 2, K.wide) + s * G + g, guard, mask=rows)


@triton.jit
def _denormalized(
    dq, table, s, g, G, h, rows, ok, H, scale, shift, rstd,
    SLOT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradients of x and of z, the values before the guard, from that of `_normalized`; the same if streamed."""
    c, lanes = g * H + h, h < H
    d, dz = dq, dq
    if KIND != "none":
        y = tl.load(_at(table, SLOT, K.wide) + s * G * H + c, mask=ok, other=0.0)
        z, w = y, y
        if scale is not None:
            w = tl.load(scale + c, mask=lanes, other=0.0)
            z = y * w + tl.load(shift + c, mask=lanes, other=0.0)
        if K.guard == "scale":
            guard = tl.load(_at(table, SLOT + 2, K.wide) + s * G + g, mask=rows, other=0.0)
            q = z * guard
            d = (d - q * (tl.sum(q * d, 1, keep_dims=True) / H)) * guard
        if K.guard == "clamp":
            d = tl.where(tl.abs(z) <= tl.full(z.shape, K.limit, z.dtype), d, 0.0)
        dz = d
        if KIND != "streamed" and scale is not None:
            d = d * w
        if KIND == "frozen":
            d = d * tl.load(rstd + c, mask=lanes, other=0.0)
        if KIND == "layer" or KIND == "rms":
            along = tl.sum(d * y, 1, keep_dims=True) / H
            if KIND == "layer":
                d = d - tl.sum(d, 1, keep_dims=True) / H
            r = tl.load(_at(table, SLOT + 1, K.wide) + s * G + g, mask=rows, other=0.0)
            d = tl.where(ok, (d - y * along) * r, 0.0)
    return d, dz


@triton.jit
def _pre(table, part, s, n, c, C, ok, carries, KIND: tl.constexpr, K: tl.constexpr):
    """A gate's pre-activations, or its normalized ones if streamed. A reset state has no recurrent part."""
    if KIND == "streamed":
        x = tl.load(_at(table, NORM, K.wide) + s * C + c, mask=ok, other=0.0)
    else:
        x = tl.load(_at(table, GATES, K.wide) + s * C + c, mask=ok, other=0.0)
        x += tl.load(part + n * C + c, mask=ok & carries, other=0.0).to(K.wide)
    return x


@triton.jit
def _zoned(new, old, table, at, ok, STAY: tl.constexpr, SLOT: tl.constexpr, K: tl.constexpr):
    """A state after zoneout."""
    if STAY is not None:
        stay = tl.load(_at(table, SLOT, STAY) + at, mask=ok, other=0).to(K.wide)
        new = stay * old + (1.0 - stay) * new
    return new


@triton.jit
def _split(grad, table, at, ok, STAY: tl.constexpr, SLOT: tl.constexpr, K: tl.constexpr):
    """Backward of `_zoned`: the gradients of the new and of the old state."""
    old = tl.zeros_like(grad)
    if STAY is not None:
        stay = tl.load(_at(table, SLOT, STAY) + at, mask=ok, other=0).to(K.wide)
        old = grad * stay
        grad = grad * (1.0 - stay)
    return grad, old


@triton.jit
def _renew(new, old, table, mask, s, n, h, P, ok, K: tl.constexpr):
    """The new h after zoneout, and what of it enters the next step's product."""
    new = _zoned(new, old, table, s * P + h, ok, K.stay_h, STAY_H, K)
    enters = new
    if mask is not None:
        enters = new * tl.load(mask + n * P + h, mask=ok, other=0.0)
    return new, enters


@triton.jit
def _leave(table, new, enters, old, entering, h_state, s, n, h, P, cells, ok, K: tl.constexpr):
    """End a step with its new h: output, state, and what enters the next step's product."""
    tl.store(entering + n * P + h, enters.to(K.narrow), mask=ok)
    tl.store(h_state + n * P + h, new, mask=ok)
    tl.store(_at(table, OUT, K.narrow) + s * P + h, tl.where(ok, new, 0.0).to(K.narrow), mask=cells)
    if K.save:
        tl.store(_at(table, OLD_H, K.wide) + s * P + h, old, mask=cells)


@triton.jit
def _arrive(table, direct, product, mask, s, n, h, P, cells, ok, K: tl.constexpr):
    """The gradients of h from the steps after this one, and of h with the output's; [ROWS, BLOCK]."""
    recurrent = tl.load(product + n * P + h, mask=cells, other=0.0).to(K.wide)
    if mask is not None:
        recurrent = recurrent * tl.load(mask + n * P + h, mask=cells, other=0.0)
    later = tl.load(direct + n * P + h, mask=cells, other=0.0) + recurrent
    out = tl.where(ok, later, 0.0)
    if K.grad_y:
        out += tl.load(_at(table, GRAD_Y, K.narrow) + s * P + h, mask=ok, other=0.0).to(K.wide)
    return later, out


@triton.jit
def _pass(direct, later, through, n, h, P, cells, active, carries):
    """Hand `through` to the old state: zero if it was reset, the whole later gradient if the position is padded."""
    tl.store(direct + n * P + h, tl.where(active, tl.where(carries, through, 0.0), later), mask=cells)


@_kernel
def lstm(
    table, counter, part, entering, hidden, h_state, c_state, mask, lengths, scale, shift, mean, rstd,
    cell_scale, cell_shift, cell_mean, cell_rstd, offset, direction, N, H,
    PART: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`hidden`: operand of the projection, None without one; then `projected` ends the step."""
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    gates, extra, C = _at(table, GATES, K.wide), _at(table, EXTRA, K.wide), 4 * H
    c_old = tl.load(c_state + n * H + h, mask=ok & carries, other=0.0)
    if PART != LAST:
        xs = ()
        for g in tl.static_range(4):
            xs += (_pre(table, part, s, n, g * H + h, C, ok, carries, tl.constexpr(K.kind), K),)
        normed = ()
        for g in tl.static_range(4):
            normed += (_normalized(xs[g], g, h, ok, H, scale, shift, mean, rstd, tl.constexpr(K.kind), K),)
        acts = (_sigmoid(normed[0][3]), _sigmoid(normed[1][3]), _tanh(normed[2][3]), _sigmoid(normed[3][3]))
        o = acts[3]
        c = tl.where(ok, acts[1] * c_old + acts[0] * acts[2], 0.0)
    if PART == LAST:
        c = tl.load(_at(table, CELL, K.wide) + s * H + h, mask=ok, other=0.0)
        o = tl.load(gates + s * C + 3 * H + h, mask=ok, other=0.0)
    if PART != FIRST:
        y_c, r_c, guard_c, c = _normalized(
            c, 0, h, ok, H, cell_scale, cell_shift, cell_mean, cell_rstd, tl.constexpr(K.cell_kind), K
        )
        t, c_new = _tanh(c), _zoned(c, c_old, table, s * H + h, ok, K.stay_c, STAY_C, K)
        if hidden is None:
            old = tl.load(h_state + n * H + h, mask=ok & carries, other=0.0)
            new, enters = _renew(o * t, old, table, mask, s, n, h, H, ok, K)
    tl.debug_barrier()
    if PART == FIRST:
        tl.store(extra + s * H + h, c, mask=cells)
    else:
        if hidden is not None:
            tl.store(hidden + n * H + h, tl.where(ok, o * t, 0.0).to(K.narrow), mask=cells)
        else:
            _leave(table, new, enters, old, entering, h_state, s, n, h, H, cells, ok, K)
        tl.store(c_state + n * H + h, c_new, mask=ok)
        if K.save:
            tl.store(extra + s * H + h, t, mask=cells)
            tl.store(_at(table, OLD_C, K.wide) + s * H + h, c_old, mask=cells)
        _keep(table, s, 0, 1, h, H, y_c, r_c, guard_c, inside, cells, CELL, tl.constexpr(K.cell_kind), K)
    if PART != LAST:
        for g in tl.static_range(4):
            y, r, guard, _ = normed[g]
            _keep(table, s, g, 4, h, H, y, r, guard, inside, cells, NORM, tl.constexpr(K.kind), K)
            if K.save or (PART == FIRST and g == 3):
                tl.store(gates + s * C + g * H + h, acts[g], mask=cells)


@_kernel
def projected(
    table, counter, product, entering, h_state, mask, lengths, offset, direction, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    ok = active & (h < P)
    old = tl.load(h_state + n * P + h, mask=ok & carries, other=0.0)
    new = tl.load(product + n * P + h, mask=ok, other=0.0).to(K.wide)
    new, enters = _renew(new, old, table, mask, s, n, h, P, ok, K)
    tl.debug_barrier()
    _leave(table, new, enters, old, entering, h_state, s, n, h, P, inside & (h < P), ok, K)


@_kernel
def gru(
    table, counter, part, entering, h_state, mask, lengths, bias, scale, shift, mean, rstd, offset, direction, N, H,
    PART: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`bias` [H]: of the recurrent part of n, None without one."""
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    C = 3 * H
    gates, at = _at(table, GATES, K.wide) + s * C + h, 2 * H + h
    old = tl.load(h_state + n * H + h, mask=ok & carries, other=0.0)
    if PART != LAST:
        x_r = _pre(table, part, s, n, h, C, ok, carries, tl.constexpr(K.kind), K)
        x_z = _pre(table, part, s, n, H + h, C, ok, carries, tl.constexpr(K.kind), K)
        x = tl.load(gates + 2 * H, mask=ok, other=0.0)
        apart = tl.load(part + n * C + at, mask=ok & carries, other=0.0).to(K.wide)
        if bias is not None:
            apart += tl.load(bias + h, mask=ok, other=0.0)
        y_r, r_r, guard_r, r = _normalized(x_r, 0, h, ok, H, scale, shift, mean, rstd, tl.constexpr(K.kind), K)
        y_z, r_z, guard_z, z = _normalized(x_z, 1, h, ok, H, scale, shift, mean, rstd, tl.constexpr(K.kind), K)
        r, z = _sigmoid(r), _sigmoid(z)
        x = tl.where(ok, x + r * apart, 0.0)
    if PART == LAST:
        x = tl.load(_at(table, NORM, K.wide) + s * C + at, mask=ok, other=0.0)
        z = tl.load(gates + H, mask=ok, other=0.0)
    if PART != FIRST:
        y_n, r_n, guard_n, q = _normalized(x, 2, h, ok, H, scale, shift, mean, rstd, tl.constexpr(K.kind), K)
        n_gate = _tanh(q)
        new, enters = _renew(n_gate + z * (old - n_gate), old, table, mask, s, n, h, H, ok, K)
    tl.debug_barrier()
    if PART == FIRST:
        tl.store(gates + 2 * H, x, mask=cells)
    else:
        _leave(table, new, enters, old, entering, h_state, s, n, h, H, cells, ok, K)
        _keep(table, s, 2, 3, h, H, y_n, r_n, guard_n, inside, cells, NORM, tl.constexpr(K.kind), K)
        if K.save:
            tl.store(gates + 2 * H, n_gate, mask=cells)
    if PART != LAST:
        _keep(table, s, 0, 3, h, H, y_r, r_r, guard_r, inside, cells, NORM, tl.constexpr(K.kind), K)
        _keep(table, s, 1, 3, h, H, y_z, r_z, guard_z, inside, cells, NORM, tl.constexpr(K.kind), K)
        if K.save:
            tl.store(_at(table, EXTRA, K.wide) + s * H + h, apart, mask=cells)
            tl.store(gates, r, mask=cells)
        if K.save or PART == FIRST:
            tl.store(gates + H, z, mask=cells)


@_kernel
def rnn(
    table, counter, part, entering, h_state, mask, lengths, scale, shift, mean, rstd, offset, direction, N, H,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    old = tl.load(h_state + n * H + h, mask=ok & carries, other=0.0)
    x = _pre(table, part, s, n, h, H, ok, carries, tl.constexpr(K.kind), K)
    y, r, guard, q = _normalized(x, 0, h, ok, H, scale, shift, mean, rstd, tl.constexpr(K.kind), K)
    if K.relu:
        q = tl.where(q < 0, 0.0, q)
    else:
        q = _tanh(q)
    new, enters = _renew(q, old, table, mask, s, n, h, H, ok, K)
    tl.debug_barrier()
    _leave(table, new, enters, old, entering, h_state, s, n, h, H, cells, ok, K)
    _keep(table, s, 0, 1, h, H, y, r, guard, inside, cells, NORM, tl.constexpr(K.kind), K)
    if K.save:
        tl.store(_at(table, GATES, K.wide) + s * H + h, q, mask=cells)


@triton.jit
def _write(
    d, dz, table, operand, s, n, c, C, cells, carries, scale, KIND: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a gate. If it is streamed, `stream_backward` completes them and writes the operand."""
    tl.store(_at(table, D_PRE, K.wide) + s * C + c, d, mask=cells)
    if KIND != "streamed":
        if KIND != "none" and scale is not None:
            tl.store(_at(table, D_Z, K.wide) + s * C + c, dz, mask=cells)
        if operand is not None:
            tl.store(operand + n * C + c, tl.where(carries, d, 0.0).to(K.narrow), mask=cells)


@_kernel
def projected_backward(
    table, counter, direct, product, operand, mask, lengths, offset, direction, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`operand`: the gradient of the projected h, for the product with the projection."""
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < P), active & (h < P)
    later, out = _arrive(table, direct, product, mask, s, n, h, P, cells, ok, K)
    d, through = _split(out, table, s * P + h, ok, K.stay_h, STAY_H, K)
    tl.debug_barrier()
    _pass(direct, later, through, n, h, P, cells, active, carries)
    tl.store(_at(table, D_APART, K.wide) + s * P + h, d, mask=cells)
    tl.store(operand + n * P + h, d.to(K.narrow), mask=cells)


@_kernel
def lstm_backward(
    table, counter, direct, product, hidden, d_hidden, grad_c, operand, mask, lengths, scale, shift, rstd,
    cell_scale, cell_shift, cell_rstd, offset, direction, N, H,
    PART: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`hidden`: the gradient of h before its projection, None without one. `d_hidden`: it, from the first part."""
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    C, at = 4 * H, s * H + h
    gates, t = _at(table, GATES, K.wide) + s * C + h, tl.load(_at(table, EXTRA, K.wide) + at, mask=ok, other=0.0)
    o = tl.load(gates + 3 * H, mask=ok, other=0.0)
    dc_new, dc_old = _split(tl.load(grad_c + n * H + h, mask=ok, other=0.0), table, at, ok, K.stay_c, STAY_C, K)
    if PART != FIRST:
        i = tl.load(gates, mask=ok, other=0.0)
        f = tl.load(gates + H, mask=ok, other=0.0)
        c = tl.load(gates + 2 * H, mask=ok, other=0.0)
        c_old = tl.load(_at(table, OLD_C, K.wide) + at, mask=ok, other=0.0)
    if PART == LAST:
        dh = tl.load(d_hidden + n * H + h, mask=cells, other=0.0)
        dc = tl.load(_at(table, D_CELL, K.wide) + at, mask=ok, other=0.0)
    else:
        if hidden is not None:
            dh = tl.load(hidden + n * H + h, mask=ok, other=0.0).to(K.wide)
        else:
            later, out = _arrive(table, direct, product, mask, s, n, h, H, cells, ok, K)
            dh, through = _split(out, table, at, ok, K.stay_h, STAY_H, K)
        dc = dc_new + dh * o * (1.0 - t * t)
        dc, dz_c = _denormalized(
            dc, table, s, 0, 1, h, inside, ok, H, cell_scale, cell_shift, cell_rstd,
            CELL, tl.constexpr(K.cell_kind), K,
        )  # fmt: skip
    if PART != FIRST:
        dqs = (
            dc * c * i * (1.0 - i), dc * c_old * f * (1.0 - f), dc * i * (1.0 - c * c), dh * t * o * (1.0 - o)
        )  # fmt: skip
        ds = ()
        for g in tl.static_range(4):
            gate = _denormalized(
                dqs[g], table, s, g, 4, h, inside, ok, H, scale, shift, rstd, NORM, tl.constexpr(K.kind), K
            )  # fmt: skip
            ds += (gate,)
    tl.debug_barrier()
    if PART != FIRST:
        for g in tl.static_range(4):
            d, dz = ds[g]
            _write(d, dz, table, operand, s, n, g * H + h, C, cells, carries, scale, tl.constexpr(K.kind), K)
        tl.store(grad_c + n * H + h, tl.where(carries, dc * f + dc_old, 0.0), mask=ok)
    if PART != LAST:
        if hidden is None:
            _pass(direct, later, through, n, h, H, cells, active, carries)
        if PART == FIRST or (K.cell_kind != "none" and cell_scale is not None):
            tl.store(_at(table, D_CELL, K.wide) + at, dz_c, mask=cells)
        if PART == FIRST:
            tl.store(d_hidden + n * H + h, dh, mask=cells)


@_kernel
def gru_backward(
    table, counter, direct, product, d_hidden, operand, mask, lengths, scale, shift, rstd, offset, direction, N, H,
    PART: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    C, at = 3 * H, s * H + h
    gates = _at(table, GATES, K.wide) + s * C + h
    z = tl.load(gates + H, mask=ok, other=0.0)
    new = tl.load(gates + 2 * H, mask=ok, other=0.0)
    if PART != FIRST:
        r = tl.load(gates, mask=ok, other=0.0)
        apart = tl.load(_at(table, EXTRA, K.wide) + at, mask=ok, other=0.0)
        old = tl.load(_at(table, OLD_H, K.wide) + at, mask=ok, other=0.0)
    if PART == LAST:
        dh = tl.load(d_hidden + n * H + h, mask=cells, other=0.0)
        dn = tl.load(_at(table, D_PRE, K.wide) + s * C + 2 * H + h, mask=ok, other=0.0)
    else:
        later, out = _arrive(table, direct, product, mask, s, n, h, H, cells, ok, K)
        dh, through = _split(out, table, at, ok, K.stay_h, STAY_H, K)
        dn, dz_n = _denormalized(
            dh * (1.0 - z) * (1.0 - new * new), table, s, 2, 3, h, inside, ok, H, scale, shift, rstd,
            NORM, tl.constexpr(K.kind), K,
        )  # fmt: skip
    if PART != FIRST:
        dr, dz_r = _denormalized(
            dn * apart * r * (1.0 - r), table, s, 0, 3, h, inside, ok, H, scale, shift, rstd,
            NORM, tl.constexpr(K.kind), K,
        )  # fmt: skip
        dz, dz_z = _denormalized(
            dh * (old - new) * z * (1.0 - z), table, s, 1, 3, h, inside, ok, H, scale, shift, rstd,
            NORM, tl.constexpr(K.kind), K,
        )  # fmt: skip
    tl.debug_barrier()
    if PART != FIRST:
        _write(dr, dz_r, table, operand, s, n, h, C, cells, carries, scale, tl.constexpr(K.kind), K)
        _write(dz, dz_z, table, operand, s, n, H + h, C, cells, carries, scale, tl.constexpr(K.kind), K)
        tl.store(_at(table, D_APART, K.wide) + at, dn * r, mask=cells)
        tl.store(operand + n * C + 2 * H + h, tl.where(carries, dn * r, 0.0).to(K.narrow), mask=cells)
    if PART != LAST:
        _pass(direct, later, through + dh * z, n, h, H, cells, active, carries)
        _write(dn, dz_n, table, None, s, n, 2 * H + h, C, cells, carries, scale, tl.constexpr(K.kind), K)
        if PART == FIRST:
            tl.store(d_hidden + n * H + h, dh, mask=cells)


@_kernel
def rnn_backward(
    table, counter, direct, product, operand, mask, lengths, scale, shift, rstd, offset, direction, N, H,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    table = _addresses(table)
    s, n, inside, active, carries = _step(table, counter, lengths, offset, direction, N, K, ROWS)
    h = tl.arange(0, BLOCK)[None, :]
    cells, ok = inside & (h < H), active & (h < H)
    a = tl.load(_at(table, GATES, K.wide) + s * H + h, mask=ok, other=0.0)
    later, out = _arrive(table, direct, product, mask, s, n, h, H, cells, ok, K)
    d, through = _split(out, table, s * H + h, ok, K.stay_h, STAY_H, K)
    if K.relu:
        d = tl.where(a > 0, d, 0.0)
    else:
        d = d * (1.0 - a * a)
    d, dz = _denormalized(
        d, table, s, 0, 1, h, inside, ok, H, scale, shift, rstd, NORM, tl.constexpr(K.kind), K
    )  # fmt: skip
    tl.debug_barrier()
    _pass(direct, later, through, n, h, H, cells, active, carries)
    _write(d, dz, table, operand, s, n, h, H, cells, carries, scale, tl.constexpr(K.kind), K)
