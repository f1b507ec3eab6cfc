"""A folder of three text files: how every corpus that is not generated is kept."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lm.errors import UserError
from lm.files import reading
from lm.text import Text

Split = Literal["train", "valid", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
FAMILIES = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens")  # how the three files may be called


@dataclass(frozen=True)
class Known:
    """What a split of a published corpus must be: its lines, its tokens with one `<eos>` a line, its md5."""

    lines: int
    tokens: int
    md5: str | None = None


def digest(lines: Iterable[str], algorithm: str) -> str:
    """Returns the hash of the UTF-8 bytes of each line and a line feed."""
    found = hashlib.new(algorithm)
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()


def files(folder: Path) -> dict[str, Path]:
    """Returns the path of each split, present or not, in the first family of names that the folder uses."""
    for family in FAMILIES:
        paths = {split: folder / family.format(split) for split in SPLITS}
        if any(path.exists() for path in paths.values()):
            return paths
    names = " or ".join(family.format("{train,valid,test}") for family in FAMILIES)
    raise UserError(f"a text folder must hold {names}; got {folder}, which holds none of these; put them there")


def read(folder: Path) -> dict[str, Text]:
    """Reads the three splits of a folder.

    Raises:
        UserError: the folder or a split is missing, a split is empty (zero lines), or is not UTF-8.
    """
    if not folder.is_dir():
        raise UserError(
            f"a text folder must be a folder; got {folder}, which is not; give one that holds train.txt and so on"
        )
    splits = {}
    for split, path in files(folder).items():
        text = Text(path, str(path))
        with reading(path, f"the {split} split"):
            path.stat()
        facts = text.facts
        if "utf8" in facts.found:
            raise _not_utf8(split, text)
        if not facts.lines:
            raise UserError(
                f"the {split} split must hold text; got {path}, which is empty; put at least one line there"
            )
        splits[split] = text
    return splits


def _not_utf8(split: str, text: Text) -> UserError:
    offset = text.facts.found["utf8"]
    byte = next(text.part(offset, offset + 1).blocks())[0]
    return UserError(
        f"the {split} split must be UTF-8 text; got {text.place(offset)}, with byte 0x{byte:02x} at byte offset "
        f"{offset}; convert the file to UTF-8"
    )


def faults(splits: Mapping[str, Text], known: Mapping[str, Known]) -> list[str]:
    """Returns what differs from the published corpus, one sentence per split; nothing when it is that corpus."""
    found = []
    for split, must in known.items():
        text, facts = splits[split], splits[split].facts
        count = facts.lines + facts.words
        if (facts.lines, count) != (must.lines, must.tokens):
            found.append(
                f"{split}: must be {must.lines:,} lines of {must.tokens:,} tokens; got {facts.lines:,} of {count:,}"
            )
        elif must.md5 and (md5 := digest(text, "md5")) != must.md5:
            found.append(f"{split}: the md5 must be {must.md5}; got {md5}")
    return found
