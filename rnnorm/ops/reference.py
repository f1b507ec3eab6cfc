"""The reference backend: the algorithm as published, a loop over steps and samples, for any device and dtype.

Autograd differentiates everything but the online normalization itself, so this is an independent check of every
hand-written gradient. It favours clarity over speed, and shares no code with the fast backends.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnorm.norms import Constants
from rnnorm.ops import library
from rnnorm.ops.backend import Backend
from rnnorm.ops.call import DIFFERENTIABLE, CallSpec, Operands, Results, Round, mogrifier_rounds, statistics_dtype
from rnnorm.ops.channels import like


class OnlineStep(torch.autograd.Function):
    """Online normalization of n samples, one by one: Chiley et al., eq. 8 (forward) and 9-12 (backward).

    `x` [n, C, D]; the forward pass updates `mean`, `var` [C] in place, the backward pass `u`, `v` [C].
    """

    @staticmethod
    def forward(ctx, x, mean, var, u, v, constants):
        alpha_fwd = constants.alpha_fwd
        y, s = torch.empty_like(x), x.new_empty(x.shape[:2])
        for n, sample in enumerate(x):
            s[n] = (var + constants.eps).sqrt()
            y[n] = (sample - mean[:, None]) / s[n][:, None]
            own_mean = sample.mean(1)
            own_var = sample.var(1, correction=0)
            d = own_mean - mean
            var.copy_(alpha_fwd * var + (1 - alpha_fwd) * own_var + alpha_fwd * (1 - alpha_fwd) * d * d)
            mean.add_((1 - alpha_fwd) * d)
        ctx.save_for_backward(y, s)
        # Not saved through autograd, which would reject their updates between forward and backward.
        ctx.control = u, v
        ctx.constants = constants
        ctx.spent = False
        return y

    @staticmethod
    def backward(ctx, grad):
        library.begin_backward(ctx, (grad,), controlled=True, repeatable=ctx.constants.alpha_bwd == 1)
        y, s = ctx.saved_tensors
        u, v = ctx.control
        rest = 1 - ctx.constants.alpha_bwd
        dx = torch.empty_like(y)
        for n, g in enumerate(grad):
            e = g - rest * v[:, None] * y[n]
            # Without a floor this is the paper's v + mean(e y).
            carry = (1 - rest * y[n].square().mean(1)).clamp(min=ctx.constants.control_floor)
            v.copy_(carry * v + (g * y[n]).mean(1))
            dx[n] = e / s[n][:, None] - rest * u[:, None]
            u.add_(dx[n].mean(1))
        return dx, *([None] * 5)


def _guard(z: Tensor, guard: str, constants: Constants) -> Tensor:
    """Apply the guard to normalized values `z` [n, G, H], gate by gate."""
    if guard == "scale":
        return z / (z.square().mean(-1, keepdim=True) + constants.scale_eps).sqrt()
    if guard == "clamp":
        return z.clamp(-constants.clamp_limit, constants.clamp_limit)
    return z


def normalizer(
    spec: CallSpec,
    H: int,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Callable[[Tensor, int], Tensor]:
    """The normalization of one layer, `normalize(pre [n, k*H], first gate)`; updates mean and var of `statistics`."""

    def normalize(pre: Tensor, first: int = 0) -> Tensor:
        if spec.norm == "none":
            return pre
        part = slice(first * H, first * H + pre.size(1))
        if statistics is not None:
            if spec.training:
                y = OnlineStep.apply(pre[:, :, None], *(s[part] for s in statistics), spec.constants)[:, :, 0]
            else:
                mean, var = (s[part] for s in statistics[:2])
                # A copy: autograd keeps it, and later training calls update the statistics.
                y = (pre - mean.clone()) / (var.clone() + spec.constants.eps).sqrt()
        else:
            gates = pre.unflatten(1, (-1, H))
            if spec.norm == "layer":
                gates = gates - gates.mean(-1, keepdim=True)
            y = (gates / (gates.square().mean(-1, keepdim=True) + spec.constants.eps).sqrt()).flatten(1)
        if weight is not None and bias is not None:
            y = y * weight[part] + bias[part]
        return _guard(y.unflatten(1, (-1, H)), spec.guard, spec.constants).flatten(1)

    return normalize


def _statistics(operands: Operands, prefix: str) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    mean, var, u, v = (getattr(operands, f"{prefix}_{name}") for name in ("mean", "var", "u", "v"))
    return None if mean is None else (mean.clone(), var.clone(), u, v)


def _mogrified(x: Tensor, h: Tensor, rounds: list[Round]) -> tuple[Tensor, Tensor]:
    """x [n, I] and h [n, P] after they have gated each other. Source: Melis et al., ICLR 2020 (arXiv 1909.01792)."""
    for number, (down, up, bias) in enumerate(rounds):
        of = (h if number % 2 == 0 else x).to(up.dtype)
        gate = 2 * F.linear(of if down is None else F.linear(of, down), up, bias).to(x.dtype).sigmoid()
        if number % 2 == 0:
            x = gate * x
        else:
            h = gate * h
    return x, h


def run(operands: Operands, spec: CallSpec, watch: Callable[[Tensor], None] = lambda _: None) -> Results:
    """Run a whole sequence step by step, online normalization sample by sample.

    `watch` is called with the inputs of the nonlinearities, [n, k*H] for the k gates that are normalized together.
    """
    library.refuse_part_on_meta(Operands._fields, operands)
    o = operands.in_product_dtype()
    T, N, _ = o.x.shape
    dtype, wide = o.x.dtype, statistics_dtype(o.x.dtype)
    H = o.weight_ih.size(0) // spec.gates
    gate_stats, cell_stats = _statistics(o, "norm"), _statistics(o, "cell_norm")
    normalize_gates = normalizer(spec, H, o.norm_scale, o.norm_shift, gate_stats)
    cell = normalizer(spec, H, o.cell_norm_scale, o.cell_norm_shift, cell_stats)
    normalize_cell: Callable[[Tensor], Tensor] = (lambda c: cell(reached(c), 0)) if spec.cell_norm else (lambda c: c)
    step = (spec.declared.capped if spec.cap else None) or spec.declared.step
    rounds = mogrifier_rounds(o, spec)

    recorded = spec.controlled and library.needs_gradient(operands[: len(DIFFERENTIABLE)])

    def reached(values: Tensor) -> Tensor:
        # The control process counts every sample, whichever operands need gradients.
        return values.detach().requires_grad_() if recorded and not values.requires_grad else values

    def normalize(pre: Tensor, first: int) -> Tensor:
        normalized = normalize_gates(reached(pre), first)
        watch(normalized)
        return normalized

    h, c = o.h.to(wide), None if o.c is None else o.c.to(wide)
    lengths = torch.full((N,), T, device="cpu") if o.lengths is None else o.lengths
    ys: list[Tensor] = [o.x.new_zeros(N, h.size(1), dtype=wide)] * T
    for t in reversed(range(T)) if spec.reverse else range(T):
        rows = torch.nonzero(lengths > t)[:, 0].to(o.x.device)
        old_h, old_c = h[rows], None if c is None else c[rows]
        if o.reset is not None:
            begins = o.reset[t, rows, None]
            old_h, old_c = old_h.masked_fill(begins, 0), None if old_c is None else old_c.masked_fill(begins, 0)
        entering = old_h if o.recurrent_mask is None else old_h * o.recurrent_mask[rows]
        x_t = o.x[t, rows]
        if rounds:
            x_t, entering = _mogrified(x_t.to(wide), entering, rounds)
        x_part = F.linear(x_t.to(dtype), o.weight_ih, o.bias_ih).to(wide)
        h_part = F.linear(entering.to(dtype), o.weight_hh, o.bias_hh).to(wide)
        new_h, new_c = step(x_part, h_part, old_h, old_c, normalize, normalize_cell)
        if o.weight_hr is not None:
            new_h = F.linear(new_h.to(dtype), o.weight_hr).to(wide)
        if o.zoneout_h is not None:
            share = o.zoneout_h[t, rows].to(wide)
            new_h = share * old_h + (1 - share) * new_h
        if o.zoneout_c is not None and old_c is not None and new_c is not None:
            share = o.zoneout_c[t, rows].to(wide)
            new_c = share * old_c + (1 - share) * new_c
        h = h.index_put((rows,), new_h)
        if c is not None and new_c is not None:
            c = c.index_put((rows,), new_c)
        ys[t] = torch.zeros_like(ys[t]).index_put((rows,), new_h)
    empty = o.x.new_empty(0)
    statistics: list[Tensor] = []
    if spec.controlled:
        before: list[Any] = [o.norm_mean, o.norm_var, o.cell_norm_mean, o.cell_norm_var]
        after = [*(gate_stats or ())[:2], *(cell_stats or ())[:2]]
        finite = torch.cat(after).isfinite().all()
        statistics = [torch.where(finite, moved, held) for moved, held in zip(after, before, strict=False)]
    mean, var, cell_mean, cell_var = [*statistics, *[empty] * 4][:4]
    return Results(
        torch.stack(ys).to(dtype),
        h.to(o.h.dtype),
        empty if c is None or o.c is None else c.to(o.c.dtype),
        *(mean, var, cell_mean, cell_var),
    )


class Reference(Backend):
    name = "reference"
    differentiable = True
    runs_special = True
    wide_weights = True

    def why_not(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None) -> str | None:
        if torch.jit.is_tracing():
            return "torch.jit.trace would record its loop for this number of steps or samples alone"
        if spec is not None and spec.controlled and torch.compiler.is_compiling():
            return "torch.compile and torch.export cannot record its control process"
        return None if dtype.is_floating_point else f"it supports floating-point dtypes only; got {dtype}"

    def saved_like(self, operands: Operands, spec: CallSpec) -> list[Tensor]:
        return []

    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        return run(operands, spec), []

    def backward(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("autograd differentiates the reference backend")

    def online_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        u: Tensor,
        v: Tensor,
        guard: str,
        constants: Constants,
    ) -> tuple[Tensor, Tensor, Tensor]:
        after = mean.clone(), var.clone()
        samples = x.reshape(*x.shape[:2], -1).to(mean.dtype)
        y = OnlineStep.apply(samples, *after, u, v, Constants(*constants))
        if weight is not None and bias is not None:
            y = y * weight.to(y.dtype)[:, None] + bias.to(y.dtype)[:, None]
        y = _guard(y.reshape(x.size(0), 1, -1), guard, Constants(*constants)).reshape(x.shape).to(x.dtype)
        y = like(x).copy_(y)
        finite = torch.cat(after).isfinite().all()
        new_mean, new_var = (torch.where(finite, b, a) for a, b in zip((mean, var), after, strict=True))
        return y, new_mean, new_var

    online_norm_backward = backward
