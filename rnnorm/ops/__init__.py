"""Whole-sequence execution: `run` takes one layer and direction, chooses the backend, and returns its results."""

import torch

from rnnorm.ops import library as _library  # registers the operators  # noqa: F401
from rnnorm.ops.call import DIFFERENTIABLE, Operands, Results, Spec
from rnnorm.ops.errors import RECOMPUTATION
from rnnorm.ops.registry import BackendUnavailable, backends, choose, names

__all__ = [
    "BackendUnavailable",
    "Operands",
    "Results",
    "Spec",
    "backends",
    "names",
    "refuse_recomputation",
    "run",
]


def refuse_recomputation() -> None:
    """Raise when called from within a backward pass, as activation checkpointing does to recompute a forward."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(RECOMPUTATION)


def run(operands: Operands, spec: Spec) -> Results:
    """Run a sequence on the backend that `spec.backend` names (`"auto"`: the best one that can)."""
    if spec.controlled:
        refuse_recomputation()
    backend = choose(spec.backend, operands.x.device, operands.x.dtype, spec)
    if backend.differentiable:
        with torch.autocast(operands.x.device.type, enabled=False):
            return backend.forward(operands, spec)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in operands[: len(DIFFERENTIABLE)]
    )
    spec = spec._replace(backend=backend.name, save=save)
    return Results(*torch.ops.rnnorm.sequence(*operands, *spec))
