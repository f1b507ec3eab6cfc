"""Runs command lines of `lm` in separate processes that start fast: this one has imported the program, and forks.

Input is one JSON object per line: `arguments`, `log` (a path for what it prints), and perhaps `file_limit` (the most
bytes of a file). Output is two lines: the process id and, when it has ended, its exit code (-9: killed).
"""

import json
import os
import resource
import sys

import torch
import torch._dynamo  # the first optimizer would load it, which takes longer than a whole small run
from tensorboard.compat.proto import event_pb2  # noqa: F401
from torch.utils.tensorboard import summary  # noqa: F401

import rnnorm
from lm.cli import main


def child(arguments: list[str], log: str, file_limit: int | None = None) -> int:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


torch.set_num_threads(1)
rnnorm.LSTM(1, 1)(torch.zeros(1, 1, 1))  # loads the operators
for line in sys.stdin:
    number = os.fork()
    if number == 0:
        try:
            os._exit(child(**json.loads(line)))
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    print(number, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
