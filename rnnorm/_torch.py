"""Private names of torch, in one place, each with a fallback for versions of torch that lack it.

Checked on torch 2.11.0, 2.13.0 and 2.14.1.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _found(path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The function `torch.<path>`, or `otherwise` if this torch has none."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return otherwise if value is None else value


# No fallback: without it operators cannot be redispatched, and no gradient recorded.
below_autograd = torch._C._AutoDispatchBelowAutograd
# The number of the running backward pass, -1 outside; without it recomputation is not detected.
_backward_pass = _found("_C._current_graph_task_id", lambda: -1)
# Numbers of active dispatch modes; without them every call goes through the dispatcher.
_modes = _found("_C._len_torch_dispatch_stack", lambda: 1)
_modes_before_dispatch = _found("_ops._len_torch_dispatch_stack_pre_dispatch", lambda: 1)
# The active transform of torch.func; without it the user gets torch's own, less helpful error.
_transform = _found("_C._functorch.peek_interpreter_stack", lambda: None)
# Detects tensors of `torch.autograd.grad(..., is_grads_batched=True)`, which is not a transform of torch.func.
_is_batched = _found("_C._functorch.is_legacy_batchedtensor", lambda tensor: False)
# Whether torch may use oneDNN; without it that is taken for granted.
may_use_onednn = _found("_C._get_mkldnn_enabled", lambda: True)
# Raises on the device, without waiting for it; without it the assertions of torch's own indexing remain.
assert_on_device = _found("_assert_async", lambda condition, message: None)
# What TorchScript may replace by fused kernels on a GPU: pairs that ask and set; without them it may.
_FUSERS = [
    (_found("_C._jit_texpr_fuser_enabled", lambda: True), _found("_C._jit_set_texpr_fuser_enabled", lambda on: None)),
    (_found("_C._jit_can_fuse_on_gpu", lambda: True), _found("_C._jit_override_can_fuse_on_gpu", lambda on: None)),
]
# The level of forward-mode differentiation, below 0 outside of it.
_forward_ad_level: Callable[[], int] = lambda: getattr(torch.autograd.forward_ad, "_current_level", 0)  # noqa: E731


def in_backward() -> bool:
    """True while a backward pass runs."""
    return _backward_pass() != -1


def has_modes() -> bool:
    """True if a mode that intercepts operators is active."""
    return _modes() != 0 or _modes_before_dispatch() != 0


def is_autocast(kind: str) -> bool:
    """True if autocast is on for this kind of device."""
    # Other devices have no autocast, and raise when they are asked; torch 2.11 cannot compile the second question.
    known = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Autocast's dtype for products with `tensor`; None if autocast is off or the tensor is float64."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if tensor.dtype != torch.float64 and is_autocast(kind) else None


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """True inside a transform of torch.func, or if one of the tensors carries a forward-mode derivative."""
    if _transform() is not None:
        return True
    return _forward_ad_level() >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None
    )


def scan() -> Any:
    """Torch's scan, a loop over steps that export keeps as one operator; imports the compiler."""
    from torch._higher_order_ops.scan import scan

    return scan


def is_batched(tensors: Sequence[Tensor | None]) -> bool:
    """True if one of the tensors is a batch of gradients."""
    return any(_is_batched(tensor) for tensor in tensors if tensor is not None)


class _Unfused:
    """TorchScript's fusers, off while at least one thread asks for it: they are settings of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._before: list[bool] = []

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """Inside, TorchScript runs on a GPU as it is written, and so with the same bits at each call. Else fused
        kernels, which round differently, replace a function's operators after its first calls."""
        if device.type != "cuda":
            yield
            return
        with self._lock:
            if self._asking == 0:
                self._before = [is_on() for is_on, _ in _FUSERS]
                self._switch([False] * len(_FUSERS))
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if self._asking == 0:
                    self._switch(self._before)

    def _switch(self, wanted: Sequence[bool]) -> None:
        for (_, switch), on in zip(_FUSERS, wanted, strict=True):
            switch(on)


unfused = _Unfused()
