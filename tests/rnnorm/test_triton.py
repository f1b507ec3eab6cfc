"""The Triton backend without a device: in its interpreter, in a process with TRITON_INTERPRET=1, and compiled ahead."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from rnnorm import norms
from rnnorm.ops import CallSpec

HERE = Path(__file__).parent
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("these tests start the interpreter in a process apart", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")


def _interpreted(least: int, *arguments: str) -> None:
    """Run tests in the interpreter; at least so many must run, since all of them may skip with success."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
    assert passed >= least, done.stdout[-2000:]


@pytest.mark.slow
def test_equals_reference_in_the_interpreter() -> None:
    _interpreted(100, str(HERE / "triton_interpreted.py"))


@pytest.mark.slow
@pytest.mark.skipif("RNNORM_RECORDED" not in os.environ, reason="RNNORM_RECORDED does not name the recorded cases")
def test_recorded_cases_in_the_interpreter() -> None:
    _interpreted(40, str(HERE / "test_recorded.py"), "-k", "triton")


@pytest.mark.slow
@pytest.mark.parametrize(("named", "count"), [("GRU online,", 6), ("/ torch's p", 4)])
def test_the_rows_of_the_benchmark_for_a_gpu_run(named: str, count: int) -> None:
    command = [sys.executable, "scripts/benchmark.py", "--tiny", "--threads", "1", "--only", named]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=HERE.parents[1])
    assert sum(line.startswith("| ") and named in line for line in done.stdout.splitlines()) == count


def test_pairs_are_complete() -> None:
    axes: dict[str, Sequence[Any]] = {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2, 3]}
    rows = list(cases.pairwise(axes, lambda row: row.get("a") != 2 or row.get("c") != 3))
    assert {(row["a"], row["b"]) for row in rows} == {(x, y) for x in axes["a"] for y in axes["b"]}
    assert {(row["a"], row["c"]) for row in rows} == {(x, y) for x in axes["a"] for y in axes["c"]} - {(2, 3)}
    assert len(rows) < 24


AXES: dict[str, Sequence[Any]] = {
    "cell": ["lstm", "lstm-cell_norm", "lstm-proj", "lstm-proj-cell_norm", "gru", "rnn_tanh"],
    "norm": list(cases.NORMS),
    "H": [2048, 1, 7, 200, 650, 1150],
    "capability": [90, 80, 100],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "training": [True, False],
    "N": [20, 1, 64],
    "more": [(), ("lengths", "reset", "recurrent_mask", "zoneout_h", "zoneout_c")],
}


@pytest.fixture
def compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that compiles kernels ahead; what it compiles is kept in a folder of the tests."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    from rnnorm.ops import triton_ahead

    return triton_ahead


def _spec(cell: str, norm: norms.Spec, training: bool) -> CallSpec:
    name, *options = cell.split("-")
    return CallSpec(
        *(name, norm.kind, norm.guard, norm.constants, "cell_norm" in options and norm.kind != "none"),
        *(training, False, "triton"),
    )


# Without more than this a program needs no leave to use it, on any device.
SHARED = 48 * 1024


@pytest.mark.slow
def test_kernels_compile_without_spills(compiler: Any) -> None:
    done = 0
    for row in cases.pairwise(AXES):
        spec = _spec(row["cell"], cases.NORMS[row["norm"]], row["training"])
        P = max(1, row["H"] // 2) if "proj" in row["cell"] else 0
        o = compiler.operands(spec, row["N"], row["H"], row["dtype"], P, row["more"])
        for kernel in compiler.compiled(spec, o, row["capability"]):
            done += 1
            assert kernel.local == 0, (row, kernel.name)
            assert kernel.shared <= SHARED, (row, kernel.name)
            assert kernel.registers <= 255, (row, kernel.name)
            assert _in_order(kernel.ptx), (row, kernel.name)
    assert done > 200


def _in_order(ptx: str) -> bool:
    """One warp, or a barrier between the last load and the first store."""
    lines = ptx.splitlines()
    loads, barriers, stores = (
        [k for k, line in enumerate(lines) if what in line] for what in ("ld.global", "bar.sync", "st.global")
    )
    alone = ".reqntid 32" in ptx or not loads
    return alone or any(max(loads) < k < min(stores) for k in barriers)


@pytest.mark.parametrize("norm", ["online-none", "layer"])
def test_no_warp_stores_what_another_one_still_loads(compiler: Any, norm: str) -> None:
    """A size, dtype and mode in which the compiler gives loads and stores of h to different warps."""
    spec = _spec("lstm", cases.NORMS[norm], training=False)
    kernels = [*compiler.compiled(spec, compiler.operands(spec, 3, 40, torch.float64), 90)]
    assert [kernel.name for kernel in kernels if not _in_order(kernel.ptx)] == []
    assert not _in_order(kernels[0].ptx.replace("bar.sync", ""))


@pytest.mark.slow
def test_kernels_of_online_norm_compile_without_spills(compiler: Any) -> None:
    axes: dict[str, Sequence[Any]] = {
        "shape": [(8, 64, 32, 32), (128, 64), (3, 7, 5), (1, 1), (1280, 800)],
        "guard": list(norms.GUARDS),
        "capability": [80, 90, 100],
        "dtype": [torch.float32, torch.bfloat16, torch.float64],
        "affine": [True, False],
        "last": [False, True],
    }
    found = set()
    for row in cases.pairwise(axes):
        x = torch.zeros(row["shape"], dtype=row["dtype"])
        if row["last"]:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for kernel in compiler.compiled_online_norm(x, row["affine"], row["guard"], row["capability"]):
            found.add(kernel.name)
            assert kernel.local == 0, (row, kernel.name)
            assert kernel.shared <= SHARED, (row, kernel.name)
            assert kernel.registers <= 255, (row, kernel.name)
    assert found == {"moments", "statistics", "normalize", "squares", "sums", "control", "gradient"}


def _bits(value: float) -> str:
    return "0d" + struct.pack(">d", value).hex().upper()


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_constants_of_float64_are_exact(compiler: Any, capability: int) -> None:
    """None of them is rounded to float32 on its way into a kernel."""
    constants = norms.Constants(
        eps=1.1e-3, alpha_fwd=0.91, alpha_bwd=0.83, scale_eps=1.3e-3, clamp_limit=4.7, control_floor=0.37
    )
    alpha, rest = constants.alpha_fwd, 1 - constants.alpha_bwd
    expected = {
        "stream": [constants.eps, alpha, 1 - alpha, alpha * (1 - alpha)],
        "stream_backward": [rest, constants.control_floor],
    }
    for guard, value in (("scale", constants.scale_eps), ("clamp", constants.clamp_limit)):
        spec = CallSpec("rnn_tanh", "online", guard, constants, False, True, False, "triton")
        o = compiler.operands(spec, 3, 7, torch.float64)
        for kernel in compiler.compiled(spec, o, capability):
            for constant in [*expected.get(kernel.name, []), *([value] if kernel.name == "rnn" else [])]:
                # A difference may be a sum with the negative, and a quotient a product with the inverse.
                assert _bits(constant) in kernel.ptx or _bits(-constant) in kernel.ptx, (kernel.name, constant)
