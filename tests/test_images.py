"""`scripts/images.py` at a tiny size."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_PATH = Path(__file__).parents[1] / "scripts/images.py"


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with few and small images."""
    spec = importlib.util.spec_from_file_location("images", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TRAIN", 8)
    monkeypatch.setattr(module, "VALID", 4)
    small = module.TASKS["segment"]._replace(data={"shapes": lambda seed: module.shapes(seed, 16, 20)}, epochs=1)
    monkeypatch.setitem(module.TASKS, "segment", small)
    return module


def test_the_table_of_every_arm(images: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new/segment.json"
    images.main(["--task", "segment", "--seeds", "2", "--lr", "0.01", "0.1", "--json", str(file)])
    told = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert [(row["norm"], row["batch_size"]) for row in record["table"]] == [
        (norm, size) for norm in ("batch", "online", "group", "none") for size in (1, 4, 32)
    ]
    assert told.count("\n| ") == 12
    assert len(record["runs"]) == 12 * 2
    assert len(record["tuning"]) >= 12 * 2 * 2
    for row in record["table"]:
        arm = [run for run in record["tuning"] if (run["norm"], run["batch_size"]) == (row["norm"], row["batch_size"])]
        scores: dict[float, float] = {}
        for run in arm:
            scores[run["lr"]] = scores.get(run["lr"], 0.0) + run["valid"]
        assert {0.01, 0.1} <= scores.keys()
        assert scores[row["lr"]] == max(scores.values())
    assert record["claim"] in told
    assert record["claim"].startswith("online at batch size 1: median 0.")


def test_a_table_goes_on_where_it_was(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, options = tmp_path / "segment.json", ["--task", "segment", "--seeds", "1", "--lr", "0.1", "--norm"]
    images.main([*options, "batch", "online", "--json", str(tmp_path / "whole.json")])
    images.main([*options, "online", "--batch-size", "4", "--json", str(file)])
    trained, train = [], images.train
    monkeypatch.setattr(images, "train", lambda *given: (trained.append(given[2:4]), train(*given))[1])
    images.main([*options, "batch", "online", "--json", str(file)])
    assert trained == [("batch", 1), ("batch", 4), ("batch", 32), ("online", 1), ("online", 32)]
    whole, gone_on = (json.loads((tmp_path / name).read_text())["table"] for name in ("whole.json", "segment.json"))
    assert gone_on == whole
    with pytest.raises(SystemExit, match=r"segment\.json, whose seeds is 1, not 2; name another"):
        images.main([*options, "batch", "--seeds", "2", "--json", str(file)])
    file.write_text("[]")
    with pytest.raises(SystemExit, match="must name a new file or a table of this script; got "):
        images.main([*options, "batch", "--json", str(file)])


def test_one_seed_one_run_and_norms_differ(images: Any) -> None:
    task = images.TASKS["segment"]
    data = task.data["shapes"](1)
    ticks: list[int] = []
    runs = [
        images.train(task, data, norm, 2, 0.1, seed, 2, None, ticks.append)._replace(seconds=0.0)
        for norm, seed in (("online", 1), ("online", 1), ("online", 2), ("batch", 1), ("none", 1))
    ]
    assert runs[0] == runs[1]
    assert len({run.loss for run in runs}) == 4
    assert sum(ticks) == 10


def test_a_run_that_diverges_scores_nothing(images: Any) -> None:
    task = images.TASKS["segment"]
    ticks: list[int] = []
    run = images.train(task, task.data["shapes"](1), "none", 2, 1e9, 1, 5, None, ticks.append)
    assert (run.diverged, run.loss, run.valid, run.test, sum(ticks)) == (True, None, 0.0, 0.0, 5)


def test_shapes_and_their_masks(images: Any) -> None:
    whole = images.shapes(3, 32, 60)
    kinds = [torch.cat([part.targets for part in whole[:3]]) == kind for kind in range(4)]
    assert all(kind.any() for kind in kinds)
    assert [len(part.targets) for part in whole[:3]] == [8, 4, 48]
    pixels = torch.cat([part.inputs for part in whole[:3]])[:, 0].abs()
    assert pixels[~kinds[0]].mean() > 2 * pixels[kinds[0]].mean()
    assert torch.equal(whole.test.inputs, images.shapes(3, 32, 60).test.inputs)
    assert not torch.equal(whole.test.inputs, images.shapes(4, 32, 60).test.inputs)


def test_scores(images: Any) -> None:
    targets = torch.tensor([[[0, 0], [1, 1]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).movedim(-1, 1)
    # class 0: 1 of 2; class 1: 2 of 3; class 2: in neither
    assert images.intersection_over_union(logits, targets, 3) == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert images.accuracy(torch.eye(3), torch.tensor([0, 1, 1]), 3) == pytest.approx(2 / 3)
    assert images.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("best", "rates", "tried"),
    [
        (0.01, [0.003, 0.01, 0.03], []),
        (1.0, [0.003, 0.01, 0.03], [0.1, 0.3, 1.0, 3.0]),
        (1e-9, [0.003, 0.01, 0.03], [0.001, 0.0003, 0.0001, 3e-05]),  # no further
        (0.001, [0.02, 0.01], [0.005, 0.0025, 0.00125, 0.000625]),
        (5.0, [0.1], None),
    ],
)
def test_the_grid_grows_where_the_best_rate_is_its_end(
    images: Any, best: float, rates: list[float], tried: list[float] | None
) -> None:
    asked: list[float] = []

    def score(lr: float) -> float:
        asked.append(lr)
        return -abs(math.log(lr / best))

    found = images.tuned(sorted(rates), score)
    assert asked == ([] if tried is None else [*sorted(rates), *tried])
    assert found == max(asked or rates, key=lambda lr: -abs(math.log(lr / best)))


@pytest.mark.parametrize("norm", ["batch", "online", "group", "none"])
def test_the_residual_network_trains_on_digits(images: Any, norm: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[images]'")
    images.main(
        [
            *("--task", "classify", "--norm", norm, "--batch-size", "4", "--seeds", "1", "--lr", "0.01"),
            *("--epochs", "1", "--tensorboard", str(tmp_path / "board"), "--json", str(tmp_path / "it.json")),
        ]
    )
    record = json.loads((tmp_path / "it.json").read_text())
    assert record["data"] == "digits"
    assert record["tuning"] == []
    assert list((tmp_path / "board").glob(f"classify-{norm}-4-0.01-1/events*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "segment", "--data", "digits"], "--data of segment must be one of shapes; got digits"),
        (["--task", "segment", "--batch-size", "0"], "must be greater than 0"),
        (["--task", "segment", "--norm", "layer"], "invalid choice: 'layer'"),
    ],
)
def test_wrong_arguments(images: Any, given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(given)
    assert message in capsys.readouterr().err
    assert "images" not in sys.modules


def test_a_missing_package_is_named_before_anything_runs(
    images: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(images.PACKAGES, "digits", ("no_such_module", "scikit-learn"))
    with pytest.raises(SystemExit):
        images.main(["--task", "classify"])
    assert "need the package scikit-learn, which is not installed; pip install '.[images]'" in capsys.readouterr().err
