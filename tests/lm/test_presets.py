"""Every recipe of the literature, and our own, runs: a hundred steps at a tenth of its size."""

import math

import numpy as np
import pytest
import torch

from lm import config, stream, tokenizers
from lm.evaluator import evaluate
from lm.events import Stepped
from lm.model import LanguageModel
from lm.trainer import Trainer

RECIPES = [name for name, text in config.presets().items() if "published" in text or name == "regularized-450"]
# words as frequent as in a language: what can be learnt in a hundred steps at any rate and dropout
LINES = [" ".join(map(str, line)) for line in np.random.default_rng(1).zipf(1.2, (2000, 20)).clip(max=999)]
TOKENIZER = tokenizers.train("word", LINES, None)
TEXT, VALID = (stream.encode(lines, TOKENIZER) for lines in (LINES, LINES[:20]))


def small(name):
    """The preset's settings, every size a tenth, and a quarter of its columns and of a window of fixed length."""
    settings = config.build(config.preset(name))
    tables = settings.model_dump()
    tables["model"] |= {key: round(size / 10) for key, size in settings.model if key.endswith("_size") and size}
    if settings.model.layer_sizes:
        tables["model"]["layer_sizes"] = [round(size / 10) for size in settings.model.layer_sizes]
    tables["train"] |= {"max_steps": 100, "batch_size": settings.train.batch_size // 4}
    if settings.train.window.isdigit():
        tables["train"]["window"] = str(int(settings.train.window) // 4)
    return config.build(tables)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_hundred_steps_at_a_tenth_of_the_size(name):
    settings = small(name)
    torch.manual_seed(settings.train.seed)
    model = LanguageModel(settings.model, TOKENIZER.size)
    tokens = 110 * stream.policy(settings.train.window).high * settings.train.batch_size  # 100 steps, or some more
    data = stream.columns(np.resize(TEXT.ids, tokens), settings.train.batch_size, TOKENIZER.eos)
    score = lambda: evaluate(model, VALID, TOKENIZER, protocol="columns", batch_size=2)  # noqa: E731
    events = []
    before, run = score(), Trainer(model, settings.train, data, score, [events.append])
    run.fit()
    steps = [event for event in events if isinstance(event, Stepped)]
    assert steps[-1].step == 100
    assert all(math.isfinite(event.nll) for event in steps)
    with run.averaged():
        assert score().ppl < 0.5 * before.ppl
