"""A generated text of exactly known entropy: no honest evaluator reads below it.

A first-order Markov chain over K words and the end of line. A line starts after an end of line and runs until
the next; so lines are independent, and the stream of a tokenizer that keeps every word is the chain itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm.errors import UserError
from lm.text import Text, words

WORDS = 50
LINES = {"train": 5000, "valid": 500, "test": 500}  # about 20 tokens each
SEED = 1


@dataclass(frozen=True)
class Source:
    """A Markov source.

    Attributes:
        transition: [K + 1, K + 1] float64, rows sum to 1; state i < K is the word `w{i}`, K the end of line.
    """

    transition: np.ndarray

    @cached_property
    def stationary(self) -> np.ndarray:
        """[K + 1], the share of each state in a long stream: p P = p, sum p = 1."""
        states = len(self.transition)
        equations = np.vstack([self.transition.T - np.eye(states), np.ones(states)])
        return np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]

    @property
    def entropy(self) -> float:
        """Nats per token, end of lines counted: - sum_i p_i sum_j P_ij ln P_ij."""
        P = self.transition
        return float(-self.stationary @ np.where(P > 0, P * np.log(np.where(P > 0, P, 1.0)), 0.0).sum(1))

    def generate(self, lines: int, seed: int | Sequence[int]) -> list[str]:
        """Returns that many whole lines, all walked at once."""
        end = len(self.transition) - 1
        names = [f"w{i}" for i in range(end)]
        steps = self.transition.cumsum(1)
        generator = np.random.default_rng(seed)
        text: list[list[str]] = [[] for _ in range(lines)]
        state, line = np.full(lines, end), np.arange(lines)
        while len(line):
            drawn = (generator.random(len(line))[:, None] >= steps[state]).sum(1)
            state = np.minimum(drawn, end)  # a row's sum may round to just below 1
            line, state = line[state != end], state[state != end]
            for i, word in zip(line.tolist(), state.tolist(), strict=True):
                text[i].append(names[word])
        return [" ".join(found) for found in text]

    def log_probability(self, lines: Sequence[str]) -> float:
        """Returns ln of the probability of these very lines, end of lines counted, in nats."""
        end = len(self.transition) - 1
        states = {f"w{i}": i for i in range(end)}
        try:
            path = np.array([end, *(s for line in lines for s in (*(states[w] for w in words(line)), end))])
        except KeyError as word:
            raise UserError(
                f"a line of this source must hold the words w0 … w{end - 1}; got {word}; use that source's text"
            ) from None
        with np.errstate(divide="ignore"):
            return float(np.log(self.transition[path[:-1], path[1:]]).sum())


def source(count: int = WORDS, seed: int = SEED) -> Source:
    """Returns a source of `count` words; rows are uneven (u^4); 1 word in 20 ends its line; none is blank."""
    weights = np.random.default_rng(seed).random((count + 1, count + 1))
    weights = weights * weights * weights * weights  # products only: the same bits on every machine
    weights[:, count] = 0
    transition = weights / weights.sum(1, keepdims=True)
    transition[:count] *= 0.95
    transition[:count, count] = 0.05
    return Source(transition)


def load() -> dict[str, Text]:
    """Returns the splits of the default source."""
    chain = source()
    made = {split: chain.generate(count, [SEED, i]) for i, (split, count) in enumerate(LINES.items())}
    return {split: Text.of(lines, f"the {split} split of markov") for split, lines in made.items()}
