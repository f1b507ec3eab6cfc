"""Whole-sequence execution: `run` takes one layer and direction, chooses the backend, and returns its results."""

import torch

from rnnorm.ops import library
from rnnorm.ops.call import DIFFERENTIABLE, Operands, Results, Spec
from rnnorm.ops.registry import BackendUnavailable, backends, by_name, chosen, names

__all__ = [
    "BackendUnavailable",
    "Operands",
    "Results",
    "Spec",
    "backends",
    "names",
    "run",
]


def run(operands: Operands, spec: Spec) -> Results:
    """Run a sequence on the backend that `spec.backend` names (`"auto"`: the best one that can)."""
    backend = by_name(chosen(spec.backend, operands.x.device, operands.x.dtype, spec))
    if backend.differentiable:
        if spec.controlled:
            library.refuse_recomputation()
        with torch.autocast(operands.x.device.type, enabled=False):
            return backend.forward(operands, spec)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in operands[: len(DIFFERENTIABLE)]
    )
    spec = spec._replace(backend=backend.name, save=save)
    return library.run_sequence(operands, spec)
