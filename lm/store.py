"""What is made of a large text, kept in files: its tokenizer, and its ids as a memory-mapped array.

Files are named by the sha256 of what they were made from, and get their names when they are whole.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm import stream, tokenizers
from lm.files import write_chunks
from lm.stream import Stream
from lm.text import Text, watched
from lm.tokenizers import Tokenizer


def tokenizer(kind: str, text: Text, size: int | None, min_count: int, sample: int) -> Tokenizer:
    """Returns `tokenizers.train` of these, which of a large text is kept."""
    key = [text.facts.sha256, kind, size, min_count, sample] if text.is_large else None
    kept = _place(text, "tokenizer", key, ".json")
    if kept is not None and kept.exists():
        return tokenizers.load(kept)
    with watched(text, f"making a {kind} vocabulary of") as read:
        made = tokenizers.train(kind, read, size, min_count=min_count, sample=sample)
    if kept is not None:
        tokenizers.save(made, kept)
    return made


def encoded(text: Text, tokenizer: Tokenizer) -> Stream:
    """Returns `stream.encode` of a text; of a large one, its ids are a memory-mapped file of their smallest type."""
    kind = np.min_scalar_type(tokenizer.size - 1)
    key = [text.facts.sha256, tokenizer.sha256] if text.is_large else None
    kept = _place(text, "ids", key, f".{kind}")
    if kept is None:
        return stream.encode(text, tokenizer)
    if not kept.exists():
        with watched(text, "encoding") as read:
            write_chunks(kept, _as(kind, tokenizer.encode_text(read)))
    ids = np.memmap(kept, kind, "r").view(np.ndarray)
    return stream.stream_of(ids, text.facts, tokenizer)


def _as(kind: np.dtype, blocks: Iterator[np.ndarray]) -> Iterator[bytes]:
    for block in blocks:
        yield block.astype(kind).tobytes()


def _place(text: Text, what: str, key: Any, suffix: str) -> Path | None:
    if key is None or text.cache is None:
        return None
    return text.cache / f"{what}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}{suffix}"
