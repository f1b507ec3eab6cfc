"""Compile the Triton kernels ahead, for devices that need not be here, and read off what they use.

python -m rnnorm.ops.triton_ahead       # registers and shared memory of the online LSTM's kernels, as a table
"""

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rnnorm import norms
from rnnorm.ops import triton_kernels, triton_online_norm, triton_steps
from rnnorm.ops.call import CallSpec, Operands, statistics_dtype

CAPABILITIES = (80, 90, 100)
_SWITCH = threading.Lock()


class Kernel(NamedTuple):
    """A compiled kernel. `local`: bytes of a thread in local memory, where registers spill to."""

    name: str
    registers: int
    local: int
    shared: int  # bytes of a program
    ptx: str


class _Device:
    """Stands for a device of that compute capability, as far as the compiler asks."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:  # under which the compiler keeps its kernels
        return 1000 + self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(capability: int) -> Iterator[None]:
    with _SWITCH:
        before = getattr(driver, "_active", None)  # `reset_active` fails where there is no device
        driver.set_active(_Device(capability))
        try:
            yield
        finally:
            driver.set_active(before)


def operands(spec: CallSpec, N: int, H: int, dtype: torch.dtype, P: int = 0, more: tuple[str, ...] = ()) -> Operands:
    """Operands of a call of one step on the CPU, all of them of use to its kernels; `more` names masks and such."""
    C, I, T, wide = spec.gates * H, 1, 1, statistics_dtype(dtype)  # noqa: E741
    h = torch.zeros(N, P or H, dtype=dtype)
    given: dict[str, Tensor] = {
        **{"x": torch.zeros(T, N, I, dtype=dtype), "h": h},
        **{"weight_ih": torch.zeros(C, I, dtype=dtype), "weight_hh": torch.zeros(C, P or H, dtype=dtype)},
        **{"bias_ih": torch.zeros(C, dtype=dtype), "bias_hh": torch.zeros(C, dtype=dtype)},
    }
    if "c" in spec.declared.states:
        given["c"] = torch.zeros(N, H, dtype=dtype)
    if P:
        given["weight_hr"] = torch.zeros(P, H, dtype=dtype)
    for prefix, width, on in (("norm", C, spec.norm != "none"), ("cell_norm", H, spec.cell_norm)):
        names = ("scale", "shift", *(triton_steps.STATISTICS if spec.norm == "online" else ())) if on else ()
        given |= {f"{prefix}_{name}": torch.zeros(width, dtype=wide) for name in names}
    offered = {
        **{"lengths": torch.ones(N, dtype=torch.int64), "reset": torch.zeros(T, N, dtype=torch.bool)},
        **{"recurrent_mask": h.to(wide), "zoneout_h": torch.zeros(T, N, P or H, dtype=torch.bool)},
        **({"zoneout_c": torch.zeros(T, N, H, dtype=torch.bool)} if "c" in given else {}),
    }
    given |= {name: offered[name] for name in more if name in offered}
    return Operands(**{name: given.get(name) for name in Operands._fields})  # type: ignore[arg-type]


def compiled(spec: CallSpec, o: Operands, capability: int) -> Iterator[Kernel]:
    """Every kernel of a call and of its backward pass, compiled for devices of that capability."""
    passes: list[Any] = [(triton_steps.Forward, False), (triton_steps.Backward, True)]
    for kind, backward in passes:
        loop = kind(triton_steps.plan(o, spec, backward, save=True, grad_y=backward))
        for launch in loop.step(0):
            if isinstance(launch, triton_steps.Launch):
                with _compiling_for(capability):
                    made = launch.kernel.warmup(grid=(launch.programs,), **launch.arguments)
                yield _read(launch.kernel.__name__, made)
    addresses = [1 << 40] * triton_kernels.SLOTS
    with _compiling_for(capability):
        made = triton_kernels.publish.warmup(loop.table, loop.counter, 1, *addresses, grid=(1,))
    yield _read("publish", made)


def compiled_online_norm(x: Tensor, affine: bool, guard: str, capability: int) -> list[Kernel]:
    """Every kernel of a call of `online_norm` with that input and of its backward pass."""
    made: list[Kernel] = []

    class Compiled:
        """A kernel that is compiled where it would be launched."""

        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_it(*arguments: Any) -> None:
                with _compiling_for(capability):
                    made.append(_read(self._kernel.__name__, self._kernel.warmup(*arguments, grid=grid)))

            return compile_it

    launched = {
        name: kernel
        for name, kernel in vars(triton_online_norm).items()
        if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
    }
    mean, var, u, v = (torch.ones(x.size(1), dtype=statistics_dtype(x.dtype)) for _ in range(4))
    weight = mean if affine else None
    constants = norms.Online().constants
    try:
        for name, kernel in launched.items():
            setattr(triton_online_norm, name, Compiled(kernel))
        triton_online_norm.online_norm(x, weight, weight, mean, var, guard, constants)
        triton_online_norm.online_norm_backward(x, x, weight, weight, mean, var, u, v, guard, constants, True)
    finally:
        for name, kernel in launched.items():
            setattr(triton_online_norm, name, kernel)
    return made


def _read(name: str, made: Any) -> Kernel:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(made.metadata_group[f"{made.metadata.name}.cubin"])
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return Kernel(name, used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared, made.asm["ptx"])


def main() -> None:
    print("| kernel | H | " + " | ".join(f"sm_{capability}" for capability in CAPABILITIES) + " |")
    print("|---|---|" + "---|" * len(CAPABILITIES))
    spec = CallSpec("lstm", "online", "scale", norms.Online().constants, False, True, False, "triton")
    for H in (200, 650, 1150, 2048):
        o = operands(spec, 20, H, torch.float32)
        for row in zip(*(compiled(spec, o, capability) for capability in CAPABILITIES), strict=True):
            cells = " | ".join(f"{kernel.registers} registers, {kernel.shared} bytes" for kernel in row)
            print(f"| {row[0].name} | {H} | {cells} |")


if __name__ == "__main__":
    main()
