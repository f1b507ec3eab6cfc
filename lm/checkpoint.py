"""Checkpoints: plain tensors and numbers, written whole or not at all, loaded without running any code."""

import io
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lm import files
from lm.errors import UserError
from lm.events import EpochEnded, Event, Interrupted, Started, Stepped, Validated

FORMAT = "rnnorm.lm.checkpoint"
VERSION = 1
_KEYS = {"config", "tokenizer", "data_sha256", "train_counts", "model", "progress"}


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, syncs it, renames it, and syncs the folder."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **payload}, buffer)
    files.write_whole(path, buffer.getvalue())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Returns what `save` was given.

    Raises:
        UserError: the file is missing, cut short, not one of ours, of a newer format, or would run code.
    """
    if not path.is_file():
        raise UserError(f"a checkpoint must be a file; {path} does not exist; train first, or name another run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is about to be refused
            payload = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as fault:
        raise UserError(
            f"a checkpoint must hold tensors and plain values only; {path} does not ({_line(fault)}); "
            "nothing of it was run; take the checkpoint from whoever trained it again"
        ) from None
    except Exception as fault:  # torch raises RuntimeError, EOFError, KeyError, OSError … on damaged files
        raise UserError(
            f"a checkpoint must be a whole file; {path} cannot be read ({_line(fault)}); "
            "it is cut short or is no checkpoint; take another"
        ) from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"a checkpoint must be one that `train` wrote; {path} holds something else; take another")
    if not isinstance(payload.get("version"), int) or payload["version"] > VERSION:
        raise UserError(
            f"a checkpoint's format must be {VERSION} or older; {path} has {payload.get('version')!r}; "
            "install a newer version of this program"
        )
    if missing := _KEYS - payload.keys():
        raise UserError(f"a checkpoint must hold {', '.join(sorted(missing))}; {path} does not; take another")
    return payload


def _line(fault: Exception) -> str:
    text = str(fault).strip().splitlines()
    return text[0][:120] if text else type(fault).__name__


class Checkpoints:
    """The listener that keeps `last.pt` and `best.pt` in a folder.

    It must be the last listener: whatever is logged for a step is logged before that step is saved, so a
    resumed run can drop what was logged after it.

    Arguments:
        snapshot: returns the whole state of the run.
        weights: returns what evaluating needs, of the weights that the model holds now.
        every_steps: save `last` every so many steps within an epoch too.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Callable[[], Mapping[str, Any]],
        weights: Callable[[], Mapping[str, Any]],
        every_steps: int | None,
    ) -> None:
        self.folder = folder
        self.snapshot, self.weights = snapshot, weights
        self.every_steps = every_steps

    def __call__(self, event: Event) -> None:
        match event:
            case Validated(best=True):
                save(self.folder / "best.pt", self.weights())
            # at the start too: a folder that cannot be written is found before any work is done
            case Started() | EpochEnded() | Interrupted():
                save(self.folder / "last.pt", self.snapshot())
            # the last step of an epoch is saved with its validation, by EpochEnded
            case Stepped() if event.position < event.length and self._is_due(event.step):
                save(self.folder / "last.pt", self.snapshot())

    def _is_due(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0
