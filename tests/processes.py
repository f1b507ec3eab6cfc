"""Real processes that communicate through a process group, as under torchrun, but start faster."""

import importlib.util
import inspect
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_DEADLINE = 120.0
# Imports once, what DistributedDataParallel imports too, in a process that has no threads, and then forks.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.tensorboard", "rnnorm", "lm.run"])


def run(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Returns what `function(*arguments)` of a test's module returns on each of `count` processes of one group.

    `folder` is empty and used by the processes only; results are tensors and plain values.
    """
    where = (inspect.getfile(function), function.__name__)
    started = [_CONTEXT.Process(target=_work, args=(rank, count, folder, where, arguments)) for rank in range(count)]
    for process in started:
        process.start()
    end = time.monotonic() + _DEADLINE
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    if codes != [0] * count:
        told = [path.read_text() for path in sorted(folder.glob("error*"))]
        raise AssertionError(f"processes ended with {codes}\n" + "\n".join(told))
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(count)]


def _work(rank: int, count: int, folder: Path, where: tuple[str, str], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    file, name = where
    spec = importlib.util.spec_from_file_location("worker", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(getattr(module, name)(*arguments), folder / f"result{rank}")
    except BaseException:
        import traceback

        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
