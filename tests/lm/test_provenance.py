"""What versions are named, and whose commit."""

import subprocess
from pathlib import Path

import pytest

from lm import provenance


def _git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_that_of_the_repository_that_holds_the_file(tmp_path: Path) -> None:
    """Not that of a user's own, whose environment lies inside it and is not part of it."""
    (source := tmp_path / "lib.py").write_text("")
    assert provenance._commit(source) == "none"
    _git(tmp_path, "init", "-q")
    (tmp_path / "theirs.py").write_text("")
    _git(tmp_path, "add", "theirs.py")
    _git(tmp_path, "commit", "-qm", "theirs")
    assert provenance._commit(source) == "none"
    _git(tmp_path, "add", "lib.py")
    _git(tmp_path, "commit", "-qm", "ours")
    head = _git(tmp_path, "rev-parse", "HEAD").strip()
    assert provenance._commit(source) == head[:12]
    source.write_text("changed")
    assert provenance._commit(source) == f"{head[:12]}-dirty"


def test_a_result_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.versions()["commit"] == "none"
