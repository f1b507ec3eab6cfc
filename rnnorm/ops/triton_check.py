"""The Triton backend's check of itself: a small call and its backward pass against the scripted backend.

It runs once for each process, device and kind of call, before the first such call: the kernels were tested on one kind
of device, with one compiler. There it found a store that overtook a load.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rnnorm import norms
from rnnorm.ops import triton_online_norm, triton_steps
from rnnorm.ops.call import DIFFERENTIABLE, CallSpec, Operands, statistics_dtype
from rnnorm.ops.errors import Failure
from rnnorm.ops.scripted import Scripted

T, N, I = 3, 3, 2  # noqa: E741
# Of the largest value of each tensor, or of SMALL: some gradients are zero but for rounding, as that of the mean of one
# unit. Products may be of a lower precision than their dtype.
_BOUNDS = {torch.float64: 1e-7, torch.float32: 2e-2, torch.bfloat16: 2e-1, torch.float16: 5e-2}
SMALL = 1e-2
_REASONS: dict[tuple[Any, ...], Failure | None] = {}
_LOCK = threading.Lock()


def reason(device: torch.device, dtype: torch.dtype, spec: CallSpec | None, H: int) -> Failure | None:
    """Why kernels of this kind cannot be trusted on the device, None if they compute what they should.

    Without a spec, those of `OnlineNorm`.
    """
    kind: tuple[Any, ...] = device, dtype
    if spec is not None:
        kind += spec.cell, spec.norm, spec.guard, spec.cell_norm, spec.training, triton_steps.block_of(H)
    if kind not in _REASONS:
        if triton_steps.capturing(device):
            raise RuntimeError(triton_steps.UNCAPTURABLE)
        with _LOCK:
            if kind not in _REASONS:
                _REASONS[kind] = _apart(
                    lambda: compare_online_norm(device, dtype) if spec is None else compare(device, dtype, spec, H)
                )
    return _REASONS[kind]


def _apart(check: Callable[[], Failure | None]) -> Failure | None:
    """Run a check in a thread that has none of the caller's modes: no autocast, no tracing, no gradients."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(check).result()


def compare(device: torch.device, dtype: torch.dtype, spec: CallSpec, H: int) -> Failure | None:
    """The largest difference of a call of H units from the scripted backend, if it is too large; also any error."""
    try:
        own, other = _operands(device, dtype, spec, H), _operands(device, dtype, spec, H)
        with torch.no_grad(), torch.cuda.device_of(own.x), triton_steps.once():
            found = _named(own, spec, *_run(triton_steps, own, spec))
            expected = _named(other, spec, *_run(Scripted(), other, spec))
            return _difference(found, expected, _BOUNDS[dtype], f"a {spec.cell} with norm {spec.norm!r} on {device}")
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as fault:  # a compiler or a driver may raise anything
        return Failure(f"its check of itself on {device} failed with {type(fault).__name__}: {fault}")


def compare_online_norm(device: torch.device, dtype: torch.dtype) -> Failure | None:
    """As `compare`, for calls of `OnlineNorm` with each guard and order in memory."""
    try:
        for guard in norms.GUARDS:
            for D, channels_last in ((1, False), (I, False), (I, True)):
                found, expected = (
                    _online_norm(row, device, dtype, guard, D, channels_last)
                    for row in (triton_online_norm, Scripted())
                )
                if fault := _difference(
                    found, expected, _BOUNDS[dtype], f"OnlineNorm with guard {guard!r} on {device}"
                ):
                    return fault
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as fault:  # a compiler or a driver may raise anything
        return Failure(f"its check of itself on {device} failed with {type(fault).__name__}: {fault}")
    return None


def _difference(
    found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]], bound: float, what: str
) -> Failure | None:
    for (name, value), (_, wanted) in zip(found, expected, strict=True):
        error = (value.double() - wanted.double()).abs()
        if value.numel() and not bool(error.max() <= bound * wanted.double().abs().max().clamp(min=SMALL)):
            worst = int(error.nan_to_num(float("inf")).argmax())
            return Failure(
                f"its kernels do not compute {name} of {what}: it must be {wanted.flatten()[worst].item():.6g}; "
                f"got {value.flatten()[worst].item():.6g}"
            )
    return None


def _online_norm(
    row: Any, device: torch.device, dtype: torch.dtype, guard: str, D: int, channels_last: bool
) -> list[tuple[str, Tensor]]:
    generator, wide = torch.Generator(device).manual_seed(0), statistics_dtype(dtype)

    def draw(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, grad = (draw(N, T, D, dtype=dtype) for _ in range(2))
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    statistics = draw(T), draw(T).abs()
    u, v = draw(T), draw(T)
    options = guard, [*norms.Online(0.9, 0.8).constants]
    with torch.no_grad(), torch.cuda.device_of(x):
        affine = draw(T), draw(T)
        y, mean, var = row.online_norm(x, *affine, *statistics, *options)
        dx, *of_affine = row.online_norm_backward(grad, x, *affine, *statistics, u, v, *options, True)
    names = "y", "mean", "var", "the gradient of x", "the gradient of weight", "the gradient of bias", "u", "v"
    return list(zip(names, (y, mean, var, dx, *of_affine, u, v), strict=True))


def _operands(device: torch.device, dtype: torch.dtype, spec: CallSpec, H: int) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    C, wide = spec.gates * H, statistics_dtype(dtype)

    def draw(*shape: int, scale: float = 1.0, around: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        return (around + scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    given = {
        **{"x": draw(T, N, I), "h": draw(N, H), "weight_ih": draw(C, I), "weight_hh": draw(C, H, scale=H**-0.5)},
        **{"bias_ih": draw(C), "bias_hh": draw(C)},
    }
    if "c" in spec.declared.states:
        given["c"] = draw(N, H)
    for prefix, width, on in (("norm", C, spec.norm != "none"), ("cell_norm", H, spec.cell_norm)):
        if on:
            given |= {f"{prefix}_scale": draw(width, around=1.0, scale=0.1), f"{prefix}_shift": draw(width, scale=0.1)}
        if on and spec.norm == "online":
            given |= {f"{prefix}_{name}": draw(width, scale=0.1, dtype=wide) for name in ("mean", "u", "v")}
            given[f"{prefix}_var"] = draw(width, scale=0.1, around=1.0, dtype=wide).abs()
    return Operands(**{name: given.get(name) for name in Operands._fields})  # type: ignore[arg-type]


def _run(backend: Any, o: Operands, spec: CallSpec) -> tuple[Any, list[Tensor | None]]:
    results, saved = backend.forward(o, spec, True)
    grads = results.y, results.h, results.c if o.c is not None else None
    return results, backend.backward(grads, o, saved, spec, True, True)


def _named(o: Operands, spec: CallSpec, results: Any, grads: list[Tensor | None]) -> list[tuple[str, Tensor]]:
    """Every result, gradient and state by name."""

    def each() -> Iterator[tuple[str, Tensor | None]]:
        yield from results._asdict().items()
        yield from ((f"the gradient of {name}", grad) for name, grad in zip(DIFFERENTIABLE, grads, strict=True))
        yield from ((name, getattr(o, name)) for name in ("norm_u", "norm_v", "cell_norm_u", "cell_norm_v"))

    return [(name, value) for name, value in each() if value is not None]
