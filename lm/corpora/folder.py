"""A folder of text files, one for each split: how most corpora are kept, and what a published one must be."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.corpora.files import PLAIN, SPLITS, Reading, Split, find, open_text
from lm.errors import UserError
from lm.files import reading
from lm.text import Text

__all__ = ["FAMILIES", "SPLITS", "Known", "Split", "digest", "faults", "files", "read"]

FAMILIES = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens", "wiki.{}.raw")  # how the files of splits may be called
_NAMES = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}


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


def holds_text(folder: Path) -> bool:
    """Returns whether a folder has the file of any split."""
    return _family(folder) is not None


def _family(folder: Path) -> str | None:
    for family in FAMILIES:
        if any(find(folder, map(family.format, _NAMES[split])) for split in SPLITS):
            return family
    return None


def files(folder: Path) -> dict[str, Path]:
    """Returns the path of each split, present or not, in the first family of names that the folder uses."""
    if (family := _family(folder)) is None:
        names = " or ".join(family.format("{train,valid,test}") for family in FAMILIES)
        raise UserError(
            f"a text folder must hold {names}; got {folder}, which holds none of these; put them there, or give a "
            f"pattern of its files, such as '{folder}/**/*.txt'"
        )
    return {
        split: find(folder, map(family.format, names)) or folder / family.format(split)
        for split, names in _NAMES.items()
    }


def read(
    folder: Path,
    needed: Iterable[str] = SPLITS,
    options: Reading = PLAIN,
    cache: Path | None = None,
) -> dict[str, Text]:
    """Opens the splits of a folder that are there.

    Arguments:
        needed: splits that must be.
        cache: folder for what must be unpacked.

    Raises:
        UserError: the folder or a needed split is missing, or a split is empty (zero lines).
    """
    if not folder.is_dir():
        raise UserError(
            f"a text folder must be a folder; got {folder}, which is not; give one that holds train.txt and so on"
        )
    splits = {}
    for split, path in files(folder).items():
        if split in needed:
            with reading(path, f"the {split} split"):
                path.stat()
        if path.exists():
            splits[split] = open_text(path, options, cache or folder)
    return splits


def faults(splits: Mapping[str, Text], known: Mapping[str, Known]) -> list[str]:
    """Returns what differs from the published corpus, one sentence per split; nothing when it is that corpus."""
    found = []
    for split, must in known.items():
        if split not in splits:
            found.append(f"{split}: must be there; got none")
            continue
        text, facts = splits[split], splits[split].facts
        count = facts.lines + facts.words
        if (facts.lines, count) != (must.lines, must.tokens):
            found.append(
                f"{split}: must be {must.lines:,} lines of {must.tokens:,} tokens; got {facts.lines:,} of {count:,}"
            )
        elif must.md5 and (md5 := digest(text, "md5")) != must.md5:
            found.append(f"{split}: the md5 must be {must.md5}; got {md5}")
    return found
