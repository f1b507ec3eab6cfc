"""Listeners that keep the record of a run: JSON lines, and TensorBoard."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm import files
from lm.evaluator import finite, perplexity, record
from lm.events import Diverged, EpochEnded, Event, Scored, Stepped, Validated
from lm.internals import Internals
from lm.model import LanguageModel
from lm.sample import sample
from lm.tokenizers import Tokenizer

SAMPLE_LENGTH = 100


class JsonLines:
    """Appends one JSON object a line: `kind`, `step`, `epoch`, and what was measured.

    The kinds are `train` (each `log_every` steps), `valid`, `internals` (with each validation), `epoch`,
    `diverged` and `final`.

    Arguments:
        path: the file; what it holds of steps after `step`, or of the kind `final`, is dropped first.
        step: where the run stands; 0 for a new one.
        pieces_per_word: of the training text, so that its perplexity is per word as the validation's is.
        internals: looks inside the model at each validation; None: nobody does.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        log_every: int,
        pieces_per_word: float = 1.0,
        internals: Internals | None = None,
    ) -> None:
        self.path, self.log_every, self.pieces_per_word = path, log_every, pieces_per_word
        self.internals = internals
        kept = [line for line in _lines(path) if _is_before(line, step)]
        files.write_whole(path, "".join(f"{line}\n" for line in kept).encode())

    def __call__(self, event: Event) -> None:
        fields = self._fields(event)
        if fields is not None:
            kind, values = fields
            self._append(event, kind, values)
        if isinstance(event, Validated) and self.internals is not None:
            self._append(event, "internals", self.internals.at(event.step))

    def _append(self, event: Event, kind: str, values: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": event.step, "epoch": event.epoch, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")

    def _fields(self, event: Event) -> tuple[str, dict[str, Any]] | None:
        match event:
            case Stepped() if event.step % self.log_every == 0:
                return "train", _of_step(event, self.pieces_per_word)
            case Validated():
                return "valid", {"best": event.best, **record(event.score)}
            case EpochEnded():
                return "epoch", {
                    **_of_epoch(event, self.pieces_per_word),
                    "tokens": event.tokens,
                    "seconds": event.seconds,
                }
            case Diverged():
                return "diverged", {"what": event.what}
            case Scored():
                return "final", {"split": event.split, **record(event.score)}
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []


def _is_before(line: str, step: int) -> bool:
    """Whether a line belongs to what a run at this step has logged; a torn line does not."""
    try:
        row = json.loads(line)
        return row["kind"] in ("train", "valid", "internals", "epoch") and row["step"] <= step and step > 0
    except (ValueError, KeyError, TypeError):
        return False


def _of_step(event: Stepped, pieces_per_word: float) -> dict[str, float]:
    return {
        "loss": event.nll,
        "ppl": perplexity(event.nll * pieces_per_word, 1),
        "lr": event.lr,
        "grad_norm": event.grad_norm,
        "tokens_per_second": event.tokens / event.seconds,
    }


def _of_epoch(event: EpochEnded, pieces_per_word: float) -> dict[str, float]:
    mean = event.nll / event.tokens
    return {"loss": mean, "ppl": perplexity(mean * pieces_per_word, 1)}


class TensorBoard:
    """Writes scalars, histograms of the normalization streams, sampled text and hyper-parameters.

    Arguments:
        folder: of the event files; what they hold of steps after `step` is marked as void.
        settings: names and values of the hyper-parameters.
        internals: looks inside the model at each validation; None: nobody does.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        log_every: int,
        model: LanguageModel,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
        pieces_per_word: float = 1.0,
        internals: Internals | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.model, self.tokenizer = model, tokenizer
        self.log_every, self.pieces_per_word, self.internals = log_every, pieces_per_word, internals
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        if step == 0:
            # SummaryWriter.add_hparams would put them into a second run beside this one
            for summary in hparams(dict(settings), {"valid/ppl": math.nan}):
                self.writer._get_file_writer().add_summary(summary)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped() if event.step % self.log_every == 0:
                self._scalars(event, "train", _of_step(event, self.pieces_per_word))
            case Validated():
                loss = event.score.nll / event.score.tokens
                self._scalars(event, "valid", {"loss": loss, "ppl": event.score.ppl})
                self._streams(event)
                if self.internals is not None:
                    gates = self.internals.at(event.step)["gates"]
                    self._scalars(event, "saturated", {name: gate["saturated"] for name, gate in gates.items()})
                text = sample(self.model, self.tokenizer, length=SAMPLE_LENGTH, seed=event.step)
                self.writer.add_text("sample", "    " + text.replace("\n", "\n    "), event.step)
            case EpochEnded():
                self._scalars(event, "epoch", _of_epoch(event, self.pieces_per_word))
                self.writer.flush()
            case Scored():
                # One step on, where a run that goes on voids it: its own final score comes later.
                event = replace(event, step=event.step + 1)
                self._scalars(event, "final", {f"{event.split}_ppl_{event.score.protocol}": event.score.ppl})

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self.writer.close()

    def _scalars(self, event: Event, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, event.step)

    def _streams(self, event: Event) -> None:
        for name, buffer in self.model.layers.named_buffers():
            self.writer.add_histogram(f"streams/{name}", buffer, event.step)
