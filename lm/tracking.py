"""Listeners that keep the record of a run: JSON lines, and TensorBoard."""

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm import files
from lm.evaluator import finite, perplexity, record
from lm.events import Diverged, EpochEnded, Event, Scored, Started, Stepped, Validated
from lm.internals import Internals, buffers
from lm.model import LanguageModel, by_layer
from lm.sample import sample
from lm.tokenizers import Tokenizer

SAMPLE_LENGTH = 100
START = 20  # steps of a run that are all logged: what they do to the weights can decide how it ends
_KEPT = ("start", "train", "overflow", "valid", "internals", "epoch")  # by a log that is continued
LARGEST_EXPONENT = 709.0  # `math.exp` of a loss above it (of 709.78, to be exact) raises OverflowError
_POWERS = [1e-12 * 1.1**power for power in range(775)]  # to 1e20: SummaryWriter's own bins
_BINS = [*(-edge for edge in reversed(_POWERS)), 0.0, *_POWERS]


class JsonLines:
    """Appends one JSON object a line: `kind`, `step`, `epoch`, and what was measured.

    The kinds are `versions` (where the run begins, and where it is resumed with others), `start` (each of the first
    `START` steps), `train` (each `log_every` steps), `overflow` (the first step whose loss is above
    `LARGEST_EXPONENT`), `valid`, `internals` (with each validation), `epoch`, `diverged` and `final`.

    Arguments:
        path: the file; what it holds of steps after `step`, or of the kind `final`, is dropped first.
        step: where the run stands; 0 for a new one.
        tokens_per_unit: of the training text, so that its perplexity is per unit as the validation's is.
        internals: inspects the model at each validation; not if None.
        versions: see `lm.provenance.versions`; not logged if None.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        log_every: int,
        tokens_per_unit: float = 1.0,
        internals: Internals | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.log_every, self.tokens_per_unit = path, log_every, tokens_per_unit
        self.internals, self.versions = internals, versions
        kept = [line for line in _lines(path) if _is_before(line, step)]
        rows = [json.loads(line) for line in kept]
        self._overflowed = any(row["kind"] == "overflow" for row in rows)
        self._logged = next((row.get("versions") for row in reversed(rows) if row["kind"] == "versions"), None)
        files.write_whole(path, "".join(f"{line}\n" for line in kept).encode())

    def __call__(self, event: Event) -> None:
        for kind, values in self._rows(event):
            self._append(event, kind, values)
        if isinstance(event, Validated) and self.internals is not None:
            self._append(event, "internals", self.internals.at(event.step))

    def _append(self, event: Event, kind: str, values: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": event.step, "epoch": event.epoch, **values}
        with files.writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")

    def _rows(self, event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
        match event:
            case Started() if self.versions not in (None, self._logged):
                self._logged = self.versions
                yield "versions", {"versions": self.versions}
            case Stepped():
                if event.step <= START:
                    yield "start", {"position": event.position, "loss": event.nll, "grad_norm": event.grad_norm}
                if event.nll > LARGEST_EXPONENT and not self._overflowed:
                    self._overflowed = True
                    yield "overflow", {"loss": event.nll}
                if event.step % self.log_every == 0:
                    yield "train", _of_step(event, self.tokens_per_unit)
            case Validated():
                yield "valid", {"best": event.best, **record(event.score)}
            case EpochEnded():
                yield (
                    "epoch",
                    {**_of_epoch(event, self.tokens_per_unit), "tokens": event.tokens, "seconds": event.seconds},
                )
            case Diverged():
                yield "diverged", {"what": event.what}
            case Scored():
                yield "final", {"split": event.split, **record(event.score)}


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []


def _is_before(line: str, step: int) -> bool:
    """Whether a line belongs to what a run at this step has logged; a torn line does not, nor do versions with which
    no step was taken."""
    try:
        row = json.loads(line)
        if row["kind"] == "versions":
            return row["step"] < step
        return row["kind"] in _KEPT and row["step"] <= step and step > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _of_step(event: Stepped, tokens_per_unit: float) -> dict[str, float]:
    return {
        "loss": event.nll,
        "ppl": perplexity(event.nll * tokens_per_unit, 1),
        "lr": event.lr,
        "grad_norm": event.grad_norm,
        "tokens_per_second": event.tokens / event.seconds,
    }


def _of_epoch(event: EpochEnded, tokens_per_unit: float) -> dict[str, float]:
    mean = event.nll / event.tokens
    return {"loss": mean, "ppl": perplexity(mean * tokens_per_unit, 1)}


# What each scalar is, by its tag or its group; TensorBoard shows it beside the chart, groups in this order.
_DESCRIPTIONS = {
    "perplexity": "Perplexity per unit of the tokenizer after each epoch: on the training text (the mean over the "
    "epoch, in training mode) and, as the run `valid`, on the validation text.",
    "saturated": "Share of a gate's values within 5 % of an end of its range, at each validation.",
    "score": "Perplexity of the best checkpoint, at the end.",
    "train/loss": "Nats per token of one step.",
    "train/ppl": "Perplexity per unit of one step.",
    "train/lr": "Learning rate.",
    "train/grad_norm": "Norm of the gradient before clipping.",
    "train/tokens_per_second": "Speed of one step.",
    "valid/loss": "Nats per token on the validation text, read in columns.",
    "valid/ppl": "Perplexity per unit on the validation text, read in columns.",
}


class TensorBoard:
    """Writes scalars, histograms of the normalization's statistics, sampled text and hyper-parameters.

    Perplexity after each epoch has one tag in two runs, `folder` (training) and its `valid`: one chart shows both.

    Arguments:
        folder: of the event files; what they hold of steps after `step` is marked as void.
        settings: names and values of the hyper-parameters.
        internals: inspects the model at each validation; not if None.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        log_every: int,
        model: LanguageModel,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
        tokens_per_unit: float = 1.0,
        internals: Internals | None = None,
    ) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.model, self.tokenizer = model, tokenizer
        self.log_every, self.tokens_per_unit, self.internals = log_every, tokens_per_unit, internals
        self.file, self.valid = (EventFile(place, step + 1 if step else 0) for place in (folder, folder / "valid"))
        if step == 0:
            # it holds no lists
            plain = {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}
            for summary in hparams(plain, {"valid/ppl": math.nan}):
                self.file.add(0, summary)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped() if event.step % self.log_every == 0:
                self._scalars(event, "train", _of_step(event, self.tokens_per_unit))
            case Validated():
                loss = event.score.nll / event.score.tokens
                self._scalars(event, "valid", {"loss": loss, "ppl": event.score.ppl})
                self._scalars(event, "perplexity", {"epoch": event.score.ppl}, self.valid)
                self._statistics(event)
                if self.internals is not None:
                    gates = self.internals.at(event.step)["gates"]
                    self._scalars(event, "saturated", {name: gate["saturated"] for name, gate in gates.items()})
                text = sample(self.model, self.tokenizer, length=SAMPLE_LENGTH, seed=event.step)
                self._text(event, "sample", "    " + text.replace("\n", "\n    "))
            case EpochEnded():
                self._scalars(event, "perplexity", {"epoch": _of_epoch(event, self.tokens_per_unit)["ppl"]})
            case Scored():
                # One step on, where a run that resumes voids it: its own final score comes later.
                event = replace(event, step=event.step + 1)
                self._scalars(event, "score", {f"{event.split}_ppl_{event.score.protocol}": event.score.ppl})

    def close(self) -> None:
        """Closes the files."""
        self.file.close()
        self.valid.close()

    def _scalars(self, event: Event, group: str, values: Mapping[str, float], file: "EventFile | None" = None) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            summary = scalar(tag := f"{group}/{name}", value, new_style=True)  # the old one takes no description
            summary.value[0].metadata.summary_description = _DESCRIPTIONS.get(tag) or _DESCRIPTIONS[group]
            (file or self.file).add(event.step, summary)

    def _text(self, event: Event, name: str, value: str) -> None:
        from torch.utils.tensorboard.summary import text

        self.file.add(event.step, text(name, value))

    def _statistics(self, event: Event) -> None:
        from torch.utils.tensorboard.summary import histogram

        for name, values in by_layer(buffers(self.model.layers).items()):
            self.file.add(event.step, histogram(f"statistics/{name}", values, _BINS))


class EventFile:
    """One file of TensorBoard's, written at once and without a thread.

    torch's SummaryWriter keeps what it is given in memory for up to two minutes: a killed process would leave a gap,
    and a full disk would show as another thread's traceback. Its file names also sort wrongly within a second.

    Arguments:
        folder: of the event files; made where it is not there.
        void_from: what the files that are there hold from this step on does not count.
    """

    def __init__(self, folder: Path, void_from: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names
        times = (re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name) for path in folder.glob("events.*"))
        newest = max((int(found[1]) for found in times if found), default=0)
        name = f"events.out.tfevents.{max(int(time.time()), newest + 1):010}.{socket.gethostname()}.{os.getpid()}.0"
        self.path = folder / name
        with files.writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(_Whole(self.path, "ab"))
        self._record = Record
        self._write(Record(file_version="brain.Event:2", step=void_from))
        self._write(Record(session_log=SessionLog(status=SessionLog.START), step=void_from))

    def add(self, step: int, *summaries: Any) -> None:
        """Writes summaries of a step."""
        for summary in summaries:
            self._write(self._record(step=step, summary=summary))

    def _write(self, record: Any) -> None:
        record.wall_time = time.time()
        with files.writing(self.path):
            self._records.write(record.SerializeToString())

    def close(self) -> None:
        self._records.close()


class _Whole(io.FileIO):
    """Writes all that it is given, or raises; of a file's own write, a disk that is nearly full takes a part."""

    def write(self, content: Any) -> int:
        left = memoryview(content)
        while left:
            left = left[super().write(left) :]
        return len(content)
