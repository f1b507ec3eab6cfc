"""Loops over steps as replayed graphs: which graphs there are, how long they are kept, and when there are none.

Launched one by one, the few kernels of a step cost more time in Python than on the device. A graph holds a run of steps
and finds the first of them on the device, so a few sizes serve every number of steps.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

Launch = Callable[[], object]
Held = TypeVar("Held")

SIZES = (64, 32, 16, 8, 4, 2, 1)  # steps of a graph: as few replays as possible for any number
BOUND = 32  # loops that are kept


def split(steps: int) -> list[int]:
    """The fewest graphs for that number of steps, largest first."""
    found = []
    for size in SIZES:
        found += [size] * (steps // size)
        steps %= size
    return found


class Runner:
    """Runs loops whose launches always have the same arguments.

    The first run launches one by one: it warms up what may not happen while a graph is recorded. Later runs replay
    graphs, each recorded when it is first needed by `record`, which returns its replay. Without `record`, or once it
    has failed, every run launches one by one.
    """

    def __init__(self, record: Callable[[Sequence[Launch]], Launch] | None) -> None:
        self._record = record
        self._replays: dict[int, Launch] = {}
        self._warm = False

    def run(self, steps: int, launches: Callable[[int], Sequence[Launch]]) -> None:
        """Run that many steps. `launches(count)` are those of the next `count`."""
        for size in split(steps):
            replay = self._replay(size, launches) if self._warm else None
            for launch in launches(size) if replay is None else [replay]:
                launch()
        self._warm = True

    def _replay(self, size: int, launches: Callable[[int], Sequence[Launch]]) -> Launch | None:
        if size not in self._replays and self._record is not None:
            try:
                self._replays[size] = self._record(launches(size))
            except RuntimeError as fault:
                self._record = None
                warnings.warn(
                    f"rnnorm launches the kernels of a step one by one, which is slower: recording a CUDA graph failed "
                    f"with {fault}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._replays.get(size)


class Cache(Generic[Held]):
    """The `bound` most recently used values by key."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._held: OrderedDict[Hashable, Held] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable, make: Callable[[], Held]) -> Held:
        with self._lock:
            held = self._held.pop(key) if key in self._held else make()
            self._held[key] = held
            while len(self._held) > self.bound:
                self._held.popitem(last=False)
            return held

    def clear(self) -> None:
        with self._lock:
            self._held.clear()

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._held.pop(key, None)

    def values(self) -> list[Held]:
        with self._lock:
            return [*self._held.values()]


class _Side:
    """Where graphs of one of the user's streams are recorded: a stream beside it, and a pool of memory.

    The only memory that a recording takes is the workspace that torch keeps for the products of a stream. Graphs of two
    of the user's streams must not share it, and it must stay with the graphs when torch drops it, as it does while
    torch.compile records: so their pool holds it. A first graph, of nothing that matters, stays in the pool: once the
    last one is gone torch records no other there.
    """

    def __init__(self, current: Any, taken: Sequence[int]) -> None:
        for _ in range(_STREAMS):  # of which torch hands out one after another, so this one may be in use
            self.stream = torch.cuda.Stream(current.device)
            if self.stream.cuda_stream not in (current.cuda_stream, *taken):
                break
        self._pool = torch.cuda.graph_pool_handle()
        number = torch.zeros(1, device=current.device)
        self._first = number, self.record(current, [number.zero_])

    def record(self, current: Any, launches: Sequence[Launch]) -> Any:
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # In another mode, calls of other threads could break the recording, or be broken by it.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph


_STREAMS = 32  # that torch has
_SIDES: Cache[_Side] = Cache(BOUND)
_RECORDING = threading.Lock()


def record(launches: Sequence[Launch]) -> Launch:
    """The replay of a CUDA graph of these launches, recorded on a stream beside the current one.

    A launch may have a method `warm`, for what this thread must not do first while a graph is recorded. One thread
    records at a time: others may have the same stream and pool.
    """
    for launch in launches:
        getattr(launch, "warm", lambda: None)()
    current = torch.cuda.current_stream()
    place = current.device, current.cuda_stream
    with _RECORDING:
        taken = [side.stream.cuda_stream for side in _SIDES.values()]
        try:
            return _SIDES.get(place, lambda: _Side(current, taken)).record(current, launches).replay
        except RuntimeError:
            _SIDES.drop(place)
            with suppress(RuntimeError):
                _Side(current, taken)  # torch before 2.13 draws no random numbers until another recording succeeds
            raise
