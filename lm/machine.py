"""What this machine can run: backends, devices, models that fit into its memory."""

import math
import os

import torch

import rnnorm
from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import sketch


def require_backend(name: str, device: torch.device) -> None:
    """Raises UserError unless the recurrence can run by this name on the device."""
    known = rnnorm.backends(device)
    if name != "auto" and name not in known:
        raise UserError(f"a backend must be one of auto, {', '.join(known)}; got {name!r}; choose one of these")
    if name != "auto" and known[name] is not None:
        raise UserError(f"a backend must be able to run here; got {name}: {known[name]}; choose another, or auto")


def resolve_device(name: str, before: str | None = None) -> str:
    """Returns the name of the device that `auto` stands for: that of the run `before` where there is one, else cuda
    where there is one, else cpu. Any other name is returned as it is."""
    if name != "auto":
        return name
    there = torch.cuda.is_available()
    if before is not None and (there or not before.startswith("cuda")):
        return before
    return "cuda" if there else "cpu"


def resolve_precision(name: str, device: str) -> str:
    """Returns the precision that `auto` stands for on a device: bfloat16 in the decoder where it has instructions."""
    if name != "auto":
        return name
    return "float32" if rnnorm.why_not_bfloat16(device) else "bfloat16-decoder"


def require_device(name: str) -> torch.device:
    """Returns the device of this name, or of what `auto` stands for; raises UserError where it cannot be used."""
    try:
        device = torch.device(resolve_device(name))
        torch.zeros(1, device=device).item()  # `meta` has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as fault:  # ImportError: hpu
        why = str(fault).strip().splitlines()[0]
        raise UserError(f"a device must be one that torch can use here; got {name!r} ({why}); use cpu") from None
    return device


def require_memory(config: ModelConfig, vocabulary: int) -> None:
    """Raises UserError unless the weights of a model fit into memory; allocates none."""
    try:
        size = sum(float(parameter.nbytes) for parameter in sketch(config, vocabulary).parameters())
    except RuntimeError:  # more than 2^63 bytes
        size = math.inf
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        raise UserError(
            f"the weights of a model must fit into {there / 2**30:,.0f} GiB of memory; got {size / 2**30:,.0f} GiB; "
            "lower model.hidden_size or model.num_layers"
        )


def out_of_memory(fault: MemoryError | RuntimeError) -> str | None:
    """Returns what to tell of memory that was lacking, on a GPU or here; None where that is not the fault."""
    said = " ".join(str(fault).split("\n")[0].split())
    if isinstance(fault, torch.OutOfMemoryError):
        memory, repair = "the GPU's memory", "free the GPU"
    elif isinstance(fault, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in said:  # numpy's, torch's
        memory, repair = "the memory", "end other programs"
        said = said.partition("DefaultCPUAllocator: ")[2] or said or "there is too little"
    else:
        return None
    return (
        f"{memory} must hold the model and a step; {said}; raise train.accumulate, lower train.batch_size or "
        f"train.window, or {repair}"
    )
