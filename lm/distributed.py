"""The processes of one run: which columns each has, and what they send each other.

The first process reads and writes every file; the others need the program and nothing else.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rnnorm
from lm.errors import UserError
from lm.stream import parts

Made = TypeVar("Made")

# How long a process may keep the others waiting: while the first prepares the text, and between two steps.
_PREPARING = timedelta(minutes=30)
_STEPPING = timedelta(seconds=50)
_OF_A_GROUP = ("gloo", "nccl", "processgroup", "process group", "connection", "socket", "store", "timed out")


class ProcessError(Exception):
    """One process of several failed, or lost the others."""


class ElsewhereError(Exception):
    """Another process of the run failed, and reports why."""


def is_first() -> bool:
    """True in the process that reports for its run: the only one, or the first of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class Team:
    """K processes that train one model together, each on its own share of the columns; without arguments, one alone.

    Arguments:
        rank: 0 … K - 1; 0 is the first.
        size: K.
        group: their process group.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: "dist.ProcessGroup | None" = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @property
    def first(self) -> bool:
        """True in the process that reads, writes and reports."""
        return self.rank == 0

    def share(self, width: int) -> tuple[int, int]:
        """Returns the columns of this process among `width`: first, and one past the last."""
        return parts(width, self.size)[self.rank]

    def place(self, device: str) -> str:
        """Returns the device of this process: with `cuda`, the GPU of its number on its machine.

        Raises:
            UserError: a numbered device, or fewer GPUs than processes.
        """
        if self.size == 1 or not device.startswith("cuda"):
            return device
        number, found = _number("LOCAL_RANK", self.rank), torch.cuda.device_count()
        if device != "cuda" or number >= found:
            raise UserError(
                f"processes on GPUs must have train.device=cuda and a GPU each; got {device} and {found} GPUs for "
                f"process {number + 1} of this machine; set it, start fewer processes, or set train.device=cpu"
            )
        return f"cuda:{number}"

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Returns the module with gradients averaged over the processes; statistics: `average_statistics`."""
        if self.size == 1:
            return module
        # before torch 2.13 under its old name
        known = inspect.signature(DistributedDataParallel).parameters
        name = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
        return DistributedDataParallel(module, process_group=self.group, **{name: False})  # type: ignore[arg-type]

    def apart(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients of what `data_parallel` returned are not averaged over the processes yet."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def average_statistics(self, module: nn.Module) -> None:
        """Averages the running statistics and control states of online normalization over the processes."""
        if self.size > 1:
            rnnorm.distributed.average_running_stats(module, self.group)

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes, on its device."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def agree(self, word: str | None) -> str | None:
        """Returns the word of the first process that has one, on all of them."""
        if self.size == 1 or not self.sum(torch.tensor(int(word is not None))):
            return word
        words: list[str | None] = [None] * self.size
        dist.all_gather_object(words, word, group=self.group)
        return next((said for said in words if said is not None), None)

    def join(self, tensor: Tensor, dim: int, width: int) -> Tensor:
        """Returns the processes' shares of `width` columns along `dim`, put together, on all of them."""
        if self.size == 1:
            return tensor
        widths = [stop - start for start, stop in parts(width, self.size)]
        padded = tensor.new_zeros(*tensor.shape[:dim], max(widths), *tensor.shape[dim + 1 :])
        padded.narrow(dim, 0, tensor.size(dim)).copy_(tensor)
        shares = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(shares, padded, group=self.group)
        return torch.cat([share.narrow(dim, 0, own) for share, own in zip(shares, widths, strict=True)], dim)

    def of_first(self, make: Callable[[], Made]) -> Made:
        """Returns on all processes what `make` returns on the first, the only one to call it.

        Raises:
            ElsewhereError: on the others, where `make` raises on the first.
        """
        if self.size == 1:
            return make()
        if not self.first:
            made_there: list[Any] = [None]
            dist.broadcast_object_list(made_there, src=0)
            if made_there[0] is None:
                raise ElsewhereError
            return made_there[0][0]
        try:
            made = make()
        except BaseException:
            dist.broadcast_object_list([None], src=0)
            raise
        dist.broadcast_object_list([(made,)], src=0)
        return made


@contextmanager
def joined() -> Iterator[Team]:
    """Inside: the team that torchrun started this process in, or this process alone.

    Processes use gloo for tensors on the CPU, and nccl for tensors on GPUs.

    Raises:
        UserError: the other processes cannot be found; WORLD_SIZE is not a number.
        ProcessError: another process of the run was lost, or this one alone failed.
    """
    own = not dist.is_initialized()
    size = _number("WORLD_SIZE", 1) if own else dist.get_world_size()
    if size == 1:
        yield Team()
        return
    if own:
        _meet()
    team = Team(dist.get_rank(), size, dist.new_group(timeout=_STEPPING))
    try:
        yield team
    except UserError as fault:
        if team.first:
            raise
        raise ProcessError(f"process {team.rank + 1} of {size}: {fault}") from None
    except RuntimeError as fault:
        if not any(word in str(fault).lower() for word in _OF_A_GROUP):
            raise
        raise ProcessError(
            f"the {size} processes of a run must all live; process {team.rank + 1} has lost another "
            f"({_line(fault)}); nothing saved is lost: resume with the same command, on as many processes or fewer"
        ) from None
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def _number(name: str, usual: int) -> int:
    """A number that torchrun has put into the environment."""
    value = os.environ.get(name, str(usual))
    if not value.isdecimal():
        raise UserError(f"{name} must be a number that torchrun has set; got {value!r}; unset it, or start torchrun")
    return int(value)


def _meet() -> None:
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PREPARING)
    except (ValueError, RuntimeError) as fault:
        raise UserError(
            f"the processes of a run must find each other; got an error ({_line(fault)}); start them with torchrun"
        ) from None


def _line(fault: Exception) -> str:
    """The fault's first sentence, without the place in torch's sources."""
    return re.sub(r"^\[\S+\] ", "", str(fault).strip().splitlines()[0]).split(". ")[0][:160]
