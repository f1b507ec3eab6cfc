"""One run by several real processes: the same result as one process, or on online normalization the same statistics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

from lm import checkpoint, config, distributed, run, trainer
from lm.distributed import ProcessError, Team
from lm.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model": {"hidden_size": 8, "norm": "none", "embedding_dropout": 0.0},
    "train": {
        **{"epochs": 2, "batch_size": 5, "window": "uniform{2..9}", "log_every": 1, "backend": "reference"},
        **{"lr": 0.5, "clip": 0.3, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
    },
}


@pytest.fixture
def corpus(tmp_path, lines):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed=count)))
    return folder


@pytest.fixture
def together(tmp_path, corpus):
    """`together(count, folder, "section.key=value", …)`: a run by so many processes; what each ended with."""
    numbers = iter(range(99))

    def make(count, folder, *assignments):
        place = tmp_path / f"processes{next(numbers)}"
        place.mkdir()
        tables = config.override({"data": {"source": str(corpus)}, **SETTINGS}, assignments)
        if count == 1:
            return [_train(str(tmp_path / folder), tables)]
        return processes.run(count, _train, place, str(tmp_path / folder), tables)

    return make


def _train(folder, tables, deferred=False):
    kept = []
    make = run.Trainer

    def trainer(*given, **named):
        kept.append(make(*given, **named))
        kept[-1].deferred = deferred
        return kept[-1]

    run.Trainer = trainer
    said = []
    try:
        outcome = run.train(config.build(tables), Path(folder), say=said.append)
    except (UserError, ProcessError, distributed.ElsewhereError) as fault:
        return {"fault": f"{type(fault).__name__}: {fault}"}
    finally:
        run.Trainer = make
    (own,) = kept
    return {
        "reason": outcome.reason,
        "said": said,
        "nll": None if outcome.score is None else outcome.score.nll,
        "model": {name: value.clone() for name, value in own.model.state_dict().items()},
        "averages": own.state_dict()["averages"],
        "seed": torch.initial_seed(),
        "columns": [list(cut) for cut, _ in own.parts],
    }


def _ended(folder):
    saved = checkpoint.load(folder / "checkpoints/last.safetensors")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row.get("loss", row.get("nll")) for row in rows]
    tensors = {
        "model": saved["model"],
        "averages": saved["averages"],
        "optimizer": saved["optimizer"]["state"],
        "carried": saved["carried"],
    }
    counts = {name: value for name, value in saved["trainer"].items() if isinstance(value, int)}
    return {**tensors, "losses": losses}, ([(row["kind"], row["step"]) for row in rows], counts)


def _assert_close(folder, other, rtol=2e-5):
    ours, theirs = _ended(folder), _ended(other)
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=rtol / 10)
    assert ours[1] == theirs[1]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_without_norm_several_processes_equal_one(together, tmp_path, count):
    together(1, "one")
    ranks = together(count, "several")
    _assert_close(tmp_path / "several", tmp_path / "one")
    assert [rank["reason"] for rank in ranks] == ["epochs"] * count
    cuts = [cut for rank in ranks for cut in rank["columns"]]
    assert cuts == ([[0, 2], [2, 5]] if count == 2 else [[0, 1], [1, 2], [2, 3], [3, 5]])
    assert [rank["nll"] is None for rank in ranks] == [False] + [True] * (count - 1)
    assert [bool(rank["said"]) for rank in ranks] == [True] + [False] * (count - 1)
    assert ranks[0]["said"][-1].endswith(f"a new run, {count} processes")


@pytest.mark.slow
def test_online_keeps_equal_statistics_and_resumes_to_the_bit(together, tmp_path):
    with_it = ("model.norm=online", "model.dropout=0.3", "model.num_layers=2", "train.optimizer=adam", "train.lr=0.01")
    ranks = together(2, "whole", *with_it)
    for name, value in ranks[0]["model"].items():
        assert torch.equal(value, ranks[1]["model"][name]), name
    assert ranks[0]["model"]["layers.norm_v_l1"].any()
    for steps in (3, 11):
        stopped = together(2, "stopped", *with_it, f"train.max_steps={steps}")
        assert [rank["reason"] for rank in stopped] == ["max_steps"] * 2
    together(2, "stopped", *with_it)
    _assert_close(tmp_path / "stopped", tmp_path / "whole", rtol=0)


def test_numbers_read_back_later_are_the_same_in_all_processes(tmp_path, corpus):
    tables = config.override({"data": {"source": str(corpus)}, **SETTINGS}, ["train.max_steps=7", "train.log_every=3"])
    for name, deferred in (("later", True), ("at once", False)):
        (tmp_path / f"processes {name}").mkdir()
        processes.run(2, _train, tmp_path / f"processes {name}", str(tmp_path / name), tables, deferred)
    _assert_close(tmp_path / "later", tmp_path / "at once", rtol=0)


@pytest.mark.gpu
@pytest.mark.slow
def test_several_gpus(tmp_path, corpus, cuda):
    """Under torchrun itself, by nccl."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices; torch finds {torch.cuda.device_count()}")
    settings = tmp_path / "mine.toml"
    settings.write_text(config.to_toml(config.build({"data": {"source": str(corpus)}, **SETTINGS})))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "lm", "train"]
    for folder, start in (("two", command), ("one", [sys.executable, "-m", "lm", "train"])):
        subprocess.run(
            [*start, f"--preset={settings}", f"--folder={folder}", "--device=cuda"], cwd=tmp_path, check=True
        )
    _assert_close(tmp_path / "two", tmp_path / "one", rtol=1e-3)


AVERAGING = ("train.optimizer=asgd", "train.momentum=0.0", "train.average_patience=none")


@pytest.mark.slow
def test_averages_and_their_statistics_are_equal_in_all_processes(together, tmp_path):
    with_it = (*AVERAGING, "model.norm=online", "model.alpha_fwd=0.9", "model.dropout=0.3", "model.num_layers=2")
    ranks = together(2, "whole", *with_it)
    first, second = (rank["averages"] for rank in ranks)
    assert first["steps"] == second["steps"] > 3
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    saved = checkpoint.load(tmp_path / "whole/checkpoints/last.safetensors")
    assert torch.equal(first["model"]["layers.norm_mean_l1"], saved["averages"]["model"]["layers.norm_mean_l1"])
    assert not torch.equal(first["model"]["layers.norm_mean_l1"], saved["model"]["layers.norm_mean_l1"])
    for steps in (3, 11):
        together(2, "stopped", *with_it, f"train.max_steps={steps}")
    together(2, "stopped", *with_it)
    _assert_close(tmp_path / "stopped", tmp_path / "whole", rtol=0)


@pytest.mark.slow
def test_averages_of_several_processes_equal_those_of_one_without_norm(together, tmp_path):
    (one,), two = together(1, "one", *AVERAGING), together(2, "two", *AVERAGING)
    for rank in two:
        torch.testing.assert_close(rank["averages"], one["averages"], rtol=2e-5, atol=2e-6)
    _assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_resumes_on_fewer_processes(together, tmp_path):
    together(1, "one")
    for count, steps in ((4, 3), (2, 8), (3, 12), (1, None)):
        ranks = together(count, "fewer", *([f"train.max_steps={steps}"] if steps else []))
        assert len(ranks) == count
    _assert_close(tmp_path / "fewer", tmp_path / "one")


@pytest.mark.slow
def test_accumulation_within_processes(together, tmp_path):
    together(1, "one")
    ranks = together(2, "parts", "train.accumulate=2")
    assert [rank["columns"] for rank in ranks] == [[[0, 1], [1, 2]], [[2, 3], [3, 5]]]
    _assert_close(tmp_path / "parts", tmp_path / "one")


def test_each_process_drops_its_own(together):
    ranks = together(2, "run", "train.max_steps=3")
    assert [rank["seed"] for rank in ranks] == [trainer._derive(1, 2, rank) for rank in (0, 1)]
    assert ranks[0]["seed"] != ranks[1]["seed"]


def test_only_the_first_process_reports_an_error(together, tmp_path):
    ranks = together(4, "run", "train.batch_size=3")
    assert ranks[0]["fault"].startswith("UserError: train.batch_size must have a column for each of")
    assert [rank["fault"] for rank in ranks[1:]] == ["ElsewhereError: "] * 3
    assert not (tmp_path / "run").exists()


def test_settings_are_the_first_processes(tmp_path, corpus):
    tables = config.override({"data": {"source": str(corpus)}, **SETTINGS}, ["train.max_steps=2"])
    ranks = processes.run(2, _others_settings, tmp_path, str(tmp_path / "run"), tables)
    assert [rank["model"]["decoder.bias"].shape for rank in ranks] == [ranks[0]["model"]["decoder.bias"].shape] * 2
    assert ranks[1]["reason"] == "max_steps"


def _others_settings(folder, tables):
    """The second process finds no run folder, as on another machine, and so has other settings."""
    return _train(folder, tables if dist.get_rank() == 0 else {"data": {"source": "nowhere"}})


def _stopped_by_one():
    """Only the second process is asked to stop."""
    team = Team(dist.get_rank(), 3, dist.group.WORLD)
    return [
        team.agree("SIGTERM" if team.rank == 1 else None),
        team.agree(None),
        team.sum(torch.tensor(1.5)).item(),
        team.share(7),
    ]


def test_processes_agree(tmp_path):
    found = processes.run(3, _stopped_by_one, tmp_path)
    assert found == [["SIGTERM", None, 4.5, share] for share in ((0, 2), (2, 4), (4, 7))]


def _joined():
    team = Team(dist.get_rank(), 4, dist.group.WORLD)
    whole = torch.arange(24.0).view(2, 3, 4) if dist.get_rank() else torch.arange(24.0).view(2, 3, 4).clone()
    start, stop = team.share(3)  # one of the four has none
    return team.join(whole[:, start:stop], 1, 3)


def test_shares_are_put_together(tmp_path):
    for found in processes.run(4, _joined, tmp_path):
        assert torch.equal(found, torch.arange(24.0).view(2, 3, 4))


def _fails_alone():
    told = []
    for fault in (
        UserError("a GPU must be there"),
        RuntimeError("[gloo/pair.cc:1] Connection closed. Typically"),
        None,
    ):
        try:
            with distributed.joined() as team:
                if fault is not None and team.rank == 1:
                    raise fault
        except ProcessError as raised:
            told.append(str(raised))
    return told


def test_a_process_reports_its_own_error(tmp_path):
    first, second = processes.run(2, _fails_alone, tmp_path)
    assert first == []
    assert second[0] == "process 2 of 2: a GPU must be there"
    assert second[1].startswith(
        "the 2 processes of a run must all live; process 2 has lost another (Connection closed)"
    )


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Team().place("cuda:1") == "cuda:1"
    assert Team(1, 2).place("cpu") == "cpu"
    assert Team(1, 2).place("cuda") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Team(3, 4).place("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="got cuda and 2 GPUs for process 3 of this machine"):
        Team(2, 4).place("cuda")
    with pytest.raises(UserError, match=r"must have train\.device=cuda and a GPU each; got cuda:1"):
        Team(0, 2).place("cuda:1")


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5"])
def test_a_number_of_processes_that_is_none(monkeypatch, value):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, value)
        message = f"{name} must be a number that torchrun has set; got '{value}'; unset it, or start torchrun"
        with pytest.raises(UserError, match=message), distributed.joined():
            Team(1, 2).place("cuda")
        monkeypatch.delenv(name)


def test_without_the_others_there_is_no_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert not distributed.is_first()
    with (
        pytest.raises(UserError, match=r"must find each other; got an error \(.*; start them with torchrun"),
        distributed.joined(),
    ):
        pass


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_resumes(tmp_path, corpus, together):
    """Under torchrun itself."""
    settings = tmp_path / "mine.toml"
    tables = config.override({"data": {"source": str(corpus)}, **SETTINGS}, ["model.norm=online", "train.epochs=9999"])
    settings.write_text(config.to_toml(config.build(tables)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "lm", "train"]
    process = subprocess.Popen(
        [*command, f"--preset={settings}", "--folder=run"],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path},
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    ranks: dict[str, int] = {}
    with process:
        try:
            _wait_for(tmp_path / "run/checkpoints/best.safetensors")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks |= {_environment(child)["RANK"]: int(child) for child in children}
            os.kill(ranks["1"], signal.SIGKILL)
            began = time.monotonic()
            _, told = process.communicate(timeout=60)
        finally:
            process.terminate()  # not killed: it ends its workers first
    assert process.returncode
    assert time.monotonic() - began < 60
    assert "error: the 2 processes of a run must all live; process 1 has lost another" in told
    step = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")["trainer"]["step"]
    (one,) = together(1, "run", "model.norm=online", f"train.max_steps={step + 2}", "train.epochs=9999")
    assert one["reason"] == "max_steps"
    assert one["said"][-1].endswith(f"resuming after step {step}")


def _wait_for(path):
    end = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


def _environment(process):
    text = Path(f"/proc/{process}/environ").read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
