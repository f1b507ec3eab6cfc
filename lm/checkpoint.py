"""Checkpoints: plain tensors and numbers, written whole or not at all, examined before they are loaded, and loaded
without running any code."""

import io
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lm import archive, files
from lm.archive import DamagedError, Stored, SuspectError
from lm.errors import UserError
from lm.events import EpochEnded, Event, Interrupted, Started, Stepped, Validated

FORMAT = "rnnorm.lm.checkpoint"
VERSION = 2  # 1 had no checksum
MOST_STEPS = 2**53  # a float holds each number up to here
_KEYS = {
    "config": dict,
    "tokenizer": dict,
    "data_sha256": dict,
    "train_counts": Stored,
    "model": dict,
    "progress": dict,
}
Say = Callable[[str], None]


class DamagedCheckpointError(UserError):
    """The file is missing, cut short or changed; the one before it may be whole."""


def save(path: Path, payload: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes a checkpoint and its checksum under a temporary name, syncs it, renames it, and syncs the folder.

    Arguments:
        path: in a folder that exists.
        previous: what the file that is there now is renamed to: at every instant one of the two is whole.

    Raises:
        UserError: the file cannot be written; what was there still is.
    """
    buffer = io.BytesIO()
    torch.save(_plain({"format": FORMAT, "version": VERSION, **payload}), buffer)
    files.write_whole(path, archive.seal(buffer), previous=previous, new_folder=False)


def _plain(value: Any) -> Any:
    """Rebuilds containers, so that equal states make equal bytes: a pickle says of an object met again only where."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return sys.intern(value) if type(value) is str else value


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Returns what `save` was given.

    Raises:
        DamagedCheckpointError: the file is missing, cut short, or has other bytes than were written.
        UserError: it is not one of ours, of a newer format, declares more than it holds, or would run code.
    """
    with _opened(path) as file:
        _check(_contents(file), path)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is about to be refused
            try:
                return torch.load(file, map_location=device, weights_only=True)
            except Exception as fault:  # torch raises RuntimeError, EOFError, KeyError, UnpicklingError …
                raise SuspectError(_line(fault)) from None


def load_last(folder: Path, say: Say = print) -> dict[str, Any] | None:
    """Returns what `last.pt` holds; where that is missing or damaged, what `previous.pt` does, and says so.

    None where neither is there. A damaged `last.pt` is renamed to `damaged.pt` by the next `Checkpoints`.

    Raises:
        UserError: both are damaged; or see `load`.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    if not (last.exists() or previous.exists()):
        return None
    try:
        return load(last)
    except DamagedCheckpointError as fault:
        if not previous.exists():
            raise
        try:
            saved = load(previous)
        except DamagedCheckpointError as second:
            raise DamagedCheckpointError(f"{fault}. And the one before it: {second}") from None
        say(f"warning: {fault}; going on from the one before it, {previous.name}, of step {saved['progress']['step']}")
        return saved


def describe(path: Path) -> Iterator[str]:
    """Yields what a file holds as lines for a person, the largest last. Nothing of it is loaded.

    Raises:
        UserError: see `load`; after the lines of what can still be read.
    """
    with _opened(path) as file:
        intact = archive.is_intact(file)
        seal = {True: "checksum good", False: "checksum WRONG", None: "no checksum"}[intact]
        yield f"{path}: {path.stat().st_size:,} bytes, {seal}"
        found = archive.examine(file)
        _check(found, path)
        yield f"tokenizer.kind = {_shown(found.pop('tokenizer').get('kind'))}"
        tensors = []
        for name, value in archive.leaves(found):
            if isinstance(value, Stored):
                tensors.append((_dotted(name), value))
            elif "params" not in name:  # the optimizer's numbers of its parameters
                yield f"{_dotted(name)} = {_shown(value)}"
        yield f"{len(tensors)} tensors, {sum(value.nbytes for _, value in tensors):,} bytes:"
        for text, value in tensors:
            kind = str(value.dtype).removeprefix("torch.")
            yield f"{text:40} {kind:8} {list(value.shape)!s:16} {value.nbytes:12,} bytes"
        if intact is False:
            raise DamagedError("its checksum does not match")


def _dotted(name: tuple[Any, ...]) -> str:
    return ".".join(_shown(part).removeprefix("'").removesuffix("'") for part in name)


def _shown(value: Any) -> str:
    """A value as short text, without line ends and other characters that would do something to a terminal."""
    if type(value) is int and value.bit_length() > 1000:
        return "a huge number"
    return "none" if value is None else repr(value)[:100]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Inside, faults of a file become faults that name it."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"a checkpoint must be a file; {path} does not exist; train first, or name another run"
        ) from None
    except OSError as fault:
        raise UserError(f"a checkpoint must be readable; {path}: {fault.strerror or fault}; check the path") from None
    except DamagedError as fault:
        raise DamagedCheckpointError(
            f"a checkpoint must be a whole file; {path} is damaged ({_line(fault)}); take another"
        ) from None
    except SuspectError as fault:
        raise UserError(
            f"a checkpoint must hold tensors and plain values only; {path} does not ({_line(fault)}); "
            "nothing of it was run; take the checkpoint from whoever trained it again"
        ) from None


def _contents(file: BinaryIO) -> Any:
    intact = archive.is_intact(file)
    if intact is False:
        raise DamagedError("its checksum does not match")
    found = archive.examine(file)
    if intact is None and isinstance(found, dict) and found.get("version") == VERSION:
        raise DamagedError("its checksum is missing")
    return found


def _check(found: Any, path: Path) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"a checkpoint must be one that `train` wrote; {path} holds something else; take another")
    version = found.get("version")
    if type(version) is not int or version > VERSION:
        raise UserError(
            f"a checkpoint's format must be {VERSION} or older; {path} has {version!r}; "
            "install a newer version of this program"
        )
    if wrong := sorted(key for key, kind in _KEYS.items() if not isinstance(found.get(key), kind)):
        raise UserError(f"a checkpoint must hold {', '.join(wrong)}; {path} does not; take another")
    step = found["progress"].get("step")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise UserError(f"a checkpoint must hold the number of its step; {path} does not; take another")


def is_whole(path: Path) -> bool:
    """Returns whether a file is there and holds the bytes that were written."""
    try:
        with _opened(path) as file:
            _contents(file)
    except DamagedCheckpointError:
        return False
    return True


def _line(fault: Exception) -> str:
    text = str(fault).strip().splitlines()
    return text[0][:120] if text else type(fault).__name__


class Checkpoints:
    """The listener that keeps `last.pt`, the one before it as `previous.pt`, and `best.pt`, in a folder.

    It must be the last listener: whatever is logged for a step is logged before that step is saved, so a
    resumed run can drop what was logged after it.

    Arguments:
        snapshot: returns the whole state of the run.
        weights: returns what evaluating needs, of the weights that the model holds now.
        every_steps, every_minutes: save `last` so often within an epoch too.
        best: nats per token of what `best.pt` holds already; infinity where it holds nothing.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Callable[[], Mapping[str, Any]],
        weights: Callable[[], Mapping[str, Any]],
        every_steps: int | None,
        every_minutes: float | None = None,
        best: float = math.inf,
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.snapshot, self.weights = snapshot, weights
        self.every_steps, self.every_minutes, self.best = every_steps, every_minutes, best
        self._saved_at: float | None = None  # None: no save by this process yet

    def __call__(self, event: Event) -> None:
        match event:
            case Validated(best=True):
                self.save_best(event.score.nll / event.score.tokens)
            # at the start too: a folder that cannot be written is found before any work is done
            case Started() | EpochEnded() | Interrupted():
                self.save_last()
            # the last step of an epoch is saved with its validation, by EpochEnded
            case Stepped() if event.position < event.length and self._is_due(event.step):
                self.save_last()

    def _is_due(self, step: int) -> bool:
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        since = time.monotonic() - (self._saved_at or 0)
        return self.every_minutes is not None and since >= 60 * self.every_minutes

    def save_best(self, nats: float) -> None:
        """Saves the weights that the model holds now, validated at so many nats per token, unless better ones are kept.

        The file itself tells its nats: the run's progress cannot, as weights that `max_steps` left inside an epoch are
        validated once more than in a run that never stopped there, and the schedules must not see that.
        """
        if nats < self.best:
            save(self.folder / "best.pt", {**self.weights(), "nats": nats})
            self.best = nats

    def save_last(self) -> None:
        """Saves the whole state of the run as it is now."""
        last = self.folder / "last.pt"
        if self._saved_at is None and last.exists() and not is_whole(last):
            last.replace(self.folder / "damaged.pt")  # it must not take the place of the good one before it
        save(last, self.snapshot(), previous=self.folder / "previous.pt")
        self._saved_at = time.monotonic()
