import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.errors import UserError
from lm.lock import NAME, Lock

ROOT = Path(__file__).parents[2]
_HOLDER = "import sys, time; from pathlib import Path; from lm.lock import Lock\n"
_HOLDER += "with Lock() as lock: lock.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"


def test_the_second_is_refused_and_names_the_first(tmp_path):
    folder = tmp_path / "run"
    with Lock() as first:
        first.take(folder)
        assert first.holds(folder)
        with Lock() as second, pytest.raises(UserError) as fault:
            second.take(folder)
        assert re.fullmatch(
            rf"a run folder must be used by one process at a time; got .*run, in use by process {os.getpid()} on \S+ "
            r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until that ends, stop it, or choose another folder with --run",
            str(fault.value),
        )
        assert not second.holds(folder)
    assert (folder / NAME).read_bytes() == b""
    with Lock() as third:
        third.take(folder)


def test_a_lock_stays_with_a_folder_that_is_renamed(tmp_path):
    with Lock() as lock:
        lock.take(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "old")
        assert not lock.holds(tmp_path / "run")
        assert lock.holds(tmp_path / "old")
        lock.take(tmp_path / "run")
        assert lock.holds(tmp_path / "run")


def test_a_killed_process_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with holder:
        assert holder.stdout.readline() == "taken\n"
        with Lock() as lock, pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
            lock.take(tmp_path)
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / NAME).read_text().startswith("process")
    with Lock() as lock:
        lock.take(tmp_path)


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Lock() as lock,
        pytest.raises(UserError, match=r"file must be a folder that can be written; .*; check the path"),
    ):
        lock.take(tmp_path / "file")


def test_a_full_disk_takes_no_text_and_locks_all_the_same(tmp_path):
    program = _HOLDER.replace("time.sleep(60)", "None").replace(
        "with Lock",
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nwith Lock",
        1,
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
