"""The operators: `rnnorm::sequence` for a recurrent layer over a sequence, `rnnorm::online_norm` for one stream.

They are registered through `torch.library` with fake kernels and autograd formulas, so that eager, `torch.compile`,
`torch.export` and TorchScript all call the same thing; an eager call that nothing looks at does the same without the
dispatcher. The forward operators are functional: new statistics are returned, and the module copies them into its
buffers. The backward operators move u and v in place.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

from rnnorm.ops import stream
from rnnorm.ops.call import DIFFERENTIABLE, MOVED_IN_BACKWARD, Operands, Results, Spec, results_like
from rnnorm.ops.errors import DOUBLE_BACKWARD, FUSED_DOUBLE_BACKWARD, RECOMPUTATION, SECOND_BACKWARD, TRANSFORM
from rnnorm.ops.registry import by_name, choose

_SCALARS = {str: "str", float: "float", bool: "bool"}
_PLAIN = (Tensor, nn.Parameter, type(None))
_REQUIRED = ("x", "h", "weight_ih", "weight_hh")


def _operands_schema(mutable: Sequence[str] = ()) -> str:
    def kind(name: str) -> str:
        alias = f"({chr(97 + mutable.index(name))}!)" if name in mutable else ""
        return f"Tensor{alias}{'' if name in _REQUIRED else '?'} {name}"

    return ", ".join(kind(name) for name in Operands._fields)


_SPEC_SCHEMA = ", ".join(f"{_SCALARS[kind]} {name}" for name, kind in Spec.__annotations__.items())


def refuse_recomputation() -> None:
    """Raise when called from within a backward pass, as activation checkpointing does to recompute a forward."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(RECOMPUTATION)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Statistics stay in their own dtype whatever autocast does to products."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _unpack(args: Sequence[Any]) -> tuple[Operands, Spec]:
    split = len(Operands._fields)
    return Operands(*args[:split]), Spec(*args[split:])


@torch.library.custom_op(
    "rnnorm::sequence",
    mutates_args=(),
    schema=f"({_operands_schema()}, {_SPEC_SCHEMA}) -> ({'Tensor, ' * (len(Results._fields) - 1)}Tensor[])",
)
def sequence(*args: Any) -> Results:
    return _forward(*_unpack(args))


def _forward(operands: Operands, spec: Spec) -> Results:
    if spec.controlled:
        refuse_recomputation()
    with _without_autocast(operands.x.device.type):
        results = choose(spec.backend, operands.x.device, operands.x.dtype, spec).forward(operands, spec)
    if operands.lengths is not None:
        rows, used = operands.x.size(0) * operands.x.size(1), int(operands.lengths.sum())
        for saved in results.saved:
            # Padding leaves rows over, and no result may hang on what memory held.
            if saved.size(0) == rows:
                saved[used:].zero_()
    return results


@sequence.register_fake
def _(*args: Any) -> Results:
    operands, spec = _unpack(args)
    return results_like(operands, spec, by_name(spec.backend).saved_like(operands, spec) if spec.save else [])


# Defined by hand: what custom_op does around an operator that moves its arguments takes 0.3 ms for as many as these.
torch.library.define(
    "rnnorm::sequence_backward",
    f"(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor[] saved, bool need_input, bool need_weights, "
    # One by one: operators that move their arguments and return a list cannot be made functional for torch.compile.
    f"{_operands_schema(MOVED_IN_BACKWARD)}, {_SPEC_SCHEMA}) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
)


@torch.library.impl("rnnorm::sequence_backward", "default")
def sequence_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    saved: Sequence[Tensor],
    need_input: bool,
    need_weights: bool,
    *args: Any,
) -> tuple[Tensor, ...]:
    operands, spec = _unpack(args)
    grads = _backward((grad_y, grad_h, grad_c), saved, need_input, need_weights, operands, spec)
    return tuple(
        grad if grad is not None and _wanted(name, need_input, need_weights) else operands.x.new_empty(0)
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True)
    )


def _backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: Sequence[Tensor],
    need_input: bool,
    need_weights: bool,
    operands: Operands,
    spec: Spec,
) -> list[Tensor | None]:
    control = [getattr(operands, name) for name in MOVED_IN_BACKWARD] if spec.controlled else []
    with _without_autocast(operands.x.device.type), _kept_finite(control):
        return by_name(spec.backend).backward(grads, operands, saved, spec, need_input, need_weights)


@contextmanager
def _kept_finite(control: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, u and v move, unless they would not be finite. A step with such a gradient is skipped by whoever watches
    for it, as a GradScaler does that looks for its scale; one that stayed in u and v would spoil all that come."""
    before = [(moved, moved.clone()) for moved in control if moved is not None]
    yield
    sums = [moved.sum() for moved, _ in before]
    # On a CPU it costs next to nothing to look at a value; elsewhere it would mean to wait for the device.
    if all(total.is_cpu and math.isfinite(total) for total in sums):
        return
    finite = torch.stack(sums).isfinite().all()
    for moved, kept in before:
        moved.copy_(torch.where(finite, moved, kept))


def _wanted(name: str, need_input: bool, need_weights: bool) -> bool:
    if name in ("h", "c"):
        return True
    return need_input if name == "x" else need_weights


@torch.library.register_fake("rnnorm::sequence_backward")
def _(grad_y: Any, grad_h: Any, grad_c: Any, saved: Any, need_input: bool, need_weights: bool, *args: Any):
    operands, _spec = _unpack(args)
    return tuple(
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        if operand is not None and _wanted(name, need_input, need_weights)
        else operands.x.new_empty(0)
        for name, operand in zip(DIFFERENTIABLE, operands, strict=False)
    )


def _keep(ctx: Any, operands: Operands, spec: Spec, saved: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*operands[: len(DIFFERENTIABLE)], operands.lengths, *saved)
    # u and v are moved on purpose between forward and backward: autograd's version check must not see them.
    ctx.streams = operands[len(DIFFERENTIABLE) : -1]
    ctx.spec = spec
    # Nobody asks for gradients of what was saved: zeros for it would cost as much memory again.
    ctx.set_materialize_grads(False)
    ctx.spent = False


def _sequence_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _keep(ctx, *_unpack(inputs), Results(*output).saved)


def _once(ctx: Any, controlled: bool, repeatable: bool) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD if controlled else FUSED_DOUBLE_BACKWARD)
    if ctx.spent and not repeatable:
        raise RuntimeError(SECOND_BACKWARD)
    ctx.spent = True


def _gradients(ctx: Any, needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the differentiable operands, for those of y, h and c."""
    _once(ctx, ctx.spec.controlled, repeatable=not ctx.spec.controlled or ctx.spec.alpha_bwd == 1)
    count = len(DIFFERENTIABLE)
    kept = ctx.saved_tensors  # read once: non-reentrant checkpointing unpacks by the reading
    differentiable, lengths, saved = kept[:count], kept[count], kept[count + 1 :]
    operands = Operands._make((*differentiable, *ctx.streams, lengths))
    needed = dict(zip(DIFFERENTIABLE, needs, strict=False))
    need_weights = any(needed[name] for name in DIFFERENTIABLE if name not in ("x", "h", "c"))
    given = grads[0], grads[1], grads[2] if operands.c is not None else None
    if _alone(operands, *given):
        found = _backward(given, saved, needed["x"], need_weights, operands, ctx.spec)
    else:
        found = torch.ops.rnnorm.sequence_backward(*given, saved, needed["x"], need_weights, *operands, *ctx.spec)
    return [grad if needed[name] else None for name, grad in zip(DIFFERENTIABLE, found, strict=True)]


def _sequence_gradient(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    found = _gradients(ctx, ctx.needs_input_grad, grads)
    return (*found, *([None] * (len(Operands._fields) - len(found) + len(ctx.spec))))


sequence.register_autograd(_sequence_gradient, setup_context=_sequence_context)


def _alone(operands: Operands, *others: Tensor | None) -> bool:
    """Whether nothing looks at what is called: no compiler, tracer, mode or subclass. Then what an operator does can be
    called itself; for so many arguments the dispatcher takes 0.04 ms, of the 0.14 of a small layer's call."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and _len_torch_dispatch_stack_pre_dispatch() == 0
        and not operands.x.is_meta
        and all(type(operand) in _PLAIN for operand in (*operands, *others))
    )


class _Eager(torch.autograd.Function):
    """The same for eager calls: the operator's general formula costs 0.5 ms of bookkeeping over so many arguments."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *args: Any) -> tuple[Tensor, ...]:
        operands = Operands(*args)
        results = _call(operands, spec)
        _keep(ctx, operands, spec, results.saved)
        ctx.mark_non_differentiable(*results[3:-1])
        return results[:-1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        found = _gradients(ctx, ctx.needs_input_grad[1:], grads)
        return (None, *found, *([None] * (len(Operands._fields) - len(found))))


def refuse_transforms(operands: Sequence[Tensor | None]) -> None:
    """Raise where a derivative would be lost on its way through an operator, without a word."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and forward_ad._current_level >= 0:
        tensors = [operand for operand in operands if operand is not None]
        transformed = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if transformed:
        raise RuntimeError(TRANSFORM)


def run_sequence(operands: Operands, spec: Spec) -> Results:
    """`rnnorm::sequence`, differentiable by the shortest way."""
    refuse_transforms(operands)
    if spec.save and not torch.compiler.is_compiling():
        return Results._make((*_Eager.apply(spec, *operands), []))
    return _call(operands, spec)


def _call(operands: Operands, spec: Spec) -> Results:
    """The operator, or what it does."""
    if _alone(operands):
        with torch.no_grad():
            return _forward(operands, spec)
    return Results(*torch.ops.rnnorm.sequence(*operands, *spec))


@torch.library.custom_op("rnnorm::online_norm", mutates_args=())
def online_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    alpha_fwd: float,
    alpha_bwd: float,
    eps: float,
    control_floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y`, reciprocal deviations, new mean and var for samples `x` [N, C, D] in order; u, v are for the backward."""
    refuse_recomputation()
    with _without_autocast(x.device.type):
        y, rstd, mean, var = stream.online_norm(x.to(mean.dtype), mean, var, alpha_fwd, eps)
        return y.contiguous(), rstd, mean, var


@online_norm.register_fake
def _(x: Tensor, mean: Tensor, var: Tensor, u: Any, v: Any, *constants: float):
    y = torch.empty(x.shape, dtype=mean.dtype, device=x.device)
    return y, y.new_empty(x.shape[:2]), torch.empty_like(mean), torch.empty_like(var)


@torch.library.custom_op("rnnorm::online_norm_backward", mutates_args=("u", "v"))
def online_norm_backward(
    grad: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, alpha_bwd: float, control_floor: float
) -> Tensor:
    with _without_autocast(grad.device.type), _kept_finite((u, v)):
        return stream.online_norm_backward(grad.to(y.dtype), y, rstd, u, v, alpha_bwd, control_floor).contiguous()


@online_norm_backward.register_fake
def _(grad: Tensor, y: Tensor, rstd: Tensor, u: Tensor, v: Tensor, *constants: float) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _online_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, _mean, _var, *ctx.control, _alpha_fwd, ctx.alpha_bwd, _eps, ctx.control_floor = inputs
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[0], output[1])
    ctx.spent = False


def _online_norm_gradient(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    _once(ctx, controlled=True, repeatable=ctx.alpha_bwd == 1)
    y, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(y)
    dx = torch.ops.rnnorm.online_norm_backward(grad, y, rstd, *ctx.control, ctx.alpha_bwd, ctx.control_floor)
    return dx.to(ctx.dtype), *([None] * 8)


online_norm.register_autograd(_online_norm_gradient, setup_context=_online_norm_context)
