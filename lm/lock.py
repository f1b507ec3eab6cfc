"""One process at a time in a run folder."""

import fcntl
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from lm.errors import UserError

NAME = ".lock"


class Lock:
    """A context that keeps the folders it has taken until it ends, however the process ends.

    The lock is the operating system's (flock), on a file that stays; its text only names the process holding it.
    """

    def __init__(self) -> None:
        self._files: list[TextIO] = []

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk takes no text: the lock goes with the file all the same
                file.truncate(0)
            with suppress(OSError):
                file.close()

    def holds(self, folder: Path) -> bool:
        """Returns whether the folder of this name now is one that was taken."""
        place = folder / NAME
        return any(place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()) for file in self._files)

    def take(self, folder: Path) -> None:
        """Takes a folder; makes it where it is not there.

        Raises:
            UserError: another process has it, which the message names; or the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / NAME).open("a+")
        except OSError as fault:
            raise UserError(
                f"{folder} must be a folder that can be written; {fault.strerror}; check the path"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                holder = file.read() or "another process"
            raise UserError(
                f"a run folder must be used by one process at a time; got {folder}, in use by {holder}; "
                "wait until that ends, stop it, or choose another folder with --run"
            ) from None
        self._files.append(file)
        if not self.holds(folder):  # who held it has removed the file just now
            return self.take(folder)
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
