"""What a study is: a TOML file of arms, read into the exact `train` command of every run."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm import config
from lm.config import Config
from lm.errors import UserError

_SECTIONS = tuple(Config.model_fields)
_STUDY_KEYS = ("description", "seeds", "preset", "grid", "arms", *_SECTIONS)
_ARM_KEYS = ("name", "preset", "published", *_SECTIONS)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folder; its base's name with the values of the grid.
        base: its name in the study's file: arms of one base differ only by the grid.
        preset, assignments: what `train --preset … --set …` is given.
        published: a median published for it, valid perplexity under `chunk-mean`, or None.
        settings: all of it together.
    """

    name: str
    base: str
    preset: str
    assignments: tuple[str, ...]
    published: float | None
    settings: Config = field(hash=False)  # holds lists

    def command(self, seed: int | str, folder: Path | str) -> list[str]:
        """Returns the arguments of the `train` command of one seed."""
        given = [word for assignment in self.assignments for word in ("--set", assignment)]
        return ["train", "--preset", self.preset, *given, "--seed", str(seed), "--run", str(folder)]


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Arms times seeds; seeds count from 1. `options` are those of the command that every arm was given."""

    name: str
    description: str
    arms: tuple[Arm, ...]
    seeds: int
    options: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """Returns every run, all arms of a seed before the next seed: a study cut short is balanced."""
        return [Job(arm, seed) for seed in range(1, self.seeds + 1) for arm in self.arms]


def read(path: Path, *, seeds: int | None = None, data: str | None = None, assignments: Sequence[str] = ()) -> Study:
    """Reads a study file.

    Its keys: `description`; `seeds`, how many; `preset`, of every arm that names none; the sections of a
    configuration (`[train]` …), for every arm; `[grid]`, lists of values under full names such as
    `"train.lr"`, whose every combination makes an arm of each; `[[arms]]`, each with a `name`, and maybe a
    `preset`, its own sections (`train.lr = 1`), and `published`, a median to compare with.

    Arguments:
        seeds, data: instead of the file's.
        assignments: `section.key=value` for every arm, last.

    Raises:
        UserError: a key that is not known, a value of another type, a name used twice, an arm whose settings cannot
            be, a setting of `train.seed`, or `data` or an assignment for a key of the grid.
    """
    tables = config.read_tables(path, "a study")
    _known(tables, _STUDY_KEYS, f"{path}")
    _text(tables, ("description", "preset"), f"{path}")
    rows, grid = tables.get("arms", []), tables.get("grid", {})
    if not (isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows)):
        raise UserError(f"a study must have [[arms]]; {path} has none; write one table for each")
    if not (isinstance(grid, Mapping) and all(isinstance(values, list) and values for values in grid.values())):
        raise UserError(
            f'[grid] must hold lists of values under names such as "train.lr"; got {grid!r} in {path}; '
            "write each list in brackets"
        )
    count = tables.get("seeds", 1) if seeds is None else seeds
    if not (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        raise UserError(f"seeds must be a whole number from 1 on; got {count!r}; say how many runs an arm has")
    last = ([] if data is None else [config.assignment("data.source", data)]) + list(assignments)
    varied = {key.strip() for key in grid}
    if fixed := [given for given in last if config.assigned([given]) & varied]:  # the arms' names would be false
        raise UserError(
            f"--set and --data must not set what [grid] varies; got {', '.join(fixed)} with a grid of "
            f"{', '.join(sorted(varied))} in {path}; leave the option out, or take the key out of [grid]"
        )
    arms = tuple(arm for row in rows for arm in _arms(tables, row, grid, last, path))
    names = [arm.name for arm in arms]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise UserError(f"names of arms must be unique; {path} has {', '.join(sorted(doubles))} twice; rename")
    options = [
        *([] if data is None else ["--data", data]),
        *(word for given in assignments for word in ("--set", given)),
    ]
    return Study(path.stem, tables.get("description", ""), arms, count, tuple(options))


def _arms(
    tables: Mapping[str, Any], row: Mapping[str, Any], grid: Mapping[str, list[Any]], last: list[str], path: Path
) -> Iterator[Arm]:
    """The arms of one table: one for each point of the grid."""
    name = row.get("name", "")
    _known(row, _ARM_KEYS, f"{path}, arm {name!r}")
    if not (isinstance(name, str) and re.fullmatch(r"[^\W_][\w.-]*", name)):  # it names folders: not `..`
        raise UserError(
            "an arm's name must be letters, digits, '.', '_' and '-', a letter or digit first; "
            f"got {name!r} in {path}; rename it"
        )
    _text(row, ("preset",), f"{path}, arm {name}")
    preset, published = row.get("preset", tables.get("preset", "default")), row.get("published")
    if published is not None and not (_is_number(published) and 0 < published < math.inf):
        raise UserError(
            f"{path}, arm {name}: published must be a perplexity, a number above 0; got {published!r}; correct it"
        )
    shared = [*_assignments(tables), *_assignments(row)]
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        parts = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items()]
        given = [*shared, *(config.assignment(key, value) for key, value in point.items()), *last]
        try:
            settings = config.build(config.override(config.preset(preset), given))
        except UserError as fault:
            raise UserError(f"{path}, arm {name}: {fault}") from None
        kept = {line.partition("=")[0].strip(): line for line in given}  # the last one of each key is what counts
        if "train.seed" in kept:  # every run of the arm would be the same one
            raise UserError(
                f"{path}, arm {name}: seeds must be the study's own, 1, 2 …; got {kept['train.seed']}; remove it, "
                "and say how many with --seeds, or which with --seed"
            )
        yield Arm("_".join([name, *parts]), name, preset, tuple(kept.values()), published, settings)


def _assignments(tables: Mapping[str, Any]) -> list[str]:
    sections = {name: tables[name] for name in _SECTIONS if name in tables}
    return [
        config.assignment(f"{name}.{key}", value) for name, table in sections.items() for key, value in table.items()
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.-]", "-", str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(tables: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if not isinstance(tables.get(key, ""), str):
            raise UserError(f"{where}: {key} must be text; got {tables[key]!r}; write it in quotes")


def _known(tables: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in tables:
        if key not in keys:
            raise UserError(f"{where}: a key must be one of {', '.join(keys)}; got {key!r}; rename or remove it")
    for name in _SECTIONS:
        if not isinstance(tables.get(name, {}), Mapping):
            raise UserError(f"{where}: {name} must be a table of settings; got {tables[name]!r}; write [{name}]")
