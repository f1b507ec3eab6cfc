"""Compiles the C++ operators at first use: one library in a per-user cache, published by an atomic rename.

Threads of a process wait for one build and share its library. Processes do not lock each other out: those that build at
the same time publish equal files one after the other, and a killed one leaves a folder that is never read.
A process forked after the load has the operators; one forked before loads them itself.
`python -m rnnorm.ops.build` builds ahead of time.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from rnnorm.ops import errors
from rnnorm.ops.errors import Failure

_SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_LAST_LINES = 12
_STALE_SECONDS = 24 * 3600


class BuildError(RuntimeError):
    """The operators cannot be built on this machine; the message holds the compiler's last lines."""


class CacheError(BuildError):
    """The cache folder cannot be written, or is full."""


def cache_folder() -> Path:
    """`$RNNORM_CACHE`, or `rnnorm` in the user's cache folder. Raises `CacheError` where no home folder is known."""
    try:
        if chosen := os.environ.get("RNNORM_CACHE"):
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnorm"
    except RuntimeError as problem:  # a user without an entry, as in containers
        why = str(problem).rstrip(".")
        raise CacheError(
            f"no cache folder is known: {why}; set RNNORM_CACHE to a writable folder, by its path"
        ) from None


def _sources() -> list[Path]:
    return sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".cpp", ".h") and "cuda" not in path.parts)


def _flags() -> list[str]:
    """The compiler's flags; `$RNNORM_CXXFLAGS` adds to them, for sanitizers and debuggers."""
    include = Path(torch.__file__).parent / "include"
    machine = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "aarch64": ["-mcpu=native"]}
    # No -ffast-math: infinities and NaN must stay what they are.
    arithmetic = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    warnings = ["-Wall", "-Wextra"]
    messages = [f'-DRNNORM_{name}="{text}"' for name, text in vars(errors).items() if name.isupper()]
    return [
        *("-std=c++20", "-O3", "-fPIC", "-fopenmp", *warnings, *arithmetic, *machine.get(platform.machine(), [])),
        *_words("RNNORM_CXXFLAGS"),
        *messages,
        *(abi, f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"),
    ]


def _processor() -> str:
    """The processor's features, on which -march=native depends: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _words(variable: str) -> list[str]:
    """What a variable holds, as a shell splits it. Raises `BuildError`."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as problem:
        raise BuildError(f"{variable} must be words of a shell; got {text!r}: {problem}; correct it") from None


def _compiler() -> list[str] | None:
    """The compiler's command: a program, and what `$CXX` gives it (`ccache g++`, `g++ -m64`). Raises `BuildError`."""
    if whole := shutil.which(os.environ.get("CXX") or ""):  # a path may hold spaces
        return [whole]
    wanted = _words("CXX")
    commands = [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]
    return next(([path, *rest] for name, *rest in commands if (path := shutil.which(name))), None)


def _run(command: list[str], messages: int) -> subprocess.CompletedProcess[str]:
    """What a compiler's command gives; `messages` is where its errors go, in any encoding. Raises `BuildError`."""
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=messages, text=True, errors="replace", check=False
        )
    except OSError as problem:
        raise BuildError(f"the compiler {command[0]} cannot be run: {problem.strerror}; set CXX to another") from None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def _name(compiler: list[str] | None) -> str:
    """The library's file name; without a compiler, a pattern that any compiler's build of these sources matches."""
    texts = [f"{path.relative_to(_SOURCES)}\n{path.read_text()}" for path in _sources()]
    base = _digest(*texts, torch.__version__, *_flags(), _processor())
    if compiler is None:
        return f"rnnorm_cpu-{base}-*.so"
    version = _run([*compiler, "--version"], subprocess.DEVNULL).stdout
    return f"rnnorm_cpu-{base}-{_digest(*compiler, version)}.so"


def _compile(compiler: list[str], folder: Path, target: Path) -> None:
    """Compile and link into `target`, a file in `folder`. Raises `BuildError` with the compiler's last lines."""
    units = [path for path in _sources() if path.suffix == ".cpp"]
    objects = [folder / f"{path.stem}.o" for path in units]
    jobs = []
    for unit, made in zip(units, objects, strict=True):
        # To a file: a pipe would fill up while several compilers run.
        log = made.with_suffix(".log").open("w+", errors="replace")
        command = [*compiler, *_flags(), "-c", str(unit), "-o", str(made)]
        jobs.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log))
    outputs = []
    for process, log in jobs:
        if process.wait() != 0:
            log.seek(0)
            outputs.append(log.read())
        log.close()
    if not outputs:
        libraries = Path(torch.__file__).parent / "lib"
        command = [*compiler, "-shared", *_flags(), "-o", str(target), *map(str, objects)]
        command += [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        linked = _run(command, subprocess.STDOUT)
        outputs = [linked.stdout] if linked.returncode else []
    if outputs:
        last = "\n".join("\n".join(outputs).strip().splitlines()[-_LAST_LINES:])
        raise BuildError(f"{shlex.join(compiler)} could not build the CPU operators; its last lines:\n{last}")


def _sweep(folder: Path) -> None:
    """Remove folders that killed builds left, once they are a day old."""
    for left in folder.glob("building-*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue


def _build_in(cache: Path, compiler: list[str], name: str) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    print(
        f"rnnorm: building the CPU operators with {shlex.join(compiler)}, once for this torch; "
        "this takes up to a minute ...",
        file=sys.stderr,
        flush=True,
    )
    try:
        built = folder / name
        _compile(compiler, folder, built)
        with built.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(built, cache / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return cache / name


def _made(compiler: list[str] | None, name: str, cache: Path) -> Path:
    """The library in `cache`, found or built now. Raises `BuildError`."""
    if found := sorted(cache.glob(name)):
        return found[0]
    if compiler is None:
        raise BuildError(
            f"no C++ compiler was found ({os.environ.get('CXX') or 'g++, c++, clang++'}) and {cache} holds no library "
            "built for these sources; install g++, or set CXX"
        )
    try:
        return _build_in(cache, compiler, name)
    except (OSError, BuildError) as problem:
        full = isinstance(problem, OSError) or "No space left" in str(problem) or "Read-only" in str(problem)
        if not full:
            raise
        raise CacheError(f"{cache} cannot be written: {problem}; set RNNORM_CACHE to a writable folder") from None


def library() -> Path:
    """The built library, from the cache or built now. Raises `BuildError`."""
    compiler = _compiler()
    return _made(compiler, _name(compiler), cache_folder())


def _load() -> Failure | None:
    try:
        compiler = _compiler()
        name = _name(compiler)
        try:
            again = "and they are built again" if compiler else "and install g++, or set CXX, to build them again"
            _load_from(_made(compiler, name, cache_folder()), f"remove that file, {again}")
        except CacheError as problem:
            # The cache is read-only or full: build for this process alone. A loaded library no longer needs its file.
            try:
                with tempfile.TemporaryDirectory(prefix="rnnorm-") as folder:
                    _load_from(_made(compiler, name, Path(folder)), "set RNNORM_CACHE to a writable folder")
            except CacheError as second:
                raise BuildError(f"neither the cache nor a temporary folder can be used: {problem}; {second}") from None
    except (BuildError, OSError) as problem:
        return Failure(problem)
    return None


def _load_from(path: Path, advice: str) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as problem:
        raise BuildError(f"the CPU operators cannot be loaded: {problem.__cause__ or problem}; {advice}") from None


_lock = threading.Lock()
_outcome: list[Failure | None] = []  # result of the only attempt to load


def load() -> Failure | None:
    """Load the operators into this process, once; returns None, or why it failed. Threads wait for the first one."""
    if not _outcome:
        with _lock:  # torch ends a process that loads a second library of the same operators
            if not _outcome:
                _outcome.append(_load())
    return _outcome[0]


def _unlocked() -> None:
    """Replace the lock: a child forked while another thread holds it would wait forever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)


if __name__ == "__main__":
    try:
        print(library())
    except BuildError as problem:
        sys.exit(f"error: {problem}")
