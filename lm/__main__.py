"""`python -m lm` and `rnnlm`: the command line, or what to install for it."""

import os
import signal
import sys

from lm.errors import missing_package


def main() -> int:
    """Runs one command; returns the exit code."""
    stops = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where Ctrl-C is ignored
    if stops:  # at once: there is nothing to save yet, and what is imported makes anything of an exception
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        from lm.cli import main as command_line

        if stops:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command_line()
    except ModuleNotFoundError as fault:
        print(f"error: {missing_package(fault)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
