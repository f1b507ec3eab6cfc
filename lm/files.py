"""Files read with a clear fault, and files written whole or not at all."""

import os
from pathlib import Path

from lm.errors import UserError


def read_text(path: Path, what: str) -> str:
    """Returns the UTF-8 text of a file, byte for byte (no newline translation).

    Raises:
        UserError: the file is missing, unreadable, or not UTF-8 (says at which byte); `what` is its role.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} must be a file; {path} does not exist; put it there or name another") from None
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{what} must be UTF-8 text; {path} has byte 0x{fault.object[fault.start]:02x} at byte offset "
            f"{fault.start}; convert the file to UTF-8"
        ) from None
    except OSError as fault:
        raise UserError(f"{what} must be readable; {path}: {fault.strerror}; check the path") from None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it, renames it: a reader sees the old one or the new.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # there only if a step before failed
    except OSError as fault:
        raise UserError(f"{path} must be writable; {fault.strerror}; check the path and its folder") from None
