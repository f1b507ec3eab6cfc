"""The layout of the repository: where files are, which packages import which, and that imports have no side effects."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rnnorm

ROOT = Path(__file__).parents[1]
TOP = {"rnnorm", "lm", "data", "tests", "scripts", "pyproject.toml", "README.md"}
LONGEST = 70
_STUB = r"\b(TODO|FIXME|XXX)\b"


def _tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def _sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def _imports(path: Path) -> Iterator[str]:
    """Every imported name, dotted: `from a import b` gives `a.b`; nested imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _first(name: str) -> str:
    return name.split(".")[0]


def test_top_level_is_the_plan() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in _tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP
    assert all((ROOT / name).exists() for name in TOP)
    assert not list((ROOT / "data").rglob("*.py")), "no Python among the data"


def test_library_imports_torch_alone() -> None:
    for path in _sources("rnnorm"):
        foreign = {_first(name) for name in _imports(path)} - sys.stdlib_module_names - {"torch", "rnnorm"}
        # Comes with torch where it can be used; `test_nothing_happens_at_import` keeps it out of the import.
        own = {"triton"} if path.stem.startswith("triton") else set()
        assert not foreign - own, f"{path}: {foreign}"


def test_operators_do_not_know_the_modules() -> None:
    allowed = ("rnnorm.ops", "rnnorm._cells", "rnnorm._torch", "rnnorm.norms")
    below = [ROOT / "rnnorm" / name for name in ("_cells.py", "_torch.py", "norms.py")]
    for path in [*_sources("rnnorm/ops"), *below]:
        up = [name for name in _imports(path) if _first(name) == "rnnorm" and not name.startswith(allowed)]
        assert not up, f"{path}: {up}"


def test_nothing_reaches_past_the_operators_own_names() -> None:
    offered = {f"rnnorm.ops.{name}" for name in rnnorm.ops.__all__} | {"rnnorm.ops"}
    for path in (ROOT / "rnnorm").glob("*.py"):
        past = [name for name in _imports(path) if name.startswith("rnnorm.ops") and name not in offered]
        tree = ast.walk(ast.parse(path.read_text()))
        past += [f"ops.{n.attr}" for n in tree if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "ops"]
        assert not [name for name in past if f"rnnorm.{name}" not in offered], f"{path}: {past}"


def test_no_module_imports_itself_through_others() -> None:
    """No module of the library imports itself, directly or not; imports inside functions count."""
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in _sources("rnnorm")}
    modules = {name.removesuffix(".__init__") for name in names.values()}
    needs: dict[str, set[str]] = {}
    for path, name in names.items():
        found = [i for i in _imports(path) if _first(i) == "rnnorm"]
        parts = {i if i in modules else i.rpartition(".")[0] for i in found}
        # A package is its table of contents: what it holds does not need it.
        needs[name.removesuffix(".__init__")] = (
            parts - {"rnnorm", "rnnorm.ops"} if "ops" in name else parts - {"rnnorm"}
        )
    while leaves := {name for name, found in needs.items() if not found & needs.keys()}:
        for name in leaves:
            del needs[name]
    assert not needs, f"a circle among {sorted(needs)}"


def test_one_file_holds_torchs_private_names() -> None:
    using = set()
    for folder in ("rnnorm", "lm", "scripts"):
        for path in _sources(folder):
            private = [i for i in _imports(path) if re.match(r"torch\.(\w+\.)*_[a-z]", i)]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and re.match(r"torch\.(\w+\.)*_[A-Za-z]", ast.unparse(node)):
                    private.append(ast.unparse(node))
            if private:
                using.add(path.relative_to(ROOT).as_posix())
    assert using == {"rnnorm/_torch.py"}


def test_toolkit_uses_the_librarys_public_names() -> None:
    public = {f"rnnorm.{name}" for name in rnnorm.__all__} | {"rnnorm", "rnnorm.__version__"}
    for path in [*_sources("lm"), *_sources("scripts")]:
        found = [name for name in _imports(path) if _first(name) == "rnnorm"]
        private = [name for name in found if name not in public and not name.startswith("rnnorm.norms.")]
        assert not private, f"{path}: {private}"
        tree = ast.walk(ast.parse(path.read_text()))
        used = {n.attr for n in tree if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "rnnorm"}
        assert used <= {*rnnorm.__all__, "__version__"}, f"{path}: {used}"


def test_nobody_imports_scripts_or_tests() -> None:
    for folder in ("rnnorm", "lm", "scripts"):
        for path in _sources(folder):
            assert not {_first(name) for name in _imports(path)} & {"scripts", "tests"}, path
    for path in _sources("rnnorm"):
        assert "lm" not in {_first(name) for name in _imports(path)}, path


def test_one_file_compiles_torchscript() -> None:
    using = set()
    for folder in ("rnnorm", "lm", "scripts"):
        for path in _sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and re.match(
                    r"(torch\.)?jit\.(script|trace|load|save|export)", ast.unparse(node)
                ):
                    using.add(path.relative_to(ROOT).as_posix())
            assert not [name for name in _imports(path) if name.startswith("torch.jit")], path
    assert using == {"rnnorm/ops/scripted.py", "lm/export.py"}  # to run it, and to write files of it


def test_functions_are_short() -> None:
    long = []
    for folder in ("rnnorm", "lm", "scripts"):
        for path in _sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                    lines = node.end_lineno - node.lineno + 1
                    if lines > LONGEST:
                        long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {lines}")
    assert not long


def test_no_paths_of_a_machine_and_no_stubs() -> None:
    found = []
    for path in _tracked():
        if path == Path(__file__) or path.suffix in (".png", ".npz"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"(?<![\w.~$}])/(?:work|home|root|Users|mnt)/", line) or re.search(_STUB, line):
                found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert not found


_IMPORT = """
import sys, torch
done = []
WRITES = ("w", "a", "x", "+")
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and any(c in mode for c in WRITES)) or (mode is None and flags & 3):
            done.append((event, str(path)))
    elif event.startswith(("socket.", "subprocess.", "os.system", "os.posix_spawn", "os.exec", "os.fork")):
        done.append((event, str(arguments)[:200]))
    elif event in ("os.mkdir", "os.remove", "os.rename"):
        done.append((event, str(arguments)[:200]))
def refuse(*arguments, **options):
    raise AssertionError("TorchScript compiled at import")
torch.jit.script = refuse
before = set(sys.modules)
sys.addaudithook(hook)
import {name}
new = set(sys.modules) - before
late = ["matplotlib", "tensorboard", "torch.utils.tensorboard", "datasets", "sentencepiece", "torch._dynamo", "triton"]
print([name for name in late if name in new], done)
"""


@pytest.mark.parametrize("name", ["rnnorm", "lm", "lm.cli"])
def test_nothing_happens_at_import(name: str) -> None:
    program = _IMPORT.replace("{name}", name)
    arguments = [sys.executable, "-B", "-W", "error", "-c", program]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] []\n"
    assert done.stderr == ""
