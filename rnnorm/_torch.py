"""Names of torch that are not public, in one place, each with what is done by a torch that lacks it.

Checked on torch 2.11, 2.13 and 2.14.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _found(path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The function `torch.<path>`, or `otherwise` where this torch has none."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return otherwise if value is None else value


# Without it nothing can be redispatched, and no gradient recorded: no fallback is right.
below_autograd = torch._C._AutoDispatchBelowAutograd
# The number of the backward pass that runs, -1 outside; without it recomputation is not recognized.
_backward_pass = _found("_C._current_graph_task_id", lambda: -1)
# Modes that want to see operators; without these every call goes through the dispatcher.
_modes = _found("_C._len_torch_dispatch_stack", lambda: 1)
_modes_before_dispatch = _found("_ops._len_torch_dispatch_stack_pre_dispatch", lambda: 1)
# The transform of torch.func that is active; without it torch's own error says less.
_transform = _found("_C._functorch.peek_interpreter_stack", lambda: None)
# A tensor of `torch.autograd.grad(..., is_grads_batched=True)`, which is no transform of torch.func.
_is_batched = _found("_C._functorch.is_legacy_batchedtensor", lambda tensor: False)
# The level of forward-mode derivatives, below 0 where there are none.
_forward_ad_level: Callable[[], int] = lambda: getattr(torch.autograd.forward_ad, "_current_level", 0)  # noqa: E731


def in_backward() -> bool:
    """True while a backward pass runs."""
    return _backward_pass() != -1


def has_modes() -> bool:
    """True if a mode wants to see every operator."""
    return _modes() != 0 or _modes_before_dispatch() != 0


def is_transformed(tensors: list[Tensor]) -> bool:
    """True inside a transform of torch.func, or where one of the tensors carries a forward-mode derivative."""
    if _transform() is not None:
        return True
    return _forward_ad_level() >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def scan() -> Any:
    """`torch`'s loop over steps that export keeps as one operator; imports the compiler."""
    from torch._higher_order_ops.scan import scan

    return scan


def is_batched(tensors: list[Tensor]) -> bool:
    """True if one of the tensors is a batch of gradients."""
    return any(_is_batched(tensor) for tensor in tensors)
