"""Requirements: the library needs torch and numpy, the toolkit its extra, and errors say so."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rnnorm
from lm.errors import missing_package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def modules(requirements):
    """The names under which requirements are imported."""
    return {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}


def imported(folder):
    """The top-level names that the sources of a package import, but for the standard library's and our own."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"rnnorm", "lm"}


def test_requirements_are_what_is_imported():
    base = modules(PROJECT["dependencies"])
    assert base == {"torch", "numpy"}
    assert imported("rnnorm") - {"triton"} <= base  # triton comes with torch's builds for CUDA, which alone need it
    # `datasets` brings huggingface_hub and pyarrow; pydoc_data is Python's own, which some systems package apart
    needed = imported("lm") - {"huggingface_hub", "pyarrow", "pydoc_data"}
    assert needed - modules(EXTRAS["export"]) == base | modules(EXTRAS["lm"])


def test_every_requirement_has_a_pinned_version():
    pinned = modules((ROOT / "scripts/constraints.txt").read_text().splitlines())
    wanted = modules(name for names in [PROJECT["dependencies"], *EXTRAS.values()] for name in names)
    assert wanted - {"rnnorm"} <= pinned


def test_metadata():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rnnorm.__version__)
    assert {"description", "readme", "requires-python", "authors", "keywords", "classifiers"} <= PROJECT.keys()
    for package in ("rnnorm", "lm"):
        assert (ROOT / package / "py.typed").is_file()


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def without(absent, program, *arguments):
    """Runs a program as if some packages were not installed."""
    text = _WITHOUT.replace("ABSENT", repr(set(absent))) + program
    command = [sys.executable, "-B", "-W", "error", "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_library_runs_without_the_extras():
    absent = modules(name for names in EXTRAS.values() for name in names) - {"rnnorm"}
    program = """
import torch, rnnorm
for layer in (rnnorm.LSTM(3, 4, norm="online"), rnnorm.GRU(3, 4), rnnorm.RNN(3, 4)):
    layer(torch.randn(2, 2, 3))[0].sum().backward()
rnnorm.OnlineNorm(4)(torch.randn(2, 4))
print("ran")
"""
    done = without(absent, program)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


TOLD = (
    r"error: the toolkit needs the package (\w+), which is not installed; install it with: pip install 'rnnorm\[lm\]'\n"
)


@pytest.mark.parametrize("absent", ["click", "pydantic", "safetensors", "tomli_w", None])
def test_the_command_line_says_what_to_install(absent):
    names = modules(EXTRAS["lm"]) if absent is None else {absent}
    for program in (
        "import runpy; sys.argv[0] = 'lm'; runpy.run_module('lm', run_name='__main__', alter_sys=True)",
        "from lm.__main__ import main; sys.exit(main())",  # as `rnnlm` does
    ):
        done = without(names, program, "config", "--list")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(TOLD, done.stderr)[1] in names


def test_python_says_what_to_install():
    done = without({"pydantic"}, "import lm; print(lm.__doc__[:8]); lm.load")
    assert done.stdout == "Language\n"
    told = TOLD.removeprefix("error: ")
    assert re.search(f"ImportError: {told}", done.stderr)


def test_a_module_of_our_own_is_not_taken_for_a_package():
    for name in ("lm.gone", "rnnorm"):
        fault = ModuleNotFoundError(f"No module named {name!r}", name=name)
        with pytest.raises(ModuleNotFoundError) as raised:
            missing_package(fault)
        assert raised.value is fault


def test_a_command_says_what_it_needs_in_addition(tmp_path):
    program = "from lm.__main__ import main; sys.exit(main())"
    given = ["tokenizer", "train", "--data", "markov", "--out", str(tmp_path / "new.json")]
    done = without({"sentencepiece"}, program, *given)
    assert done.returncode == 2
    assert re.fullmatch(TOLD, done.stderr)[1] == "sentencepiece"


def test_the_command_is_the_module():
    assert PROJECT["scripts"] == {"rnnlm": "lm.__main__:main"}
