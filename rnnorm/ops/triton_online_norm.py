# mypy: ignore-errors
# Triton's language: what looks like Python's types here is not.
"""Online normalization of channels in Triton: the functions of `rnnorm.ops.channels` for CUDA devices.

What depends on the order of the samples is a walk over [N, C]: `statistics` and `control`, a block of channels in each
program. All else is done for many samples at once. A program never reads what it or another program of the same launch
has written; there are no atomics, so runs repeat to the bit, and nothing waits for the device.

A float constant is rounded to float32 unless it stands in the same expression as a tensor of float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnorm.norms import Constants
from rnnorm.ops import library
from rnnorm.ops.channels import like

_CHANNELS = 64  # of a program that walks over the samples
_UNROLL = 8  # samples that are loaded before the chain that depends on them
_TILE = 1024  # values of a program's tile


class Code(NamedTuple):
    """What decides the code of the kernels of a call."""

    guard: str
    eps: float
    limit: float  # of the guard "clamp"
    alpha: float  # decay factor of the statistics
    rest: float  # 1 - decay factor of the control process
    floor: float | None  # bound on the decay of v
    wide: Any  # dtype of states and statistics
    channels_last: bool


_kernel = triton.jit(do_not_specialize=["N"])


@triton.jit
def _place(n, c, d, C, D, K: tl.constexpr):
    """Offsets of values [channels, values] of sample n."""
    return n * C * D + (d.to(tl.int64) * C + c if K.channels_last else c * D + d)


@triton.jit
def _of_tile(C, CHANNELS: tl.constexpr):
    """The sample, the channels [channels, 1], which of them exist, and their places in [N, C] of a program."""
    tiles = tl.cdiv(C, CHANNELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = (tl.program_id(0) % tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    return n, c, c < C, n * C + c


@triton.jit
def _affine(c, lanes, r, weight, bias):
    """Factors of `z = a * (x - mean) + b`."""
    # Else, not after it: the compiler reads on behind a return, with `weight` as None.
    if weight is None:
        return r, tl.zeros_like(r)
    else:
        return r * tl.load(weight + c, mask=lanes, other=0.0), tl.load(bias + c, mask=lanes, other=0.0)


@triton.jit
def _of_z(given, z, factor, pull, K: tl.constexpr):
    """The gradient of z from that of the guarded value."""
    if K.guard == "scale":
        return factor * given - pull * z
    elif K.guard == "clamp":
        limit = tl.full(z.shape, K.limit, z.dtype)
        return tl.where((z >= -limit) & (z <= limit), given, tl.zeros_like(z))
    else:
        return given


@_kernel
def moments(x, m, w, C, D, K: tl.constexpr, CHANNELS: tl.constexpr, VALUES: tl.constexpr):
    """Each sample's own mean and biased variance [N, C]."""
    n, c, lanes, at = _of_tile(C, CHANNELS)
    total = tl.zeros((CHANNELS, VALUES), K.wide)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        total += tl.load(x + _place(n, c, d, C, D, K), mask=lanes & (d < D), other=0.0).to(K.wide)
    mean = tl.sum(total, 1, keep_dims=True) / D
    squares = tl.zeros((CHANNELS, VALUES), K.wide)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        inside = lanes & (d < D)
        deviation = tl.load(x + _place(n, c, d, C, D, K), mask=inside, other=0.0).to(K.wide) - mean
        squares += tl.where(inside, deviation * deviation, 0.0)
    tl.store(m + at, mean, mask=lanes)
    tl.store(w + at, tl.sum(squares, 1, keep_dims=True) / D, mask=lanes)


@_kernel
def statistics(
    m, w, mean, var, before, rstd, new_mean, new_var, N, C, K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    """For each sample the mean before it and 1 / sqrt(var + eps) [N, C]; the statistics after all of them [C].

    `d = m - mean`, `var = a var + (1 - a) w + a (1 - a) d^2`, `mean = mean + (1 - a) d`.
    """
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = c < C
    mu, s = tl.load(mean + c, mask=lanes, other=0.0), tl.load(var + c, mask=lanes, other=1.0)
    for first in range(0, N, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            inside = lanes & (first + i < N)
            at = (first + i + tl.zeros_like(c)) * C + c  # 64 bits
            own = tl.load(m + at, mask=inside, other=0.0).to(K.wide)
            wide = own
            if w is not None:
                wide = tl.load(w + at, mask=inside, other=0.0)
            loaded += ((own, wide, inside, at),)
        for i in tl.static_range(UNROLL):
            own, wide, inside, at = loaded[i]
            tl.store(before + at, mu, mask=inside)
            tl.store(rstd + at, 1.0 / tl.sqrt(s + K.eps), mask=inside)
            d = own - mu
            moved = K.alpha * s + (K.alpha * (1.0 - K.alpha)) * d * d
            if w is not None:
                moved += (1.0 - K.alpha) * wide
            s = tl.where(inside, moved, s)
            mu = tl.where(inside, mu + (1.0 - K.alpha) * d, mu)
    tl.store(new_mean + c, mu, mask=lanes)
    tl.store(new_var + c, s, mask=lanes)


@_kernel
def normalize(
    x, out, before, rstd, weight, bias, factor, C, D, K: tl.constexpr, CHANNELS: tl.constexpr, VALUES: tl.constexpr
):
    """The output."""
    n, c, lanes, at = _of_tile(C, CHANNELS)
    mu, r = tl.load(before + at, mask=lanes, other=0.0), tl.load(rstd + at, mask=lanes, other=0.0)
    a, b = _affine(c, lanes, r, weight, bias)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        place, inside = _place(n, c, d, C, D, K), lanes & (d < D)
        z = a * (tl.load(x + place, mask=inside, other=0.0).to(K.wide) - mu) + b
        if K.guard == "scale":
            z = z * tl.load(factor + n)
        if K.guard == "clamp":
            limit = tl.full(z.shape, K.limit, z.dtype)
            z = tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))
        tl.store(out + place, z.to(out.dtype.element_ty), mask=inside)


@_kernel
def squares(
    x, grad, before, rstd, weight, bias, zz, gz, C, D, K: tl.constexpr, CHANNELS: tl.constexpr, VALUES: tl.constexpr
):
    """For the guard `scale`: sums over a sample [N, C] of z * z and, where there is a gradient, of gradient times z."""
    n, c, lanes, at = _of_tile(C, CHANNELS)
    mu, r = tl.load(before + at, mask=lanes, other=0.0), tl.load(rstd + at, mask=lanes, other=0.0)
    a, b = _affine(c, lanes, r, weight, bias)
    sum_zz = tl.zeros((CHANNELS, VALUES), K.wide)
    sum_gz = tl.zeros((CHANNELS, VALUES), K.wide)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        place, inside = _place(n, c, d, C, D, K), lanes & (d < D)
        z = a * (tl.load(x + place, mask=inside, other=0.0).to(K.wide) - mu) + b
        sum_zz += tl.where(inside, z * z, 0.0)
        if grad is not None:
            sum_gz += tl.load(grad + place, mask=inside, other=0.0).to(K.wide) * z
    tl.store(zz + at, tl.sum(sum_zz, 1, keep_dims=True), mask=lanes)
    if grad is not None:
        tl.store(gz + at, tl.sum(sum_gz, 1, keep_dims=True), mask=lanes)


@_kernel
def sums(
    x,
    grad,
    before,
    rstd,
    weight,
    bias,
    factor,
    pull,
    g,
    gd,
    C,
    D,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Sums over a sample [N, C] of the gradient of z and of its product with x - mean."""
    n, c, lanes, at = _of_tile(C, CHANNELS)
    mu, r = tl.load(before + at, mask=lanes, other=0.0), tl.load(rstd + at, mask=lanes, other=0.0)
    a, b = _affine(c, lanes, r, weight, bias)
    of_sample, pulled = mu, mu
    if K.guard == "scale":
        of_sample, pulled = tl.load(factor + n), tl.load(pull + n)
    sum_g = tl.zeros((CHANNELS, VALUES), K.wide)
    sum_gd = tl.zeros((CHANNELS, VALUES), K.wide)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        place, inside = _place(n, c, d, C, D, K), lanes & (d < D)
        from_mean = tl.load(x + place, mask=inside, other=0.0).to(K.wide) - mu
        given = tl.load(grad + place, mask=inside, other=0.0).to(K.wide)
        of_z = tl.where(inside, _of_z(given, a * from_mean + b, of_sample, pulled, K), 0.0)
        sum_g += of_z
        sum_gd += of_z * from_mean
    tl.store(g + at, tl.sum(sum_g, 1, keep_dims=True), mask=lanes)
    tl.store(gd + at, tl.sum(sum_gd, 1, keep_dims=True), mask=lanes)


@_kernel
def control(
    m, w, before, rstd, weight, g, gd, u, v, of_d, shift, grad_weight, grad_bias, N, C, D,
    K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The control process: `dx = a * g + of_d * (x - mean) + shift` with the factors of each sample [N, C]; moves u, v.

    `v = (1 - (1 - a) mean(y^2)) v + mean(g y)`, `u = u + mean(dx)`. Sums the gradients of weight and bias [C].
    """
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = c < C
    us, vs = tl.load(u + c, mask=lanes, other=0.0), tl.load(v + c, mask=lanes, other=0.0)
    scale = tl.full(us.shape, 1.0, us.dtype)
    if weight is not None:
        scale = tl.load(weight + c, mask=lanes, other=0.0)
    sum_weight, sum_bias = tl.zeros_like(us), tl.zeros_like(us)
    for first in range(0, N, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            inside = lanes & (first + i < N)
            at = (first + i + tl.zeros_like(c)) * C + c  # 64 bits
            d = tl.load(m + at, mask=inside, other=0.0).to(K.wide) - tl.load(before + at, mask=inside, other=0.0)
            dd = d * d
            if w is not None:
                dd += tl.load(w + at, mask=inside, other=0.0)
            r = tl.load(rstd + at, mask=inside, other=0.0)
            g_mean = tl.load(g + at, mask=inside, other=0.0) / D
            gd_mean = tl.load(gd + at, mask=inside, other=0.0) / D
            loaded += ((d, dd, r, g_mean, gd_mean, inside, at),)
        for i in tl.static_range(UNROLL):
            d, dd, r, g_mean, gd_mean, inside, at = loaded[i]
            sum_weight += r * gd_mean * D
            sum_bias += g_mean * D
            factor = -(K.rest * vs) * r * r
            moved = -(K.rest * us)
            tl.store(of_d + at, factor, mask=inside)
            tl.store(shift + at, moved, mask=inside)
            us = tl.where(inside, us + scale * r * g_mean + factor * d + moved, us)
            decay = 1.0 - K.rest * (r * r * dd)
            if K.floor is not None:
                decay = tl.where(decay < K.floor, tl.full(decay.shape, K.floor, decay.dtype), decay)
            vs = tl.where(inside, decay * vs + scale * r * gd_mean, vs)
    tl.store(u + c, us, mask=lanes)
    tl.store(v + c, vs, mask=lanes)
    if weight is not None:
        tl.store(grad_weight + c, sum_weight, mask=lanes)
        tl.store(grad_bias + c, sum_bias, mask=lanes)


@_kernel
def gradient(
    x,
    grad,
    out,
    before,
    rstd,
    weight,
    bias,
    factor,
    pull,
    of_d,
    shift,
    C,
    D,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradient of the input."""
    n, c, lanes, at = _of_tile(C, CHANNELS)
    mu, r = tl.load(before + at, mask=lanes, other=0.0), tl.load(rstd + at, mask=lanes, other=0.0)
    a, b = _affine(c, lanes, r, weight, bias)
    of_mean, moved = tl.load(of_d + at, mask=lanes, other=0.0), tl.load(shift + at, mask=lanes, other=0.0)
    of_sample, pulled = mu, mu
    if K.guard == "scale":
        of_sample, pulled = tl.load(factor + n), tl.load(pull + n)
    for first in range(0, D, VALUES):
        d = first + tl.arange(0, VALUES)[None, :]
        place, inside = _place(n, c, d, C, D, K), lanes & (d < D)
        from_mean = tl.load(x + place, mask=inside, other=0.0).to(K.wide) - mu
        given = tl.load(grad + place, mask=inside, other=0.0).to(K.wide)
        dx = a * _of_z(given, a * from_mean + b, of_sample, pulled, K) + of_mean * from_mean + moved
        tl.store(out + place, dx.to(out.dtype.element_ty), mask=inside)


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class _Call:
    """A call's input, and what both passes compute of it: each sample's moments and the statistics before it."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        guard: str,
        constants: Any,
    ) -> None:
        self.constants = Constants(*constants)
        self.N, self.C = x.shape[:2]
        self.D = x[0, 0].numel()
        last = x.movedim(1, -1).is_contiguous()
        self.x = x if last else x.contiguous()
        self.affine = (weight, bias) if weight is None else (weight.contiguous(), bias.contiguous())
        given, single = self.constants, self.D == 1
        floor = None if given.control_floor == float("-inf") else given.control_floor
        across = 1 if not last or single else 32
        values = min(_TILE // across, triton.next_power_of_2(self.D))
        channels = across if not single else min(_TILE, triton.next_power_of_2(self.C))
        self.tile = channels, values
        self.code = Code(
            *(guard, given.eps, given.clamp_limit, given.alpha_fwd, 1 - given.alpha_bwd, floor, _DTYPES[mean.dtype]),
            last,
        )
        self.wide = mean
        self.m, self.w = self.x, None
        if not single:
            self.m, self.w = self.made(), self.made()
            moments[self.tiles](self.x, self.m, self.w, self.C, self.D, self.code, *self.tile)
        self.before, self.rstd, self.new = self.made(), self.made(), (torch.empty_like(mean), torch.empty_like(var))
        statistics[self.walks](
            *(self.m, self.w, mean.contiguous(), var.contiguous(), self.before, self.rstd, *self.new, self.N, self.C),
            *(self.code, _UNROLL, _CHANNELS),
        )

    @property
    def tiles(self) -> tuple[int]:
        return (self.N * triton.cdiv(self.C, self.tile[0]),)  # along the one axis of a grid that may exceed 65,535

    @property
    def walks(self) -> tuple[int]:
        return (triton.cdiv(self.C, _CHANNELS),)

    def made(self) -> Tensor:
        """An uninitialized value of each sample and channel."""
        return self.wide.new_empty(self.N, self.C)

    def scale(self, grad: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """For the guard `scale` what each sample is multiplied by [N], and what its gradient is pulled by."""
        if self.code.guard != "scale":
            return None, None
        zz, gz = self.made(), None if grad is None else self.made()
        given = self.x, grad, self.before, self.rstd, *self.affine, zz, gz
        squares[self.tiles](*given, self.C, self.D, self.code, *self.tile)
        values = self.C * self.D
        factor = (zz.sum(1) / values + self.constants.scale_eps).rsqrt()
        return factor, None if gz is None else factor.pow(3) * (gz.sum(1) / values)


def online_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    guard: str,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `channels.online_norm`."""
    call = _Call(x, weight, bias, mean, var, guard, constants)
    out = like(call.x)
    given = call.x, out, call.before, call.rstd, *call.affine, call.scale()[0]
    normalize[call.tiles](*given, call.C, call.D, call.code, *call.tile)
    new_mean, new_var = library.finite_or([mean, var], list(call.new))
    return out, new_mean, new_var


def online_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    guard: str,
    constants: Sequence[float],
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `channels.online_norm_backward`."""
    call = _Call(x, weight, bias, mean, var, guard, constants)
    if grad.stride() != call.x.stride():
        grad = like(call.x).copy_(grad)
    factor, pull = call.scale(grad)
    given = call.x, grad, call.before, call.rstd, *call.affine, factor, pull
    g, gd, of_d, shift = (call.made() for _ in range(4))
    sums[call.tiles](*given, g, gd, call.C, call.D, call.code, *call.tile)
    of_weight, of_bias = (mean.new_empty(0 if weight is None else call.C) for _ in range(2))
    moved = [
        value if need_input and value.is_contiguous() else value.clone(memory_format=torch.contiguous_format)
        for value in (u, v)
    ]
    with library.kept_finite(moved):
        control[call.walks](
            *(call.m, call.w, call.before, call.rstd, call.affine[0], g, gd, *moved, of_d, shift, of_weight, of_bias),
            *(call.N, call.C, call.D, call.code, _UNROLL, _CHANNELS),
        )
    if not need_input:
        return x.new_empty(0), of_weight, of_bias
    for value, new in zip((u, v), moved, strict=True):
        if new is not value:
            value.copy_(new)
    dx = like(call.x)
    gradient[call.tiles](
        *(call.x, grad, dx, *given[2:], of_d, shift, call.C, call.D, call.code, *call.tile),
    )
    return dx, of_weight, of_bias
