"""Files read with a clear fault, and files written whole or not at all."""

import atexit
import functools
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lm.errors import UserError


def path(text: str | Path) -> Path:
    """Returns the path that an option of the command line names.

    Raises:
        UserError: it is empty, which would stand for the working folder; it is not UTF-8, as whose text config.toml and
            safetensors take it.
    """
    if text == "":
        raise UserError("a path must not be empty; got ''; write . for the working folder")
    utf8(str(text), "a path", "rename the file or folder")
    return Path(text)


def utf8(text: str, what: str, repair: str = "write it again") -> bytes:
    """Returns text as UTF-8; `what` is its role.

    Raises:
        UserError: it holds half of a surrogate pair, which a byte that is not UTF-8 arrives as.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as fault:
        shown = text[max(0, fault.start - 40) : fault.start + 20]
        raise UserError(
            f"{what} must be UTF-8 text; got {shown!a}, whose character {fault.start + 1} is not UTF-8; {repair}"
        ) from None


def read_text(path: Path, what: str) -> str:
    """Returns the UTF-8 text of a file, byte for byte (no newline translation).

    Raises:
        UserError: the file is missing, unreadable, or not UTF-8 (says at which byte); `what` is its role.
    """
    try:
        with reading(path, what):
            return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{what} must be UTF-8 text; got {path} with byte 0x{fault.object[fault.start]:02x} at byte offset "
            f"{fault.start}; convert the file to UTF-8"
        ) from None


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Inside, what the system raises on a file that is read is a UserError that names it; `what` is its role."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{what} must be a file; got {path}, which does not exist; put it there or name another"
        ) from None
    except OSError as fault:
        raise UserError(f"{what} must be readable; got {path}: {fault.strerror}; check the path") from None


def write_whole(
    path: Path, content: bytes | bytearray, *, previous: Path | None = None, new_folder: bool = True
) -> None:
    """Writes a file under a temporary name, syncs it, renames it: a reader sees the old one or the new.

    Arguments:
        previous: in the same folder; what the old file is renamed to just before.
        new_folder: make the folder where it is not there.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        if new_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # there only if a step before failed


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file of many bytes as `write_whole` does, chunk by chunk; makes its folder.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system raises on a file that is written, such as a full disk, is a UserError that names it."""
    try:
        yield
    except OSError as fault:
        raise UserError(f"{path} must be writable; {fault.strerror}; check the path and its folder") from None


def cache_file(folder: Path, name: str) -> Path:
    """Returns the path of a file that only saves time: in `folder`, or where it is not there and cannot be written, in
    a temporary folder that lives as long as this process."""
    path = folder / name
    return path if path.exists() or _can_write(folder) else _instead(folder) / name


def _can_write(folder: Path) -> bool:
    """Whether files can be written there, once the folder is made."""
    while not folder.exists() and not folder.is_symlink() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def _instead(folder: Path) -> Path:
    made = Path(tempfile.mkdtemp(prefix="rnnlm-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    print(
        f"warning: {folder} cannot be written; what is made of large texts is kept in {made} until this process ends",
        file=sys.stderr,
        flush=True,
    )
    return made


def remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed inside `write_whole` have left of a file; let none be running."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if is_leftover(found, path.name):
            found.unlink(missing_ok=True)


def is_leftover(path: Path, name: str) -> bool:
    """Returns whether this may be what a process that was killed has left of a file of this name."""
    return path.stem == f".{name}" and path.suffix[1:].isdecimal()


def _sync(folder: Path) -> None:
    """Makes renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
