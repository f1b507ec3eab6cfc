"""What a report is made from: the results of a study, or of run folders by themselves."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm import checkpoint, config, provenance, tokenizers
from lm.errors import UserError
from lm.run_folder import SCORES, RunFolder, Say
from lm.study import SUMMARY, Arm, Job, Study, results, statistics, summarize
from lm.tokenizers import EOS

_REPORTED = {*itertools.product(("valid", "test"), ("exact", "chunk-mean"))}  # scores by split and protocol
_SUMMARY = {
    **{"study": str, "description": str, "seeds": int, "runs": int, "runs_planned": int, "arms": list},
    **{"sign_tests": dict, "data_sha256": dict, "vocabulary_sha256": dict, "versions": dict},
}


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        result: as `lm.study.results.gather` returns it.
        internals: what was logged of the kind `internals`, epoch by epoch.
    """

    result: Mapping[str, Any]
    internals: Sequence[Mapping[str, Any]]

    @property
    def arm(self) -> str:
        """Of which arm it is."""
        return self.result["row"]["arm"]

    def bands(self, name: str) -> list[Mapping[str, Any]]:
        """Returns `by_frequency` or `by_position` of the test text, else of valid; [] where it was not measured."""
        found = {score["split"]: score[name] for score in self.result["scores"] if score.get(name)}
        return found.get("test") or found.get("valid") or []


@dataclass(frozen=True)
class Source:
    """A study, or some runs, with all that a page says of them.

    Attributes:
        name: of the study, and its folder's where a report shows several of that name.
        folder: of a study; None for runs.
        summary: as `lm.study.summarize` returns it.
        settings: of runs: every setting, by arm.
    """

    name: str
    folder: Path | None
    summary: Mapping[str, Any]
    entries: tuple[Entry, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the perplexities are per; units of different tokenizers in one study are named together."""
        found = {score.get("unit", "word") for entry in self.entries for score in entry.result["scores"]}
        return " or ".join(sorted(found)) or "word"

    @property
    def by_bits(self) -> bool:
        """Whether bits per byte are shown, since the perplexities of a study's arms do not compare."""
        return statistics.by_bits(self.summary)

    @property
    def quantity(self) -> str:
        """What is shown of its arms."""
        return "bits per byte" if self.by_bits else "perplexity"

    @property
    def selected(self) -> list[Mapping[str, Any]]:
        """The arms that are compared: of each base, the one that is best on valid."""
        return [arm for arm in self.summary["arms"] if arm["selected"]]

    def of(self, arm: Mapping[str, Any]) -> list[Entry]:
        """Returns the runs of an arm, by seed."""
        return [entry for entry in self.entries if entry.arm == arm["arm"]]


def in_order(bands: Iterable[str]) -> list[str]:
    """Returns the names of bands once each, by their numbers, then `<unk>`, then `<eos>`."""

    def place(band: str) -> tuple[bool, bool, int]:
        number = re.search(r"\d[\d,]*", band)
        return band.startswith("<"), band == EOS, int(number[0].replace(",", "")) if number else 0

    return sorted(dict.fromkeys(bands), key=place)


def load(folders: Sequence[Path], say: Say = print) -> list[Source]:
    """Reads study folders, each by itself, and run folders, those on one text together.

    Arguments:
        say: receives warnings of what runs have written and is not as it was.

    Raises:
        UserError: a folder that is neither, or that is given twice; a study that has no result yet, or is damaged.
    """
    studies = [_study(folder, say) for folder in folders if (folder / SUMMARY).is_file()]
    runs = [folder for folder in folders if not (folder / SUMMARY).is_file()]
    for folder in runs:
        if not (folder / "config.toml").is_file():
            raise UserError(
                f"a report must be of run folders and of studies that have a result; got {folder}, which is neither; "
                "check the path"
            )
    return _apart(studies + _runs(runs, say))


def _apart(sources: list[Source]) -> list[Source]:
    """The sources with unique names: a name that occurs twice is followed by the study's folder."""
    names = [source.name for source in sources]
    for name in {name for name in names if names.count(name) > 1}:
        folders = [source.folder for source in sources if source.name == name and source.folder is not None]
        labels = {folder: f"{name} in {end}" for folder, end in zip(folders, _names(folders), strict=True)}
        sources = [
            replace(source, name=labels[source.folder]) if source.folder in labels else source for source in sources
        ]
    return sources


def _study(folder: Path, say: Say) -> Source:
    summary = results.read_whole(folder / SUMMARY, "a study's summary", _SUMMARY)
    order = [arm["arm"] for arm in summary["arms"]]
    kept = sorted((order.index(arm), seed, path) for arm, seed, path in results.kept(folder) if arm in order)
    found = [results.read(path) for _, _, path in kept]
    entries = [
        Entry(result, _internals(results.metrics(folder / "runs" / row["arm"] / f"seed-{row['seed']}", say)))
        for result in found
        for row in [result["row"]]
    ]
    # a summary of an older version does not tell which runs the authors' program would have finished
    summary["arms"] = [
        {"finishing": statistics.finishing([]) | {"unknown": arm["runs"]}, **arm} for arm in summary["arms"]
    ]
    return Source(summary["study"], folder, summary, tuple(entries))


def _runs(folders: Sequence[Path], say: Say) -> list[Source]:
    """Each run as a separate arm; runs on other texts, or with perplexities that do not compare, apart."""
    found: dict[tuple[str, ...], list[tuple[Arm, Entry]]] = {}
    for folder, name in zip(folders, _names(folders) if folders else (), strict=True):
        settings = config.build(config.read_toml(folder / "config.toml", "a run's configuration"))
        arm = Arm(name, name, f"{folder}/config.toml", (), None, settings)
        log = results.metrics(folder, say)
        finals = [row for row in log if row["kind"] == "final"]
        diverged = next((row["what"] for row in log if row["kind"] == "diverged"), None)
        own = {(score["split"], score["protocol"]): score for score in (*finals, *_evaluated(folder, log, say))}
        scores = [score for key, score in own.items() if key in _REPORTED]
        gathered = results.gather(Job(arm, settings.train.seed), log, scores, diverged)
        valid = next((row for row in log if row["kind"] in ("final", "valid")), None) or _begun(folder)
        key = str(valid.get("data_sha256", settings.data.source)), *statistics.per(valid)
        entry = Entry({**gathered, "versions": _versions(log)}, _internals(log))
        found.setdefault(key, []).append((arm, entry))
    names = [Path(pairs[0][0].settings.data.source).name or "text" for pairs in found.values()]
    labels = [f"runs on {name}" for name in names] if len(found) > 1 else ["runs"]
    labels = [name if labels.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(labels, 1)]
    return [_of_one_text(name, pairs) for name, pairs in zip(labels, found.values(), strict=True)] if folders else []


def _versions(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """With what a run was trained, where it was resumed with others one after another; unknown of older versions."""
    rows = [row for row in log if row["kind"] == "versions"]
    found = [*([] if rows and rows[0]["step"] == 0 else [{}]), *(row["versions"] for row in rows)]
    return {
        name: ", then ".join(dict.fromkeys(each.get(name, "unknown") for each in found)) for name in provenance.NAMES
    }


def _begun(folder: Path) -> dict[str, str]:
    """What the last checkpoint tells of the valid text, for a run that was not validated yet."""
    with suppress(UserError, KeyError):
        saved = checkpoint.load(folder / "checkpoints" / checkpoint.LAST)
        tokenizer = tokenizers.from_state(saved["tokenizer"])
        text = {"data_sha256": saved["data_sha256"]["valid"]}
        return text | {"unit": tokenizer.unit, "vocabulary_sha256": tokenizer.sha256}
    return {}


def _of_one_text(name: str, pairs: Sequence[tuple[Arm, Entry]]) -> Source:
    arms, entries = [arm for arm, _ in pairs], tuple(entry for _, entry in pairs)
    summary = summarize(Study(name, "", tuple(arms), 1), [dict(entry.result) for entry in entries])
    summary["arms"] = [{**arm, "command": _again(of)} for arm, of in zip(summary["arms"], arms, strict=True)]
    return Source(name, None, summary, entries, {arm.name: config.flatten(arm.settings) for arm in arms})


def _again(arm: Arm) -> list[str]:
    """The command that trains as a run did; it names a text that is kept in the run's folder and was moved with it."""
    place = RunFolder(Path(arm.preset).parent).moved(arm.settings.data).source
    data = [] if place == arm.settings.data.source else ["--data", place]
    return ["train", "--preset", arm.preset, *data, "--run", "ANOTHER"]


def _evaluated(folder: Path, log: Sequence[Mapping[str, Any]], say: Say) -> list[dict[str, Any]]:
    """What `eval` has scored of the run's best weights, each split and protocol once: the last; of one text alone, the
    one that was scored last."""
    best = [row["step"] for row in log if row["kind"] == "valid" and row["best"]]
    with suppress(UserError):
        best = [checkpoint.load(folder / "checkpoints" / checkpoint.BEST)["trainer"]["step"]]
    scores = []
    for number, row in enumerate(RunFolder(folder).scores(), 1):
        if wrong := results.fault_of(row, results.Scored):
            say(results.left_out(f"{folder / SCORES}, score {number},", wrong))
        else:
            scores.append(row)
    texts = {row["split"]: row["data_sha256"] for row in scores}
    kept = [row for row in scores if row["step"] in best[-1:] and row["data_sha256"] == texts[row["split"]]]
    return [*{(row["split"], row["protocol"]): row for row in kept}.values()]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that distinguishes them."""
    parts = [tuple(map(_printable, folder.resolve().parts)) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(
        f"a report shows each run and study once; got {', '.join(map(str, folders))}; name each of them once"
    )


def _printable(name: str) -> str:
    """A name without control characters, which no figure can hold."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def _internals(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in log if row["kind"] == "internals"]
