"""The build's faults, as real processes. A stand-in compiler that copies the finished library makes them quick."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rnnorm.ops import build

pytestmark = pytest.mark.skipif(build.load() is not None, reason=f"the C++ backend cannot run here: {build.load()}")

RUN = """
import warnings
import rnnorm, torch
warnings.simplefilter("ignore" if {quiet} else "always")
layer = rnnorm.LSTM(3, 4, backend={backend!r})
layer(torch.randn(2, 2, 3))[0].sum().backward()
layer(torch.randn(2, 2, 3))
print({{k: v is None for k, v in rnnorm.backends().items()}})
"""


def _program(backend: str = "cpu", quiet: bool = False) -> list[str]:
    return [sys.executable, "-c", RUN.format(backend=backend, quiet=quiet)]


def _stand_in(folder: Path, body: str) -> Path:
    """A compiler whose links run `body` with $out as the file to make."""
    script = folder / "compiler"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo stand-in 1 && exit 0
real={build.library()}
linking=no
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -shared) linking=yes ;; esac
  shift
done
[ $linking = no ] && : > "$out" && exit 0
{body}
"""
    )
    script.chmod(0o755)
    return script


def _environment(cache: Path, compiler: str | Path) -> dict[str, str]:
    return {**os.environ, "RNNORM_CACHE": str(cache), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}


def _run(environment: dict[str, str], **program) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _program(**program), env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_two_processes_at_once_and_one_killed_in_the_middle(tmp_path):
    cache = tmp_path / "cache"
    environment = _environment(cache, _stand_in(tmp_path, 'sleep 3; cp "$real" "$out"'))
    killed = subprocess.Popen(_program(), env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(cache.glob("building-*/*.o")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(cache.glob("building-*")), "the killed build leaves its folder behind"
    assert not list(cache.glob("*.so"))
    both = [
        subprocess.Popen(_program(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "'cpu': True" in out
        assert "building its CPU operators" in err
    assert len(list(cache.glob("*.so"))) == 1
    again = _run(environment)
    assert again.returncode == 0
    assert again.stderr == "", "a built library is found without a word"


def test_a_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    compiler = _stand_in(tmp_path, 'cp "$real" "$out"')
    found = _run(_environment(blocked / "cache", compiler))
    assert found.returncode == 0, found.stderr
    assert "'cpu': True" in found.stdout


def test_a_full_cache(tmp_path):
    cache = tmp_path / "cache"
    body = f'case "$out" in {cache}/*) echo "ld: No space left on device" >&2; exit 1 ;; esac; cp "$real" "$out"'
    found = _run(_environment(cache, _stand_in(tmp_path, body)))
    assert found.returncode == 0, found.stderr
    assert "'cpu': True" in found.stdout
    assert not list(cache.iterdir())


def test_a_failing_compiler_warns_once_under_auto_and_raises_by_name(tmp_path):
    environment = _environment(
        tmp_path / "cache", _stand_in(tmp_path, 'echo "stand-in: no such instruction" >&2; exit 1')
    )
    found = _run(environment, backend="auto")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("RuntimeWarning") == 1
    assert "no such instruction" in found.stderr
    assert "'cpu': False, 'scripted': True" in found.stdout
    named = _run(environment, backend="cpu")
    assert named.returncode != 0
    assert "BackendUnavailable: backend 'cpu' cannot run this call" in named.stderr
    assert "no such instruction" in named.stderr


def test_no_compiler(tmp_path):
    environment = _environment(tmp_path / "cache", tmp_path / "none")
    found = _run(environment, backend="auto")
    assert found.returncode == 0, found.stderr
    assert "no C++ compiler was found" in found.stderr
    assert "'cpu': False" in found.stdout


def test_a_library_built_ahead_needs_no_compiler(tmp_path):
    cache = tmp_path / "cache"
    environment = _environment(cache, _stand_in(tmp_path, 'cp "$real" "$out"'))
    ahead = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rnnorm.ops.build"],
        **{"env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert ahead.returncode == 0, ahead.stderr
    assert Path(ahead.stdout.strip()).parent == cache
    found = _run({**environment, "CXX": str(tmp_path / "none")})
    assert found.returncode == 0, found.stderr
    assert "'cpu': True" in found.stdout


def test_old_leftovers_are_swept(tmp_path):
    old, young = tmp_path / "building-old", tmp_path / "building-young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    build._sweep(tmp_path)
    assert not old.exists()
    assert young.exists()
