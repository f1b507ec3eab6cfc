"""The operator `rnnorm::sequence`: a recurrent layer and direction over a whole sequence.

The forward operators are functional: they return new statistics, which the module copies to its buffers. The backward
operator updates u and v in place. The public operator takes the user's choice of backend, `"auto"` or a name, and
resolves it when it runs; the operators behind it take the name of the backend that was chosen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm import _torch
from rnnorm.norms import Constants
from rnnorm.ops import library
from rnnorm.ops.call import DIFFERENTIABLE, MOVED_IN_BACKWARD, SAVED, CallSpec, Operands, Results, results_like
from rnnorm.ops.registry import Backend, by_name, choose

_SCALARS = {str: "str", bool: "bool", int: "int", Constants: "float[]"}
_STATISTICS = [name for name in Results._fields if name.endswith(("_mean", "_var"))]
_REQUIRED = ("x", "h", "weight_ih", "weight_hh")


def _operands_schema(mutable: Sequence[str] = ()) -> str:
    def kind(name: str) -> str:
        if name in mutable:
            # Never None: torch's modes inspect every tensor that an operator writes.
            return f"Tensor({chr(97 + mutable.index(name))}!) {name}"
        return f"Tensor{'' if name in _REQUIRED else '?'} {name}"

    return ", ".join(kind(name) for name in Operands._fields)


_SPEC_SCHEMA = ", ".join(f"{_SCALARS[kind]} {name}" for name, kind in CallSpec.__annotations__.items())
# torch.compile must not put the operators into its CUDA graphs: the Triton backend keeps buffers between calls.
_TAGS = [torch.Tag.cudagraph_unsafe]
_RESULTS_SCHEMA = ", ".join(["Tensor"] * len(Results._fields))


def _unpack(args: Sequence[Any]) -> tuple[Operands, CallSpec]:
    split = len(Operands._fields)
    spec = CallSpec(*args[split:])
    return Operands(*args[:split]), spec._replace(constants=Constants(*spec.constants))


def _chosen(operands: Operands, spec: CallSpec) -> Backend:
    units = operands.weight_ih.size(0) // spec.gates
    return choose(spec.wanted, operands.x.device, operands.x.dtype, spec, units)


def _forward(backend: Backend, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
    if spec.controlled:
        library.refuse_recomputation()
    with torch.no_grad(), library.without_autocast(operands.x.device.type):
        suited = operands if backend.wide_weights else operands.in_product_dtype()
        results, saved = backend.forward(suited, spec, save)
    if operands.lengths is not None and saved:
        rows, used = operands.x.size(0) * operands.x.size(1), int(operands.lengths.sum())
        for kept in saved:
            # Padding leaves rows unused; results must not depend on uninitialized memory.
            if kept.size(0) == rows:
                kept[used:].zero_()
    if spec.controlled and not backend.keeps_finite:
        results = _finite_statistics(results, operands)
    return results, saved


def _finite_statistics(results: Results, operands: Operands) -> Results:
    """`results`, with the statistics before the call if any statistic after it is not finite."""
    names = [name for name in _STATISTICS if getattr(operands, name) is not None]
    before, after = ([getattr(held, name) for name in names] for held in (operands, results))
    kept: dict[str, Any] = dict(zip(names, library.finite_or(before, after), strict=True))
    return results._replace(**kept)


def _plain(*args: Any) -> Results:
    operands, spec = _unpack(args)
    return _forward(_chosen(operands, spec), operands, spec, save=False)[0]


def _plain_fake(*args: Any) -> Results:
    operands, spec = _unpack(args)
    _chosen(operands, spec)  # a named backend that cannot run raises while the graph is captured
    return results_like(operands, spec)


def _recorded(*args: Any) -> Any:
    operands, spec = _unpack(args)
    library.refuse_transforms(operands)
    if library.needs_gradient(operands[: len(DIFFERENTIABLE)]):
        return _Sequence.apply(*operands[: len(DIFFERENTIABLE)], operands[len(DIFFERENTIABLE) :], spec)
    with _torch.below_autograd():
        return sequence(*args)


sequence = library.operator(
    "sequence", f"({_operands_schema()}, {_SPEC_SCHEMA}) -> ({_RESULTS_SCHEMA})", _plain, _plain_fake, _recorded, _TAGS
)


def _saving(*args: Any) -> tuple[Any, ...]:
    operands, spec = _unpack(args)
    results, saved = _forward(by_name(spec.wanted), operands, spec, save=True)
    return *results, saved


def _saving_fake(*args: Any) -> tuple[Any, ...]:
    operands, spec = _unpack(args)
    return *results_like(operands, spec), by_name(spec.wanted).saved_like(operands, spec)


sequence_saving = library.operator(
    "sequence_saving",
    f"({_operands_schema()}, {_SPEC_SCHEMA}) -> ({_RESULTS_SCHEMA}, Tensor[])",
    _saving,
    _saving_fake,
    tags=_TAGS,
)


def _backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: Sequence[Tensor],
    need_input: bool,
    need_weights: bool,
    operands: Operands,
    spec: CallSpec,
) -> list[Tensor | None]:
    backend = by_name(spec.wanted)
    guarded = MOVED_IN_BACKWARD if spec.controlled and not backend.keeps_finite else ()
    control = [getattr(operands, name) for name in guarded]
    with library.without_autocast(operands.x.device.type), library.kept_finite(control):
        suited = operands if backend.wide_weights else operands.in_product_dtype()
        found = backend.backward(grads, suited, saved, spec, need_input, need_weights)
    return [
        None if grad is None or operand is None else grad if grad.dtype == operand.dtype else grad.to(operand.dtype)
        for grad, operand in zip(found, operands, strict=False)
    ]


def _wanted(name: str, need_input: bool, need_weights: bool) -> bool:
    if name in ("h", "c"):
        return True
    return need_input if name == "x" else need_weights


def _backward_kernel(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    saved: Sequence[Tensor],
    need_input: bool,
    need_weights: bool,
    *args: Any,
) -> tuple[Tensor, ...]:
    operands, spec = _unpack(args)
    absent: dict[str, Any] = {name: None for name in MOVED_IN_BACKWARD if not getattr(operands, name).numel()}
    operands = operands._replace(**absent)
    grads = _backward((grad_y, grad_h, grad_c), saved, need_input, need_weights, operands, spec)
    return tuple(
        grad if grad is not None and _wanted(name, need_input, need_weights) else operands.x.new_empty(0)
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True)
    )


def _backward_fake(
    grad_y: Any, grad_h: Any, grad_c: Any, saved: Any, need_input: bool, need_weights: bool, *args: Any
) -> tuple[Tensor, ...]:
    operands, _ = _unpack(args)
    return tuple(
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        if operand is not None and _wanted(name, need_input, need_weights)
        else operands.x.new_empty(0)
        for name, operand in zip(DIFFERENTIABLE, operands, strict=False)
    )


sequence_backward = library.operator(
    "sequence_backward",
    f"(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor[] saved, bool need_input, bool need_weights, "
    # Not as a list: torch.compile cannot functionalize operators that mutate arguments and return a list.
    f"{_operands_schema(MOVED_IN_BACKWARD)}, {_SPEC_SCHEMA}) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    _backward_kernel,
    _backward_fake,
    tags=_TAGS,
)


class _Sequence(torch.autograd.Function):
    """A recorded call; the backend is chosen in the forward pass.

    The operands without gradients are one argument: each one takes time in every call.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *differentiable, rest, spec = args
        operands = Operands(*differentiable, *rest)
        backend = _chosen(operands, spec)
        spec = spec._replace(wanted=backend.name)
        if library.is_unobserved(operands):
            results, saved = _forward(backend, operands, spec, save=True)
        else:
            *results, saved = sequence_saving(*operands, *spec)
        ctx.save_for_backward(*operands[: len(SAVED)], *saved)
        # Not saved through autograd, which would reject the updates of u and v between forward and backward.
        ctx.buffers = operands[len(SAVED) :]
        ctx.spec = spec
        ctx.spent = False
        # Zeros for the unused gradients of the statistics would cost memory.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[3:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        spec: CallSpec = ctx.spec
        library.begin_backward(ctx, grads, spec.controlled, not spec.controlled or spec.constants.alpha_bwd == 1)
        kept = ctx.saved_tensors  # read once: non-reentrant checkpointing unpacks at each read
        operands = Operands._make((*kept[: len(SAVED)], *ctx.buffers))
        saved = kept[len(SAVED) :]
        needed = dict(zip(DIFFERENTIABLE, ctx.needs_input_grad, strict=False))
        need_weights = any(needed[name] for name in DIFFERENTIABLE if name not in ("x", "h", "c"))
        given = grads[0], grads[1], grads[2] if operands.c is not None else None
        found: Sequence[Tensor | None]
        if library.is_unobserved((*operands, *given)):
            found = _backward(given, saved, needed["x"], need_weights, operands, spec)
        else:
            absent = [name for name in MOVED_IN_BACKWARD if getattr(operands, name) is None]
            whole = operands._replace(**{name: operands.x.new_empty(0) for name in absent})
            found = sequence_backward(*given, saved, needed["x"], need_weights, *whole, *spec)
        gradients = [grad if needed[name] else None for name, grad in zip(DIFFERENTIABLE, found, strict=True)]
        return (*gradients, None, None)


def run(operands: Operands, spec: CallSpec) -> Results:
    """Call `rnnorm::sequence`, without the dispatcher if nothing observes the call."""
    library.refuse_transforms(operands)
    if not library.is_unobserved(operands):
        return Results(*sequence(*operands, *spec))
    if library.needs_gradient(operands[: len(DIFFERENTIABLE)]):
        return Results._make(_Sequence.apply(*operands[: len(DIFFERENTIABLE)], operands[len(DIFFERENTIABLE) :], spec))
    return _forward(_chosen(operands, spec), operands, spec, save=False)[0]
