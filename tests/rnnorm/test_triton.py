"""The Triton backend without a device: in its interpreter, in a process with TRITON_INTERPRET=1, and compiled ahead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _interpreted(*arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_equals_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    _interpreted(str(HERE / "triton_interpreted.py"))


@pytest.mark.slow
@pytest.mark.skipif("RNNORM_RECORDED" not in os.environ, reason="RNNORM_RECORDED does not name the recorded cases")
def test_recorded_cases_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    _interpreted(str(HERE / "test_recorded.py"), "-k", "triton")
