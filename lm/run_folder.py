"""A run's folder: who may begin or resume a run in it, and what it holds.

config.toml  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/{last,previous,best}.safetensors
text.txt, where the text was the standard input
"""

import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lm import checkpoint, config, files, tokenizers
from lm.config import Config, DataConfig
from lm.errors import UserError
from lm.lock import NAME as LOCK
from lm.lock import Lock
from lm.machine import out_of_memory
from lm.tokenizers import Tokenizer

TEXT = "text.txt"  # what was read from the standard input, kept so that the run can resume
_OWN = (TEXT, "config.toml", "tokenizer.json")  # that a run writes first
SCORES = "scores.jsonl"  # what `eval` has scored of the run's own text, for its report
_SCORED = ("step", "split", "protocol", "ppl", "data_sha256", "vocabulary_sha256")  # of a whole line of it
Say = Callable[[str], None]
Which = Literal["best", "last"]

_PLACES = ("source", "dir", "split", "encoding", "column")  # of a text
# What a run may be resumed with another value of: nothing that its past steps depended on.
_MAY_CHANGE = {
    *(f"data.{name}" for name in _PLACES),  # the text is known by its checksum
    *("train.epochs", "train.max_steps", "train.patience", "train.stop_patience", "train.backend"),
    *("train.device", "train.log_every"),
    *("checkpoint.every_steps", "checkpoint.every_minutes"),
}
_WAYS = "choose another folder with --run, or give --overwrite, which moves this one aside"


class RunFolder:
    """The folder of one run, by its path; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.tokenizer = path / "config.toml", path / "tokenizer.json"
        self.metrics, self.tensorboard, self.checkpoints = (
            path / name for name in ("metrics.jsonl", "tensorboard", "checkpoints")
        )

    def __str__(self) -> str:
        return str(self.path)

    @property
    def events(self) -> Path:
        """Where TensorBoard's files are: in a folder that has the run's name, by which TensorBoard calls it; of a run
        that was renamed or begun by version 0.1, where they were."""
        inner = [path for path in self.tensorboard.glob("*") if path.is_dir()]
        held = [path for path in inner if path.name != "valid" or (path / "valid").is_dir()]
        if any(path.is_file() for path in self.tensorboard.glob("events.*")):
            return self.tensorboard
        return held[0] if len(held) == 1 else self.tensorboard / self.path.resolve().name

    def data(self, settings: DataConfig) -> DataConfig:
        """Returns the section with where the run's text lies now: as `config.toml` tells, which a resumed run writes
        again; in the folder, where that keeps the standard input."""
        if self.config.is_file():
            with suppress(UserError):
                tables = config.read_toml(self.config, "a run's configuration")
                theirs = config.build(tables).data
                written = [name for name in _PLACES if name in tables.get("data", {})]  # a file may be torn
                settings = settings.model_copy(update={name: getattr(theirs, name) for name in written})
        return self.moved(settings)

    def moved(self, settings: DataConfig) -> DataConfig:
        """Returns the section with the text of the standard input where it is after the folder was moved."""
        own = self.path / TEXT  # even where another run's lies in the old place now
        if Path(settings.source).name == TEXT and own.is_file():
            return settings.model_copy(update={"source": str(own.resolve())})
        return settings

    @property
    def best(self) -> Path:
        """Where the weights of the best validation are kept."""
        return self.checkpoints / checkpoint.BEST

    @contextmanager
    def with_text(self, chunks: Iterable[bytes]) -> Iterator[Lock]:
        """Inside, the folder is locked and keeps these bytes as a new run's text; where no run begins, both go again.

        Raises:
            UserError: the folder is not free for a new run.
        """
        is_new = not self.path.exists()
        with Lock() as lock:
            self._require_free()
            lock.take(self.path)
            self._require_free()  # of a run that began just now
            try:
                files.write_chunks(self.path / TEXT, chunks)
                yield lock
            finally:
                if not self.config.exists():
                    (self.path / TEXT).unlink(missing_ok=True)
                    if is_new:
                        (self.path / LOCK).unlink(missing_ok=True)
                        with suppress(OSError):
                            self.path.rmdir()

    def _require_free(self) -> None:
        """Raises UserError where the folder holds anything but what a run leaves that was killed before it began."""
        path = self.path
        inner = [*path.iterdir()] if path.is_dir() else []
        names = {each.name for each in inner if not any(files.is_leftover(each, own) for own in _OWN)}
        if path.exists() and not (path.is_dir() and (names <= {LOCK} or names == {LOCK, TEXT})):
            raise UserError(
                f"a run folder must be empty or a run's own; got {path}, which is neither; choose another with --run"
            )

    def claim(self, resume: str, overwrite: bool, lock: Lock, data: DataConfig) -> Path | None:
        """Refuses a folder that is not for a run, and locks one that holds a run; returns where to move it aside to,
        if that was asked for."""
        path = self.path
        if not self.config.is_file():
            self._require_free()
            return None
        if overwrite and Path.cwd().is_relative_to(path):
            raise UserError(
                f"a run that is moved aside must not hold the working folder; got {path}, which does; change to "
                "another folder first"
            )
        for used in (data.source, data.dir, data.tokenizer_file or ""):
            if overwrite and used != str(path / TEXT) and Path(used).is_relative_to(path):
                raise UserError(
                    f"a run that is moved aside must not hold what the new one reads; got {used}; move that to another "
                    "folder first"
                )
        lock.take(path)
        if overwrite:
            number = 1
            while (aside := path.with_name(f"{path.name}.old{number}")).exists():
                number += 1
            return aside
        if resume == "never":
            raise UserError(f"a run that never resumes must have an empty folder; got {path}, a run's; {_WAYS}")
        return None

    def occupy(self, settings: Config, tokenizer: Tokenizer, lock: Lock, aside: Path | None) -> None:
        """Makes the folder this run's, and removes what a process that was killed while it wrote has left there."""
        if aside:
            self.path.rename(aside)
        if not lock.holds(self.path):
            lock.take(self.path)
            if aside and settings.data.source == str(self.path / TEXT):
                shutil.copy2(aside / TEXT, self.path)
            if self.config.exists():
                raise UserError(f"a new run must have an empty folder; another began in {self} just now; {_WAYS}")
        written = (*(self.path / name for name in _OWN), self.metrics, self.checkpoints / checkpoint.LAST, self.best)
        for name in written:
            files.remove_leftovers(name)
        files.write_whole(self.config, config.to_toml(settings).encode())
        tokenizers.save(tokenizer, self.tokenizer)

    def last(self, say: Say) -> dict[str, Any] | None:
        """Returns what the last checkpoint holds, see `checkpoint.load_last`; None in a folder without a run."""
        saved = checkpoint.load_last(self.checkpoints, say)
        if saved is not None:
            self.require_vocabulary(tokenizers.from_state(saved["tokenizer"]))
        elif self.best.exists():
            raise UserError(
                f"a run must have {self.checkpoints / checkpoint.LAST} to resume from; got {checkpoint.BEST} alone; "
                "choose another folder with --run"
            )
        elif (epochs := self._epochs_logged()) > 1:
            raise UserError(
                f"a run must have {self.checkpoints / checkpoint.LAST} to resume from; got none, and a log of {epochs} "
                f"epochs; restore it, or {_WAYS}"
            )
        return saved

    def _epochs_logged(self) -> int:
        """How many epochs the log tells of; the first may be there before its checkpoint, where a run was killed."""
        try:
            return self.metrics.read_bytes().count(b'"kind": "epoch"')
        except OSError:
            return 0

    def saved(self, which: Which, say: Say, instead: str = "give --checkpoint last") -> dict[str, Any]:
        """Returns what a checkpoint of the run holds.

        Arguments:
            instead: what to do where the best one is damaged and the last one whole.

        Raises:
            UserError: there is no run; the checkpoint is missing or damaged.
        """
        if not self.config.is_file():
            raise UserError(f"a run must be a folder that `train` made; got {self}, which is not; check the path")
        if which == "last" and (saved := checkpoint.load_last(self.checkpoints, say)):
            return saved
        try:
            return checkpoint.load(self.checkpoints / f"{which}.safetensors")
        except checkpoint.DamagedCheckpointError as fault:
            if which == "best" and checkpoint.is_whole(self.checkpoints / checkpoint.LAST):
                raise UserError(f"{fault}; the last one is whole: {instead}") from None
            raise

    def keep_scores(self, step: int, scores: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Appends scores of the weights of a step, by split; raises OSError where the folder cannot be written."""
        lines = [json.dumps({"step": step, "split": split, **record}) + "\n" for split, record in scores]
        with (self.path / SCORES).open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":  # a line that is torn
                lines.insert(0, "\n")
            file.write("".join(lines).encode())

    def scores(self) -> list[dict[str, Any]]:
        """Returns the scores that `eval` has kept, but lines that are torn."""
        path, found = self.path / SCORES, []
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and all(key in row for key in _SCORED) and isinstance(row["split"], str):
                found.append(row)
        return found

    def scored_texts(self) -> dict[str, str]:
        """Returns the sha256 of the text that `eval` has kept the last score of, by split."""
        return {row["split"]: row["data_sha256"] for row in self.scores() if row["data_sha256"]}

    def require_same_run(self, settings: Config, saved: Mapping[str, Any] | None) -> None:
        """Raises UserError where the folder holds a run of other settings."""
        if not self.config.is_file():
            return
        # the checkpoint's configuration where there is one, since the file may have been edited
        tables = saved["config"] if saved else config.read_toml(self.config, "a run's configuration")
        theirs, ours = config.flatten(config.build(tables)), config.flatten(settings)
        names = [name for name in sorted(ours) if theirs[name] != ours[name] and not _may_change(name, settings)]
        if names:
            differences = "; ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in names)
            fixed = ""
            if set(names) <= {"train.epochs", "train.max_steps"} and settings.train.schedule == "cosine":
                fixed = (
                    "the schedule cosine is planned for so many epochs; to train on, begin another run with these "
                    f"weights: {shlex.join(['--init-from', str(self)])}; or "
                )
            raise UserError(
                f"a run must be resumed with its own settings; got others than {self} has: {differences}; "
                f"{fixed}{_WAYS}"
            )

    def require_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless the folder's tokenizer, where it has one that can be read, is this."""
        try:
            theirs = tokenizers.load(self.tokenizer) if self.tokenizer.exists() else tokenizer
        except UserError as fault:
            raise UserError(
                f"{fault}; or remove {self.tokenizer}, since the checkpoint holds the tokenizer too"
            ) from None
        if theirs.sha256 != tokenizer.sha256:
            raise UserError(
                f"a checkpoint must be of its folder's vocabulary; got one in {self} of another than "
                f"{self.tokenizer.name}; put each checkpoint back into its own run folder"
            )

    def restore(self, module: nn.Module, saved: Mapping[str, Any]) -> None:
        """Loads the weights of a checkpoint."""
        with self.fitting("model"):
            checkpoint.require_tensors(saved["model"], module.state_dict())
            module.load_state_dict(saved["model"])

    @contextmanager
    def fitting(self, what: str) -> Iterator[None]:
        """Inside, whatever is raised on values that do not fit is a fault of the checkpoint."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
            if isinstance(fault, RuntimeError) and out_of_memory(fault):
                raise
            why = " ".join(str(fault).split())[:200]
            raise UserError(
                f"a checkpoint must hold the {what} of its configuration; got one in {self} that does not ({why}); "
                "take another checkpoint"
            ) from None

    def best_nats(self, module: nn.Module) -> float:
        """Nats per token of the best weights that are kept; infinity where there are none that fit the model."""
        try:
            saved = checkpoint.load(self.best)
            checkpoint.require_tensors(saved["model"], module.state_dict())
        except (UserError, ValueError):
            return math.inf
        nats = saved.get("nats")
        return nats if type(nats) is float and nats >= 0 else math.inf

    def last_good(self) -> str:
        """Names the last good checkpoint: one whose weights are finite, which a run that diverged may not have
        saved."""
        for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST):
            try:
                saved = checkpoint.load(path := self.checkpoints / name)
            except UserError:
                continue
            if all(isinstance(value, Tensor) and value.isfinite().all() for value in saved["model"].values()):
                return f"the last good checkpoint is {path} (step {saved['trainer']['step']})"
        return "no good checkpoint is left"


def _may_change(name: str, settings: Config) -> bool:
    if name == "train.average_patience":
        return not settings.train.averaging  # nothing uses it then
    if name == "train.precision":
        return settings.train.precision == "auto"  # the run keeps what it was at first
    ends = name in ("train.epochs", "train.max_steps")
    return (name in _MAY_CHANGE or name.startswith("eval.")) and not (ends and settings.train.schedule == "cosine")
