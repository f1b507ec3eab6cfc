"""How a study is doing: a line for each run that ends, and on a terminal one that moves."""

import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.output import Lenient
from lm.study import results
from lm.study.plan import Job, Study
from lm.study.statistics import shown

_EVERY = 1.0  # seconds between looks at the running runs' logs


class StudyProgress:
    """Says what ends; shows what runs where a person watches.

    Arguments:
        done: results that there are already.
        say: receives whole lines.
    """

    def __init__(self, study: Study, folder: Path, done: Collection[Job], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.jobs = study.jobs()
        self.done, self.diverged = set(done), 0
        self._at_start = len(self.done)
        self._began = self._shown = time.monotonic()
        self._stream = Lenient(sys.stderr)
        self._moving = self._stream.isatty()
        size = f"{len(study.arms)} arms x {study.seeds} seeds"
        say(f"study {study.name}: {size}, {len(self.done)} of {len(self.jobs)} runs are done")

    def finished(self, job: Job, result: Mapping[str, Any]) -> None:
        """Says how a run ended."""
        self.done.add(job)
        row = result["row"]
        outcome = f"diverged ({result['diverged']})" if row["diverged"] else f"best of {row['epochs']} epochs"
        reached = ", ".join(f"{split} {shown(row[f'{split}_exact'])}" for split in ("valid", "test"))
        self.diverged += row["diverged"]
        unit = "" if row["unit"] in (None, "word") else f", per {row['unit']}"
        self.line(f"[{len(self.done)}/{len(self.jobs)}] {job}: {outcome}: {reached} (exact{unit})")

    def line(self, text: str) -> None:
        """Says a line above the moving one; one that cannot be said stops no run."""
        self.close()
        with suppress(OSError, ValueError):
            self.say(text)

    def show(self, live: Collection[Job], stopped: bool) -> None:
        """Moves the line: what is running, how far it is, how long it may take; or that it is about to stop."""
        now = time.monotonic()
        if not self._moving or now - self._shown < _EVERY:
            return
        self._shown = now
        running = [(job, *self._place(job)) for job in list(live)]
        parts = [f"{job} epoch {epoch}/{job.arm.settings.train.epochs} {ppl}".rstrip() for job, epoch, ppl in running]
        done = len(self.done) + sum(epoch / job.arm.settings.train.epochs for job, epoch, _ in running)
        fresh = done - self._at_start
        left = (now - self._began) / fresh * (len(self.jobs) - done) if fresh > 0.02 else None
        head = "stopping, saving" if stopped else f"{len(self.done)}/{len(self.jobs)} runs"
        tail = "" if left is None or stopped else f", about {_duration(left)} left"
        line = f"{head}: {'; '.join(parts)}{tail}"
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
        self._stream.write(f"\r\x1b[K{line if len(line) <= width else line[: width - 2] + ' …'}")
        self._stream.flush()

    def close(self) -> None:
        """Takes the moving line away."""
        if self._moving:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _place(self, job: Job) -> tuple[int, str]:
        """Epochs that a running run has done, and its last validation as text."""
        path = results.run_folder(self.folder, job) / "metrics.jsonl"
        epoch, ppl = 0, ""
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 100_000))
                content = file.read()
        except OSError:
            return epoch, ppl
        for row in results.logged(content):  # the first and the last line may be torn
            epoch = row["epoch"] - (row["kind"] not in ("valid", "internals", "epoch", "final"))
            if row["kind"] == "valid":
                ppl = f"valid {shown(row['ppl'])}"
        return epoch, ppl


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
