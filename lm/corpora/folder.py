"""A folder of three text files: how every corpus that is not generated is kept."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lm.errors import UserError
from lm.files import read_text
from lm.tokenizers import words

Split = Literal["train", "valid", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
FAMILIES = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens")  # how the three files may be called


@dataclass(frozen=True)
class Known:
    """What a split of a published corpus must be: its lines, its tokens with one `<eos>` a line, its md5."""

    lines: int
    tokens: int
    md5: str | None = None


def split_lines(text: str) -> list[str]:
    """Returns the lines of a text, cut at line feeds alone; drops a carriage return at an end, and a BOM."""
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def digest(lines: Sequence[str], algorithm: str) -> str:
    """Returns the hash of the UTF-8 bytes of each line and a line feed."""
    return hashlib.new(algorithm, "".join(f"{line}\n" for line in lines).encode()).hexdigest()


def files(folder: Path) -> dict[str, Path]:
    """Returns the path of each split, present or not, in the first family of names that the folder uses."""
    for family in FAMILIES:
        paths = {split: folder / family.format(split) for split in SPLITS}
        if any(path.exists() for path in paths.values()):
            return paths
    names = " or ".join(family.format("{train,valid,test}") for family in FAMILIES)
    raise UserError(f"a text folder must hold {names}; got {folder}, which holds none of these; put them there")


def read(folder: Path) -> dict[str, list[str]]:
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
        splits[split] = split_lines(read_text(path, f"the {split} split"))
        if not splits[split]:
            raise UserError(
                f"the {split} split must hold text; got {path}, which is empty; put at least one line there"
            )
    return splits


def faults(splits: Mapping[str, Sequence[str]], known: Mapping[str, Known]) -> list[str]:
    """Returns what differs from the published corpus, one sentence per split; nothing when it is that corpus."""
    found = []
    for split, must in known.items():
        lines = splits[split]
        count = len(lines) + sum(len(words(line)) for line in lines)
        if must.md5 and digest(lines, "md5") != must.md5:
            found.append(f"{split}: the md5 must be {must.md5}; got {digest(lines, 'md5')}")
        elif (len(lines), count) != (must.lines, must.tokens):
            found.append(
                f"{split}: must be {must.lines:,} lines of {must.tokens:,} tokens; got {len(lines):,} of {count:,}"
            )
    return found
