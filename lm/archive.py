"""Files of `torch.save`, sealed with a checksum, and examined before they are loaded.

Such a file is a zip archive of one pickle and one stored member for each storage of numbers. The seal is its zip
comment, so a sealed file is still read by `torch.load`. Examining allocates no tensor and calls nothing that the file
names: it tells what is inside, and refuses what would take more memory than the file has bytes.
"""

import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch

_MARK = b"rnnorm sha256 "
_SEAL = len(_MARK) + 64
_MEMBER = re.compile(r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+|\.data/\w+")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DEEPEST = 50
_BLOCK = 2**20


class DamagedError(Exception):
    """The bytes are not those that were written."""


class SuspectError(Exception):
    """The bytes may be whole, but they are not what `torch.save` makes of tensors and plain values."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Stands for a tensor that was not loaded."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __setstate__(self, state: Any) -> NoReturn:
        raise SuspectError("it changes a tensor after it is made")


def seal(content: io.BytesIO) -> bytes:
    """Returns the bytes of `torch.save`, their sha256 behind them."""
    whole = bytearray(content.getbuffer())
    whole[-2:] = struct.pack("<H", _SEAL)  # the length of the zip comment
    return bytes(whole) + _MARK + hashlib.sha256(whole).hexdigest().encode()


def is_intact(file: BinaryIO) -> bool | None:
    """Returns whether a file's bytes are those that were sealed; None for a file without a seal."""
    left = _length(file) - _SEAL
    file.seek(max(0, left))
    found = file.read(_SEAL)
    if not found.startswith(_MARK):
        return None
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return found[len(_MARK) :] == digest.hexdigest().encode()


def examine(file: BinaryIO) -> Any:
    """Returns what `torch.load` would, with `Stored` in the place of each tensor.

    Raises:
        DamagedError: the file is no archive, is cut short, or has its directory elsewhere than torch.save puts it.
        SuspectError: it would run code, or declares more than it holds: compressed or overlapping members, tensors
            larger than their storages or that repeat values, containers that expand.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = archive.namelist()[0].partition("/")[0] + "/"
            members = _members(archive, file, root)
            content = archive.read(f"{root}data.pkl")
    except (zipfile.BadZipFile, EOFError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError) as fault:
        raise DamagedError(str(fault)) from None
    _check_memo(content)
    try:
        found = _Reader(content, members).load()
    except SuspectError:
        raise
    except Exception as fault:  # whatever a pickle that was not written by torch.save makes Python's reader raise
        raise SuspectError(f"{fault or type(fault).__name__}") from None
    for count, _ in enumerate(leaves(found)):
        if count > len(content):
            raise SuspectError("its containers hold each other over and over")
    return found


def leaves(value: Any, name: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, value) of everything in nested dictionaries, lists and tuples that is none of these, and of each
    of these that is empty.

    Raises:
        SuspectError: they are nested too deep.
    """
    if len(name) > _DEEPEST:
        raise SuspectError(f"its containers are nested more than {_DEEPEST} deep")
    if not isinstance(value, dict | list | tuple) or not value:
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*name, key))


def _length(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _members(archive: zipfile.ZipFile, file: BinaryIO, root: str) -> dict[str, int]:
    """The size of each member under the root. Any reader finds the same members here, and none is larger inside."""
    length = _length(file)
    end = length - len(archive.comment) - 98
    file.seek(max(0, end))
    record, locator, last = (file.read(size) for size in (56, 20, 22))
    marks = (record[:4], locator[:4], last[:4]) == (b"PK\6\6", b"PK\6\7", b"PK\5\6")
    if not marks or struct.unpack("<QQ", record[48:] + locator[8:16]) != (archive.start_dir, end):
        raise DamagedError("its directory is not where torch.save puts it")
    members = archive.infolist()
    sizes = {member.filename.removeprefix(root): member.file_size for member in members}
    named = all(member.filename.startswith(root) for member in members) and all(map(_MEMBER.fullmatch, sizes))
    if len(sizes) < len(members) or not named:
        raise SuspectError("it has other members than torch.save writes")
    if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
        raise SuspectError("it has compressed members")
    if sum(sizes.values()) > length:
        raise SuspectError(f"its members declare {sum(sizes.values()):,} bytes in a file of {length:,}")
    return sizes


def _check_memo(content: bytes) -> None:
    """Refuses a pickle whose memo has places far beyond its length: Python's reader makes room for all of them."""
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(content):
                raise SuspectError("its pickle declares more values than it holds")
    except ValueError as fault:
        raise SuspectError(str(fault)) from None


class _Reader(pickle.Unpickler):
    """Builds plain containers and `Stored`, and refuses every other name."""

    def __init__(self, content: bytes, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._sizes = members

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise SuspectError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        _, dtype, key, _, count = pid
        if self._sizes[f"data/{key}"] != count * dtype.itemsize:
            raise SuspectError(f"its storage {key} declares {count:,} values and has another size")
        return dtype, count


def _tensor(storage: tuple[torch.dtype, int], offset: int, shape: Any, strides: Any, *_: Any) -> Stored:
    dtype, count = storage
    if min(offset, *shape, *strides, 0) < 0:
        raise SuspectError("it has a tensor of negative size")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > count or (math.prod(shape) and last >= count):
        raise SuspectError(f"it has a tensor of shape {list(shape)} over {count:,} values")
    return Stored(dtype, tuple(shape))
