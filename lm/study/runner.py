"""The queue of a study: a number of runs at a time, each the ordinary `train` and `eval` in separate processes."""

import fcntl
import functools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lm import config, corpora, files
from lm.corpora import Reading
from lm.errors import UserError
from lm.machine import require_backend, require_device
from lm.study import results
from lm.study.plan import Job, Study
from lm.study.progress import StudyProgress

Say = Callable[[str], None]
_POLL = 0.2  # seconds
_PLAN = "commands.txt"


class _StoppedError(Exception):
    """The study was asked to stop."""


def run(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    devices: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    say: Say = print,
) -> tuple[dict[str, Any], str | None]:
    """Runs what is missing of a study, and returns its summary and what stopped it, if anything did.

    A run that is over is never run or scored again; one that was stopped resumes from its checkpoint; one
    that diverged is a result. Ctrl-C and SIGTERM let every run save and stop; a second one kills them.

    Arguments:
        folder: of the study, see `lm.study`.
        jobs: runs at once; each computes with so many `threads`.
        devices: given out to the runs, one each; none: as the settings say.
        arms: only these, by their names or by what the grid made them of: the others are left for another time, or for
            another machine that sees the same folder. None: all.
        seeds: only these, likewise.
        say: receives lines for a person.

    Raises:
        UserError: a folder that holds something else; results of other arms or settings; an arm or a seed that is not
            the study's; runs that failed (the others are done first).
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _PLAN).exists():
        raise UserError(
            f"a study's folder must be empty or a study's own; {folder} is neither; choose another with --run"
        )
    wanted = _wanted(study, arms, seeds)
    whole, done = results.held(study, folder)
    missing = [job for job in wanted if job not in done]
    _check(missing, devices)
    _require_same_text(done, folder)
    files.write_whole(folder / _PLAN, _described(whole).encode())
    progress = StudyProgress(whole, folder, done, say)
    runs = _Runs(folder, threads, devices, jobs)
    failed: dict[Job, str] = {}
    with _signals(runs), ThreadPoolExecutor(jobs) as pool:
        waiting: dict[Future[dict[str, Any]], Job] = {pool.submit(runs.work, job): job for job in missing}
        while waiting:
            over, _ = wait(waiting, timeout=_POLL, return_when=FIRST_EXCEPTION)
            over |= {future for future in waiting if future.done()}
            for future in over:
                job = waiting.pop(future)
                try:
                    progress.finished(job, future.result())
                    _write(study, folder)
                except _StoppedError:
                    pass
                except Exception as fault:  # whatever it is, it is this run's; the others need this loop
                    failed[job] = str(fault) if isinstance(fault, UserError) else _failure(job, fault)
                    progress.line(failed[job])
            runs.pass_on()
            progress.show(runs.live, runs.stopped is not None)
    progress.close()
    if failed:
        raise UserError(
            f"every run of a study must end; {len(failed)} of {len(wanted)} failed: "
            f"{next(iter(failed.values()))}; put it right and give the same command again"
        )
    return _write(study, folder), runs.stopped


def _wanted(study: Study, arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The jobs of these arms and seeds; none: of all."""
    names = {name for arm in study.arms for name in (arm.name, arm.base)}
    if unknown := [name for name in arms if name not in names]:
        known = ", ".join(arm.name for arm in study.arms)
        raise UserError(f"an arm must be one of {known}; got {', '.join(unknown)}; correct --arm")
    if unknown_seeds := [str(seed) for seed in seeds if not 1 <= seed <= study.seeds]:
        raise UserError(
            f"a seed must be one of 1 to {study.seeds}; got {', '.join(unknown_seeds)}; correct --seed, or ask for "
            "more --seeds"
        )
    return [
        job
        for job in study.jobs()
        if (not arms or {job.arm.name, job.arm.base} & {*arms}) and (not seeds or job.seed in seeds)
    ]


def _failure(job: Job, fault: Exception) -> str:
    return f"{job} failed: {type(fault).__name__}: {' '.join(str(fault).split())}"


def _write(study: Study, folder: Path) -> dict[str, Any]:
    """Writes the tables of what is done, by this process or by another in the same folder; returns the summary."""
    whole, done = results.held(study, folder)
    return results.write(folder, whole, [*done.values()])


def _check(missing: Sequence[Job], devices: Sequence[str]) -> None:
    """Refuses what would make every run fail; fetches a corpus once, not in each run."""
    settings = [job.arm.settings for job in missing]
    for source, place, reading in {(each.data.source, each.data.dir, each.data.reading) for each in settings}:
        corpora.load(source, Path(place), corpora.SPLITS, reading)  # each run is scored on the test text too
    for device in set(devices) or {each.train.device for each in settings}:
        there = require_device(device)
        for backend in {each.train.backend for each in settings}:
            require_backend(backend, there)


def _require_same_text(done: Mapping[Job, dict[str, Any]], folder: Path) -> None:
    """Refuses results of other texts than those that the study's arms name now, as far as these are here."""

    @functools.cache
    def digests(data: tuple[str, str, Reading]) -> Mapping[str, set[str]]:
        source, place, reading = data[0], Path(data[1]), data[2]
        if source in corpora.CORPORA and not corpora.is_here(source, place):
            return {}
        try:
            splits = corpora.load(source, place, (), reading).splits
        except UserError:
            return {}
        return {split: {text.facts.digest(lossless) for lossless in (False, True)} for split, text in splits.items()}

    for job, result in done.items():
        data = job.arm.settings.data
        now = digests((data.source, data.dir, data.reading))
        for score in result["scores"]:
            known, split = score.get("data_sha256"), str(score.get("split"))
            if known and known not in now.get(split, {known}):
                raise UserError(
                    f"a study's text must be that of its results; {folder} holds {job} of another {split} text than "
                    f"{data.source} is now; restore that, or choose another folder with --run"
                )


def _described(study: Study) -> str:
    """The study as the commands that it consists of."""
    comments = [*f"{study.name}: {study.description}".splitlines(), f"seeds 1 to {study.seeds}"]
    commands = [arm.command("SEED", f"runs/{arm.name}/seed-SEED") for arm in study.arms]
    lines = [*(f"# {line}" for line in comments), *("python -m lm " + shlex.join(words) for words in commands)]
    return "\n".join(lines) + "\n"


class _Runs:
    """Does the jobs; `work` in a thread of the pool, the other methods in the main one."""

    def __init__(self, folder: Path, threads: int, devices: Sequence[str], jobs: int) -> None:
        self.folder = folder
        self.stopped: str | None = None
        self.live: dict[Job, subprocess.Popen[str]] = {}
        self._asked = 0
        self._signalled: dict[subprocess.Popen[str], int] = {}
        names = [*devices] or [""]
        self._devices: queue.SimpleQueue[str] = queue.SimpleQueue()
        for number in range(jobs):
            self._devices.put(names[number % len(names)])
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def stop(self, reason: str) -> None:
        """Asks each run to save and stop; asked again, kills them. Safe to call from a signal handler."""
        self._asked += 1
        self.stopped = reason
        self.pass_on()

    def pass_on(self) -> None:
        """Tells the running processes what `stop` asked for, those too that have begun since."""
        for process in list(self.live.values()):
            if self._signalled.get(process, 0) < self._asked:
                self._signalled[process] = self._asked
                process.send_signal(signal.SIGINT if self._asked == 1 else signal.SIGKILL)

    def work(self, job: Job) -> dict[str, Any]:
        """Returns the result of a job, once it is over."""
        device = self._devices.get()
        try:
            with self._log(job) as log:
                found = results.load(self.folder, job)  # another process may have done it while we waited
                return found or self._train_and_score(job, device, log)
        finally:
            self._devices.put(device)

    def _train_and_score(self, job: Job, device: str, log: IO[str]) -> dict[str, Any]:
        where = results.run_folder(self.folder, job)
        device = device or job.arm.settings.train.device
        # an assignment, and the last one: `--device` would yield to a train.device that the study sets
        chosen = ["--set", config.assignment("train.device", device)]
        code, _ = self._lm(job, log, log, [*job.arm.command(job.seed, where), *chosen])
        logged = results.metrics(where) if code in (0, 1) else []  # what a run that failed said matters more
        diverged = next((row["what"] for row in logged if row["kind"] == "diverged"), None)
        if code and not (code == 1 and diverged):
            raise UserError(f"{job} failed with exit code {code}: {_last_line(log.name)} (see {log.name})")
        scores = []
        if (where / "checkpoints" / "best.safetensors").exists():
            protocols = ["--protocol", "exact", "--protocol", "chunk-mean"]
            splits, bands = ["--split", "valid", "--split", "test"], ["--by-frequency", "--by-position"]
            given = [*splits, *protocols, *bands, "--json", "--device", device]
            code, printed = self._lm(job, subprocess.PIPE, log, ["eval", str(where), *given])
            if code:
                raise UserError(f"{job} could not be scored: {_last_line(log.name)} (see {log.name})")
            scores = json.loads(printed)
        return results.save(self.folder, job, scores, diverged)

    def _lm(self, job: Job, out: IO[str] | int, log: IO[str], arguments: Sequence[str]) -> tuple[int, str]:
        """Runs one command, which says into the log; returns its exit code and what it printed into a pipe."""
        if self.stopped:
            raise _StoppedError
        process = subprocess.Popen(
            [sys.executable, "-m", "lm", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            text=True,
            env=self._environment,
            start_new_session=True,  # so that Ctrl-C on the terminal reaches it through `pass_on` alone, once
        )
        self.live[job] = process
        try:
            printed, _ = process.communicate()
        finally:
            del self.live[job]
        if self.stopped and process.returncode:
            raise _StoppedError
        return process.returncode, printed or ""

    @contextmanager
    def _log(self, job: Job) -> Iterator[IO[str]]:
        """The log of a run, locked. The run's processes inherit it and so hold the lock: where a study was killed
        and they were not, the next one waits for them to end."""
        where = results.run_folder(self.folder, job)
        where.parent.mkdir(parents=True, exist_ok=True)
        with where.with_suffix(".log").open("a", encoding="utf-8") as log:
            while True:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.stopped:
                        raise _StoppedError from None
                    time.sleep(_POLL)
            yield log


def _last_line(path: str) -> str:
    lines = Path(path).read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


@contextmanager
def _signals(runs: _Runs) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal stop the runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    schedulers = (signal.SIGHUP, signal.SIGUSR1)  # ignored under nohup
    heard = [number for number in schedulers if signal.getsignal(number) is not signal.SIG_IGN]
    numbers = (signal.SIGINT, signal.SIGTERM, *heard)
    before = {
        number: signal.signal(number, lambda number, _: runs.stop(signal.Signals(number).name)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
