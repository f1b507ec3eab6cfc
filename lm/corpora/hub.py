"""Penn Treebank and WikiText-2: files the user placed, else the hub through `datasets`; always verified."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.corpora.folder import FAMILIES, SPLITS, Known, faults, read
from lm.errors import UserError
from lm.files import write_whole
from lm.text import Text

PATIENCE = 5.0  # seconds in which the hub must answer


@dataclass(frozen=True)
class Source:
    """Where the hub holds a corpus, what its files are called here, and what they must be.

    `line` turns a row of the hub into the published file's line.
    """

    repository: str
    options: Mapping[str, str]
    column: str
    line: Callable[[str], str]
    family: str
    known: Mapping[str, Known]


SOURCES = {
    "ptb": Source(
        "ptb-text-only/ptb_text_only",
        {"revision": "refs/convert/parquet"},  # its script form is refused by datasets >= 4
        "sentence",
        " {} ".format,
        FAMILIES[1],
        {
            "train": Known(42_068, 929_589, "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
            "valid": Known(3_370, 73_760, "aa0affc06ff7c36e977d7cd49e3839bf"),
            "test": Known(3_761, 82_430, "8b80168b89c18661a38ef683c0dc3721"),
        },
    ),
    "wikitext-2": Source(
        "Salesforce/wikitext",
        {"name": "wikitext-2-v1"},
        "text",
        lambda row: row or " ",  # the published blank line
        FAMILIES[2],
        {
            "train": Known(36_718, 2_088_628),
            "valid": Known(3_760, 217_646),
            "test": Known(4_358, 245_569),
        },
    ),
}


def load(name: str, folder: Path) -> dict[str, Text]:
    """Returns the verified splits: from `folder` if it holds them, else from the hub (and keeps them there).

    Raises:
        UserError: no answer from the hub (how to place the files), or a text that is not the published one.
    """
    source = SOURCES[name]
    here = folder.is_dir() and any((folder / family.format(s)).exists() for family in FAMILIES for s in SPLITS)
    splits = read(folder) if here else _download(name, source, folder)
    if wrong := faults(splits, source.known):
        place = folder if here else f"the hub's {source.repository}"
        raise UserError(
            f"{name} must be the published corpus; got another text from {place} ({'; '.join(wrong)}); "
            f"{_how_to_place(source, folder)}"
        )
    if not here:
        for split, text in splits.items():
            write_whole(folder / source.family.format(split), b"".join(text.blocks()))
    return splits


def _how_to_place(source: Source, folder: Path) -> str:
    names = ", ".join(source.family.format(split) for split in SPLITS)
    return f"put {names} into {folder}, or give as the data a folder that holds them"


def _download(name: str, source: Source, folder: Path) -> dict[str, Text]:
    import datasets
    import huggingface_hub

    try:
        if not huggingface_hub.is_offline_mode():
            # One request with a time limit: without a network `datasets` would retry for half a minute.
            huggingface_hub.HfApi().dataset_info(source.repository, timeout=PATIENCE)
        rows = datasets.load_dataset(source.repository, **source.options)
    except Exception as fault:  # each of these libraries, and those under them, has its own kinds
        raise UserError(
            f"{name} must be on the hub or in {folder}; got no answer from the hub "
            f"({type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason'}); "
            f"{_how_to_place(source, folder)}"
        ) from None
    return {
        split: Text.of(source.line(text.rstrip("\n")) for text in rows[key][source.column])
        for split, key in zip(SPLITS, ("train", "validation", "test"), strict=True)
    }
