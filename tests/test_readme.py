"""Checks of the READMEs: their code runs, their commands parse, and what they name exists."""

import builtins
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch

import rnnorm
from lm import cli, config, corpora, evaluator, export, run, study
from lm.errors import UserError

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "rnnorm/README.md", "lm/README.md", "data/README.md", "data/results/README.md")
LONGEST = 100  # lines of the first one
NOT_RUN = 0  # blocks that cannot run: each has `<!-- not run: why -->` on the line before it
STANDS_FOR = {"FOLDER": "text", "ARM": "lstm-online", "NAME": "markov", "N": "1", "HOST": "localhost"}
# commands of ours that are run, not only parsed
CHEAP = {"eval", "sample", "config", "checkpoint show", "data list", "data check"}
NOT_OURS = {"perf", "fullgraph", "forward_sync_buffers", "broadcast_buffers"}  # of other programs


class Block(NamedTuple):
    readme: str
    line: int  # of its first line of code
    language: str
    text: str
    marked: bool


def _lines(readme: str) -> list[str]:
    return (ROOT / readme).read_text("utf-8").splitlines()


def _blocks(*languages: str) -> list[Block]:
    found = []
    for readme in READMES:
        lines = _lines(readme)
        fences = [number for number, line in enumerate(lines) if line.startswith("```")]
        assert len(fences) % 2 == 0, readme
        for start, stop in zip(fences[::2], fences[1::2], strict=True):
            marked = lines[start - 1].startswith("<!-- not run: ")
            language = lines[start].removeprefix("```")
            found.append(Block(readme, start + 2, language, "\n".join(lines[start + 1 : stop]), marked))
    return [block for block in found if not languages or (block.language in languages and not block.marked)]


def _prose(readme: str) -> str:
    """A README without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / readme).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def _spans(readme: str) -> list[str]:
    """What stands in backticks in the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(readme))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text in `text` and a small trained model in `runs/mine`."""
    place = tmp_path_factory.mktemp("readme")
    (place / "text").mkdir()
    for split in corpora.SPLITS:
        (place / "text" / f"{split}.txt").write_text("return the value of the list\n\nthe list is empty\n" * 20)
    tables = {
        "data": {"source": str(place / "text")},
        "model": {"hidden_size": 8},
        "train": {"batch_size": 3, "max_steps": 5, "backend": "reference"},
    }
    run.train(config.build(tables), place / "runs/mine", say=lambda _: None)
    return place


def test_the_first_one_is_short() -> None:
    assert len(_lines("README.md")) <= LONGEST


def test_all_are_here() -> None:
    done = subprocess.run(["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    assert sorted(done.stdout.split()) == sorted(READMES)


def test_every_block_is_checked_or_says_why_not() -> None:
    blocks = _blocks()
    assert {block.language for block in blocks} <= {"python", "bash", "toml"}
    assert sum(block.marked for block in blocks) == NOT_RUN


_RUN = """
import json, sys
space = {"__name__": "__main__"}
for line, text in json.loads(sys.argv[2]):
    exec(compile("\\n" * (line - 1) + text, sys.argv[1], "exec"), space)
"""


@pytest.mark.slow
@pytest.mark.parametrize("readme", sorted({block.readme for block in _blocks("python")}))
def test_python_runs(readme: str, workplace: Path) -> None:
    """All blocks of a README one after another, as a reader runs them."""
    blocks = [(block.line, block.text) for block in _blocks("python") if block.readme == readme]
    # what a machine without a compiler says is no fault of a README
    options = ["-B", "-W", "error", "-W", "ignore:rnnorm:RuntimeWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", _RUN, str(ROOT / readme), json.dumps(blocks)],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _commands() -> list[str]:
    """Every command line of the shell blocks, and of the prose where it stands in backticks."""
    lines = [line for block in _blocks("bash") for line in block.text.replace("\\\n", " ").splitlines()]
    lines += [span for readme in READMES for span in _spans(readme) if _is_command(span)]
    return sorted({shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))})


def _is_command(span: str) -> bool:
    words = span.split()
    return len(words) > 1 and words[0] in ("python", "bash", "source", "pip", "rnnlm", "torchrun")


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        assert words.pop(0).partition("=")[0] in _environment()
    match words:
        case ["python", "-m", "lm", *arguments] | ["rnnlm", *arguments]:
            _check_lm(arguments)
        case ["python", "-m", module]:
            assert importlib.util.find_spec(module)
        case ["python", script, *arguments] | ["bash", script, *arguments]:
            text = (ROOT / script).read_text("utf-8")
            assert all(f'"{word}"' in text for word in arguments if word.startswith("--"))
        case ["source", script]:
            assert script in (ROOT / "scripts/environment.sh").read_text("utf-8")
        case ["pip", "install", what]:
            found = re.fullmatch(r"(?:\.|rnnorm)(?:\[(\w+)\])?", what)
            assert found
            assert found[1] is None or found[1] in _project()["optional-dependencies"]
        case ["torchrun", *arguments]:
            from torch.distributed.run import get_args_parser

            given = get_args_parser().parse_args(arguments)
            assert (given.module, given.training_script) == (True, "lm")
            _check_lm(given.training_script_args)
        case [program, *_]:
            assert importlib.metadata.entry_points(group="console_scripts", name=program), program


def _check_lm(arguments: list[str]) -> None:
    """Parses the arguments of our command and the settings that they name; runs it where that is cheap."""
    command: click.Command = cli.cli
    words, path = list(arguments), ""
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, words[0]
        command, path = command.commands[words[0]], f"{path} {words.pop(0)}".strip()
    if not words or words == ["--help"]:
        return  # the command is named, not called
    given = command.make_context("rnnlm", words).params
    if path == "train":
        cli.compose(given["preset"], given["data"], given["folder"], given["assignments"], {})
    elif path == "study":
        plan = study.read(ROOT / given["file"], seeds=given["seeds"], assignments=given["assignments"])
        assert {*given["arms"]} <= {arm.base for arm in plan.arms}
        assert all(1 <= seed <= plan.seeds for seed in given["only"])
    elif path in CHEAP:
        assert cli.main(arguments) == 0


@pytest.mark.parametrize("block", _blocks("toml"), ids=lambda block: f"{block.readme}:{block.line}")
def test_configurations_are_taken(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "given.toml"
    file.write_text(block.text)
    if "arms" in tomllib.loads(block.text):
        assert study.read(file).arms
    else:
        config.build(config.preset(str(file)))


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", _prose(readme))
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        leads_to = (ROOT / readme).parent / path if path else ROOT / readme
        assert leads_to.exists(), target
        if heading:
            assert heading in _headings(leads_to), target


def _headings(readme: Path) -> set[str]:
    """The names by which headings are linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", readme.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_first_one_links_to_all() -> None:
    assert {*READMES} - {"README.md"} <= {*re.findall(r"\]\(([^)#\s]+)", _prose("README.md"))}


def _project() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@functools.cache
def _sources() -> str:
    """All files that names may come from."""
    paths = [path for folder in ("rnnorm", "lm", "scripts") for path in sorted((ROOT / folder).rglob("*"))]
    kinds = {".py", ".h", ".cpp", ".toml", ".sh", ".txt"}
    return "\n".join(path.read_text("utf-8") for path in [*paths, ROOT / "pyproject.toml"] if path.suffix in kinds)


@functools.cache
def _words() -> set[str]:
    return {*re.findall(r"[A-Za-z_]\w*", _sources())}


@functools.cache
def _environment() -> set[str]:
    """Names of environment variables of ours."""
    others = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    return {*re.findall(r"(?:\$\{|environ\b[^\n]*\")(RNNORM_\w+)", "\n".join([_sources(), *others]))}


@functools.cache
def _options() -> set[str]:
    """Every option of our command and of the scripts, and those of torchrun that we name."""

    def all_of(command: click.Command) -> Iterator[str]:
        for parameter in command.params:
            yield from parameter.opts
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from all_of(inner)

    scripts = "\n".join(path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py"))
    return {"--help", *all_of(cli.cli), *re.findall(r'"(--[a-z-]+)"', scripts)}


@functools.cache
def _hyphenated() -> set[str]:
    """Names of ours that have a hyphen: presets, arms, corpora, protocols, formats, folders of results."""
    arms = {arm.name for file in (ROOT / "scripts/studies").glob("*.toml") for arm in study.read(file).arms}
    results = {path.name for path in (ROOT / "data/results").iterdir()}
    return {*config.presets(), *arms, *corpora.CORPORA, *evaluator.PROTOCOLS, *export.FORMATS, *results}


def _expanded(text: str) -> list[str]:
    """What a pattern such as `a-{b,c}` stands for."""
    found = re.search(r"\{([\w,]+,[\w,]+)\}", text)
    if not found:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [whole for part in found[1].split(",") for whole in _expanded(before + part + after)]


_FILE = re.compile(
    r"[\w.{},*~/-]+\.(?:py|md|toml|sh|txt|csv|json|jsonl|html|png|h|cpp|safetensors|tokens)\b|[\w.~-]+/[\w./-]*"
)


def _is_there(name: str, readme: str) -> bool:
    """True if the repository has a file of this name, or our programs write one."""
    if name.startswith(("runs/", "~/")):
        return True
    if any((place / name).exists() or [*place.glob(name)] for place in (ROOT, (ROOT / readme).parent)):
        return True
    last = name.rstrip("/").rpartition("/")[2]
    stem, _, suffix = last.rpartition(".")
    if any([*(ROOT / folder).rglob(last)] for folder in ("rnnorm", "lm", "scripts", "data") if last == name):
        return True
    # our programs hold the name whole, or put it together
    return last in _sources() or (f"}}.{suffix}" in _sources() and stem.rpartition(".")[2] in _words())


_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_SETTING = re.compile(r"(?:data|model|train|checkpoint|eval)\.[a-z_]+(=\S+)?")
_DOTTED = re.compile(r"\b(?:torch|rnnorm|lm)(?:\.\w+)+")


def _faults(span: str, readme: str) -> Iterator[str]:
    """What a span in backticks names that does not exist."""
    yield from (f"no option {option}" for option in _OPTION.findall(span) if option not in _options())
    span = _OPTION.sub(" ", span).strip()
    if (setting := _SETTING.fullmatch(span)) and not _FILE.fullmatch(span):
        try:
            config.build(config.override({}, [span] if setting[1] else []))
        except UserError as fault:
            yield str(fault)
        if span.partition("=")[0] not in config.flatten(config.Config()):
            yield f"no setting {span}"
        return
    for name in (name for file in _FILE.findall(span) for name in _expanded(file)):
        if not _is_there(name, readme):
            yield f"no file {name}"
    span = _FILE.sub(" ", span).strip()
    for path in _DOTTED.findall(span):
        if not _resolves(path) and f'"{path}"' not in _sources():
            yield f"no {path}"
    span = _DOTTED.sub(" ", span)
    for whole in _expanded(span):
        if re.fullmatch(r"[a-z]+[a-z0-9]*(-[a-z0-9]+)+", whole):
            if whole not in _hyphenated():
                yield f"nothing is called {whole}"
        else:
            words = re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\{\w+\}", "", whole))
            yield from (f"nothing is called {word}" for word in words if not _is_known(word))


def _is_known(word: str) -> bool:
    """True if a word is a name in our sources, in Python or in torch, or the beginning of one."""
    others = {*dir(builtins), *sys.stdlib_module_names, *dir(torch.nn), *dir(torch.nn.functional), *NOT_OURS}
    if word.endswith("_"):
        return any(known.startswith(word) for known in _words())
    return word in _words() | _environment() | others


def _resolves(path: str) -> bool:
    """True if a dotted name can be resolved; imports modules as needed."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return all((value := getattr(value, name, None)) is not None for name in parts[count:])
    return False


@pytest.mark.parametrize("readme", READMES)
def test_what_is_named_exists(readme: str) -> None:
    faults = [f"`{span}`: {fault}" for span in _spans(readme) for fault in _faults(span, readme)]
    assert not faults, "\n".join(faults)


def _table(readme: str, heading: str) -> list[str]:
    """The first column of the first table under a heading."""
    text = (ROOT / readme).read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert set(rows[1]) <= set("|- :"), heading
    return [row.split("|")[1] for row in rows[2:]]


def _named(cells: list[str]) -> set[str]:
    return {name for cell in cells for span in re.findall(r"`([^`]+)`", cell) for name in _expanded(span.strip('"'))}


def test_tables_list_all_that_there_is() -> None:
    assert _named(_table("rnnorm/README.md", "Interface")) == {*rnnorm.__all__}
    assert _named(_table("rnnorm/README.md", "Options")) == {*rnnorm.Options.__annotations__}
    assert _named(_table("rnnorm/README.md", "Backends")) == {*rnnorm.backends()}
    assert {*rnnorm.norms.KINDS} <= _named(_table("rnnorm/README.md", "Norms"))
    assert _named(_table("rnnorm/README.md", "Environment variables")) - {"CXX"} == _environment()
    assert _named(_table("lm/README.md", "Settings and presets")) == {*config.presets()}
