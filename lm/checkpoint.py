"""Checkpoints: one safetensors file each, written whole or not at all, validated before anything is allocated.

A file holds tensors under names that any reader of the format can use, tied weights once, and everything else as one
canonical JSON text under one metadata key. The model's tensors have the model's own names; those that only a run that
resumes needs begin with `training.`. Reading executes no code.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lm import files
from lm.errors import UserError
from lm.events import EndedEarly, EpochEnded, Event, Interrupted, Started, Stepped, Validated

FORMAT = "rnnorm.lm.checkpoint"  # the metadata key
VERSION = 3  # 1 and 2 were files of torch.save
MOST_STEPS = 2**53  # a float represents every integer up to here
LAST, PREVIOUS, BEST, DAMAGED = (f"{name}.safetensors" for name in ("last", "previous", "best", "damaged"))
_PREFIX = "training."  # no module has a child of this name: it is an attribute of each
_READINGS = 10  # of a file that a run which is training replaces between the two that a reading consists of
_LONGEST_HEADER = 100_000_000  # bytes; the format's limit
_KEYS = {
    "config": dict,
    "tokenizer": dict,
    "data_sha256": dict,
    "train_counts": list,
    "model": dict,
    "trainer": dict,
}
_PLACE = "0" * 64  # stands for the checksum while it is computed
_WRONG = "its checksum does not match"
Say = Callable[[str], None]


class DamagedCheckpointError(UserError):
    """The file is missing, cut short or changed; the one before it may be whole."""


def save(path: Path, payload: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes a checkpoint and its checksum under a temporary name, syncs it, renames it, and syncs the folder.

    Equal payloads make equal bytes.

    Arguments:
        path: in a folder that exists.
        payload: tensors and plain values in dictionaries, lists and tuples; `model` is a module's state dict.
        previous: what the file that is there now is renamed to: at every instant one of the two is whole.

    Raises:
        UserError: the file cannot be written; what was there still is.
    """
    packer = _Packer()
    content = packer.pack({"version": VERSION, **payload, "sha256": _PLACE})
    written = bytearray(to_bytes(packer.tensors, metadata={FORMAT: _canonical(content)}))
    if (size := int.from_bytes(written[:8], "little")) > _LONGEST_HEADER:
        raise UserError(
            f"the settings and vocabulary of a checkpoint must take at most {_LONGEST_HEADER:,} bytes; got {size:,}; "
            "lower data.vocab_size"
        )
    place = written.index(rf"\"sha256\":\"{_PLACE}".encode()) + 13
    written[place : place + 64] = hashlib.sha256(written).hexdigest().encode()
    files.write_whole(path, written, previous=previous, new_folder=False)


def load(path: Path) -> dict[str, Any]:
    """Returns what `save` was given, on the CPU.

    Raises:
        DamagedCheckpointError: the file is missing, cut short, or has other bytes than were written.
        UserError: it is not one of ours, or of another version.
    """
    content, tensors, intact = _read(path)
    if not intact:
        raise _damaged(path, _WRONG)
    _check(_unpacked(content, tensors), path)
    # copies: what was read is mapped from the file, aligned as it happens to be
    return _unpacked(content, {name: tensor.clone() for name, tensor in tensors.items()})


def load_last(folder: Path, say: Say = print) -> dict[str, Any] | None:
    """Returns what the last checkpoint of a folder holds; where that is missing or damaged, what the one before it
    does, and says so.

    None where neither is there. A damaged one is renamed to `damaged.safetensors` by the next `Checkpoints`.

    Raises:
        UserError: both are damaged; they are an older version's; or see `load`.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not (last.exists() or previous.exists()):
        _refuse_old(last)
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
        say(f"warning: {fault}; resuming from the one before it, {previous.name}, of step {saved['trainer']['step']}")
        return saved


def describe(path: Path) -> Iterator[str]:
    """Yields what a file holds as lines for a person, the tensors last. Nothing of it is loaded.

    Raises:
        UserError: see `load`; after the lines of what can still be read.
    """
    content, tensors, intact = _read(path)
    yield f"{path}: {path.stat().st_size:,} bytes, checksum {'good' if intact else 'WRONG'}"
    found = _unpacked(content, tensors)
    _check(found, path)
    yield f"tokenizer.kind = {_shown(found.pop('tokenizer').get('kind'))}"
    yield f"train_counts: {len(found.pop('train_counts')):,} numbers"
    for name, value in _leaves(found):
        if not isinstance(value, Tensor) and "params" not in name:  # the optimizer's numbers of its parameters
            yield f"{'.'.join(map(_bare, name))} = {_shown(value)}"
    yield f"tensors: {len(tensors)}, {sum(tensor.nbytes for tensor in tensors.values()):,} bytes:"
    for key in sorted(tensors, key=lambda key: (key.startswith(_PREFIX), key)):
        kind, shape, size = str(tensors[key].dtype), [*tensors[key].shape], tensors[key].nbytes
        yield f"{_bare(key):40} {kind.removeprefix('torch.'):8} {shape!s:16} {size:12,} bytes"
    if not intact:
        raise _damaged(path, _WRONG)


def is_whole(path: Path) -> bool:
    """Returns whether a file is there and holds the bytes that were written."""
    try:
        return _read(path)[2]
    except DamagedCheckpointError:
        return False


def require_tensors(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are tensors of the wanted names, shapes and dtypes, which loading would not all
    look at."""
    if lacking := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{lacking[0]} must be there")
    if more := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{more[0]} must not be there")
    for name, tensor in wanted.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor; got {value!r:.50}")
        if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} must have shape {[*tensor.shape]} and dtype {tensor.dtype}; got {[*value.shape]} and "
                f"{value.dtype}"
            )


class _Packer:
    """Takes a payload apart into tensors by name and what JSON can hold.

    What JSON lacks becomes a table of one key that begins with `$`: a tensor, by its name in the file; a tuple; an
    infinity or NaN; a dictionary with other keys than text.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def pack(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        """Returns what JSON can hold of a value, and keeps its tensors."""
        match value:
            case Tensor():
                return {"$tensor": self._keep(value.detach(), path)}
            case dict():
                packed = {key: self.pack(value[key], (*path, key)) for key in sorted(value)}
                plain = all(isinstance(key, str) and not key.startswith("$") for key in packed)
                return packed if plain else {"$items": [[key, each] for key, each in packed.items()]}
            case tuple():
                return {"$tuple": self.pack([*value], path)}
            case list():
                return [self.pack(each, (*path, number)) for number, each in enumerate(value)]
            case float() if not math.isfinite(value):
                return {"$float": repr(value)}
        if value is not None and type(value) not in (bool, int, float, str):
            raise TypeError(f"a checkpoint must hold tensors and plain values; got {type(value)} at {path}")
        return value

    def _keep(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        """The name of a tensor: the first that it was met by, so that tied weights are kept once."""
        own = path[0] == "model"
        name = ("" if own else _PREFIX) + ".".join(map(str, path[own:]))
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (first := self._names.setdefault(place, name)) != name:
                return first
        if name in self.tensors:
            raise ValueError(f"the tensors of a checkpoint must have different names; got {name} twice")
        storage = tensor.untyped_storage().data_ptr()
        # a part of another tensor is kept by itself
        self.tensors[name] = (tensor.clone() if storage in self._storages else tensor).cpu().contiguous()
        self._storages.add(storage)
        return name


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What a `_Packer` took apart; raises KeyError, TypeError or ValueError for what none has made."""
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, inner),) = value.items()
        match kind:
            case "$tensor":
                return tensors[inner]
            case "$tuple":
                return tuple(_unpacked(inner, tensors))
            case "$float":
                return float(inner)
            case "$items":
                return {key: _unpacked(each, tensors) for key, each in inner}
    return {key: _unpacked(each, tensors) for key, each in value.items()}


def _leaves(value: Any, name: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, value) of everything in nested dictionaries, lists and tuples that is none of these, and of each
    of these that is empty."""
    if not isinstance(value, dict | list | tuple) or not value:
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, (*name, key))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """What a file holds: as `_Packer` returned it; its tensors, mapped and not loaded; whether its checksum is right.

    Anything that a file may hold instead is a fault that names it.
    """
    try:
        for _ in range(_READINGS):
            with path.open("rb") as file:
                content, intact = _examined(file, path)
                with safe_open(path, "pt") as opened:  # refuses sizes and offsets that do not make up the file
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        _unpacked(content, tensors)
    except FileNotFoundError:
        _refuse_old(path)
        raise DamagedCheckpointError(
            f"a checkpoint must be a file; got {path}, which does not exist; train first, or name another run"
        ) from None
    except OSError as fault:
        raise UserError(
            f"a checkpoint must be readable; got {path}: {fault.strerror or fault}; check the path"
        ) from None
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise _damaged(path, _line(fault)) from None  # RuntimeError: of text that is nested too deep
    return content, tensors, intact


def _examined(file: BinaryIO, path: Path) -> tuple[dict[str, Any], bool]:
    """The text of a file, as `_Packer` returned it, and whether the checksum in it is that of the whole file."""
    start = file.read(8)
    if start.startswith(b"PK\3\4"):
        raise _old(path)
    size = int.from_bytes(start, "little")
    if size > min(_LONGEST_HEADER, path.stat().st_size):
        raise ValueError("its header is too large")
    header = file.read(size)
    metadata = json.loads(header, object_pairs_hook=_unique).get("__metadata__", {})
    if FORMAT not in metadata:
        raise DamagedCheckpointError(
            f"a checkpoint must be one that `train` wrote; got {path}, which holds something else; take another"
        )
    content = json.loads(metadata[FORMAT])
    if _canonical(content) != metadata[FORMAT]:
        raise ValueError("its text is not canonical JSON")
    if len(stated := str(content.pop("sha256", None))) != len(_PLACE):
        raise ValueError("it states no checksum")
    digest = hashlib.sha256(start + header.replace(stated.encode(), _PLACE.encode()))
    while block := file.read(2**20):
        digest.update(block)
    return content, stated == digest.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("its header names something twice")  # which safetensors' own reader lets pass
    return table


def _check(found: Mapping[str, Any], path: Path) -> None:
    version = found.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"a checkpoint's version must be {VERSION}; got {path}, which has {_shown(version)}; use the version of "
            "this program that wrote it"
        )
    if wrong := sorted(key for key, kind in _KEYS.items() if not isinstance(found.get(key), kind)):
        raise UserError(f"a checkpoint must hold {', '.join(wrong)}; got {path}, which does not; take another")
    step = found["trainer"].get("step")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise UserError(f"a checkpoint must hold the number of its step; got {path}, which does not; take another")


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"a checkpoint must be a whole file; got {path}, which is damaged ({why}); take another"
    )


def _old(path: Path) -> UserError:
    return UserError(
        f"a checkpoint must be a safetensors file; got {path}, which an older version of this program wrote; use that "
        "version, or train again in another run folder"
    )


def _refuse_old(path: Path) -> None:
    """Refuses a folder whose checkpoints are an older version's, where `path` is missing."""
    if path.suffix == ".safetensors" and path.with_suffix(".pt").is_file():
        raise _old(path.with_suffix(".pt"))


def _line(fault: Exception) -> str:
    if isinstance(fault, KeyError):
        return f"it lacks {_shown(fault.args[0])}"
    text = str(fault).removeprefix("Error while deserializing header: ").strip().splitlines()
    return text[0][:120] if text else type(fault).__name__


def _shown(value: Any) -> str:
    """A value as short text, without line ends and other characters that would do something to a terminal."""
    return "none" if value is None else repr(value)[:100]


def _bare(value: Any) -> str:
    return _shown(value).removeprefix("'").removesuffix("'")


class Checkpoints:
    """The listener that keeps the last checkpoint, the one before it, and the best one, in a folder.

    It must come after the listeners that log: whatever is logged for a step is logged before that step is saved, so a
    resumed run can drop what was logged after it.

    Arguments:
        snapshot: returns the whole state of the run.
        weights: returns what evaluating needs, of the weights that the model holds now.
        every_steps, every_minutes: save `last` so often within an epoch too; on a GPU at the next logged step.
        best: nats per token of what the best one holds already; infinity where it holds nothing.
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
        self._due = False
        self._saved_at: float | None = None  # None: no save by this process yet

    def __call__(self, event: Event) -> None:
        match event:
            case Validated():  # not the best alone: the file of the best may be lost
                self.save_best(event.score.nll / event.score.tokens)
            case EndedEarly():
                self.save_best(event.nats)
            # at the start too: a folder that cannot be written is found before any work is done
            case Started() | EpochEnded() | Interrupted():
                self.save_last()
            case Stepped():
                self._due = self._due or self._is_due(event.step)
                # the last step of an epoch is saved with its validation, by EpochEnded; what is saved is the run as it
                # is now, so the events of all its steps must be logged before
                if self._due and event.position < event.length and not event.following:
                    self.save_last()

    def _is_due(self, step: int) -> bool:
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        since = time.monotonic() - (self._saved_at or 0)
        return self.every_minutes is not None and since >= 60 * self.every_minutes

    def save_best(self, nats: float) -> None:
        """Saves the weights that the model holds now, validated at so many nats per token, unless better ones are kept.

        The nats of the kept weights are read from their file, not from the trainer's state: weights that `max_steps`
        left inside an epoch are validated once more than in a run without that stop, unseen by the schedules.
        """
        if nats < self.best:
            save(self.folder / BEST, {**self.weights(), "nats": nats})
            self.best = nats

    def save_last(self) -> None:
        """Saves the whole state of the run as it is now."""
        last = self.folder / LAST
        if self._saved_at is None and last.exists() and not is_whole(last):
            last.replace(self.folder / DAMAGED)  # it must not take the place of the good one before it
        save(last, self.snapshot(), previous=self.folder / PREVIOUS)
        self._due = False
        self._saved_at = time.monotonic()
