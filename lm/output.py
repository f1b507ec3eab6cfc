"""The standard streams of a command: what cannot be shown there must cost nothing else."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from typing import TextIO, cast


class Lenient:
    """A text stream for whoever watches: once it cannot be written, as when its reader has gone, it is silent.

    Arguments:
        stream: where to; None, which a closed standard stream is: silent from the start.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding, self.errors = getattr(stream, "encoding", None), getattr(stream, "errors", None)

    def write(self, text: str) -> int:
        """Writes text, or leaves it."""
        with self._leaving() as stream:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is held back, or leaves it."""
        with self._leaving() as stream:
            stream.flush()

    def isatty(self) -> bool:
        """Returns whether a person watches."""
        with self._leaving() as stream:
            return stream.isatty()
        return False

    def fileno(self) -> int:
        """Returns the stream's descriptor."""
        return (self._stream or io.StringIO()).fileno()

    @contextmanager
    def _leaving(self) -> Iterator[TextIO]:
        try:
            yield self._stream or io.StringIO()
        except (OSError, ValueError):  # ValueError: it was closed
            broken, self._stream = self._stream, None
            # what its buffer holds would fail once more when the program ends, and change the exit code
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), cast(TextIO, broken).fileno())


@contextmanager
def standard_streams() -> Iterator[None]:
    """Inside, those that are closed are there and empty, the output shows what its encoding lacks as Python writes it,
    and the error stream is lenient."""
    with ExitStack() as stack:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                stack.callback(setattr, sys, name, None)
                setattr(sys, name, stack.enter_context(open(os.devnull, mode)))
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            stack.callback(sys.stdout.reconfigure, errors="strict")
            sys.stdout.reconfigure(errors="backslashreplace")
        stack.enter_context(redirect_stderr(cast(TextIO, Lenient(sys.stderr))))
        yield
