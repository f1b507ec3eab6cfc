"""The listener that shows progress: one updating line on a terminal, plain lines elsewhere."""

import sys
from typing import Any, TextIO

from lm.evaluator import measured, perplexity
from lm.events import Diverged, EpochEnded, Event, Interrupted, Started, Stepped, Validated
from lm.output import Lenient
from lm.tokenizers import Unit

_FORMAT = "training {percentage:3.0f}%|{bar:20}| {desc}, {rate_fmt}{postfix}, {remaining} left"


class ProgressBar:
    """Shows epoch, tokens/s, training perplexity of the epoch so far, time left; and a line for each epoch.

    Arguments:
        tokens_per_unit: of the training text, so that its perplexity is per unit as the validation's is.
        unit: of the perplexities.
        stream: where to, as long as it can be written; the moving line only appears on a terminal.

    Attributes:
        tokens, seconds: trained on by this process, and what its steps took.
    """

    def __init__(self, tokens_per_unit: float = 1.0, stream: TextIO | None = None, unit: Unit = "word") -> None:
        self.stream = Lenient(sys.stderr if stream is None else stream)
        self.unit = unit
        self.tokens_per_unit = tokens_per_unit
        self.tokens = 0
        self.seconds = 0.0
        self._epochs = 0
        self._valid = ""
        self._bar: Any = None

    @property
    def speed(self) -> str:
        """Tokens/s so far, as text."""
        return f"{self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else "no step taken"

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._epochs = event.epochs
                if self.stream.isatty():
                    self._open(event)
            case Stepped():
                self.tokens += event.tokens
                self.seconds += event.seconds
                if self._bar is not None:
                    self._move(event)
            case Validated():
                best = ", best so far" if event.best else ""
                self._valid = f"valid {measured(event.score.ppl, self.unit, short=True)} ({event.score.protocol}{best})"
            case EpochEnded():
                self._write(
                    f"epoch {event.epoch}/{self._epochs}: train {self._ppl(event.nll, event.tokens)}, "
                    f"{self._valid}, {self.speed}"
                )
            case Interrupted() | Diverged():
                self.close()

    def close(self) -> None:
        """Takes the moving line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, event: Started) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=event.epochs * event.tokens,
            initial=(event.epoch - 1) * event.tokens + event.epoch_tokens,
            unit=" tokens",
            unit_scale=True,
            bar_format=_FORMAT,
            file=self.stream,
            leave=False,
            dynamic_ncols=True,
        )

    def _move(self, event: Stepped) -> None:
        self._bar.set_description_str(f"epoch {event.epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(self._ppl(event.epoch_nll, event.epoch_tokens), refresh=False)
        self._bar.update(event.tokens)

    def _ppl(self, nats: float, tokens: int) -> str:
        return measured(perplexity(nats * self.tokens_per_unit, tokens), self.unit, short=True)

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.write(line, file=self.stream)
