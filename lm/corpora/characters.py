"""Texts that the field measures by characters or bytes: text8, enwik8, and Penn Treebank's characters."""

from pathlib import Path

from lm.corpora import hub
from lm.corpora.files import PLAIN, find, open_text
from lm.errors import UserError
from lm.text import Text

SIZE = 100_000_000
SHARES = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, SIZE)}
PTB = {"train": 5_017_482, "valid": 393_042, "test": 442_423}  # characters, line feeds among them


def million(folder: Path, name: str) -> dict[str, Text]:
    """Returns text8 or enwik8 from its file in `folder`: the first 90 million bytes, the next 5 and the last 5.

    A split of enwik8 may begin inside a character.

    Raises:
        UserError: no such file; another number of bytes; for text8, another byte than a … z and space.
    """
    path = find(folder, [name, f"{name}.txt"])
    if path is None:
        raise UserError(
            f"{name} must be in {folder}; got no file {name} there; get it from Matt Mahoney's pages and put it there, "
            "unzipped, or as .gz or .zst"
        )
    text = open_text(path, PLAIN, folder)
    if text.size != SIZE:
        raise UserError(
            f"{name} must hold {SIZE:,} bytes; got {path} with {text.size:,}; put the published file there, unzipped"
        )
    others = (block.translate(None, _TEXT8) for block in text.blocks())
    if name == "text8" and (other := next(filter(None, others), b"")):
        raise UserError(
            f"text8 must hold a to z and spaces alone; got {other[:1]!r} in {path}; put the published file there"
        )
    return {split: text.part(*share) for split, share in SHARES.items()}


_TEXT8 = b"abcdefghijklmnopqrstuvwxyz "


def ptb(folder: Path) -> dict[str, Text]:
    """Returns the characters of Penn Treebank from the files of `ptb`, which are verified: words with one space between
    them, and a line feed after each line.

    Raises:
        UserError: see `hub.load`.
    """
    splits = hub.load("ptb", folder.with_name("ptb"))
    found = {
        split: Text.of((line.strip(" ") for line in text), f"the {split} split of ptb-char")
        for split, text in splits.items()
    }
    for split, text in found.items():
        if text.size != PTB[split]:
            raise UserError(
                f"ptb-char must hold {PTB[split]:,} characters in {split}; got {text.size:,}; get ptb again"
            )
    return found
