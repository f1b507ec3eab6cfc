"""The built-in corpus: what CPython's own library says about itself, in English, with nothing to download.

Documents: each topic of `pydoc_data.topics`, and each module of the standard library (its docstrings, then
the comments that stand on separate lines), read from the sources and never imported. The text is made the
Treebank's way:

- one sentence or list item a line; code, tables, signatures and grammar rules are left out;
- lower case; a number is `N`; `.,;:?!()` are separate words where they end or enclose something, other
  punctuation is dropped, so `os.path` and `run_module()` come apart into `os path` and `run module`; hyphens and
  digits inside a word stay; `doesn't` is `does n't` and `it's` is `it 's`;
- a sentence that occurred before, in any document, is left out: no test sentence is in train;
- words rarer than the vocabulary holds, counted in train alone, are written `<unk>`.

The text follows the Python version (and how it was packaged), so perplexities compare only under one version;
the manifest says which one it was.
"""

import ast
import contextlib
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lm.corpora.folder import SPLITS, digest, read
from lm.errors import UserError
from lm.files import read_text, write_whole
from lm.text import Text
from lm.tokenizers import EOS, UNK

VOCABULARY = 10_000  # words at most, <unk> and <eos> among them
RAREST = 3  # times in train, at least, that a kept word stands: the others teach the model what <unk> is
HELD_OUT = 0.1  # share of the tokens that test takes, and valid
BUILDER = 1  # raise it when this file makes another text, so that cached ones are made again

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
}
_OF_ONE_MACHINE = re.compile(r"(^|/)(config-|_sysconfigdata)")
_MANIFEST = "manifest.json"
_ITEM = re.compile(r"\n[ \t]*\n|\n(?=[ \t]*[*-] )")
_CODE = re.compile(r">>>|::=|^\s*\$ |^\s*[*=~^-]{4,}\s*$", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.?!:])(?<!e\.g\.)(?<!i\.e\.)[\"')\]]*\s+(?=[\"'(*A-Z_])")
_NOISE = re.compile(r"\S+(?:://|@)\S+|\(\)")
_TOKEN = re.compile(r"[ei]\.[ge]\.|\d+(?:[.,]\d+)*(?![^\W_])|[^\W_]+(?:['-][^\W_]+)*|[.,;:?!](?![^\W_])|[()]")
_CONTRACTION = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))$")


def load(folder: Path) -> dict[str, Text]:
    """Returns the splits from `folder`, which is made first (seconds) when it is not there.

    Raises:
        UserError: this Python lacks the sources of its library; the folder holds something else.
    """
    if not folder.exists():
        _make(folder)
    record = _manifest(folder)
    splits = read(folder)
    for split, text in splits.items():
        if text.facts.lines_sha256 != record.get(split):
            raise _foreign(folder, f"{split}.txt is another text")
    return splits


def python_version(folder: Path) -> str:
    """Returns the version of the Python whose documentation the kept text is."""
    return str(_manifest(folder)["python"])


def _make(folder: Path) -> None:
    """Builds the corpus beside its place and renames the whole folder, so that none is ever half there."""
    splits = build(documents(Path(sysconfig.get_path("stdlib"))))
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for split, lines in splits.items():
            write_whole(staging / f"{split}.txt", "".join(f"{line}\n" for line in lines).encode())
        record = {"builder": BUILDER, "python": platform.python_version()}
        record |= {split: digest(lines, "sha256") for split, lines in splits.items()}
        write_whole(staging / _MANIFEST, (json.dumps(record, indent=1) + "\n").encode())
        with contextlib.suppress(OSError):  # another process was first: its text is the same
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, object]:
    try:
        record = json.loads(read_text(folder / _MANIFEST, "the manifest of python-docs"))
    except (UserError, ValueError, RecursionError):
        raise _foreign(folder, f"its {_MANIFEST} cannot be read") from None
    if not isinstance(record, dict) or record.get("builder") != BUILDER or "python" not in record:
        raise _foreign(folder, f"its {_MANIFEST} is of another version")
    return record


def _foreign(folder: Path, fault: str) -> UserError:
    return UserError(
        f"{folder} must hold python-docs as it was made; got another: {fault}; move the folder away to have it made "
        "again, and give your own text as a folder elsewhere"
    )


def documents(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, passages of raw text) for every topic and every module, in an order of names."""
    texts: Mapping[str, str] = {}
    with contextlib.suppress(ImportError):  # some systems package it apart
        from pydoc_data import topics

        texts = topics.topics
    for topic, text in sorted(texts.items()):
        yield f"topic {topic}", [text]
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if _SKIPPED.isdisjoint(parts) and not _OF_ONE_MACHINE.search("/".join(parts)):
            yield "/".join(parts), _passages(path)


def _passages(path: Path) -> list[str]:
    """Returns the docstrings of a module, then its blocks of comment lines; nothing if it does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
    block: list[str] = []
    for line in [*source.split("\n"), ""]:
        if (text := line.strip()).startswith("#"):
            text = text.lstrip("#:! ")
            block.append(text if any(map(str.isalnum, text)) else "")  # a ruled line parts paragraphs
        elif block:
            found.append("\n".join(block))
            block = []
    return found


def sentences(passage: str) -> Iterator[list[str]]:
    """Yields the sentences of a passage as words; skips what is not English."""
    for item in _ITEM.split(inspect.cleandoc(passage)):
        if _CODE.search(item):
            continue
        for sentence in _SENTENCE.split(" ".join(item.split())):
            symbols = sum(not (c.isalnum() or c in " .,-'\"()") for c in sentence)
            found = tokens(sentence)
            words = _words(found)
            plain = sum(word.isalpha() and len(word) > 1 for word in words)
            if len(words) >= 4 and symbols <= 0.06 * len(sentence) and plain >= 0.6 * len(words):
                yield found


def _words(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for word in found if word[0].isalnum())


def tokens(sentence: str) -> list[str]:
    """Returns the words of a sentence, as the head of this file says."""
    found: list[str] = []
    for word in _TOKEN.findall(_NOISE.sub(" ", sentence).lower().replace("\u2019", "'")):
        if word[0].isdigit() and word.replace(".", "").replace(",", "").isdigit():
            found.append("N")
        else:
            found += _CONTRACTION.sub(r" \1", word).split()
    return list(itertools.dropwhile(lambda word: word in ".,;:?!)", found))


def build(raw: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Turns (name, passages) into the three splits."""
    seen: set[tuple[str, ...]] = set()
    texts: dict[str, list[list[str]]] = {}
    for name, passages in raw:
        texts[name] = []
        for found in (found for passage in passages for found in sentences(passage)):
            if (words := _words(found)) not in seen:
                seen.add(words)
                texts[name].append(found)
    where = _assign({name: sum(len(line) + 1 for line in text) for name, text in texts.items()})
    splits = {s: [line for name in texts if where[name] == s for line in texts[name]] for s in SPLITS}
    counts = Counter(word for line in splits["train"] for word in line)
    kept = {word for word, count in counts.most_common(VOCABULARY - len((UNK, EOS))) if count >= RAREST}
    written = {
        split: [" ".join(word if word in kept else UNK for word in line) for line in lines]
        for split, lines in splits.items()
    }
    train = set(written["train"])  # rare words gone, a few held-out lines are the same as one of train
    final = {s: lines if s == "train" else [x for x in lines if x not in train] for s, lines in written.items()}
    if not all(final.values()):
        raise UserError(
            "python-docs must be made from the sources of Python's standard library and pydoc_data; got a Python "
            "without them; use a complete Python, or give a folder of your own text"
        )
    return final


def _assign(sizes: Mapping[str, int]) -> dict[str, str]:
    """Returns the split of each document: by the sha256 of their names first test, then valid, then train."""
    where: dict[str, str] = {}
    share = HELD_OUT * sum(sizes.values())
    taken = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        where[name] = "test" if taken < share else "valid" if taken < 2 * share else "train"
        taken += sizes[name]
    return where
