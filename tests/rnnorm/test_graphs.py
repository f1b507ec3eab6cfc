"""The graphs of a loop: which there are, when they are recorded and replayed, and how many are kept."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rnnorm.ops import graphs


class _Loop:
    """Steps that write down their number; `record` writes down what it records."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.recorded: list[int] = []

    def launches(self, count: int) -> list[graphs.Launch]:
        return [lambda: self.done.append("step")] * count

    def record(self, launches: Sequence[graphs.Launch]) -> graphs.Launch:
        self.recorded.append(len(launches))
        return lambda: self.done.append(f"graph {len(launches)}")


@pytest.mark.parametrize("T", range(1, 200))
def test_a_split_is_complete_and_short(T: int) -> None:
    sizes = graphs.split(T)
    assert sum(sizes) == T
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= T // max(graphs.SIZES) + 6
    assert set(sizes) <= set(graphs.SIZES)


def test_no_steps_no_graphs() -> None:
    assert graphs.split(0) == []


def test_the_first_run_launches_and_later_ones_replay() -> None:
    loop = _Loop()
    runner = graphs.Runner(loop.record)
    runner.run(41, loop.launches)
    assert loop.done == ["step"] * 41
    assert loop.recorded == []
    loop.done.clear()
    runner.run(41, loop.launches)
    assert loop.done == ["graph 32", "graph 8", "graph 1"]
    runner.run(105, loop.launches)
    assert loop.recorded == [32, 8, 1, 64], "each size is recorded once"


def test_any_lengths_share_the_graphs() -> None:
    loop = _Loop()
    runner = graphs.Runner(loop.record)
    for T in range(1, 120):
        runner.run(T, loop.launches)
    assert len(loop.recorded) == len(graphs.SIZES)


def test_without_graphs_every_run_launches() -> None:
    loop = _Loop()
    runner = graphs.Runner(None)
    for _ in range(2):
        runner.run(9, loop.launches)
    assert loop.done == ["step"] * 18


def test_failed_recording_warns_once_and_launches() -> None:
    loop = _Loop()

    def refused(launches: Sequence[Callable[[], object]]) -> Any:
        raise RuntimeError("operation not permitted")

    runner = graphs.Runner(refused)
    runner.run(2, loop.launches)
    with pytest.warns(RuntimeWarning, match="recording a CUDA graph failed with operation not permitted") as caught:
        runner.run(9, loop.launches)
    assert len(caught) == 1
    runner.run(1, loop.launches)
    assert loop.done == ["step"] * 12


def test_the_cache_keeps_the_most_recent() -> None:
    cache: graphs.Cache[str] = graphs.Cache(2)
    assert [cache.get(key, lambda: "made") for key in "ab"] == ["made"] * 2
    assert cache.get("a", lambda: "again") == "made"
    cache.get("c", lambda: "made")
    assert "a" in cache
    assert "b" not in cache
    assert cache.get("b", lambda: "again") == "again"
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0


def test_threads_share_what_the_cache_makes() -> None:
    cache: graphs.Cache[object] = graphs.Cache(4)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get("key", object))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


class _Stream:
    device = "cpu"

    def __init__(self, name: str, log: list[str], number: int = 7) -> None:
        self.name, self.log, self.cuda_stream = name, log, number

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to streams and graphs, in order, on a device that is not here."""
    found: list[str] = []

    class Graph:
        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            found.append(f"begin {capture_error_mode} in {pool}")

        def capture_end(self) -> None:
            found.append("end")

        def replay(self) -> None:
            found.append("replay")

    @contextmanager
    def inside(stream: _Stream) -> Iterator[None]:
        found.append(f"on {stream.name}")
        yield
        found.append(f"off {stream.name}")

    numbers = itertools.chain((7, 8, 7, 8), itertools.count(9))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Stream("current", found))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream("side", found, next(numbers)))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(graphs, "_SIDES", graphs.Cache(2))
    return found


def test_recording(log: list[str]) -> None:
    class Product:
        def warm(self) -> None:
            log.append("warm")

        def __call__(self) -> None:
            log.append("product")

    begin = ("side waits for current", "on side", "begin thread_local in the pool")
    end = ("end", "off side", "current waits for side")
    replay = graphs.record([Product(), lambda: log.append("kernel")])
    # the first graph stays in the pool
    assert log == ["warm", *begin, *end, *begin, "product", "kernel", *end]
    replay()
    assert log[-1] == "replay"
    log.clear()
    graphs.record([lambda: log.append("kernel")])
    assert log == [*begin, "kernel", *end]


def test_a_side_is_a_stream_that_nothing_else_is(log: list[str]) -> None:
    """Torch hands out few streams, one after another: the user's stream comes again, and those of other sides."""
    graphs.record([])
    (side,) = graphs._SIDES.values()
    assert side.stream.cuda_stream == 8
    assert graphs._Side(torch.cuda.current_stream(), [8]).stream.cuda_stream == 9


def test_a_recording_that_fails_is_ended(log: list[str]) -> None:
    def refused() -> None:
        raise RuntimeError("operation not permitted")

    graphs.record([])
    (before,) = graphs._SIDES.values()
    log.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record([refused])
    begin, end = ["side waits for current", "on side", "begin thread_local in the pool"], ["end", "off side"]
    # another one that succeeds, in another pool
    assert log == [*begin, "end", *begin, *end, "current waits for side"]
    graphs.record([])
    assert graphs._SIDES.values() != [before]


def test_one_thread_records_at_a_time(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    most: list[int] = []

    def slow() -> None:
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()

    graphs.record([])
    threads = [threading.Thread(target=lambda: graphs.record([slow])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
