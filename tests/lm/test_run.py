import json
import re
import shlex
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

from lm import checkpoint, config, provenance, run, stream, tokenizers
from lm.errors import UserError
from lm.evaluator import evaluate
from lm.events import Stepped
from lm.lock import Lock
from lm.machine import require_backend, resolve_device
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from lm.trained import load
from lm.trainer import DivergedError


@pytest.fixture
def corpus(tmp_path, lines):
    """A folder of three small splits."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed=count)))
    return folder


@pytest.fixture
def settings(corpus):
    """`settings("section.key=value", …)`: small and quick."""

    def make(*assignments):
        tables = {
            "data": {"source": str(corpus)},
            "model": {"hidden_size": 8, "dropout": 0.2},
            "train": {
                "epochs": 2,
                "batch_size": 3,
                "window": "uniform{2..9}",
                "lr": 0.5,
                "log_every": 1,
                "clip": 1.0,
                "optimizer": "sgd",
            },
        }
        return config.build(config.override(tables, assignments))

    return make


@pytest.fixture
def train(settings, tmp_path):
    """`train("section.key=value", …, folder="run", …)`: runs in a folder; returns the outcome."""

    def make(*assignments, folder="run", **options):
        return run.train(settings(*assignments), tmp_path / folder, **{"say": lambda _: None, **options})

    return make


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_end(ours, theirs):
    for name in ("last", "best"):
        left, right = (checkpoint.load(f / "checkpoints" / f"{name}.safetensors") for f in (ours, theirs))
        assert left.keys() == right.keys()
        for key in left.keys() - {"config"}:
            assert_equal(left[key], right[key], f"{name}.{key}")
    assert measured(ours) == measured(theirs)


def assert_equal(left, right, name):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_equal(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{name}.{number}")
    else:
        assert left == right, name


def measured(folder):
    """Every logged value but the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_a_run_folder_holds_all_of_a_run(train, settings, tmp_path):
    outcome = train()
    folder = tmp_path / "run"
    assert outcome.reason == "epochs"
    assert outcome.score.protocol == "exact"
    assert {path.name for path in folder.iterdir()} == {
        *("config.toml", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints", ".lock")
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "last.safetensors",
        "previous.safetensors",
        "best.safetensors",
    }
    written = settings(f"train.device={resolve_device('auto')}")
    assert config.build(config.read_toml(folder / "config.toml", "")) == written
    kinds = [row["kind"] for row in measured(folder)]
    assert kinds.count("valid") == kinds.count("epoch") == 2
    assert kinds[-1] == "final"
    trained = load(folder)
    assert trained.tokenizer.sha256 == tokenizers.load(folder / "tokenizer.json").sha256
    assert trained.score_split("valid", protocol="exact").ppl == outcome.score.ppl


def test_an_epoch_is_saved_before_it_is_shown(train, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(run.ProgressBar, "_write", fail)
    with pytest.raises(RuntimeError):
        train()
    last = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")
    assert last["trainer"]["epoch"] == 1
    assert measured(tmp_path / "run")[-1]["kind"] == "epoch"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_load_with_safetensors_alone(train, tmp_path, tied):
    train("train.max_steps=3", f"model.tied={tied}".lower(), "train.optimizer=adam", "train.lr=0.01")
    trained = load(tmp_path / "run")
    model = LanguageModel(trained.config.model, trained.tokenizer.size)
    load_model(model, tmp_path / "run/checkpoints/best.safetensors")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.decoder.weight is model.embedding.weight) == tied
    best, last = (load_file(tmp_path / f"run/checkpoints/{name}.safetensors") for name in ("best", "last"))
    assert best.keys() == {name for name in last if not name.startswith("training.")} < last.keys()


def test_a_run_of_layers_of_their_own_sizes_is_logged_and_loaded(train, tmp_path):
    shape = ("model.num_layers=2", "model.layer_sizes=[7, 5]", "model.locked_dropout=true", "model.decoder=mixture")
    outcome = train(*shape, "model.norm=layer", "train.epochs=1")
    assert load(tmp_path / "run").score_split("valid").nll == pytest.approx(outcome.score.nll)
    assert train(*shape, "model.norm=layer", "train.epochs=2").step == 2 * outcome.step


@pytest.mark.parametrize("optimizer", ["sgd", "asgd", "adam"])
def test_stopped_anywhere_and_resumed_ends_with_the_same_bits(train, tmp_path, optimizer, monkeypatch):
    with_it = (f"train.optimizer={optimizer}", "train.lr=0.05", "train.schedule=plateau", "checkpoint.every_steps=4")
    with_it += ("train.average_patience=none", "model.alpha_fwd=0.9")  # for asgd: averages from the first step
    whole = train(*with_it, folder="whole")
    stops = iter((2, 5, 5, whole.step - 1))
    fit = run.Trainer.fit

    def stopping(self):
        at = next(stops, None)
        if at is not None:
            self.listeners.insert(0, lambda event: self.stop("SIGTERM") if event.step == at else None)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", stopping)
    reasons = [train(*with_it, folder="stopped").reason for _ in range(5)]
    assert reasons == ["SIGTERM"] * 4 + ["epochs"]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_crash_after_unsaved_steps_is_made_good(train, tmp_path, monkeypatch):
    train("checkpoint.every_steps=3", folder="whole")
    fit = run.Trainer.fit

    def crashing(self):
        def crash(event):
            if event.step == 5:
                raise MemoryError

        self.listeners.append(crash)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", crashing)
    with pytest.raises(MemoryError):
        train("checkpoint.every_steps=3", folder="crashed")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "crashed/checkpoints/last.safetensors")["trainer"]["step"] == 3
    train("checkpoint.every_steps=3", folder="crashed")
    assert_same_end(tmp_path / "crashed", tmp_path / "whole")


def test_more_epochs_continue_a_finished_run(train, tmp_path):
    train("train.epochs=3", folder="whole")
    train()
    train("train.epochs=3")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_max_steps_stops_and_more_steps_resume(train, tmp_path):
    train(folder="whole")
    first = train("train.max_steps=3")
    assert (first.reason, first.step) == ("max_steps", 3)
    assert first.score is not None
    train()
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("asked", "before", "there", "device"),
    [
        *(("auto", None, True, "cuda"), ("auto", None, False, "cpu"), ("auto", "cuda:1", True, "cuda:1")),
        *(("auto", "cuda:1", False, "cpu"), ("auto", "cpu", True, "cpu"), ("cpu", "cuda", True, "cpu")),
        *(("cuda:1", "cuda", True, "cuda:1"), ("cuda", "cpu", False, "cuda")),
    ],
)
def test_auto_is_the_device_of_the_run_or_of_the_machine(monkeypatch, asked, before, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resolve_device(asked, before) == device


def test_a_backend_must_run_on_the_device_of_the_run(monkeypatch):
    """And no other device is asked about: for the CPU that may start a compiler."""
    asked = []
    monkeypatch.setattr("rnnorm.backends", lambda device: asked.append(device) or {"triton": None, "cpu": "no CPU"})
    gpu = torch.device("cuda:1")
    require_backend("triton", gpu)
    with pytest.raises(UserError, match="a backend must be able to run here; got cpu: no CPU"):
        require_backend("cpu", gpu)
    assert asked == [gpu, gpu]


def test_a_run_keeps_its_device_and_says_when_it_moves(train, tmp_path, monkeypatch):
    """The GPU is the CPU here, under another name."""
    monkeypatch.setattr(run, "require_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: name)

    def resumed(there, steps, *assignments):
        said = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        train(f"train.max_steps={steps}", *assignments, say=said.append)
        saved = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")["config"]["train"]["device"]
        assert config.build(config.read_toml(tmp_path / "run/config.toml", "")).train.device == saved
        return saved, [line for line in said if "bits will differ" in line]

    assert resumed(True, 1) == ("cuda", [])
    assert resumed(True, 2) == ("cuda", [])
    assert resumed(True, 3, "train.device=cuda:0") == ("cuda:0", [])
    moved = "the run was on cuda:0 and is now on cpu: its bits will differ from a run on cuda:0 alone"
    assert resumed(False, 4) == ("cpu", [moved])
    assert resumed(True, 5) == ("cpu", [])


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_on_the_cpu_and_is_evaluated_on_both(train, tmp_path, cuda):
    adam = ("train.optimizer=adam", "train.lr=0.01")
    train("train.device=cuda", "train.max_steps=3", *adam)
    saved = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")
    assert all(value.device.type == "cpu" for value in saved["model"].values())
    train("train.device=cpu", "train.max_steps=6", *adam)
    outcome = train("train.device=cuda", *adam)
    here, there = (load(tmp_path / "run", device=device) for device in ("cpu", "cuda"))
    assert here.score_split("valid").nll == pytest.approx(outcome.score.nll, rel=1e-4)
    assert there.score_split("valid").nll == pytest.approx(outcome.score.nll, rel=1e-4)
    named = load(tmp_path / "run", device="cuda", backend="triton")
    assert named.score_split("valid").nll == there.score_split("valid").nll
    assert len(re.findall(r"\n|\S+", there.sample(length=5, seed=1))) == 5
    assert [token.text for token in here.next_words("the", 3)] == [token.text for token in there.next_words("the", 3)]


AVERAGING = ("train.optimizer=asgd", "train.average_patience=none", "model.alpha_fwd=0.9")


def scored(trained):
    """The nats of a model by the protocol of the validations after each epoch."""
    source = Path(trained.config.data.source)
    text = stream.encode((source / "valid.txt").read_text().splitlines(), trained.tokenizer)
    width = trained.config.train.valid_batch_size
    return evaluate(trained.model, text, trained.tokenizer, protocol="columns", batch_size=width).nll


def test_averages_and_their_statistics_are_kept_and_evaluated(train, tmp_path):
    train(*AVERAGING)
    last, best = (checkpoint.load(tmp_path / f"run/checkpoints/{name}.safetensors") for name in ("last", "best"))
    logged = [row["nll"] for row in measured(tmp_path / "run") if row["kind"] == "valid"]
    assert [scored(load(tmp_path / "run", which=which)) for which in ("best", "last")] == [min(logged), logged[-1]]
    assert_equal(dict(load(tmp_path / "run", which="last").model.state_dict()), last["averages"]["model"], "last")
    assert best.get("averages") is None, "the best is the model that was scored, and no more"
    for name, value in last["model"].items():
        assert torch.equal(value, last["averages"]["model"][name]) == bool(re.search("norm_[uv]_", name)), name


def test_within_the_first_epoch_the_last_weights_are_evaluated_as_they_are(train, tmp_path):
    train(*AVERAGING, "train.max_steps=3")
    last, best = (checkpoint.load(tmp_path / f"run/checkpoints/{name}.safetensors") for name in ("last", "best"))
    assert_equal(dict(load(tmp_path / "run", which="last").model.state_dict()), last["model"], "last")
    # the validation at the end of the run is of the averages, with statistics estimated for them
    assert torch.equal(best["model"]["decoder.bias"], last["averages"]["model"]["decoder.bias"])
    statistics = [saved["layers.norm_mean_l0"] for saved in (best["model"], last["model"], last["averages"]["model"])]
    assert not torch.equal(statistics[0], statistics[1])
    assert not statistics[2].any(), "none was estimated when this was saved"


@pytest.fixture
def validations(monkeypatch):
    """`validations(nats, …)`: what the validations to come find per token, whatever the weights are."""
    evaluate = run.evaluate

    def script(*nats):
        left = iter(nats)

        def scripted(*given, **named):
            score = evaluate(*given, **named)
            return replace(score, nll=next(left) * score.tokens) if named.get("protocol") == "columns" else score

        monkeypatch.setattr(run, "evaluate", scripted)

    return script


def test_a_run_begins_with_the_best_weights_of_another(train, tmp_path, corpus):
    """Its tokenizer too, also on another text, whose own one would differ; and resumes without that run."""
    train()
    best = checkpoint.load(tmp_path / "run/checkpoints/best.safetensors")
    (tmp_path / "other").mkdir()
    for split in ("train", "valid", "test"):
        lines = [f"{line} new" for line in (corpus / f"{split}.txt").read_text().splitlines()[::-1]]
        (tmp_path / "other" / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    given = [f"train.init_from={tmp_path / 'run'}", f"data.source={tmp_path / 'other'}"]
    train(*given, "train.max_steps=1", "train.lr=1e-30", folder="tuned")
    tuned = checkpoint.load(tmp_path / "tuned/checkpoints/last.safetensors")
    weights = {name for name in tuned["model"] if not re.search(r"norm_(mean|var|u|v)_", name)}
    assert_equal({n: tuned["model"][n] for n in weights}, {n: best["model"][n] for n in weights}, "model")
    assert tuned["tokenizer"] == best["tokenizer"]
    assert tuned["trainer"]["step"] == 1, "steps are counted from 0"
    shutil.rmtree(tmp_path / "run")
    assert train(*given, "train.max_steps=2", "train.lr=1e-30", folder="tuned").step == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.hidden_size=13", "must have its model; got one that differs: .* must have shape"),
        ("model.norm=none", "must have its model; got one that differs: .* must not be there"),
        ("train.init_from=nowhere", "a run must be a folder that `train` made; got nowhere"),
    ],
)
def test_a_run_that_cannot_begin_with_another_writes_nothing(train, tmp_path, given, message):
    train()
    with pytest.raises(UserError, match=message):
        train(f"train.init_from={tmp_path / 'run'}", given, folder="tuned")
    assert not (tmp_path / "tuned").exists()


def test_the_best_weights_are_kept_over_a_stop_inside_an_epoch_and_an_extension(train, tmp_path, validations):
    best = tmp_path / "run/checkpoints/best.safetensors"
    validations(2.0, 3.0)
    train("train.schedule=plateau", folder="whole")
    validations(1.5)
    first = train("train.schedule=plateau", "train.max_steps=3")
    kept = best.read_bytes()
    validations(1.75)
    assert train("train.schedule=plateau", "train.max_steps=4").score == first.score
    validations(2.0, 3.0)
    outcome = train("train.schedule=plateau")
    assert outcome.score == first.score
    assert best.read_bytes() == kept
    assert (checkpoint.load(best)["trainer"]["step"], checkpoint.load(best)["nats"]) == (3, 1.5)
    last = [checkpoint.load(tmp_path / folder / "checkpoints/last.safetensors") for folder in ("run", "whole")]
    assert_equal(*last, "last")  # the schedule and all else continue as if the run had not stopped
    assert measured(tmp_path / "run")[:-1] == measured(tmp_path / "whole")[:-1]
    validations(1.25, 1.0)
    assert train("train.schedule=plateau", "train.epochs=4").step == checkpoint.load(best)["trainer"]["step"]


@pytest.mark.parametrize("how", ["another model", "no number", "damaged"])
def test_a_best_checkpoint_that_is_of_no_use_gives_way(train, tmp_path, validations, how):
    best = tmp_path / "run/checkpoints/best.safetensors"
    validations(1.5)
    train("train.max_steps=3")
    saved = checkpoint.load(best)
    if how == "another model":
        saved["model"] = {**saved["model"], "decoder.bias": torch.zeros(3)}
    elif how == "no number":
        saved["nats"] = float("nan")
    else:
        del saved["nats"]
    checkpoint.save(best, saved)
    if how == "damaged":
        best.write_bytes(best.read_bytes()[:-9])
    validations(2.0)
    train("train.max_steps=4")
    assert checkpoint.load(best)["trainer"]["step"] == 4


@pytest.mark.parametrize("name", ["patience", "stop_patience"])
def test_a_finished_run_names_the_setting_that_ended_it(train, validations, name):
    validations(1.0, 2.0, 3.0)
    train("train.epochs=30", f"train.{name}=1")
    said = []
    train("train.epochs=30", f"train.{name}=1", say=said.append)
    assert (
        f" (train.{name}=1): nothing is left to train; raise what ended it, as by --set train.{name}=N, or" in said[-1]
    )


def test_a_finished_run_only_scores_again_and_says_so(train, tmp_path):
    first = train()
    before = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")
    said = []
    again = train(say=said.append)
    assert re.search(r"finished after step \d+ \(all epochs\): nothing is left to train; .*--init-from", said[-1])
    init = shlex.join(["--init-from", str(tmp_path / "run")])
    assert said[-1].endswith(f"--set train.epochs=N, or begin another run with its weights: {init}")
    assert (again.score, again.step, again.speed) == (first.score, first.step, "no step taken")
    assert_equal(checkpoint.load(tmp_path / "run/checkpoints/last.safetensors"), before, "last")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["train.lr=0.25"], "train.lr is 0.5 there and 0.25 here"),
        (
            ["model.hidden_size=9", "train.seed=2"],
            "model.hidden_size is 8 there and 9 here; train.seed is 1 there and 2",
        ),
    ],
)
def test_a_folder_of_another_configuration_is_refused(train, tmp_path, assignments, message):
    train()
    before = files_of(tmp_path / "run")
    with pytest.raises(UserError, match=message + r".*give --overwrite"):
        train(*assignments)
    assert files_of(tmp_path / "run") == before


def test_a_cosine_schedule_fixes_the_number_of_epochs(train):
    train("train.schedule=cosine")
    said = []
    train("train.schedule=cosine", say=said.append)
    assert "train.epochs=N" not in said[-1]
    assert re.search(r"nothing is left to train; begin another run with its weights: --init-from .*run'?$", said[-1])
    told = r"train\.epochs is 2 there and 3 here; the schedule cosine is planned for .*: --init-from .*run'?; or choose"
    with pytest.raises(UserError, match=told):
        train("train.schedule=cosine", "train.epochs=3")
    with pytest.raises(UserError, match=r"train\.lr is .* here; choose"):
        train("train.schedule=cosine", "train.lr=0.1")


def test_when_averaging_begins_is_fixed_where_weights_are_averaged(train):
    train("train.max_steps=1")
    assert train("train.max_steps=2", "train.average_patience=7").step == 2, "sgd does not look at it"
    train("train.max_steps=1", "train.optimizer=asgd", folder="averaging")
    with pytest.raises(UserError, match=r"train\.average_patience is 5 there and 7 here"):
        train("train.max_steps=2", "train.optimizer=asgd", "train.average_patience=7", folder="averaging")


def test_an_edited_configuration_file_does_not_pass_for_the_runs_own(train, tmp_path):
    train()
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace("hidden_size = 8", "hidden_size = 9"))
    with pytest.raises(UserError, match=r"model\.hidden_size is 8 there and 9 here"):
        train("model.hidden_size=9")


def test_overwrite_moves_the_old_run_aside(train, tmp_path):
    train()
    before = files_of(tmp_path / "run")
    for number in (1, 2):
        train(f"train.seed={number + 1}", overwrite=True)
        assert (tmp_path / f"run.old{number}/checkpoints/last.safetensors").is_file()
    assert files_of(tmp_path / "run.old1") == before
    assert load(tmp_path / "run").config.train.seed == 3


def test_overwriting_through_a_link_moves_what_it_leads_to(train, tmp_path):
    train("train.max_steps=1", folder="real")
    before = files_of(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    train("train.max_steps=1", "train.seed=2", folder="link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert files_of(tmp_path / "real.old1") == before
    assert load(tmp_path / "real").config.train.seed == load(tmp_path / "link").config.train.seed == 2
    assert {path.name for path in tmp_path.iterdir()} == {"text", "real", "real.old1", "link"}


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_the_working_folder_is_not_moved_aside(train, settings, tmp_path, monkeypatch, inside):
    train("train.max_steps=1")
    before = files_of(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / inside)
    with pytest.raises(UserError, match=r"must not hold the working folder; got \S+/run, which does; change"):
        run.train(settings(), Path(".") if inside == "." else tmp_path / "run", overwrite=True)
    assert files_of(tmp_path / "run") == before


def test_never_resuming_needs_an_empty_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    train("train.max_steps=1", resume="never")
    with pytest.raises(UserError, match="a run that never resumes must have an empty folder"):
        train("train.max_steps=1", resume="never")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "never"}])
def test_a_folder_of_other_things_is_never_touched(train, tmp_path, options):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="must be empty or a run's own"):
        train(**options)
    assert files_of(tmp_path / "run") == {"thesis.tex": b"years of work"}


def test_a_text_that_changed_is_refused(train, corpus, tmp_path):
    train("train.max_steps=3")
    before = files_of(tmp_path / "run")
    with (corpus / "valid.txt").open("a") as file:
        file.write("one more line\n")
    with pytest.raises(UserError, match=r"must be resumed with the text it began with; got another valid text in"):
        train()
    assert files_of(tmp_path / "run") == before


def test_a_moved_text_is_the_same_text(train, corpus, tmp_path):
    train("train.max_steps=3")
    corpus.rename(tmp_path / "elsewhere")
    assert train(f"data.source={tmp_path / 'elsewhere'}").reason == "epochs"


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_taken(train, tmp_path):
    train("train.epochs=3", folder="whole")
    train()
    path = tmp_path / "run/checkpoints/last.safetensors"
    damaged = path.read_bytes()[:1000]
    path.write_bytes(damaged)
    said = []
    assert load(tmp_path / "run", which="last", say=said.append).step > 0
    train("train.epochs=3", say=said.append)
    assert [line for line in said if "last.safetensors" in line] == [said[0]] * 2
    assert re.search(
        r"^warning: .*run/checkpoints/last\.safetensors, which is damaged .*; resuming from the one before it, prev",
        said[0],
    )
    assert path.with_name("damaged.safetensors").read_bytes() == damaged
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_any_whole_checkpoint(train, tmp_path):
    train()
    place = tmp_path / "run/checkpoints"
    (place / "last.safetensors").write_bytes(b"")
    (place / "previous.safetensors").unlink()
    with pytest.raises(UserError, match=r"last\.safetensors, which is damaged"):
        train("train.epochs=3")
    (place / "last.safetensors").unlink()
    before = files_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"last\.safetensors to resume from; got best\.safetensors alone"):
        train()
    assert files_of(tmp_path / "run") == before


def test_a_damaged_best_checkpoint_is_named(train, tmp_path):
    train()
    path = tmp_path / "run/checkpoints/best.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"best\.safetensors, which is damaged .*; the last one is whole: give --checkpoint last"
    ):
        load(tmp_path / "run")
    assert load(tmp_path / "run", which="last").step > 0
    with pytest.raises(
        UserError, match=r"best\.safetensors, which is damaged .*; the last one is whole: name another run"
    ):
        train(f"train.init_from={tmp_path / 'run'}", folder="other")


def test_a_checkpoint_of_another_vocabulary_is_refused(train, tmp_path, corpus):
    train()
    (corpus / "train.txt").write_text((corpus / "train.txt").read_text().replace("cat", "zebra"))
    train(folder="other")
    for name in ("best", "last"):
        (tmp_path / f"other/checkpoints/{name}.safetensors").replace(tmp_path / f"run/checkpoints/{name}.safetensors")
    with pytest.raises(UserError, match="must be of its folder's vocabulary"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match="must be of its folder's vocabulary"):
        train()


def test_a_checkpoint_of_another_model_is_refused(train, tmp_path):
    train("train.max_steps=1")
    path = tmp_path / "run/checkpoints/best.safetensors"
    saved = checkpoint.load(path)
    saved["model"]["embedding.weight"] = torch.zeros(3, 3)
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match="must hold the model of its configuration"):
        load(tmp_path / "run")


def stuffed(path, **changes):
    """Writes a checkpoint that is whole, with other values."""
    saved = checkpoint.load(path)
    checkpoint.save(path, {**saved, **{key: change(saved[key]) for key, change in changes.items()}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda m: {**m, "more": torch.zeros(2)}}, "must hold the model .*more"),
        (
            {"model": lambda m: {k: v for k, v in m.items() if k != "decoder.bias"}},
            "must hold the model .*decoder.bias",
        ),
        ({"model": lambda m: {**m, "decoder.bias": 3}}, "must hold the model .*decoder.bias must be a tensor; got 3"),
        (
            {"model": lambda m: {**m, "decoder.bias": m["decoder.bias"].double()}},
            "must hold the model .*decoder.bias must have shape .* and dtype torch.float32; got .* and torch.float64",
        ),
        (
            {"model": lambda m: {**m, "decoder.bias": torch.zeros(3)}},
            r"must hold the model .*decoder.bias must have shape \[12\] .*; got \[3\]",
        ),
        ({"config": lambda c: {**c, "model": {**c["model"], "hidden_size": 9}}}, "model.hidden_size is 9 there and 8"),
        ({"config": lambda c: {**c, "extra": 1}}, "extra must be a known section"),
        ({"tokenizer": lambda t: {"kind": "word"}}, "a tokenizer's state must be"),
        ({"carried": lambda s: s[:1]}, r"must hold the training state .*have shapes \[\(1, 3, 8\), \(1, 3, 8\)\]"),
        ({"carried": lambda s: [t[:, :2] for t in s]}, "must hold the training state .*have shapes"),
        ({"carried": lambda s: [t.long() for t in s]}, "must hold the training state .*have shapes"),
        ({"carried": lambda s: 3}, "must hold the training state"),
        ({"optimizer": lambda o: {}}, "must hold the training state"),
        ({"optimizer": lambda o: {**o, "param_groups": []}}, "must hold the training state"),
        (
            {"optimizer": lambda o: {**o, "state": {0: {**o["state"][0], "exp_avg": torch.zeros(2)}}}},
            r"must hold the training state .*exp_avg has shape \[2\] and must have \[12, 8\]",
        ),
        (
            {"optimizer": lambda o: {**o, "state": {0: {"step": torch.zeros(())}}}},
            r"optimizer keeps \['step'\] and must",
        ),
        ({"trainer": lambda p: {**p, "more": 1}}, "must hold the training state .*more"),
        ({"trainer": lambda p: {"step": 1}}, None),
        ({"trainer": lambda p: {**p, "epoch": "1"}}, "must hold the training state .*epoch"),
        ({"trainer": lambda p: {**p, "epoch": -1}}, "trainer.epoch must be from 0 to .*; got -1"),
        ({"trainer": lambda p: {**p, "epoch": 3}}, "trainer.step must reach epoch 4; got 2"),
        ({"trainer": lambda p: {**p, "position": -7}}, "trainer.position must be from 0 to .*; got -7"),
        (
            {"trainer": lambda p: {**p, "position": p["position"] + 1}},
            "trainer.position must be between two windows of epoch 1; got",
        ),
        ({"trainer": lambda p: {**p, "position": 10**6}}, "must be between two windows of epoch 1; got 1000000"),
        ({"trainer": lambda p: {**p, "step": -1}}, "must hold the number of its step"),
        ({"trainer": lambda p: {**p, "step": 2**53 + 1}}, "must hold the number of its step"),
        ({"trainer": lambda p: {**p, "step": 0}}, "trainer.step must reach epoch 1; got 0"),
        ({"trainer": lambda p: {**p, "tokens": 10**18}}, "trainer.tokens must be .*; got 1000000000000000000"),
        ({"trainer": lambda p: {**p, "best": float("nan")}}, "trainer.best must be from 0 to inf; got nan"),
        ({"data_sha256": lambda d: {}}, "must be resumed with the text it began with"),
    ],
)
def test_a_whole_checkpoint_with_values_that_do_not_fit(train, tmp_path, changes, message):
    train("train.max_steps=2", "train.optimizer=adam", "train.lr=0.01")
    stuffed(tmp_path / "run/checkpoints/last.safetensors", **changes)
    before = files_of(tmp_path / "run")
    if message is None:  # absent counts start again, as in a file of an older version that did not keep them
        train("train.max_steps=2", "train.optimizer=adam", "train.lr=0.01")
        return
    with pytest.raises(UserError, match=message):
        train("train.max_steps=3", "train.optimizer=adam", "train.lr=0.01")
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"averages": lambda a: {}}, "must hold the training state .*steps"),
        ({"averages": lambda a: 3}, "must hold the training state"),
        ({"averages": lambda a: {**a, "steps": 3}}, "must be from 0 to the 2 steps of the run; got 3"),
        ({"averages": lambda a: {**a, "steps": True}}, "averages.steps must be from 0 to .*; got True"),
        ({"averages": lambda a: {**a, "model": {}}}, "must hold the training state .*must be there"),
        ({"trainer": lambda p: {**p, "valid": 3}}, "must hold the training state"),
        ({"trainer": lambda p: {**p, "valid": [1.0]}}, "trainer.valid must be of 0 epochs; got 1"),
        ({"trainer": lambda p: {**p, "valid": ["1"]}}, "trainer.valid must be numbers from 0 up; got '1'"),
        ({"trainer": lambda p: {**p, "valid": [-1.0]}}, "trainer.valid must be numbers from 0 up; got -1.0"),
    ],
)
def test_averages_that_do_not_fit(train, tmp_path, changes, message):
    train(*AVERAGING, "train.max_steps=2")
    stuffed(tmp_path / "run/checkpoints/last.safetensors", **changes)
    with pytest.raises(UserError, match=message):
        train(*AVERAGING, "train.max_steps=3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_counts": lambda c: c[1:]}, "must hold the counts .*train_counts must be 12 integers"),
        ({"train_counts": lambda c: [*c, *c]}, "must be 12 integers"),
        ({"train_counts": lambda c: [float("inf"), *c[1:]]}, "must be 12 integers"),
        ({"train_counts": lambda c: [2**63, *c[1:]]}, "must be 12 integers"),
        ({"trainer": lambda p: {**p, "position": -1}}, "trainer.position must be from 0 to .*; got -1"),
        ({"trainer": lambda p: {**p, "epoch": -1}}, "trainer.epoch must be from 0 to .*; got -1"),
        ({"trainer": lambda p: {**p, "step": -1}}, "must hold the number of its step"),
    ],
)
def test_a_whole_checkpoint_that_cannot_be_evaluated(train, tmp_path, changes, message):
    train("train.max_steps=2")
    stuffed(tmp_path / "run/checkpoints/best.safetensors", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "run")


def test_two_runs_in_one_folder(train, settings, tmp_path):
    with Lock() as other:
        train("train.max_steps=1")
        before = files_of(tmp_path / "run")
        other.take(tmp_path / "run")
        for options in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=r"by one process at a time; got .*run, in use by process \d+ on"):
                train(**options)
        assert {**files_of(tmp_path / "run"), ".lock": b""} == before
        assert load(tmp_path / "run").step == 1, "evaluating needs no lock"


def test_two_new_runs_at_once(train, settings, tmp_path, monkeypatch):
    text = run._text

    def meanwhile(*arguments):
        monkeypatch.setattr(run, "_text", text)
        train("train.max_steps=1", "train.seed=7")
        return text(*arguments)

    monkeypatch.setattr(run, "_text", meanwhile)
    with pytest.raises(UserError, match=r"another began in .*run just now"):
        train()
    assert load(tmp_path / "run").config.train.seed == 7


def test_what_a_killed_process_left_is_removed(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on")
    train("train.max_steps=1")
    left = (".config.toml.12", "checkpoints/.last.safetensors.7", "checkpoints/.best.safetensors.7", ".metrics.jsonl.8")
    kept = (".notes.2024", "checkpoints/.last.safetensors.keep", "mine.txt")
    for name in (*left, *kept):
        (tmp_path / "run" / name).write_text("")
    train("train.max_steps=1")
    assert not any((tmp_path / "run" / name).exists() for name in left)
    assert all((tmp_path / "run" / name).exists() for name in kept)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="a run must be a folder that `train` made"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.backend=fast", "a backend must be one of auto, .*reference.*got 'fast'"),
        ("train.device=cuda:99", "a device must be one that torch can use here; got 'cuda:99'"),
        ("train.device=meta", "a device must be one that torch can use here; got 'meta'"),
        ("train.device=abacus", "a device must be one that torch can use here; got 'abacus'"),
        ("train.device=hpu", "a device must be one that torch can use here; got 'hpu'"),
        ("train.device=privateuseone", "a device must be one that torch can use here; got 'privateuseone'"),
        ("data.source=nowhere", "got 'nowhere'"),
        ("model.hidden_size=900000000", "the weights of a model must fit into .* of memory; got"),
        ("train.batch_size=1000", "lower the batch size"),
        ("data.vocab_size=1", "a vocabulary must have at least 3 pieces"),
        ("data.tokenizer_file=none.json", "does not exist"),
    ],
)
def test_settings_that_cannot_work_here_write_nothing(train, tmp_path, assignment, message):
    with pytest.raises(UserError, match=message):
        train(assignment)
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_keeps_its_last_good_checkpoint(train, tmp_path, monkeypatch):
    train("train.max_steps=4", "checkpoint.every_steps=2")
    kept = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")
    fit = run.Trainer.fit

    def poisoned(self):
        self.listeners.insert(0, lambda e: self.model.decoder.bias.data.fill_(float("nan")) if e.step == 5 else None)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", poisoned)
    with pytest.raises(DivergedError, match=r"the loss is not finite after 5 steps .*last\.safetensors \(step 4\)"):
        train("checkpoint.every_steps=2")
    after = checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")
    assert_equal(after["model"], kept["model"], "model")
    assert measured(tmp_path / "run")[-1]["kind"] == "diverged"
    monkeypatch.undo()
    assert train("checkpoint.every_steps=2").reason == "epochs"
    assert not [row for row in measured(tmp_path / "run") if row["kind"] == "diverged"]


def test_divergence_after_the_last_step_inside_an_epoch(train, tmp_path, monkeypatch):
    train("train.max_steps=2")
    fit = run.Trainer.fit

    def poisoned(self):
        self.listeners.insert(0, lambda e: self.model.decoder.bias.data.fill_(float("nan")) if e.step == 4 else None)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", poisoned)
    told = r"the validation is not finite after 4 steps \(epoch 1, .*good checkpoint is \S+/previous\.\S+ \(step 2\)"
    with pytest.raises(DivergedError, match=told):
        train("train.max_steps=4")
    assert measured(tmp_path / "run")[-1].items() >= {"kind": "diverged", "step": 4, "what": "validation"}.items()
    place = tmp_path / "run/checkpoints"
    (place / "previous.safetensors").unlink()
    with pytest.raises(DivergedError, match=r"the last good checkpoint is \S+/best\.safetensors \(step 2\)"):
        train("train.max_steps=4")
    for name in ("previous.safetensors", "best.safetensors"):
        (place / name).unlink()
    with pytest.raises(DivergedError, match="no good checkpoint is left"):
        train("train.max_steps=4")


def test_tensorboard_calls_a_run_by_its_folder(train, tmp_path):
    train("train.epochs=1")
    assert {path.parent.name for path in (tmp_path / "run").rglob("events.*")} == {"run", "valid"}
    (tmp_path / "run").rename(tmp_path / "renamed")
    train("train.epochs=2", folder="renamed")
    assert {path.name for path in (tmp_path / "renamed/tensorboard").iterdir()} == {"run"}
    for path in (tmp_path / "renamed/tensorboard/run").iterdir():  # as version 0.1 kept them
        path.rename(tmp_path / "renamed/tensorboard" / path.name)
    train("train.epochs=3", folder="renamed")
    assert len([*(tmp_path / "renamed/tensorboard").glob("events.*")]) == 3


def test_another_corpus_is_scored_with_the_same_vocabulary(train, tmp_path, lines):
    train("train.max_steps=2")
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        (other / f"{split}.txt").write_text("the zebra sat\n" * 20)
    score = load(tmp_path / "run").score_split("test", data=str(other))
    assert (score.tokens, score.unk) == (80, 20)


def test_the_unigram_model_is_of_the_training_text(train, tmp_path, corpus):
    train("train.max_steps=2")
    score = load(tmp_path / "run").score_split("test")
    assert 2 < score.unigram_ppl < 13


def test_an_empty_name_is_not_the_runs_own_corpus(train, tmp_path):
    train("train.max_steps=1")
    with pytest.raises(UserError, match=r"or a folder .*got ''"):
        load(tmp_path / "run").score_split("test", data="")


def test_a_text_of_one_token(train, tmp_path, corpus):
    (corpus / "test.txt").write_text("\n")
    train("train.max_steps=1")
    for protocol, message in (
        ("exact", "at least 2 tokens; got 1;"),
        ("chunk-mean", "must hold at least 20 tokens; got 1"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "run").score_split("test", protocol=protocol)
    (corpus / "valid.txt").write_text("\n")
    with pytest.raises(UserError, match=r"the valid text of \S+ must hold at least 2 tokens, .*; got 1"):
        train("train.max_steps=1", folder="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("kind", "unit"), [("char", "character"), ("byte", "byte"), ("unigram", "token")])
def test_other_tokenizers_train_and_score_per_unit(train, tmp_path, kind, unit):
    given = ["data.vocab_size=280"] * (kind == "unigram")
    train(f"data.tokenizer={kind}", "train.epochs=1", *given, folder="whole")
    train(f"data.tokenizer={kind}", "train.epochs=1", "train.max_steps=3", *given)
    outcome = train(f"data.tokenizer={kind}", "train.epochs=1", *given)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert (outcome.score.unit, outcome.score.ppl) == (unit, outcome.score.ppl_per_token)
    assert outcome.score.tokens > outcome.score.words + outcome.score.eos
    valid = [row["ppl"] for row in measured(tmp_path / "run") if row["kind"] in ("train", "valid", "epoch")]
    assert max(valid) < 1000, "all of them are per unit"
    assert load(tmp_path / "run").tokenizer.kind == kind


def test_a_text_of_tabs_and_carriage_returns_is_kept_and_known(train, corpus, tmp_path):
    """The checksum of a lossless run is that of the bytes: white space that changes is another text."""
    kept = (corpus / "train.txt").read_bytes()
    (corpus / "train.txt").write_bytes(kept.replace(b"\n", b" \t\r\n"))
    for kind in ("char", "word"):
        train(f"data.tokenizer={kind}", "train.max_steps=1", folder=kind)
    assert "\r" in load(tmp_path / "char").tokenizer.pieces
    (corpus / "train.txt").write_bytes(kept.replace(b"\n", b" \t\n"))
    train("data.tokenizer=word", "train.max_steps=2", folder="word")
    with pytest.raises(UserError, match="must be resumed with the text it began with; got another train text"):
        train("data.tokenizer=char", "train.max_steps=2", folder="char")


RAW = "".join(f"the cat saw w{number} on the mat and the {'dog' if number % 2 else 'bird'}\n" for number in range(300))


@pytest.mark.parametrize(
    ("text", "assignments", "size"),
    [
        (RAW, [], 10),
        (RAW, ["data.min_count=1"], 310),
        (RAW, ["data.min_count=200"], 8),
        (RAW + "<unk>\n", [], 310),
    ],
)
def test_rare_words_of_a_raw_text_are_unk(train, corpus, tmp_path, text, assignments, size):
    for split in ("train", "valid", "test"):
        (corpus / f"{split}.txt").write_text(text if split == "train" else RAW)
    said = []
    train("train.max_steps=1", *assignments, say=said.append)
    table = load(tmp_path / "run")
    assert table.tokenizer.size == size
    assert (table.train_counts[table.tokenizer.unk] > 0) == (size < 310 or "<unk>" in text)
    assert any("warning" in line for line in said) == (size == 8), said
    if size == 8:
        assert any(
            re.search(r"warning: 20\.0% of the valid text is <unk>, not in the vocabulary of 8", line) for line in said
        )


def test_the_end_of_line_written_in_the_test_text_is_found_before_training(train, corpus, tmp_path):
    (corpus / "test.txt").write_text("a\nb <eos>\n")
    with pytest.raises(UserError, match=r"the test split must not hold the word <eos>.*test\.txt, line 2"):
        train()
    assert not (tmp_path / "run").exists()
    train("data.tokenizer=char", "train.max_steps=1")


def test_one_file_trains_resumes_and_is_evaluated_in_its_splits(train, corpus, tmp_path):
    text = b"".join((corpus / f"{split}.txt").read_bytes() for split in ("train", "valid", "test")) * 3
    (tmp_path / "book.txt").write_bytes(text)
    said = []
    source = f"data.source={tmp_path / 'book.txt'}"
    train(source, folder="whole")
    train(source, "train.max_steps=3", say=said.append)
    assert any(line.startswith(f"{tmp_path}/book.txt is split 90/5/5 by lines: train 2") for line in said)
    train(source)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert load(tmp_path / "run").score_split("test").eos == pytest.approx(15, abs=2)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/test.txt").write_text("the cat sat\n" * 3)
    assert load(tmp_path / "run").score_split("test", data=str(tmp_path / "only")).eos == 3


def test_a_tokenizer_file_is_taken(train, tmp_path, lines):
    path = tmp_path / "tokenizer.json"
    tokenizers.save(tokenizers.train("word", ["the cat"], None), path)
    train(f"data.tokenizer_file={path}", "train.max_steps=2")
    assert load(tmp_path / "run").tokenizer.size == 4


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def test_signal_handlers_are_put_back(train):
    before = [signal.getsignal(number) for number in STOPPING]
    train("train.max_steps=1")
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.parametrize(
    ("number", "ignored"), [*((number, False) for number in STOPPING), (signal.SIGHUP, True), (signal.SIGUSR1, True)]
)
def test_a_signal_stops_and_saves_unless_it_was_ignored(train, tmp_path, monkeypatch, number, ignored):
    fit = run.Trainer.fit

    def is_second(event):
        return isinstance(event, Stepped) and event.step == 2

    def signalled(self):
        self.listeners.insert(0, lambda event: signal.raise_signal(number) if is_second(event) else None)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", signalled)
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        outcome = train("train.epochs=1")
    finally:
        signal.signal(number, before)
    assert outcome.reason == ("epochs" if ignored else number.name)
    if not ignored:
        assert checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")["trainer"]["step"] == 2


def test_a_rehearsal_writes_nothing(settings, tmp_path):
    before, said = {*tmp_path.rglob("*")}, []
    run.rehearse(settings(), say=said.append)
    assert {*tmp_path.rglob("*")} == before
    assert re.search(r"tokens to train on", said[0])
    assert re.search(r"memory: weights [\d.]+ MiB, gradients [\d.]+ MiB, optimizer 0\.0 MiB; .* at most", said[2])
    assert re.search(
        r"one step: [\d.]+ s for \d+ tokens, .*; an epoch of [34]\d\d tokens takes about .*, 2 epochs ", said[3]
    )
    run.rehearse(settings("train.max_steps=1", "train.optimizer=adam"), say=said.append)
    assert re.search(r" tokens takes about .*, 1 steps 0 s, validations not counted", said[7])


def test_a_rehearsal_of_a_run_has_its_tokenizer(train, settings, tmp_path):
    train("train.max_steps=2", "data.min_count=1")
    said = []
    run.rehearse(settings("data.tokenizer_file=gone.json"), tmp_path / "run", said.append)
    size = tokenizers.load(tmp_path / "run/tokenizer.json").size
    assert f"word vocabulary of {size}" in said[0]


def test_a_rehearsal_times_one_step(settings, monkeypatch):
    """On a GPU too, where steps are otherwise read together: not the first ones, which compile."""
    made, build = [], run._trainer

    def slow_at_first(model, *rest):
        trainer = build(model, *rest)
        trainer.deferred, step = True, trainer._step
        trainer._step = lambda *window: (time.sleep(0.5 * (not made)), made.append(window), step(*window))
        return trainer

    said = []
    monkeypatch.setattr(run, "_trainer", slow_at_first)
    run.rehearse(settings("train.log_every=1000"), say=said.append)
    assert len(made) == 2
    assert float(re.search(r"one step: ([\d.]+) s", said[3])[1]) < 0.25


def test_a_run_in_a_thread_needs_no_signals(train):
    reasons = []
    thread = threading.Thread(target=lambda: reasons.append(train("train.max_steps=1").reason))
    thread.start()
    thread.join()
    assert reasons == ["max_steps"]


def test_auto_precision_is_resolved_once_and_kept(train, tmp_path, monkeypatch):
    for reason, expected in (("no instructions", "float32"), (None, "bfloat16-decoder")):
        monkeypatch.setattr("rnnorm.why_not_bfloat16", lambda device, reason=reason: reason)
        train("train.precision=auto", "train.max_steps=1", folder=expected)
        written = config.build(config.read_toml(tmp_path / expected / "config.toml", ""))
        assert written.train.precision == expected
    # the same command again, on a machine where `auto` is another
    train("train.precision=auto", "train.max_steps=2", folder="float32")
    saved = checkpoint.load(tmp_path / "float32/checkpoints/last.safetensors")
    assert (saved["trainer"]["step"], saved["config"]["train"]["precision"]) == (2, "float32")


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-decoder"])
def test_bfloat16_without_instructions_is_told_to_be_slower(train, monkeypatch, precision):
    said: list[str] = []
    monkeypatch.setattr("rnnorm.why_not_bfloat16", lambda device: "no instructions")
    train(f"train.precision={precision}", "train.max_steps=1", say=said.append)
    assert any("slower here than in float32: no instructions" in line for line in said)


@pytest.mark.parametrize("name", ["events.1", "valid"])
def test_a_folder_may_be_called_as_tensorboards_own_are(train, tmp_path, name):
    train("train.epochs=1", folder=name)
    train("train.epochs=2", folder=name)
    places = {
        path.parent.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("events.*") if path.is_file()
    }
    assert places == {Path("tensorboard", name), Path("tensorboard", name, "valid")}
    (tmp_path / name).rename(tmp_path / "other")
    assert RunFolder(tmp_path / "other").events == tmp_path / "other/tensorboard" / name


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_again(train, tmp_path):
    train()
    log = (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match=r"last\.safetensors to resume from; got none, and a log of 2 epochs; restore"):
        train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == log


def test_best_weights_that_are_lost_are_replaced_by_the_next_ones(train, tmp_path):
    train("train.lr=1e-9")
    (tmp_path / "run/checkpoints/best.safetensors").unlink()
    score = train("train.lr=1e-9", "train.epochs=3").score
    assert score is not None


def test_a_run_keeps_its_versions_and_those_that_it_is_resumed_with(train, tmp_path, monkeypatch):
    here = provenance.versions()
    train("train.epochs=1")
    train("train.epochs=2")
    once = measured(tmp_path / "run")
    assert once[0] == {"kind": "versions", "step": 0, "epoch": 1, "versions": here}
    assert [row["kind"] for row in once].count("versions") == 1
    monkeypatch.setattr(provenance, "versions", lambda device: {**here, "torch": "9.9"})
    train("train.epochs=3")
    found = [row for row in measured(tmp_path / "run") if row["kind"] == "versions"]
    saved = next(row["step"] for row in once if row["kind"] == "final")
    assert [(row["step"], row["versions"]["torch"]) for row in found] == [(0, here["torch"]), (saved, "9.9")]
