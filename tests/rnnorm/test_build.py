"""Failures of the build, in real processes. A stand-in compiler that copies the finished library makes them fast."""

import os
import re
import shlex
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
    text = {"PYTHONUTF8": "1"}  # whatever the locale
    return {**os.environ, **text, "RNNORM_CACHE": str(cache), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}


def _run(environment: dict[str, str], **program) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _program(**program), env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
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
        assert "building the CPU operators" in err
    assert len(list(cache.glob("*.so"))) == 1
    again = _run(environment)
    assert again.returncode == 0
    assert again.stderr == "", "a built library is found silently"


def _caches(folder: Path) -> dict[str, Path]:
    """A writable cache, and one that is not."""
    (folder / "file").write_text("")
    return {"empty": folder / "cache", "unwritable": folder / "file" / "cache"}


THREADS = """
import threading
import rnnorm, torch
outputs = []
start = threading.Barrier(4)

def call():
    layer = rnnorm.LSTM(3, 4, backend="cpu")
    start.wait()
    outputs.append(layer(torch.ones(2, 2, 3))[0])

threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(outputs))
"""


@pytest.mark.parametrize("cache", ["empty", "unwritable"])
def test_first_use_from_several_threads_builds_and_loads_once(tmp_path, cache):
    builds, temporary = tmp_path / "builds", tmp_path / "temporary"
    temporary.mkdir()
    compiler = _stand_in(tmp_path, f'echo build >> {builds}; sleep .5; cp "$real" "$out"')
    environment = {**_environment(_caches(tmp_path)[cache], compiler), "TMPDIR": str(temporary)}
    # A second library of the same operators would end the process.
    found = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "4\n"
    assert builds.read_text() == "build\n"
    assert found.stderr.count("building the CPU operators") == 1
    assert not list(temporary.iterdir()), "a library built for one process leaves nothing behind"


FORK = """
import os, threading
import rnnorm, torch
from rnnorm.ops import build
layer = rnnorm.LSTM(3, 4, norm="none", backend="cpu").eval()
x = torch.ones(2, 2, 3)
expected = layer(x)[0] if {loaded} else None
if not {loaded}:
    build._lock.acquire()  # as another thread of the parent would hold it
child = os.fork()
if child == 0:
    with torch.no_grad():
        found = layer(x)[0]
    os._exit(0 if expected is None or torch.equal(found, expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("loaded", [True, False])
def test_a_forked_child(tmp_path, loaded):
    environment = _environment(tmp_path / "cache", _stand_in(tmp_path, 'cp "$real" "$out"'))
    found = subprocess.run(
        [sys.executable, "-c", FORK.format(loaded=loaded)],
        **{"env": environment, "capture_output": True, "text": True, "timeout": 60, "check": False},
    )
    assert found.returncode == 0, found.stderr


def test_a_cache_that_cannot_be_written(tmp_path):
    environment = _environment(_caches(tmp_path)["unwritable"], _stand_in(tmp_path, 'cp "$real" "$out"'))
    found = _run(environment)
    assert found.returncode == 0, found.stderr
    assert "'cpu': True" in found.stdout
    # Building ahead needs a cache that can be written.
    ahead = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rnnorm.ops.build"],
        **{"env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert ahead.returncode == 1
    assert "cannot be written" in ahead.stderr
    assert "set RNNORM_CACHE" in ahead.stderr


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
    assert "'cpu': False" in found.stdout
    assert "'scripted': True" in found.stdout
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


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"CXX": "NOT_A_PROGRAM"}, "NOT_A_PROGRAM cannot be run: Exec format error; set CXX to another"),
        ({"CXX": "'g++"}, 'CXX must be words of a shell; got "\'g++": No closing quotation'),
        ({"RNNORM_CXXFLAGS": "'-g"}, 'RNNORM_CXXFLAGS must be words of a shell; got "\'-g": No closing quotation'),
        ({"CXX": "LATIN_1"}, "LATIN_1 could not build the CPU operators; its last lines:\n\ufffd"),
    ],
)
def test_a_build_that_cannot_begin_is_warned_of(tmp_path, changed, told):
    programs = {"NOT_A_PROGRAM": b"\x00\x01", "LATIN_1": b"#!/bin/sh\nprintf '\\351'; exit 1\n"}
    for name, content in programs.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o755)
    changed = {key: str(tmp_path / text) if text in programs else text for key, text in changed.items()}
    environment = {**_environment(tmp_path / "cache", "g++"), **changed}
    found = _run(environment, backend="auto")
    assert found.returncode == 0, found.stderr
    assert told in found.stderr
    assert "'cpu': False" in found.stdout
    ahead = subprocess.run(
        [sys.executable, "-m", "rnnorm.ops.build"], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert ahead.returncode == 1
    assert told in ahead.stderr
    assert "Traceback" not in ahead.stderr


def test_a_compiler_may_be_a_command_of_several_words(tmp_path):
    compiler = _stand_in(tmp_path, 'cp "$real" "$out"')
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    found = _run(_environment(tmp_path / "cache", f"{wrapper} '{compiler}'"), backend="auto")
    assert found.returncode == 0, found.stderr
    assert "'cpu': True" in found.stdout
    assert f"with {shlex.join([str(wrapper), str(compiler)])}, once" in found.stderr


def test_a_compiler_in_a_path_with_spaces_that_complains_is_found_and_runs_once(tmp_path):
    """Its complaints, with the number of its process, are no part of its version."""
    (tmp_path / "my tools").mkdir()
    compiler = _stand_in(tmp_path / "my tools", 'cp "$real" "$out"')
    compiler.write_text(compiler.read_text().replace("#!/bin/sh\n", "#!/bin/sh\necho complaint $$ >&2\n"))
    environment = _environment(tmp_path / "cache", compiler)
    for count in (1, 0):
        found = _run(environment)
        assert found.returncode == 0, found.stderr
        assert found.stderr.count("building the CPU operators") == count
    assert len([*(tmp_path / "cache").glob("*.so")]) == 1


HOMELESS = """
import os
os.getuid = lambda: 2**31 - 9
import rnnorm, torch
rnnorm.LSTM(3, 4, backend="cpu")(torch.randn(2, 2, 3))
"""


def test_a_user_without_a_home(tmp_path):
    environment = _environment(tmp_path / "cache", _stand_in(tmp_path, 'cp "$real" "$out"'))
    for name in ("RNNORM_CACHE", "HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "building the CPU operators" in found.stderr, "for this process alone"


def test_a_cache_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RNNORM_CACHE", "~/kept")
    assert build.cache_folder() == tmp_path / "kept"


def test_a_library_that_cannot_be_loaded_is_named(tmp_path):
    environment = _environment(tmp_path / "cache", _stand_in(tmp_path, ': > "$out"'))
    found = _run(environment, backend="auto")
    assert found.returncode == 0, found.stderr
    assert re.search(
        r"the CPU operators cannot be loaded: .*\.so: file too short; remove that file, and they", found.stderr
    )


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


def test_a_warning_of_the_compiler_is_a_fault_in_the_scripts():
    assert {"-Wall", "-Wextra"} <= set(build._flags())
    for script in ("test.sh", "sanitize.sh"):
        assert "-Werror" in (Path(__file__).parents[2] / "scripts" / script).read_text()


def test_old_leftovers_are_swept(tmp_path):
    old, young = tmp_path / "building-old", tmp_path / "building-young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    build._sweep(tmp_path)
    assert not old.exists()
    assert young.exists()
