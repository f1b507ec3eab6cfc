"""What is made of a large text, kept in files: its tokenizer, and its ids as a memory-mapped array.

Files are named by the sha256 of what they were made from, and get their names when they are whole; one that is damaged
since is made again.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm import stream, tokenizers
from lm.files import cache_file, write_chunks
from lm.stream import Stream
from lm.text import BLOCK, Text, watched
from lm.tokenizers import Tokenizer

_FORM = 2  # of kept files; raise it where their meaning changes
_SEAL = hashlib.sha256().digest_size  # bytes


def tokenizer(kind: str, text: Text, size: int | None, min_count: int, sample: int) -> Tokenizer:
    """Returns `tokenizers.train` of these, which of a large text is kept."""
    key = [text.facts.sha256, kind, size, min_count, sample] if text.is_large else None
    kept = _place(text, "tokenizer", key, "")
    if kept is not None and (content := _whole(kept)) is not None:
        return tokenizers.from_state(json.loads(content.tobytes()))
    with watched(text, f"making a {kind} vocabulary of") as read:
        made = tokenizers.train(kind, read, size, min_count=min_count, sample=sample)
    if kept is not None:
        write_chunks(kept, _sealed([json.dumps(made.state()).encode()]))
    return made


def encoded(text: Text, tokenizer: Tokenizer) -> Stream:
    """Returns `stream.encode` of a text; of a large one, its ids are a memory-mapped file of their smallest type."""
    kind = np.min_scalar_type(tokenizer.size - 1)
    key = [text.facts.sha256, tokenizer.sha256] if text.is_large else None
    kept = _place(text, "ids", key, f".{kind}")
    if kept is None:
        return stream.encode(text, tokenizer)
    if (content := _whole(kept)) is None:
        with watched(text, "encoding") as read:
            write_chunks(kept, _sealed(block.astype(kind).tobytes() for block in tokenizer.encode_text(read)))
        content = np.memmap(kept, np.uint8, "r")[:-_SEAL]
    return stream.stream_of(content.view(kind).view(np.ndarray), text.facts, tokenizer)


def _sealed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks, and last the sha256 of what they are."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def _whole(path: Path) -> np.ndarray | None:
    """The bytes of a sealed file, memory-mapped; None where it is not there, or not what was written."""
    if not path.exists() or path.stat().st_size <= _SEAL:
        return None
    held = np.memmap(path, np.uint8, "r")
    digest = hashlib.sha256()
    for start in range(0, len(held) - _SEAL, BLOCK):
        digest.update(held[start : min(start + BLOCK, len(held) - _SEAL)].data)
    return held[:-_SEAL] if digest.digest() == held[-_SEAL:].tobytes() else None


def _place(text: Text, what: str, key: Any, suffix: str) -> Path | None:
    if key is None or text.cache is None:
        return None
    name = hashlib.sha256(json.dumps([_FORM, key]).encode()).hexdigest()[:32]
    return cache_file(text.cache, f"{what}-{name}{suffix}")
