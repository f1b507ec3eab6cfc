"""Small texts, models and trainers that every test of the toolkit may ask for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lm import config as configuration
from lm import stream, tokenizers
from lm.model import LanguageModel

WORDS = ("the", "cat", "dog", "sat", "ran", "on", "a", "mat", "and", "slept")


def _lines(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(0, 9))) for _ in range(count)]


@pytest.fixture
def lines() -> Callable[..., list[str]]:
    """`lines(count, seed=0)`: lines of zero to eight words out of ten."""
    return _lines


@pytest.fixture
def tokenizer() -> tokenizers.Tokenizer:
    """The word tokenizer of `lines`."""
    return tokenizers.train("word", _lines(200), None)


@pytest.fixture
def text(tokenizer: tokenizers.Tokenizer) -> Callable[..., stream.Stream]:
    """`text(count, seed=0)`: the stream of `lines(count, seed)`."""
    return lambda count, seed=0: stream.encode(_lines(count, seed), tokenizer)


@pytest.fixture
def model(tokenizer: tokenizers.Tokenizer) -> Callable[..., LanguageModel]:
    """`model(seed=0, vocabulary=None, **settings)`: 12 units over the tokenizer's vocabulary or another."""

    def make(
        seed: int = 0, vocabulary: int | None = None, backend: str = "reference", **settings: Any
    ) -> LanguageModel:
        torch.manual_seed(seed)
        tables = {"model": {"hidden_size": 12, **settings}, "train": {"optimizer": "sgd"}}
        size = vocabulary or tokenizer.size
        return LanguageModel(configuration.build(tables).model, size, backend=backend)

    return make
