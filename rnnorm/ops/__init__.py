"""Whole-sequence execution: `run` chooses a backend and runs one layer and direction on it."""

from rnnorm.ops import sequence
from rnnorm.ops.call import DIFFERENTIABLE, HELD, CallSpec, Operands, Results, mogrifier_shapes, statistics_dtype
from rnnorm.ops.library import refuse_recomputation, refuse_transforms, without_autocast
from rnnorm.ops.linear_cross_entropy import run as linear_cross_entropy
from rnnorm.ops.online_norm import run_online_norm
from rnnorm.ops.reference import normalizer
from rnnorm.ops.reference import run as watched
from rnnorm.ops.registry import BackendUnavailable, backends, by_name, choose, names, why_not_bfloat16

__all__ = [
    "DIFFERENTIABLE",
    "HELD",
    "BackendUnavailable",
    "CallSpec",
    "Operands",
    "Results",
    "backends",
    "by_name",
    "choose",
    "linear_cross_entropy",
    "mogrifier_shapes",
    "names",
    "normalizer",
    "refuse_transforms",
    "run",
    "run_online_norm",
    "statistics_dtype",
    "watched",
    "why_not_bfloat16",
]


def run(operands: Operands, spec: CallSpec) -> Results:
    """Run a sequence on the backend that `spec.wanted` names (`"auto"`: the first one that can)."""
    if spec.wanted == "auto" or not by_name(spec.wanted).differentiable:
        return sequence.run(operands, spec)
    if spec.controlled:
        refuse_transforms(operands)
        refuse_recomputation()
    backend = choose(spec.wanted, operands.x.device, operands.x.dtype, spec)
    with without_autocast(operands.x.device.type):
        return backend.forward(operands, spec, save=False)[0]
