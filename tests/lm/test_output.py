"""Standard streams that are closed, full, broken, or of another encoding."""

import errno
import io
import os
import sys

import pytest

from lm.output import Lenient, standard_streams


class Broken(io.StringIO):
    """A terminal that goes away after `left` writes."""

    encoding = "utf-8"

    def __init__(self, number=errno.EIO, left=1):
        super().__init__()
        self.number, self.left = number, left

    def isatty(self):
        return True

    def write(self, text):
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_stream_that_breaks_is_silent_from_then_on(number):
    broken = Broken(number)
    stream = Lenient(broken)
    assert (stream.write("one"), stream.isatty(), stream.encoding) == (3, True, "utf-8")
    assert (stream.write("two"), stream.isatty()) == (3, False)
    broken.left = 1
    print("three", file=stream, flush=True)
    assert broken.getvalue() == "one"


def test_a_stream_that_is_closed_or_not_there_is_silent():
    closed = io.StringIO()
    closed.close()
    for stream in (Lenient(closed), Lenient(None)):
        assert not stream.isatty()
        print("one", file=stream, flush=True)
        with pytest.raises(io.UnsupportedOperation):
            stream.fileno()


def test_what_the_buffer_holds_does_not_fail_once_more():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        print("one", file=Lenient(file), flush=True)
        file.flush()  # as Python does when it ends


def test_closed_standard_streams_are_empty(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with standard_streams():
        assert sys.stdin.buffer.read() == b""
        print("one", flush=True)
        print("two", file=sys.stderr, flush=True)
    assert (sys.stdin, sys.stdout, sys.stderr) == (None, None, None)


def test_what_an_encoding_lacks_is_shown_as_python_writes_it(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "latin-1"))
    with standard_streams():
        print("\u00e4 \u2014 \udcff", flush=True)
    assert content.getvalue() == b"\xe4 \\u2014 \\udcff\n"
    assert sys.stdout.errors == "strict"
