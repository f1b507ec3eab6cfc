"""Penn Treebank and WikiText-2: files the user placed, else the hub through `datasets`; always verified."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.corpora.files import Reading, require_text, rows, text_column
from lm.corpora.folder import FAMILIES, SPLITS, Known, faults, holds_text, read
from lm.errors import UserError
from lm.files import write_chunks, write_whole
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


_SPLITS = {"train": "train", "dev": "valid", "valid": "valid", "validation": "valid", "test": "test"}

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
    here = folder.is_dir() and holds_text(folder)
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
    found = _ask(name, source.repository, dict(source.options), f"or in {folder}", _how_to_place(source, folder))
    return {
        split: Text.of(source.line(text.rstrip("\n")) for text in found[key][source.column])
        for split, key in zip(SPLITS, ("train", "validation", "test"), strict=True)
    }


def dataset(source: str, data_dir: Path, options: Reading) -> dict[str, Text]:
    """Returns the splits that a text data set of the hub has, kept under `data_dir` once they were fetched.

    Arguments:
        source: `NAME` or `NAME:CONFIG`; a folder that `datasets` can load, too.

    Raises:
        UserError: no name; no answer from the hub; no column of text.
    """
    name, _, configuration = source.partition(":")
    if not name:
        raise UserError(
            f"a data set of the hub must have a name, hf:NAME or hf:NAME:CONFIG; got 'hf:{source}'; give one, such as "
            "hf:Salesforce/wikitext:wikitext-2-raw-v1"
        )
    column = "" if options.column == Reading.column else f"-{options.column}"
    folder = data_dir / "hub" / (source.replace("/", "--").replace(":", "--") + column)
    if not holds_text(folder):
        chosen = {"name": configuration} if configuration else {}
        how = "check the name and the network, or give the text as files: --data FOLDER"
        found = _ask(f"hf:{source}", name, chosen, f"or kept in {folder}", how)
        if not isinstance(found, Mapping):
            found = {"train": found}
        staging = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed when all splits are there
        try:
            for key, split in _SPLITS.items():
                if key in found:
                    column = text_column(found[key].column_names, options.column, f"hf:{source}")
                    require_text(str(getattr(found[key].features[column], "dtype", "no text")), column, f"hf:{source}")
                    batches = found[key].iter(batch_size=10_000)
                    write_chunks(staging / f"{split}.txt", (rows(batch[column]) for batch in batches))
            with suppress(OSError):  # another process was first
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return read(folder, (), replace(options, encoding=Reading.encoding), data_dir / "cache")  # as it is kept


def _ask(name: str, repository: str, options: Mapping[str, str], else_where: str, how: str) -> Any:
    """A data set of the hub, as `datasets` loads it."""
    import datasets
    import huggingface_hub

    try:
        if not Path(repository).exists() and not huggingface_hub.is_offline_mode():
            # One request with a time limit: without a network `datasets` would retry for half a minute.
            huggingface_hub.HfApi().dataset_info(repository, timeout=PATIENCE)
        return datasets.load_dataset(repository, **options)
    except Exception as fault:  # each of these libraries, and those under them, has its own kinds
        raise UserError(
            f"{name} must be on the hub {else_where}; got no answer from the hub "
            f"({type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason'}); {how}"
        ) from None
