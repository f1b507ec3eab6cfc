"""The loop of Triton kernels over the steps of a sequence, and what surrounds it.

Before the loop, one product computes the input parts of all steps; a step is one product and a few kernels; after it,
weight gradients are one product each. Tensors with a time axis belong to the call and are found through a table of
addresses on the device. All else that a step reads and writes has fixed addresses and belongs to the loop, so its
launches, whose arguments never change, can be recorded in graphs.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnorm.ops import graphs
from rnnorm.ops import triton_kernels as kernels
from rnnorm.ops.call import DIFFERENTIABLE, CallSpec, Operands, Results, results_like, statistics_dtype

_TYPES = {
    **{torch.float64: tl.float64, torch.float32: tl.float32},
    **{torch.bfloat16: tl.bfloat16, torch.float16: tl.float16},
}
STATISTICS = ("mean", "var", "u", "v")  # of an online norm
CELLS = 256  # of a program of a kernel that takes whole rows, if a row has fewer
CHANNELS = 32  # of a program of a stream: one warp
UNROLL = 8  # samples that a stream loads at once


class Plan(NamedTuple):
    """What decides a loop's launches, apart from addresses: equal plans can share a loop."""

    device: torch.device
    dtype: torch.dtype
    cell: str
    code: kernels.Code
    direction: int  # 1 or -1, the next step of the pass
    N: int
    H: int
    P: int
    G: int
    affine: bool
    cell_affine: bool
    bias: bool  # GRU: the recurrent part of n has one
    lengths: bool
    mask: bool
    projection: bool
    precision: tuple[Any, ...]  # torch's settings for products, which a graph keeps


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, all arguments bound."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[(self.programs,)](**self.arguments)


@dataclass(frozen=True)
class Product:
    """One matrix product into a given tensor."""

    left: Tensor
    right: Tensor
    out: Tensor

    def __call__(self) -> None:
        torch.mm(self.left, self.right, out=self.out)

    def warm(self) -> None:
        """Let a thread open the library of products."""
        torch.mm(self.left, self.right)


def _kind(spec: CallSpec, on: bool) -> str:
    if not on or spec.norm != "online":
        return spec.norm if on else "none"
    return "streamed" if spec.training else "frozen"


def _stay_type(share: Tensor | None) -> Any:
    if share is None:
        return None
    return tl.int8 if share.dtype == torch.bool else _TYPES[share.dtype]


def plan(o: Operands, spec: CallSpec, backward: bool, save: bool, grad_y: bool) -> Plan:
    """The plan of a pass. `save`: the forward pass keeps what the backward needs; `grad_y`: y has a gradient."""
    constants, wide = spec.constants, _TYPES[statistics_dtype(o.x.dtype)]
    code = kernels.Code(
        kind=_kind(spec, spec.norm != "none"),
        cell_kind=_kind(spec, spec.cell_norm),
        guard=spec.guard,
        eps=constants.eps,
        scale_eps=constants.scale_eps,
        limit=constants.clamp_limit,
        alpha=constants.alpha_fwd,
        rest=1 - constants.alpha_bwd,
        floor=constants.control_floor if constants.control_floor > -math.inf else None,
        wide=wide,
        narrow=_TYPES[o.x.dtype],
        save=save,
        relu=spec.declared.gates[0].nonlinearity == "relu",
        reset=o.reset is not None,
        stay_h=_stay_type(o.zoneout_h),
        stay_c=_stay_type(o.zoneout_c),
        grad_y=grad_y,
    )
    return Plan(
        *(o.x.device, o.x.dtype, spec.cell, code, 1 if spec.reverse == backward else -1),
        *(o.x.size(1), o.weight_ih.size(0) // spec.gates, o.h.size(1), spec.gates),
        affine=o.norm_scale is not None,
        cell_affine=o.cell_norm_scale is not None,
        bias=bool(spec.declared.apart) and o.bias_hh is not None,
        lengths=o.lengths is not None,
        mask=o.recurrent_mask is not None,
        projection=o.weight_hr is not None,
        precision=_precision(),
    )


def _precision() -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    names = [
        *("fp32_precision", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"),
        *("allow_bf16_reduced_precision_reduction_split_k", "allow_fp16_reduced_precision_reduction_split_k"),
        "allow_fp16_accumulation",
    ]
    found = [getattr(matmul, name, None) for name in names]
    return getattr(torch.backends, "fp32_precision", None), *found


def block_of(units: int) -> int:
    """The units that a program computes of a row of so many, the rest masked."""
    return triton.next_power_of_2(units)


class _Loop:
    """The fixed buffers of a pass, by the names of the kernels' arguments, and its launches.

    `weight` [C, P] and `projection` [P, H] are copied at every call: another call may have other weights.
    """

    moved: tuple[str, str]  # the statistics that the pass updates

    def __init__(self, plan: Plan, record: Any = None) -> None:
        self.plan = plan
        self.lock = threading.Lock()
        self.runner = graphs.Runner(record)
        device, self.wide = plan.device, statistics_dtype(plan.dtype)
        with torch.inference_mode(False):  # later calls, in other modes, write to the same buffers
            self.fixed: dict[str, Tensor | None] = {
                name: torch.empty(shape, dtype=dtype, device=device) if on else None
                for name, dtype, shape, on in self.buffers()
            }
            self.table = torch.empty(kernels.SLOTS, dtype=torch.int64, device=device)
            self.counter = torch.empty(1, dtype=torch.int64, device=device)
        self.at = {"table": self.table, "counter": self.counter, "direction": plan.direction}

    def buffers(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bool]]:
        """Name, dtype, shape and whether the plan has it, for each buffer."""
        p, wide = self.plan, self.wide
        C = p.G * p.H
        yield "weight", p.dtype, (C, p.P), True
        yield "projection", p.dtype, (p.P, p.H), p.projection
        yield "lengths", torch.int32, (p.N,), p.lengths
        yield "mask", wide, (p.N, p.P), p.mask
        norms = (("", C, p.code.kind, p.affine), ("cell_", p.H, p.code.cell_kind, p.cell_affine))
        for prefix, width, kind, affine in norms:
            for name in ("scale", "shift"):
                yield f"{prefix}{name}", wide, (width,), affine and kind != "none"
            for name in self.moved:
                yield f"{prefix}{name}", wide, (width,), kind == "streamed" or (kind == "frozen" and name == "mean")
            yield f"{prefix}rstd", wide, (width,), kind == "frozen"

    def fill(self, **values: Tensor | float | None) -> None:
        """Set fixed buffers, those that the plan has."""
        for name, value in values.items():
            buffer = self.fixed[name]
            if buffer is not None and isinstance(value, Tensor):
                buffer.copy_(value, non_blocking=True)
            elif buffer is not None:
                buffer.fill_(value or 0.0)

    def publish(self, slots: dict[int, Tensor | None], first: int) -> None:
        """Tell the device where the call's tensors are, and its first step."""
        here = self.table.data_ptr()
        addresses = [here] * kernels.SLOTS
        for slot, tensor in slots.items():
            if tensor is not None and tensor.numel():
                if tensor.device != self.plan.device:
                    raise ValueError(
                        f"all tensors of a call must be on one device; got {tensor.device} and {self.plan.device}; "
                        "move one with .to(device)"
                    )
                addresses[slot] = tensor.data_ptr()
        kernels.publish[(1,)](self.table, self.counter, first, *addresses)

    def launches(self, count: int) -> list[graphs.Launch]:
        """Those of the next `count` steps."""
        found: list[graphs.Launch] = [launch for k in range(count) for launch in self.step(k)]
        return [*found, lambda: self.counter.add_(count * self.plan.direction)]

    def step(self, k: int) -> Iterator[graphs.Launch]:
        raise NotImplementedError

    def rows(self, kernel: Any, k: int, width: int, **own: Any) -> Launch:
        """A launch of a kernel that takes whole rows of that many units."""
        block = block_of(width)
        rows = min(triton.next_power_of_2(max(self.plan.N, 1)), max(1, CELLS // block))
        sizes = {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // 128))}
        own = {"N": self.plan.N, "H": self.plan.H, "P": self.plan.P} | own
        return self._launch(kernel, triton.cdiv(self.plan.N, rows), k, sizes | own)

    def columns(self, kernel: Any, k: int, low: int, high: int, **own: Any) -> Launch:
        """A launch of a stream over the channels of the gates low..high."""
        p = self.plan
        unroll = min(UNROLL, triton.next_power_of_2(max(p.N, 1)))
        sizes = {"low": low * p.H, "high": high * p.H, "N": p.N, "UNROLL": unroll, "BLOCK": CHANNELS, "num_warps": 1}
        return self._launch(kernel, triton.cdiv((high - low) * p.H, CHANNELS), k, sizes | {"C": p.G * p.H} | own)

    def cell_columns(self, kernel: Any, k: int, **own: Any) -> Launch:
        """A launch of a stream over the channels of the cell state."""
        named = {name.removeprefix("cell_"): value for name, value in self.fixed.items() if name.startswith("cell_")}
        return self.columns(kernel, k, 0, 1, **named, C=self.plan.H, KEPT=kernels.CELL, **own)

    def _launch(self, kernel: Any, programs: int, k: int, own: dict[str, Any]) -> Launch:
        offered = {**self.fixed, **self.at, "offset": k, "K": self.plan.code, **own}
        arguments = {name: offered[name] for name in kernel.arg_names}
        return Launch(kernel, programs, arguments | {"num_warps": own["num_warps"]})


def _parts(streamed: bool) -> list[Any]:
    return [kernels.FIRST, kernels.LAST] if streamed else [kernels.WHOLE]


class Forward(_Loop):
    moved = "mean", "var"

    def buffers(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bool]]:
        p = self.plan
        yield from super().buffers()
        yield "h_state", self.wide, (p.N, p.P), True
        yield "c_state", self.wide, (p.N, p.H), p.cell == "lstm"
        yield "bias", self.wide, (p.H,), p.bias
        yield "entering", p.dtype, (p.N, p.P), True
        yield "part", p.dtype, (p.N, p.G * p.H), True
        yield "hidden", p.dtype, (p.N, p.H), p.projection
        yield "product", p.dtype, (p.N, p.P), p.projection

    def step(self, k: int) -> Iterator[graphs.Launch]:
        f: dict[str, Any] = self.fixed
        H, P, G, code = self.plan.H, self.plan.P, self.plan.G, self.plan.code
        streamed = code.kind == "streamed"
        columns = {"SOURCE": kernels.GATES, "KEPT": kernels.NORM}
        yield Product(f["entering"], f["weight"].t(), f["part"])
        if streamed:
            yield self.columns(kernels.stream, k, 0, 2 if self.plan.cell == "gru" else G, **columns)
        if self.plan.cell == "lstm":
            for part in _parts(code.cell_kind == "streamed"):
                if part is kernels.LAST:
                    yield self.cell_columns(kernels.stream, k, SOURCE=kernels.EXTRA, part=None)
                yield self.rows(kernels.lstm, k, H, PART=part)
        elif self.plan.cell == "gru":
            for part in _parts(streamed):
                if part is kernels.LAST:
                    yield self.columns(kernels.stream, k, 2, 3, part=None, **columns)
                yield self.rows(kernels.gru, k, H, PART=part)
        else:
            yield self.rows(kernels.rnn, k, H)
        if self.plan.projection:
            yield Product(f["hidden"], f["projection"].t(), f["product"])
            yield self.rows(kernels.projected, k, P)


class Backward(_Loop):
    moved = "u", "v"

    def buffers(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bool]]:
        p = self.plan
        yield from super().buffers()
        for prefix, width, affine in (("", p.G * p.H, p.affine), ("cell_", p.H, p.cell_affine)):
            for name in ("grad_scale", "grad_shift"):
                yield f"{prefix}{name}", self.wide, (width,), affine
        yield "direct", self.wide, (p.N, p.P), True
        yield "grad_c", self.wide, (p.N, p.H), p.cell == "lstm"
        yield "d_hidden", self.wide, (p.N, p.H), (p.code.kind if p.cell == "gru" else p.code.cell_kind) == "streamed"
        yield "operand", p.dtype, (p.N, p.G * p.H), True
        yield "product", p.dtype, (p.N, p.P), True
        yield "d_projected", p.dtype, (p.N, p.P), p.projection
        yield "hidden", p.dtype, (p.N, p.H), p.projection

    def step(self, k: int) -> Iterator[graphs.Launch]:
        f: dict[str, Any] = self.fixed
        H, P, G, code = self.plan.H, self.plan.P, self.plan.G, self.plan.code
        streamed = code.kind == "streamed"
        columns = {"D": kernels.D_PRE, "KEPT": kernels.NORM}
        if self.plan.projection:
            yield self.rows(kernels.projected_backward, k, P, operand=f["d_projected"])
            yield Product(f["d_projected"], f["projection"], f["hidden"])
        if self.plan.cell == "lstm":
            for part in _parts(code.cell_kind == "streamed"):
                if part is kernels.LAST:
                    yield self.cell_columns(kernels.stream_backward, k, D=kernels.D_CELL, operand=None)
                yield self.rows(kernels.lstm_backward, k, H, PART=part)
        elif self.plan.cell == "gru":
            for part in _parts(streamed):
                if part is kernels.LAST:
                    yield self.columns(kernels.stream_backward, k, 2, 3, **columns, operand=None)
                yield self.rows(kernels.gru_backward, k, H, PART=part)
        else:
            yield self.rows(kernels.rnn_backward, k, H)
        if streamed:
            yield self.columns(kernels.stream_backward, k, 0, 2 if self.plan.cell == "gru" else G, **columns)
        yield Product(f["operand"], f["weight"], f["product"])


def slabs(o: Operands, spec: CallSpec, save: bool) -> list[Tensor]:
    """Memory for the slots GATES to CELL + 2, in the statistics dtype; empty where a slot does not apply."""
    T, N, G, P, C = *o.x.shape[:2], spec.gates, o.h.size(1), o.weight_ih.size(0)
    H, cell, lstm = C // G, _kind(spec, spec.cell_norm), "c" in spec.declared.states

    def slab(width: int) -> Tensor:
        return o.x.new_empty((T, N, width) if width else (0,), dtype=statistics_dtype(o.x.dtype))

    def kept(kind: str, gates: int) -> list[Tensor]:
        if kind == "none" or not save:
            return [slab(0) for _ in range(3)]
        if kind == "frozen":  # the same for all samples, as it was in the forward pass
            rstd = o.x.new_empty((1, 1, gates * H), dtype=statistics_dtype(o.x.dtype))
        else:
            rstd = slab(gates * H if kind == "streamed" else gates)
        return [slab(gates * H), rstd, slab(gates if spec.guard == "scale" else 0)]

    extra = (lstm or spec.declared.apart) if save else cell == "streamed"
    trace = [slab(C), slab(P if save else 0), slab(H if save and lstm else 0), slab(H if extra else 0)]
    return [*trace, *kept(_kind(spec, spec.norm != "none"), G), *kept(cell, 1)]


def _recorder(device: torch.device) -> Any:
    """What records graphs on a device, None where there are none."""
    wanted = os.environ.get("RNNORM_CUDA_GRAPHS", "1") != "0"
    return graphs.record if wanted and device.type == "cuda" else None


def capturing(device: torch.device) -> bool:
    """True while the user captures a graph on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


UNCAPTURABLE = (
    "the first call of a recurrent layer on backend 'triton' must not be captured in a CUDA graph; got a new layer, "
    "size or option; run the layer once, forward and backward, before the capture"
)


_LOOPS: graphs.Cache[_Loop] = graphs.Cache(graphs.BOUND)
_SEEN: graphs.Cache[bool] = graphs.Cache(1024)
_ONCE: ContextVar[bool] = ContextVar("once", default=False)


@contextmanager
def once() -> Iterator[None]:
    """Inside, no loop is kept."""
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)


def _loop(kind: type[_Loop], plan: Plan) -> _Loop:
    """The loop of the current stream, or a fresh one where graphs are not to be had."""
    key = kind.__name__, plan
    captured, record = capturing(plan.device), _recorder(plan.device)
    if captured and key not in _SEEN:
        raise RuntimeError(UNCAPTURABLE)
    if captured and plan.lengths:
        raise RuntimeError(
            "lengths must be None in a call that a CUDA graph captures; got a tensor on the CPU; pad the sequences"
        )
    _SEEN.get(key, lambda: True)
    if captured or record is None or _ONCE.get():
        return kind(plan)
    stream = torch.cuda.current_stream(plan.device).cuda_stream if plan.device.type == "cuda" else 0
    return _LOOPS.get((*key, stream), lambda: kind(plan, record))


def _norm_operands(o: Operands, moved: tuple[str, str]) -> dict[str, Any]:
    """The operands of both norms by the names of a loop's buffers."""
    names = [f"{prefix}{name}" for prefix in ("", "cell_") for name in ("scale", "shift", *moved)]
    return {name: getattr(o, f"cell_norm_{name[5:]}" if name.startswith("cell_") else f"norm_{name}") for name in names}


def _dense(o: Operands) -> Operands:
    """The operands, without lengths that say nothing."""
    return o._replace(lengths=None) if o.lengths is not None and bool((o.lengths == o.x.size(0)).all()) else o


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: contiguous, bool as int8."""
    if tensor is None:
        return None
    return tensor.contiguous().view(torch.int8 if tensor.dtype == torch.bool else tensor.dtype)


def _shared(o: Operands) -> dict[int, Tensor | None]:
    """The slots of operands with a time axis."""
    return {
        kernels.RESET.value: _contiguous(o.reset),
        kernels.STAY_H.value: _contiguous(o.zoneout_h),
        kernels.STAY_C.value: _contiguous(o.zoneout_c),
    }


def _input_part(o: Operands, spec: CallSpec, out: Tensor) -> None:
    """Write `x @ W + b` [T*N, C] to `out`, plus the recurrent bias of gates without a separate recurrent part."""
    samples, weight, C = o.x.flatten(0, 1), o.weight_ih.t(), out.size(1)
    bias = out.new_zeros(C) if o.bias_ih is None else o.bias_ih.to(out.dtype)
    joined = spec.declared.together[0][1] * (C // spec.gates)
    if o.bias_hh is not None and joined == C:
        bias = bias + o.bias_hh
    elif o.bias_hh is not None:
        bias = torch.cat((bias[:joined] + o.bias_hh[:joined], bias[joined:]))
    if samples.dtype == out.dtype:
        torch.addmm(bias, samples, weight, out=out)
    else:
        torch.add(torch.mm(samples, weight), bias, out=out)


def forward(o: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
    o = _dense(o)
    T, H = o.x.size(0), o.weight_ih.size(0) // spec.gates
    made, results = slabs(o, spec, save), results_like(o, spec)
    _input_part(o, spec, made[0].flatten(0, 1))
    slots: dict[int, Tensor | None] = {kernels.OUT.value: results.y, **_shared(o)}
    slots.update(enumerate(made))
    if not save:  # streams overwrite what they read
        slots[kernels.NORM.value], slots[kernels.CELL.value] = made[kernels.GATES.value], made[kernels.EXTRA.value]
    loop = _loop(Forward, plan(o, spec, False, save, grad_y=False))
    f: dict[str, Any] = loop.fixed
    values = _norm_operands(o, ("mean", "var"))
    for prefix, slot in (("", kernels.NORM.value + 1), ("cell_", kernels.CELL.value + 1)):
        if f[f"{prefix}rstd"] is not None:
            values[f"{prefix}rstd"] = (values[f"{prefix}var"] + spec.constants.eps).rsqrt()
            if save:
                made[slot][0, 0] = values[f"{prefix}rstd"]
    with loop.lock:
        loop.fill(**values, weight=o.weight_hh, projection=o.weight_hr, mask=o.recurrent_mask, lengths=o.lengths)
        loop.fill(h_state=o.h, c_state=o.c, bias=None if o.bias_hh is None else o.bias_hh[-H:])
        entering = f["h_state"] if o.recurrent_mask is None else f["h_state"] * f["mask"]
        loop.fill(entering=entering)
        loop.publish(slots, T - 1 if spec.reverse else 0)
        loop.runner.run(T, loop.launches)
        results.h.copy_(f["h_state"])
        if o.c is not None:
            results.c.copy_(f["c_state"])
        if spec.controlled:
            results.norm_mean.copy_(f["mean"])
            results.norm_var.copy_(f["var"])
            if f["cell_mean"] is not None:
                results.cell_norm_mean.copy_(f["cell_mean"])
                results.cell_norm_var.copy_(f["cell_var"])
    return results, made if save else []


class _Gradients(NamedTuple):
    """What the backward loop writes, all with a time axis."""

    pre: Tensor
    z: Tensor
    cell: Tensor
    apart: Tensor


def _gradients(o: Operands, p: Plan) -> _Gradients:
    T, N = o.x.shape[:2]

    def slab(width: int, on: bool) -> Tensor:
        return o.x.new_empty((T, N, width) if on else (0,), dtype=statistics_dtype(o.x.dtype))

    cell = p.code.cell_kind == "streamed" or (p.code.cell_kind != "none" and p.cell_affine)
    return _Gradients(
        slab(p.G * p.H, True),
        slab(p.G * p.H, p.affine and p.code.kind != "streamed"),
        slab(p.H, cell),
        slab(p.P, p.projection or p.cell == "gru"),
    )


def backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    o: Operands,
    saved: Sequence[Tensor],
    spec: CallSpec,
    need_input: bool,
    need_weights: bool,
) -> list[Tensor | None]:
    o, dtype = _dense(o), o.x.dtype
    T = o.x.size(0)
    made_for = plan(o, spec, True, True, grad_y=grads[0] is not None)
    loop = _loop(Backward, made_for)
    f: dict[str, Any] = loop.fixed
    gradients = _gradients(o, made_for)
    slots: dict[int, Tensor | None] = {kernels.GRAD_Y.value: _contiguous(grads[0]), **_shared(o)}
    slots.update(enumerate(saved))
    slots.update(enumerate(gradients, kernels.D_PRE.value))
    values = _norm_operands(o, ("u", "v"))
    for prefix, slot in (("", kernels.NORM.value + 1), ("cell_", kernels.CELL.value + 1)):
        if f[f"{prefix}rstd"] is not None:
            values[f"{prefix}rstd"] = saved[slot].flatten()
    found: dict[str, Tensor | None] = {}
    with loop.lock:
        loop.fill(**values, weight=o.weight_hh, projection=o.weight_hr, mask=o.recurrent_mask, lengths=o.lengths)
        loop.fill(direct=grads[1], grad_c=grads[2], product=0.0)
        loop.fill(grad_scale=0.0, grad_shift=0.0, cell_grad_scale=0.0, cell_grad_shift=0.0)
        loop.publish(slots, 0 if spec.reverse else T - 1)
        loop.runner.run(T, loop.launches)
        recurrent = f["product"].to(f["direct"].dtype)
        found["h"] = f["direct"] + (recurrent if f["mask"] is None else recurrent * f["mask"])
        found["c"] = None if o.c is None else f["grad_c"].clone()
        for prefix, d, slot in (("", gradients.z, kernels.NORM.value), ("cell_", gradients.cell, kernels.CELL.value)):
            if f[f"{prefix}u"] is not None:
                for name in ("u", "v"):
                    getattr(o, f"{prefix}norm_{name}").copy_(f[f"{prefix}{name}"])
            if need_weights and f[f"{prefix}scale"] is not None:
                streamed = f[f"{prefix}u"] is not None
                pair = (f[f"{prefix}grad_scale"].clone(), f[f"{prefix}grad_shift"].clone())
                found[f"{prefix}norm_scale"], found[f"{prefix}norm_shift"] = (
                    pair if streamed else ((d * saved[slot]).sum((0, 1)), d.sum((0, 1)))
                )
    narrow = gradients.pre.flatten(0, 1).to(dtype) if need_input or need_weights else gradients.pre
    if need_input:
        found["x"] = torch.mm(narrow, o.weight_ih).view(o.x.shape)
    if need_weights:
        found |= _weight_gradients(o, spec, saved, gradients, narrow)
    return [
        None if grad is None or operand is None else grad.to(operand.dtype)
        for grad, operand in zip((found.get(name) for name in DIFFERENTIABLE), o, strict=False)
    ]


def _weight_gradients(
    o: Operands, spec: CallSpec, saved: Sequence[Tensor], gradients: _Gradients, narrow: Tensor
) -> dict[str, Tensor | None]:
    """Gradients of weights and biases: sums over all samples. Padded rows are zero, but for those of x.

    `narrow` [T*N, C]: the gradient of the input part in the dtype of products.
    """
    dtype = o.x.dtype
    found: dict[str, Tensor | None] = {}
    pre, apart = gradients.pre.flatten(0, 1), gradients.apart
    x, old_h = o.x, saved[kernels.OLD_H.value]
    if o.lengths is not None:
        steps = torch.arange(len(x), device=x.device)[:, None]
        x = x.masked_fill((steps >= o.lengths.to(x.device, non_blocking=True)).unsqueeze(2), 0.0)
    entered = (old_h if o.recurrent_mask is None else old_h * o.recurrent_mask).flatten(0, 1).to(dtype)
    narrow = narrow.t()
    found["weight_ih"] = torch.mm(narrow, x.flatten(0, 1))
    total = pre.sum(0)
    found["bias_ih"], found["bias_hh"] = total, total.clone()  # a caller may change one
    if spec.declared.apart:
        joined = spec.declared.together[0][1] * (pre.size(1) // spec.gates)
        rest = apart.flatten(0, 1)
        found["weight_hh"] = torch.cat((torch.mm(narrow[:joined], entered), torch.mm(rest.to(dtype).t(), entered)))
        found["bias_hh"] = torch.cat((total[:joined], rest.sum(0)))
    else:
        found["weight_hh"] = torch.mm(narrow, entered)
    if o.weight_hr is not None:
        H = o.weight_hr.size(1)
        hidden = (saved[kernels.GATES.value][..., -H:] * saved[kernels.EXTRA.value]).flatten(0, 1)
        found["weight_hr"] = torch.mm(apart.flatten(0, 1).to(dtype).t(), hidden.to(dtype))
    return found
