"""Reading with a clear fault; writing whole or not at all."""

from pathlib import Path

import pytest

from lm.errors import UserError
from lm.files import path, read_text, utf8, write_whole


def test_text_comes_back_as_it_was(tmp_path: Path):
    write_whole(tmp_path / "new" / "a.txt", "é\r\n\u2028\n".encode())
    assert read_text(tmp_path / "new" / "a.txt", "a text") == "é\r\n\u2028\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_whole(path, b"old")

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(UserError, match=r"a.txt must be writable; No space left on device; check the path"):
        write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_a_place_that_cannot_be_written_is_the_users_fault(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"):
        write_whole(tmp_path / "file" / "a.txt", b"")


def test_faults_name_the_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"the text must be a file; .*gone.txt, which does not exist; put it there"):
        read_text(tmp_path / "gone.txt", "the text")
    with pytest.raises(UserError, match=r"the text must be readable; .*: Is a directory"):
        read_text(tmp_path, "the text")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9 c")
    with pytest.raises(UserError, match=r"must be UTF-8 text; .*latin.txt with byte 0xe9 at byte offset 2; convert"):
        read_text(tmp_path / "latin.txt", "the text")


def test_a_path_is_text(tmp_path: Path):
    assert path(tmp_path) == path(f"{tmp_path}") == tmp_path
    for wrong in ("a\udcff", Path("a\udcff/run")):
        with pytest.raises(
            UserError, match=r"a path must be UTF-8 text; got 'a\\udcff.*', whose character 2 is not UTF-8"
        ):
            path(wrong)


def test_a_long_text_that_is_none_is_shown_around_the_fault():
    assert utf8("a\u2014", "a text") == b"a\xe2\x80\x94"
    with pytest.raises(UserError, match=r"a text must be UTF-8 text; got 'a{40}\\ud800b{19}', whose character 101 is"):
        utf8("a" * 100 + "\ud800" + "b" * 100, "a text")
