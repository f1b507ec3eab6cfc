"""Results of runs: a row, settings, scores and epochs of each as JSON, all of them as CSV."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from lm import config, files, provenance
from lm.errors import UserError
from lm.evaluator import finite
from lm.study.plan import Job, Study
from lm.study.statistics import BITS, MEASURES, Row, by_bits, per, summarize

SUMMARY = "summary.json"
# Where a run may be done, not what it is.
_ELSEWHERE = {"data.source", "data.dir", "train.device", "train.backend", "train.log_every"}
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Perplexity = Annotated[float | None, Field(gt=0)]
_Quantiles = Annotated[list[float | None], Field(min_length=5, max_length=5)]


class _Written(BaseModel, strict=True, allow_inf_nan=False):
    """What was written as JSON; None is what JSON cannot hold."""


class _Gate(_Written):
    low: float
    high: float
    counts: list[_Count]
    saturated: float | None


class _Band(_Written):
    name: str
    tokens: _Count
    ppl: _Perplexity


class _Line(_Written):
    """What each line of a run's log has; values that nothing reads are not looked at."""

    epoch: _Count


class _Stepped(_Line):
    step: _Count


class _Versions(_Stepped):
    versions: dict[str, str]


class _Start(_Stepped):
    position: _Count
    loss: float
    grad_norm: float


class _Train(_Line):
    tokens_per_second: float


class _Internals(_Line):
    statistics: dict[str, _Quantiles]
    gates: dict[str, _Gate]
    recurrent: dict[str, float | None] = {}


class _Epoch(_Line):
    ppl: _Perplexity
    seconds: float


class _Diverged(_Line):
    what: str


class _Measured(_Written):
    step: _Count = 0
    ppl: _Perplexity
    unit: str = ""
    data_sha256: str = ""
    vocabulary_sha256: str = ""
    bits_per_character: float | None = None
    bits_per_byte: float | None = None
    by_frequency: list[_Band] | None = None
    by_position: list[_Band] | None = None


class _Valid(_Stepped, _Measured):
    best: bool


class Scored(_Measured):
    """A score as `eval` keeps it."""

    split: str
    protocol: str
    data_sha256: str
    vocabulary_sha256: str


class _Final(_Line, Scored):
    """The score that ends a log."""


_KINDS: dict[str, type[_Line]] = {
    "versions": _Versions,
    "start": _Start,
    "overflow": _Stepped,
    "train": _Train,
    "valid": _Valid,
    "internals": _Internals,
    "epoch": _Epoch,
    "diverged": _Diverged,
    "final": _Final,
}
_RESULT = {"row": dict, "settings": dict, "scores": list, "epochs": list, "versions": dict}
_ROW = ("arm", "seed", "diverged", *MEASURES)
# How a run began; a result of an older version does not tell, which is None.
_START = ("first_window", "start_loss", "start_grad_norm", "recurrent_norm", "overflowed_at")
_AGAIN = "move it away and give the command of the study again"


def path_of(folder: Path, job: Job) -> Path:
    """Returns where a run's result is kept."""
    return folder / "results" / f"{job.arm.name}-seed-{job.seed}.json"


def kept(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Yields the arm, the seed and the file of each result that a study's folder holds."""
    for path in (folder / "results").glob("*.json"):
        if match := re.fullmatch(r"(.+)-seed-([1-9]\d*)\.json", path.name):
            yield match[1], int(match[2]), path


def run_folder(folder: Path, job: Job) -> Path:
    """Returns where a run is kept."""
    return folder / "runs" / job.arm.name / f"seed-{job.seed}"


def load(folder: Path, job: Job) -> dict[str, Any] | None:
    """Returns the result of a run that is over, or None.

    Raises:
        UserError: it was made with other settings than the job's; its file is damaged.
    """
    path = path_of(folder, job)
    if not path.exists():
        return None
    result = read(path)
    ours, theirs = _settings(job), result["settings"]
    # a setting added after the result was written had its default then
    theirs = {**config.flatten(config.Config()), **theirs}
    if ours["train.precision"] == "auto":  # each run keeps what that was where it began
        del ours["train.precision"]
    others = [f"{k} is {theirs[k]} there and {v} here" for k, v in ours.items() if theirs[k] != v]
    if others:
        raise UserError(
            f"a study's settings must be those of its results; {folder} holds {job} with others: {'; '.join(others)}; "
            "choose another folder with --run"
        )
    return result


def held(study: Study, folder: Path) -> tuple[Study, dict[Job, dict[str, Any]]]:
    """Returns the results that a folder holds, in the order of the jobs, whoever made them; and the study with so many
    seeds that it has them all: asked for fewer than before, it does not lose the others.

    Raises:
        UserError: the folder holds results of arms that are not the study's; as `load`.
    """
    there = [*kept(folder)]
    if others := sorted({name for name, _, _ in there} - {arm.name for arm in study.arms}):
        raise UserError(
            f"a study's folder must hold results of the study's arms only; {folder} has {', '.join(others)}; choose "
            "another folder with --run, or move those results away"
        )
    study = replace(study, seeds=max([study.seeds, *(seed for _, seed, _ in there)]))
    return study, {job: result for job in study.jobs() if (result := load(folder, job)) is not None}


def read(path: Path) -> dict[str, Any]:
    """Returns a result from its file.

    Raises:
        UserError: the file is damaged.
    """
    result = read_whole(path, "a result", _RESULT)
    if lost := [name for name in _ROW if name not in result["row"]]:
        raise UserError(f"a result must have {', '.join(lost)} in its row; {path} has not; {_AGAIN}")
    started = {name: result["row"].get(name) for name in _START}
    return result | {"row": result["row"] | started | _of_text(result["scores"])}


def read_whole(path: Path, what: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """Returns what a study has written as JSON, an object with these keys; `what` is its role.

    Raises:
        UserError: the file cannot be read, or is not such an object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{what} must be a file of JSON; {path}: {fault}; {_AGAIN}") from None
    record = found if isinstance(found, dict) else {}
    if lost := [key for key, kind in keys.items() if not isinstance(record.get(key), kind)]:
        raise UserError(f"{what} must be JSON with {', '.join(lost)}; {path} is not; {_AGAIN}")
    return record


def save(folder: Path, job: Job, scores: Sequence[Mapping[str, Any]], diverged: str | None) -> dict[str, Any]:
    """Writes the result of a run that is over, and returns it.

    Arguments:
        scores: the records that `eval --json` printed; none where no epoch was ever validated.
        diverged: what was not finite, or None.
    """
    place = run_folder(folder, job)
    written = place / "config.toml"  # tells the device that `auto` was
    settings = config.build(config.read_toml(written, "")) if written.is_file() else job.arm.settings
    versions = provenance.versions(settings.train.device)
    result = {**gather(job, metrics(place), scores, diverged), "versions": versions}
    files.write_whole(path_of(folder, job), json.dumps(result, indent=1).encode())
    return result


def gather(job: Job, log: Sequence[Row], scores: Sequence[Mapping[str, Any]], diverged: str | None) -> dict[str, Any]:
    """Returns the result of a run from what it logged and how it scored; one whose perplexity is infinite diverged."""
    if diverged is None and any(score["ppl"] is None for score in scores):
        diverged = "perplexity"  # finite in nats, but beyond what exp can hold
    epochs = [row for row in log if row["kind"] == "epoch"]
    best = [row["epoch"] for row in log if row["kind"] == "valid" and row["best"]]
    speeds = sorted(row["tokens_per_second"] for row in log if row["kind"] == "train")
    row: Row = {
        "arm": job.arm.name,
        "base": job.arm.base,
        "cell": job.arm.settings.model.cell,
        "norm": job.arm.settings.model.norm,
        "lr": job.arm.settings.train.lr,
        "seed": job.seed,
        "diverged": diverged is not None,
        "epochs": len(epochs),
        "best_epoch": best[-1] if best else None,
        **dict.fromkeys(MEASURES),
        **{f"{score['split']}_{score['protocol'].replace('-', '_')}": score["ppl"] for score in scores},
        "seconds": sum(row["seconds"] for row in epochs) if epochs else None,
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        **_start(log),
        **_of_text(scores),
    }
    return {
        "row": row,
        "diverged": diverged,
        "settings": _settings(job),
        "scores": list(scores),
        "epochs": _epochs(job, log),
    }


def _of_text(scores: Sequence[Mapping[str, Any]]) -> Row:
    """What the perplexities are per, and the exact bits per byte, which compare whatever that is."""
    exact = [score for score in scores if score.get("protocol") == "exact"]
    bits = {f"{score['split']}_bits_per_byte": score.get("bits_per_byte") for score in exact}
    return {"unit": next((per(score)[0] for score in scores), None), **dict.fromkeys(BITS), **bits}


def _start(log: Sequence[Row]) -> Row:
    """How a run began: the length of its first window, the largest loss and gradient of its first steps, and the norm
    of its recurrent weights (of all layers together) after the first epoch; and the first step whose loss is beyond
    what `math.exp` can take."""
    steps = [row for row in log if row["kind"] == "start"]
    inside = next((row for row in log if row["kind"] == "internals" and row["epoch"] == 1), {})
    norms = [math.inf if norm is None else norm for norm in inside.get("recurrent", {}).values()]
    found = (
        next((row["position"] for row in steps if row["step"] == 1), None),
        max((row["loss"] for row in steps), default=None),
        max((row["grad_norm"] for row in steps), default=None),
        math.hypot(*norms) if norms else None,
        next((row["step"] for row in log if row["kind"] == "overflow"), None),
    )
    return finite(dict(zip(_START, found, strict=True)))


def metrics(run: Path, say: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Returns what a run logged, line by line, see `logged`.

    Arguments:
        say: receives a warning of each line that is left out, although it is whole and a run's.

    Raises:
        UserError: the log cannot be read.
    """
    path = run / "metrics.jsonl"
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as fault:
        raise UserError(f"a run's log must be readable; {path}: {fault.strerror}; check it") from None
    return [*logged(content, lambda line, wrong: say(left_out(f"{path}, line {line},", wrong)))]


def left_out(what: str, wrong: str) -> str:
    """Returns the warning of a line or score that is not as it was written."""
    return f"warning: {what} must be as it was written; got {wrong}; it is left out"


def logged(content: bytes, tell: Callable[[int, str], None] = lambda *_: None) -> Iterator[Row]:
    """Yields the lines of a log but those that are torn, as a full disk leaves them, or not a run's.

    Arguments:
        tell: receives the number of each line that has the kind of a run's line but not its values, and what is wrong.
    """
    for number, line in enumerate(content.decode(errors="replace").split("\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not (isinstance(row, dict) and (kind := _KINDS.get(str(row.get("kind"))))):
            continue
        if "streams" in row:  # as older versions called them
            row["statistics"] = row.pop("streams")
        if wrong := fault_of(row, kind):
            tell(number, wrong)
        else:
            yield row


def fault_of(row: Row, kind: type[BaseModel]) -> str | None:
    """Returns what a line of a log or a score lacks, or which value of it cannot be; None for a whole one."""
    try:
        kind.model_validate(row)
    except ValidationError as fault:
        first = fault.errors()[0]
        name = ".".join(map(str, first["loc"]))
        return f"no {name}" if first["type"] == "missing" else f"{name}={first['input']!r:.50}"
    return None


def _settings(job: Job) -> dict[str, Any]:
    flat = config.flatten(job.arm.settings)
    return {k: v for k, v in flat.items() if k not in _ELSEWHERE | {"train.seed"} and not k.startswith("checkpoint.")}


def _epochs(job: Job, log: Iterable[Row]) -> list[Row]:
    """One row for each epoch: perplexities as training saw them (validation in columns)."""
    rows: dict[int, Row] = {}
    valid = {"ppl": "valid_ppl", "bits_per_byte": "valid_bits_per_byte"}
    names = {"valid": valid, "epoch": {"ppl": "train_ppl", "seconds": "seconds"}}
    for line in log:
        if line["kind"] in names:
            row = rows.setdefault(line["epoch"], {"arm": job.arm.name, "seed": job.seed, "epoch": line["epoch"]})
            row.update({ours: line[theirs] for theirs, ours in names[line["kind"]].items() if theirs in line})
    return [{"train_ppl": None, "seconds": None, **row} for row in rows.values()]


def write(folder: Path, study: Study, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes the tables and the summary of the results so far, each whole; returns the summary."""
    summary = summarize(study, results)
    tables = {
        "runs": [result["row"] for result in results],
        "epochs": [row for result in results for row in result["epochs"]],
        "arms": [
            {key: arm[key] for key in ("arm", "base", "selected", "runs", "diverged", "published")}
            | {
                "measure": name,
                **{statistic: math.inf if found is None else found for statistic, found in arm[name].items()},
            }
            | {"finishing": arm["finishing"]["runs"], "finishing_unknown": arm["finishing"]["unknown"]}
            | {f"finishing_{statistic}": found for statistic, found in arm["finishing"][name].items()}
            for arm in summary["arms"]
            for name in (*MEASURES, *(BITS if by_bits(summary) else ()))
        ],
    }
    for name, rows in tables.items():
        files.write_whole(folder / f"{name}.csv", to_csv(rows).encode())
    files.write_whole(folder / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def to_csv(rows: Sequence[Row]) -> str:
    """Returns rows as CSV; an absent value is an empty field."""
    if not rows:
        return ""
    text = io.StringIO()
    heads = dict.fromkeys(itertools.chain(*rows))  # results of older versions lack some
    writer = csv.DictWriter(text, [*heads], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
