import io
import re
import sys

import pytest

from lm.evaluator import Score
from lm.events import EpochEnded, Interrupted, Started, Stepped, Validated
from lm.progress import ProgressBar

EVENTS = [
    Started(1, 0, 2, 100, 0),
    *(Stepped(1, n, 5 * n, 10, 2.0, 50, 100.0 * n, 50 * n, 0.1, 1.0, 0.5) for n in (1, 2)),
    Validated(1, 2, Score("columns", 12.5, 12.5, 1.0, 1), best=True),
    EpochEnded(1, 2, 200.0, 100, 1.0),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gone(Terminal):
    def __init__(self, left=0):
        super().__init__()
        self.left = left

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError
        return super().write(text)


def play(stream, events=EVENTS, **options):
    progress = ProgressBar(stream=stream, **options)
    for event in events:
        progress(event)
    return progress


def test_one_plain_line_per_epoch_without_a_terminal():
    stream = io.StringIO()
    progress = play(stream)
    assert stream.getvalue() == ("epoch 1/2: train ppl 7.39, valid ppl 12.50 (columns, best so far), 100 tokens/s\n")
    assert progress.speed == "100 tokens/s"


def test_perplexity_is_per_word():
    stream = io.StringIO()
    play(stream, tokens_per_unit=2.0)
    assert "train ppl 54.60" in stream.getvalue()


def test_one_moving_line_on_a_terminal():
    stream = Terminal()
    progress = play(stream)
    progress.close()
    shown = stream.getvalue()
    assert re.search(r"training +\d+%\|.*\| epoch 1/2, ", shown), "the share is of all training"
    assert "ppl 7.39" in shown
    assert "tokens/s" in shown
    assert " left" in shown
    assert "valid ppl 12.50" in shown
    assert shown.count("\n") == 1, "only the epoch's own line ends; the moving one is rewritten"


def test_a_resumed_bar_starts_where_the_run_stands():
    stream = Terminal()
    progress = play(stream, [Started(2, 7, 4, 100, 50)])
    assert (progress._bar.n, progress._bar.total) == (150, 400)
    progress(Interrupted(2, 7, "SIGINT"))
    assert progress._bar is None


def test_no_step_no_speed():
    assert play(io.StringIO(), EVENTS[:1]).speed == "no step taken"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_closing_twice_is_nothing(stream):
    progress = play(stream)
    progress.close()
    progress.close()


@pytest.mark.parametrize("stream", [None, Gone(), Gone(left=3)])
def test_a_stream_that_cannot_be_written_stops_nothing(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    progress = play(stream, EVENTS * 2)
    progress.close()
    assert progress.tokens == 200
