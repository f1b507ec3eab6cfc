"""`python -m lm` and `rnnlm`: the command line, or what to install for it."""

import sys

from lm.errors import missing_package


def main() -> int:
    """Runs one command; returns the exit code."""
    try:
        from lm.cli import main as command_line

        return command_line()
    except ModuleNotFoundError as fault:
        print(f"error: {missing_package(fault)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
