import csv
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lm import config, stream, study
from lm.cli import main
from lm.errors import UserError
from lm.study import results, runner, statistics
from lm.study.progress import StudyProgress

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "scripts/studies").glob("*.toml"))

SMALL = """
seeds = 2
[model]
hidden_size = 8
[train]
optimizer = "sgd"
schedule = "constant"
epochs = 2
lr = 0.5
batch_size = 3
window = "uniform{2..9}"
log_every = 1
[[arms]]
name = "good"
model.norm = "layer"
[[arms]]
name = "bad"
train.weight_decay = 1e38
"""


@pytest.fixture
def corpus(tmp_path, lines):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 30), ("test", 30)):
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed=count)))
    return folder


@pytest.fixture
def read(tmp_path):
    """`read(text, **options)`: the study of a file that holds the text."""

    def make(text=SMALL, **options):
        path = tmp_path / "small.toml"
        path.write_text(text)
        return study.read(path, **options)

    return make


def test_arms_may_have_settings_that_are_lists(read):
    plan = read('[[arms]]\nname = "a"\npreset = "awd-ptb"\n[[arms]]\nname = "b"\nmodel.layer_sizes = [8]\n', seeds=3)
    assert len({*plan.jobs(), *plan.jobs()}) == 6


def test_an_arm_is_its_preset_the_studys_settings_and_its_own(read):
    plan = read(
        """
        preset = "paper-lstm-layer"
        [data]
        source = "markov"
        [train]
        lr = 2
        clip = 0.25
        [[arms]]
        name = "one"
        [[arms]]
        name = "two"
        preset = "paper-rnn-none"
        train.lr = 3.0
        train.window = 7
        """,
        assignments=["train.clip=0.5"],
    )
    one, two = plan.arms
    expected = config.override(
        config.preset("paper-lstm-layer"), ["data.source=markov", "train.lr=2.0", "train.clip=0.5"]
    )
    assert one.settings == config.build(expected)
    assert (two.settings.model.norm, two.settings.train.lr, two.settings.train.window) == ("none", 3.0, "7")
    assert two.command(5, "there") == [
        *("train", "--preset", "paper-rnn-none", "--set", "data.source=markov", "--set", "train.lr=3.0"),
        *("--set", "train.clip=0.5", "--set", "train.window=7", "--seed", "5", "--run", "there"),
    ]


def test_a_grid_makes_an_arm_of_each_combination(read):
    grid = '[grid]\n"train.lr" = [0.5, 2]\n"model.norm" = ["rms", "none"]\n[[arms]]\nname = "a"\n[[arms]]\nname = "b"'
    plan = read(grid, seeds=2)
    assert [arm.name for arm in plan.arms][:4] == [
        *("a_lr=0.5_norm=rms", "a_lr=0.5_norm=none", "a_lr=2_norm=rms", "a_lr=2_norm=none")
    ]
    assert {arm.base for arm in plan.arms} == {"a", "b"}
    assert [(job.arm.name, job.seed) for job in plan.jobs()] == [
        (arm.name, seed) for seed in (1, 2) for arm in plan.arms
    ]
    assert plan.arms[1].settings.model.norm == "none"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_ship_can_be_read(path):
    assert study.read(path).arms


def test_the_papers_arms_are_the_presets_to_the_letter():
    plan = study.read(ROOT / "scripts/studies/paper.toml")
    assert [arm.name for arm in plan.arms] == [f"{c}-{n}" for c in ("rnn", "lstm") for n in ("online", "layer", "none")]
    for arm in plan.arms:
        assert arm.settings == config.build(config.preset(f"paper-{arm.name}"))
        assert arm.assignments == ()
        assert arm.settings.train.clip is None


def test_the_steady_arms_are_their_presets_with_the_published_medians_beside():
    literal, steady = (study.read(ROOT / f"scripts/studies/{name}.toml") for name in ("paper", "paper-steady"))
    assert [(arm.name, arm.published) for arm in steady.arms] == [(arm.name, arm.published) for arm in literal.arms]
    for arm in steady.arms:
        assert arm.settings == config.build(config.preset(f"paper-{arm.name}-steady"))
        assert arm.assignments == ()


def test_the_fair_study_shares_all_but_cell_norm_and_decays():
    plan = study.read(ROOT / "scripts/studies/fair.toml")
    assert len(plan.arms) == 3 * 4 * 3
    assert {(arm.settings.model.cell, arm.settings.model.norm) for arm in plan.arms} == set(
        itertools.product(("lstm", "gru", "rnn_tanh"), ("online", "layer", "rms", "none"))
    )
    assert len({arm.settings.train.model_copy(update={"lr": 1.0}).model_dump_json() for arm in plan.arms}) == 1
    own = {"cell": "lstm", "norm": "none", "alpha_fwd": 1.0, "alpha_bwd": 1.0}
    assert len({arm.settings.model.model_copy(update=own).model_dump_json() for arm in plan.arms}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 1", r"a study must have \[\[arms\]\]"),
        ("seds = 1\n[[arms]]\nname='a'", "a key must be one of description, seeds, .*got 'seds'"),
        ("[[arms]]\nname='a'\nlr=1", "arm 'a': a key must be one of name, preset, .*got 'lr'"),
        ("[[arms]]\nname='a b'", "an arm's name must be letters.*got 'a b'"),
        ("[[arms]]\nname='..'", "a letter or digit first; got '..'"),
        ("[[arms]]\nname='.a'", "a letter or digit first; got '.a'"),
        ("[[arms]]\nname='_a'", "a letter or digit first; got '_a'"),
        ("[[arms]]\nname='-a'", "a letter or digit first; got '-a'"),
        ("[[arms]]\nname='a'\npublished='113.4'", "arm a: published must be a perplexity, .*; got '113.4'"),
        ("[[arms]]\nname='a'\npublished=true", "published must be a perplexity, a number above 0; got True"),
        ("[[arms]]\nname='a'\npublished=nan", "published must be a perplexity, a number above 0; got nan"),
        ("[[arms]]\nname='a'\npublished=0", "published must be a perplexity, a number above 0; got 0"),
        ("[[arms]]\nname='a'\npreset=3", "arm a: preset must be text; got 3; write it in quotes"),
        ("preset=3\n[[arms]]\nname='a'", "preset must be text; got 3; write it in quotes"),
        ("description=3\n[[arms]]\nname='a'", "description must be text; got 3; write it in quotes"),
        ("seeds=true\n[[arms]]\nname='a'", "seeds must be a whole number from 1 on; got True"),
        ("[train]\nseed=3\n[[arms]]\nname='a'", "arm a: seeds must be the study's own, .*; got train.seed=3; remove"),
        ("[[arms]]\nname='a'\ntrain.seed=3", "arm a: seeds must be the study's own, .*; got train.seed=3"),
        ("[grid]\n'train.seed'=[1, 2]\n[[arms]]\nname='a'", "seeds must be the study's own, .*; got train.seed=1"),
        ("[[arms]]\nname='a'\n[[arms]]\nname='a'", "a twice; rename"),
        ("[[arms]]\nname='a'\ntrain.lrr=1", "arm a: train.lrr must be a known key"),
        ("[[arms]]\nname='a'\npreset='papr'", "arm a: a preset must be one of"),
        ("[[arms]]\nname='a'\ntrain=1", "train must be a table of settings; got 1"),
        ("seeds=0\n[[arms]]\nname='a'", "seeds must be a whole number from 1 on; got 0"),
        ("[grid]\n'train.lr'=1\n[[arms]]\nname='a'", r"\[grid\] must hold lists"),
        ("[[arms]", "a study must be TOML"),
    ],
)
def test_a_study_file_with_a_fault(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text)


@pytest.mark.parametrize("assignment", ["train.seed=7", " train.seed = 7"])
def test_a_seed_by_assignment_is_refused(read, assignment):
    with pytest.raises(UserError, match=r"seeds must be the study's own, 1, 2 …; got .*7; remove it, and say how many"):
        read(assignments=[assignment])


def test_the_last_assignment_of_a_key_is_the_one_that_runs(read):
    arm = read(assignments=["train.lr=2", " train.lr=3"]).arms[0]
    assert arm.settings.train.lr == 3.0
    assert [word for word in arm.command(1, "there") if "train.lr" in word] == [" train.lr=3"]


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"assignments": ["train.lr=7", "train.clip=1"]}, "train.lr=7"),
        ({"assignments": [" train.lr = 7"]}, " train.lr = 7"),
        ({"data": "markov"}, "data.source=markov"),
        ({"data": "markov", "assignments": ["train.lr=7"]}, "data.source=markov, train.lr=7"),
    ],
)
def test_what_the_grid_varies_is_no_option(read, options, got):
    text = '[grid]\n"train.lr" = [1, 2]\n" data.source" = ["markov", "python-docs"]\n[[arms]]\nname = "a"\n'
    message = (
        f"must not set what \\[grid\\] varies; got {got} with a grid of data.source, train.lr in .*; leave the option"
    )
    with pytest.raises(UserError, match=message):
        read(text, **options)
    assert len(read(text, assignments=["train.clip=1"]).arms) == 4


@pytest.mark.parametrize(
    ("data", "assignments", "kept"),
    [
        ("markov", [], ["--data", "markov"]),
        (None, ["train.lr=2", "train.epochs=1"], ["--set", "train.lr=2", "--set", "train.epochs=1"]),
        ("/texts/it's", ["train.lr=2"], ["--data", "FOLDER", "--set", "train.lr=2"]),
        ("hf:one/two", [], ["--data", "hf:one/two"]),
        (None, [' data.source="/texts/a"'], ["--set", "data.source=FOLDER"]),
    ],
)
def test_a_summary_keeps_the_options_of_the_study(read, data, assignments, kept):
    plan = read(data=data, assignments=assignments)
    summary = study.summarize(plan, [row(plan.arms[0], 1, 10.0)])
    assert summary["options"] == kept
    command = summary["arms"][0]["command"]
    assert ("data.source=FOLDER" in command) == any("FOLDER" in word for word in kept)
    assert "/texts" not in " ".join(command)


@pytest.mark.parametrize("data", ["1984", "2024-01-01", "true"])
def test_data_is_text_whatever_it_looks_like(read, data):
    arm = read(data=data).arms[0]
    assert arm.settings.data.source == data
    assert f'data.source="{data}"' in arm.command(1, "there")


def test_the_sign_test_is_the_exact_binomial():
    seeds = range(10)
    first = dict.fromkeys(seeds, 1.0)
    second = dict.fromkeys(seeds, 2.0) | {0: 0.5, 20: 0.1}
    found = study.sign_test(first, second)
    assert (found["lower"], found["higher"], found["ties"]) == (9, 1, 0)
    assert found["p"] == pytest.approx(2 * (1 + 10) / 2**10)
    diverged = dict.fromkeys(seeds, math.inf)
    assert study.sign_test(diverged, diverged) == {"lower": 0, "higher": 0, "ties": 10, "p": 1.0}
    assert study.sign_test(first, diverged)["lower"] == 10
    assert study.sign_test(first, {99: 1.0})["p"] == 1.0


@pytest.mark.parametrize("n", [2, 5])
def test_the_sign_test_by_all_outcomes(n):
    """p is the chance, each seed a fair coin, of a count as far from even."""
    for outcome in itertools.product((0.0, 2.0), repeat=n):
        found = study.sign_test(dict.fromkeys(range(n), 1.0), dict(enumerate(outcome)))
        far = abs(sum(outcome) / 2 - n / 2)
        chance = np.mean([abs(sum(coins) - n / 2) >= far for coins in itertools.product((0, 1), repeat=n)])
        assert found["p"] == pytest.approx(chance)


def test_quartiles_are_numpys_and_know_infinity():
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 7.0]
    for share in (0, 0.25, 0.5, 0.75, 1):
        assert statistics.quantile(values, share) == pytest.approx(np.quantile(values, share))
    assert statistics.quantile([1.0, 2.0, math.inf], 0.5) == 2.0
    assert statistics.quantile([1.0, math.inf, math.inf, math.inf], 0.75) == math.inf


def row(arm, seed, ppl, diverged=False, **start):
    shown = {"arm": arm.name, "base": arm.base, "seed": seed, "diverged": diverged, "tokens_per_second": 10.0}
    shown["unit"] = None
    return {
        "row": {**shown, **dict.fromkeys(statistics.MEASURES, ppl), **dict.fromkeys(results._START), **start},
        "scores": [{"split": "test", "data_sha256": "d", "vocabulary_sha256": "v"}],
        "versions": {"torch": "2"},
    }


def test_a_summary_counts_a_diverged_run_as_the_worst(read):
    plan = read(SMALL, seeds=3)
    good, bad = plan.arms
    found = [row(good, 1, 10.0), row(good, 2, 12.0), row(good, 3, 1.0, diverged=True), row(bad, 1, 11.0)]
    summary = study.summarize(plan, found)
    first, second = summary["arms"]
    assert (first["runs"], first["diverged"], second["runs"]) == (3, 1, 1)
    assert first["test_exact"] == {"median": 12.0, "q1": 11.0, "q3": None, "min": 10.0, "max": None}
    assert summary["sign_tests"]["pairs"] == [
        {"first": "good", "second": "bad", "lower": 1, "higher": 0, "ties": 0, "p": 1.0}
    ]
    assert (summary["runs"], summary["runs_planned"]) == (4, 6)
    assert summary["data_sha256"] == {"test": ["d"]}
    assert "12.00" in study.table(summary)


STARTS = [
    {"kind": "start", "step": step, "epoch": 1, "position": 5 * step, "loss": 9.0 - step, "grad_norm": 0.5 * step}
    for step in (1, 2, 3)
]


def test_a_result_tells_how_the_run_began(read):
    job = read().jobs()[0]
    inside = {"kind": "internals", "step": 40, "statistics": {}, "gates": {}}
    log = [
        *STARTS,
        {"kind": "overflow", "step": 17, "epoch": 1},
        {**inside, "epoch": 1, "recurrent": {"weight_hh_l0": 3.0, "weight_hh_l1": 4.0}},
        {**inside, "epoch": 2, "recurrent": {"weight_hh_l0": 30.0, "weight_hh_l1": 40.0}},
    ]
    expected = {
        "first_window": 5,
        "start_loss": 8.0,
        "start_grad_norm": 1.5,
        "recurrent_norm": 5.0,
        "overflowed_at": 17,
    }
    assert expected.items() <= results.gather(job, log, [], None)["row"].items()
    beyond = {**inside, "epoch": 1, "recurrent": {"weight_hh_l0": None, "weight_hh_l1": 4.0}}
    assert results.gather(job, [beyond], [], None)["row"]["recurrent_norm"] is None
    for rest in ([{**inside, "epoch": 1}], log[-1:]):  # of an older version; without its first epoch
        assert results.gather(job, rest, [], None)["row"].items() >= dict.fromkeys(expected).items()


def test_which_runs_the_authors_program_finishes(read):
    arm = read().arms[0]
    told = {"first_window": 5}
    assert statistics.finishes(row(arm, 1, 9.0, **told)["row"]) is True
    assert statistics.finishes(row(arm, 1, 9.0, **told, overflowed_at=17)["row"]) is False
    assert statistics.finishes(row(arm, 1, 9.0, **told, diverged=True)["row"]) is False
    assert statistics.finishes(row(arm, 1, 9.0)["row"]) is None


def test_medians_are_given_both_ways(read):
    plan = read(SMALL.replace('name = "good"', 'name = "good"\npublished = 11.0'), seeds=5)
    good, bad = plan.arms
    told = {"first_window": 5}
    found = [row(good, seed, ppl, **told) for seed, ppl in ((1, 10.0), (2, 12.0), (3, 11.0))]
    found += [row(good, 4, 50.0, **told, overflowed_at=3), row(good, 5, 60.0, **told, overflowed_at=4)]
    found += [row(bad, 1, 20.0), row(bad, 2, 30.0)]
    summary = study.summarize(plan, found)
    first, second = summary["arms"]
    assert (first["test_exact"]["median"], first["finishing"]["test_exact"]["median"]) == (12.0, 11.0)
    assert (first["finishing"]["runs"], first["finishing"]["unknown"]) == (3, 0)
    assert (second["finishing"]["runs"], second["finishing"]["unknown"]) == (0, 2)
    assert second["finishing"]["test_exact"]["median"] is None
    head, *lines = (line.split() for line in study.table(summary).splitlines())
    assert head[-5:] == ["finishing", "runs", "their", "chunk-mean", "published"]
    assert lines[0] == ["good", "5", "0", "12.00", "12.00", "12.00", "3", "of", "5", "11.00", "11.0"]
    assert lines[1] == ["bad", "2", "0", "25.00", "25.00", "25.00", "unknown", "-", "-"]
    mixed = study.summarize(plan, [*found, row(bad, 3, 40.0, **told)])["arms"][1]
    assert statistics.shown_finishing(mixed) == "1 of 1, 2 unknown"


def test_perplexities_as_text():
    assert [statistics.shown(ppl) for ppl in (None, 12.345, 999_999.0, 1.26e82)] == [
        "-",
        "12.35",
        "999,999.00",
        "1.3e+82",
    ]
    assert statistics.shown(12_345.6, 0) == "12,346"


def test_a_result_of_an_older_version_is_unknown_there(read, tmp_path, recorded):
    """It lacks how the run began; a study that has it beside newer ones resumes and writes its tables."""
    folder, plan = tmp_path / "study", read(seeds=1)
    study.run(plan, folder, say=lambda _: None)
    path = folder / "results/good-seed-1.json"
    found = json.loads(path.read_text())
    for name in results._START:
        del found["row"][name]
    path.write_text(json.dumps(found))
    (folder / "results/bad-seed-1.json").unlink()
    run = results.run_folder(folder, plan.jobs()[1])
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STARTS))
    summary, _ = study.run(plan, folder, say=lambda _: None)
    assert [arm["finishing"]["unknown"] for arm in summary["arms"]] == [1, 0]
    rows = {row["arm"]: row for row in csv.DictReader((folder / "runs.csv").read_text().splitlines())}
    assert (rows["good"]["first_window"], rows["bad"]["first_window"]) == ("", "5")
    arms = list(csv.DictReader((folder / "arms.csv").read_text().splitlines()))
    assert {(row["arm"], row["finishing"], row["finishing_unknown"]) for row in arms} == {
        ("good", "0", "1"),
        ("bad", "1", "0"),
    }


def test_the_best_of_a_grid_is_selected(read):
    plan = read('[grid]\n"train.lr" = [1, 2]\n[[arms]]\nname = "a"\n[[arms]]\nname = "b"')
    found = [row(arm, 1, ppl) for arm, ppl in zip(plan.arms, (9.0, 8.0, 7.0, 8.0), strict=True)]
    summary = study.summarize(plan, found)
    assert [arm["arm"] for arm in summary["arms"] if arm["selected"]] == ["a_lr=2", "b_lr=1"]
    assert [(pair["first"], pair["second"]) for pair in summary["sign_tests"]["pairs"]] == [("a_lr=2", "b_lr=1")]


# By arm: unit, vocabulary, perplexity and bits per byte of valid; those of test are greater by 1.
UNITS = {
    "a_tokenizer=word": ("word", "w", 11.3, 1.2),
    "a_tokenizer=char": ("character", "c", 3.9, 2.0),
    "b_tokenizer=word": ("word", "w", 12.0, 1.5),
    "b_tokenizer=char": ("character", "c", 3.0, 1.1),
}
PIECES = {
    "a_vocab_size=100": ("token", "small", 5.0, 2.0),
    "a_vocab_size=200": ("token", "large", 9.0, 1.5),
}


def grid_of(read, key, values, bases):
    return read(f'[grid]\n"{key}" = {values}\n' + "".join(f'[[arms]]\nname = "{name}"\n' for name in bases))


def save_scored(folder, plan, of, seeds=(1, 2)):
    """Writes results of runs whose scores are those of their arms, in bits and in perplexity."""
    for job in plan.jobs():
        if job.arm.name in of and job.seed in seeds:
            unit, vocabulary, ppl, bits = of[job.arm.name]
            shared = {"protocol": "exact", "unit": unit, "vocabulary_sha256": vocabulary, "data_sha256": "d"}
            valid = {**shared, "split": "valid", "ppl": ppl, "bits_per_byte": bits}
            test = {**shared, "split": "test", "ppl": ppl + 1, "bits_per_byte": bits + 1}
            yield results.save(folder, job, [valid, test], None)


def test_arms_of_different_units_are_compared_by_bits_per_byte(read, tmp_path):
    plan = grid_of(read, "data.tokenizer", ["word", "char"], "ab")
    summary = study.summarize(plan, [*save_scored(tmp_path, plan, UNITS)])
    assert [arm["arm"] for arm in summary["arms"] if arm["selected"]] == ["a_tokenizer=word", "b_tokenizer=char"]
    assert summary["sign_tests"]["measure"] == "test_bits_per_byte"
    assert summary["sign_tests"]["pairs"][0].items() >= {"lower": 0, "higher": 1}.items()
    assert [arm["valid_bits_per_byte"]["median"] for arm in summary["arms"]] == [1.2, 2.0, 1.5, 1.1]
    head, first, *_, said = study.table(summary).splitlines()
    assert head.split()[-4:] == ["valid", "bits/byte", "test", "bits/byte"]
    assert first.split() == ["a_tokenizer=word", "1", "0", "1.200", "2.200"]
    assert "compared by bits per byte of the text" in said
    words = study.summarize(plan, [*save_scored(tmp_path, plan, dict.fromkeys(UNITS, UNITS["a_tokenizer=word"]))])
    assert (words["sign_tests"]["measure"], "valid_bits_per_byte" in words["arms"][0]) == ("test_exact", False)
    assert "bits" not in study.table(words)


def test_arms_with_different_vocabularies_of_pieces_are_compared_by_bits_per_byte(read, tmp_path):
    plan = grid_of(read, "data.vocab_size", [100, 200], "a")
    found = [*save_scored(tmp_path, plan, PIECES)]
    summary = study.summarize(plan, found)
    assert [arm["selected"] for arm in summary["arms"]] == [False, True]
    results.write(tmp_path, plan, found)
    arms = {
        (row["arm"], row["measure"]): row for row in csv.DictReader((tmp_path / "arms.csv").read_text().splitlines())
    }
    assert (len(arms), arms["a_vocab_size=200", "test_bits_per_byte"]["median"]) == (12, "2.5")
    runs = {row["arm"]: row for row in csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())}
    assert (runs["a_vocab_size=100"]["unit"], runs["a_vocab_size=100"]["valid_bits_per_byte"]) == ("token", "2.0")


def test_the_bits_of_a_result_of_an_older_version_are_those_of_its_scores(read, tmp_path):
    plan = grid_of(read, "data.vocab_size", [100, 200], "a")
    new = [*save_scored(tmp_path, plan, PIECES)]
    path = results.path_of(tmp_path, plan.jobs()[0])
    old = json.loads(path.read_text())
    for name in ("unit", *statistics.BITS):
        del old["row"][name]
    path.write_text(json.dumps(old))
    found = results.read(path)
    assert found["row"] == new[0]["row"]
    results.write(
        tmp_path, plan, [found | {"epochs": [{"epoch": 1}]}, new[1] | {"epochs": [{"epoch": 1, "bits": 2.0}]}]
    )
    assert (tmp_path / "epochs.csv").read_text() == "epoch,bits\n1,\n1,2.0\n"


@pytest.mark.slow
def test_a_study_runs_once_and_a_diverged_run_is_a_result(read, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = read(SMALL, seeds=1, data=str(corpus))
    folder, said = tmp_path / "study", []
    with pytest.raises(UserError, match="an arm must be one of good, bad; got better; correct --arm"):
        study.run(plan, folder, arms=["good", "better"], say=said.append)
    with pytest.raises(UserError, match="a seed must be one of 1 to 1; got 0, 2; correct --seed, or ask for more"):
        study.run(plan, folder, seeds=[0, 1, 2], say=said.append)
    part, _ = study.run(plan, folder, arms=["bad"], seeds=[1], say=said.append)
    assert (part["runs"], [path.name for path in (folder / "runs").iterdir()]) == (1, ["bad"])
    summary, stopped = study.run(plan, folder, jobs=2, say=said.append)
    assert stopped is None
    good, bad = (json.loads((folder / f"results/{name}-seed-1.json").read_text()) for name in ("good", "bad"))
    assert (good["row"]["diverged"], bad["row"]["diverged"], bad["diverged"]) == (False, True, "loss")
    assert (good["row"]["epochs"], len(good["epochs"])) == (2, 2)
    scored = {(score["split"], score["protocol"]): score["ppl"] for score in good["scores"]}
    assert len(scored) == 4
    for split, protocol in scored:
        assert good["row"][f"{split}_{protocol.replace('-', '_')}"] == scored[split, protocol]
    log = [json.loads(line) for line in (folder / "runs/good/seed-1/metrics.jsonl").read_text().splitlines()]
    assert scored["valid", "exact"] == pytest.approx(log[-1]["ppl"], rel=1e-6)
    first = stream.plan("uniform{2..9}", 100, seed=1, epoch=0)[0]
    starts = [line for line in log if line["kind"] == "start"]
    assert [line["step"] for line in starts] == list(range(1, 21))
    assert good["row"]["first_window"] == first[1]
    assert good["row"]["start_grad_norm"] == max(line["grad_norm"] for line in starts)
    assert good["row"]["recurrent_norm"] == next(
        line["recurrent"]["weight_hh_l0"] for line in log if line["kind"] == "internals"
    )
    assert good["row"]["overflowed_at"] is None
    best = min((line["ppl"], line["epoch"]) for line in log if line["kind"] == "valid")
    assert good["row"]["best_epoch"] == best[1]
    rows = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert {row["arm"]: row["diverged"] for row in rows} == {"good": "False", "bad": "True"}
    assert len(list(csv.DictReader((folder / "arms.csv").read_text().splitlines()))) == 8
    assert any("bad seed 1: diverged (loss)" in line for line in said)
    # again: nothing runs, the same comes out; with other settings it is refused
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(subprocess, "Popen", None)
    assert study.run(plan, folder, say=said.append) == (summary, None)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other = read(SMALL, seeds=1, data=str(corpus), assignments=["train.lr=0.25"])
    with pytest.raises(UserError, match=r"holds good seed 1 with others: train.lr is 0.5 there and 0.25 here"):
        study.run(other, folder)


def test_devices_are_given_out_one_for_each_run_at_a_time(read, tmp_path, monkeypatch):
    held, together = set(), []

    def record(self, job, device, log):
        assert device not in held
        held.add(device)
        together.append(len(held))
        time.sleep(0.05)
        held.remove(device)
        return row(job.arm, job.seed, 10.0) | {"epochs": [], "diverged": None}

    monkeypatch.setattr(runner._Runs, "_train_and_score", record)
    monkeypatch.setattr(runner, "_check", lambda *_: None)
    monkeypatch.setattr(StudyProgress, "finished", lambda *_: None)
    monkeypatch.setattr(results, "write", lambda *_: {})
    study.run(read(SMALL, seeds=4), tmp_path / "study", jobs=2, devices=("cuda:0", "cuda:1"), say=lambda _: None)
    assert len(together) == 8
    assert max(together) == 2


def test_arms_and_seeds_can_be_chosen(read, tmp_path, monkeypatch):
    begun = []

    def record(self, job, device, log):
        begun.append((job.arm.name, job.seed))
        return row(job.arm, job.seed, 10.0) | {"epochs": [], "diverged": None}

    monkeypatch.setattr(runner._Runs, "_train_and_score", record)
    monkeypatch.setattr(runner, "_check", lambda *_: None)
    monkeypatch.setattr(StudyProgress, "finished", lambda *_: None)
    monkeypatch.setattr(results, "write", lambda *_: {})
    study.run(read(SMALL, seeds=4), tmp_path / "study", arms=["bad"], seeds=[2, 4], say=lambda _: None)
    assert begun == [("bad", 2), ("bad", 4)]


@pytest.fixture
def recorded(monkeypatch):
    """Runs that train nothing but have a result in their folder; the jobs that were begun."""
    begun = []

    def record(self, job, device, log):
        begun.append((job.arm.name, job.seed))
        return results.save(self.folder, job, [SCORE | {"ppl": 10.0 + job.seed}], None)

    monkeypatch.setattr(runner._Runs, "_train_and_score", record)
    monkeypatch.setattr(runner, "_check", lambda *_: None)
    return begun


SCORE = {"split": "test", "protocol": "exact", "data_sha256": "", "vocabulary_sha256": "v"}


def test_fewer_seeds_discard_nothing(read, tmp_path, recorded):
    folder, said = tmp_path / "study", []
    before, _ = study.run(read(seeds=2), folder, say=said.append)
    tables = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    recorded.clear()
    assert study.run(read(seeds=1), folder, say=said.append) == (before, None)
    assert (recorded, before["seeds"], before["runs"], before["runs_planned"]) == ([], 2, 4, 4)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == tables
    assert said[-1] == "study small: 2 arms x 2 seeds, 4 of 4 runs are done"
    # one of seed 3, then what one seed lacks: nothing beyond it is begun, and nothing is forgotten
    study.run(read(seeds=3), folder, arms=["bad"], seeds=[3], say=said.append)
    results.path_of(folder, read().jobs()[0]).unlink()
    summary, _ = study.run(read(seeds=1), folder, say=said.append)
    assert recorded == [("bad", 3), ("good", 1)]
    assert (summary["seeds"], summary["runs"], summary["runs_planned"]) == (3, 5, 6)
    assert "# seeds 1 to 3\n" in (folder / "commands.txt").read_text()


def test_the_folder_of_another_study_is_refused(read, tmp_path, recorded):
    folder = tmp_path / "study"
    study.run(read(seeds=1), folder, say=lambda _: None)
    (folder / "results/notes.json").write_text("")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = read(SMALL.replace('"bad"', '"worse"'), seeds=1)
    with pytest.raises(
        UserError, match=r"results of the study's arms only; .* has bad; choose another folder with --run"
    ):
        study.run(other, folder, arms=["good"], say=lambda _: None)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    more = read(SMALL + '[[arms]]\nname = "worse"\n', seeds=1)
    assert study.run(more, folder, say=lambda _: None)[0]["runs"] == 3


@pytest.mark.parametrize("content", [b'{"row": {"ar', b"\xff\xfe\xfd", b"3", b'{"row": {}}', b""])
def test_a_damaged_result_is_named(read, tmp_path, recorded, content):
    folder, plan = tmp_path / "study", read(seeds=1)
    study.run(plan, folder, say=lambda _: None)
    (folder / "results/bad-seed-1.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"a result must .*results/bad-seed-1\.json.*; move it away and give the command"
    ):
        study.run(plan, folder, say=lambda _: None)
    (folder / "results/bad-seed-1.json").unlink()
    assert study.run(plan, folder, say=lambda _: None)[0]["runs"] == 2


def test_a_result_whose_row_lacks_something_is_named(read, tmp_path, recorded):
    study.run(read(seeds=1), tmp_path / "study", say=lambda _: None)
    path = tmp_path / "study/results/bad-seed-1.json"
    found = json.loads(path.read_text())
    del found["row"]["diverged"], found["row"]["test_exact"]
    path.write_text(json.dumps(found))
    with pytest.raises(
        UserError, match=r"a result must have diverged, test_exact in its row; .*bad-seed-1\.json has not"
    ):
        results.read(path)


def test_lines_of_a_log_that_are_not_a_runs_are_passed_over(read, tmp_path):
    job, log = read().jobs()[0], tmp_path / "metrics.jsonl"
    whole = [
        {"kind": "train", "epoch": 1, "tokens_per_second": 9.0},
        {"kind": "valid", "step": 9, "epoch": 1, "ppl": 50.0, "best": True},
        {"kind": "epoch", "epoch": 1, "ppl": 60.0, "seconds": 2.0},
    ]
    lines = [json.dumps(row).encode() for row in whole]
    lacking = [json.dumps(row | {"kind": kind}) for row in whole for kind in ("internals", "final", "diverged", 3, [])]
    foreign = [b"", b"3", b"null", b"[1]", b"\xff\xfe", b'"valid"', b"[" * 9999, lines[0][:20] + lines[1]]
    foreign += [b"{}", b'{"kind": "valid", "epoch": 1}', b'{"kind": "valid", "epoch": null, "ppl": 1, "best": true}']
    foreign += [line.encode() for line in lacking]
    log.write_bytes(b"\n".join(itertools.chain(*((line, *foreign) for line in lines))) + b"\n" + lines[0][:-5])
    assert results.metrics(tmp_path) == whole
    found = results.gather(job, results.metrics(tmp_path), [], None)
    assert (found["row"]["epochs"], found["row"]["best_epoch"], found["epochs"][0]["valid_ppl"]) == (1, 1, 50.0)
    assert results.metrics(tmp_path / "nowhere") == []
    log.unlink()
    log.mkdir()
    with pytest.raises(UserError, match=r"a run's log must be readable; .*metrics\.jsonl: Is a directory"):
        results.metrics(tmp_path)


def test_a_log_of_an_older_version_is_read(tmp_path):
    old = {"kind": "internals", "epoch": 1, "streams": {"norm_mean_l0": [0.0] * 5}, "gates": {}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    new = {"kind": "internals", "epoch": 1, "statistics": {"norm_mean_l0": [0.0] * 5}, "gates": {}}
    assert results.metrics(tmp_path) == [new]


def test_the_output_of_a_failed_run_is_reported(read, tmp_path, monkeypatch):
    (job, *_), said = read(seeds=1).jobs(), "error: the text must be there"

    def fail(self, job, out, log, arguments):
        (results.run_folder(tmp_path, job) / "metrics.jsonl").mkdir(parents=True)  # cannot be read
        log.write(f"begun\n{said}\n")
        log.flush()
        return 2, ""

    monkeypatch.setattr(runner._Runs, "_lm", fail)
    with pytest.raises(UserError, match="good seed 1 failed with exit code 2: the text must be there"):
        runner._Runs(tmp_path, 1, (), 1).work(job)


@pytest.mark.parametrize(
    "fault", [FileExistsError(17, "File exists", "runs/good"), ValueError("no\nJSON"), KeyError("ppl")]
)
def test_whatever_stops_a_job_is_its_own_failure(read, tmp_path, recorded, monkeypatch, fault):
    save, said = runner._Runs._train_and_score, []

    def fail(self, job, device, log):
        if job.arm.name == "good":
            raise fault
        return save(self, job, device, log)

    monkeypatch.setattr(runner._Runs, "_train_and_score", fail)
    message = rf"1 of 2 failed: good seed 1 failed: {type(fault).__name__}: .*; put it right"
    with pytest.raises(UserError, match=message):
        study.run(read(seeds=1), tmp_path / "study", say=said.append)
    assert said[1].startswith("good seed 1 failed: ")
    assert said[2].startswith("[1/2] bad seed 1: ")


@pytest.mark.parametrize("gone", [BrokenPipeError, RuntimeError])
def test_signals_are_passed_on_whatever_has_failed(read, tmp_path, monkeypatch, gone):
    """A job fails, and what says so fails too: the other job is stopped all the same."""
    ended = []

    def sleep(self, job, device, log):
        if job.arm.name == "good":
            raise OSError
        self.live[job] = subprocess.Popen(["sleep", "9"])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        ended.append(self.live[job].wait())
        raise runner._StoppedError

    def say(line):
        if "failed" in line:
            raise gone

    monkeypatch.setattr(runner._Runs, "_train_and_score", sleep)
    monkeypatch.setattr(runner, "_check", lambda *_: None)
    with pytest.raises((UserError, RuntimeError)):
        study.run(read(seeds=1), tmp_path / "study", jobs=2, say=say)
    assert ended == [-signal.SIGINT]


@pytest.mark.parametrize(("devices", "used"), [(("cpu",), "cpu"), ((), "cuda:7")])
def test_the_device_that_is_asked_for_is_used(read, tmp_path, monkeypatch, devices, used):
    """The study's file names one: `--device` is before it, and without `--device` it holds in scoring too."""
    job, commands = read(SMALL.replace("[train]", '[train]\ndevice = "cuda:7"'), seeds=1).jobs()[0], []

    def record(self, job, out, log, arguments):
        commands.append([*arguments])
        best = results.run_folder(tmp_path, job) / "checkpoints/best.safetensors"
        best.parent.mkdir(parents=True, exist_ok=True)
        best.touch()
        return 0, json.dumps([SCORE | {"ppl": 10.0}])

    monkeypatch.setattr(runner._Runs, "_lm", record)
    runner._Runs(tmp_path, 1, devices, 1).work(job)
    train, score = commands
    given = [after for word, after in itertools.pairwise(train) if word == "--set"]
    settings = config.build(config.override(config.preset("default"), given))
    assert (settings.train.device, "--device" in train) == (used, False)
    assert score[score.index("--device") + 1] == used


def test_the_commands_can_be_given_to_a_shell(read):
    description = 'description = """It\'s $HOME\nrm -rf /"""\n'
    plan = read(description + SMALL, data="it's; here")
    lines = runner._described(plan).splitlines()
    assert lines[:3] == ["# small: It's $HOME", "# rm -rf /", "# seeds 1 to 2"]
    for line, arm in zip(lines[3:], plan.arms, strict=True):
        assert shlex.split(line) == ["python", "-m", "lm", *arm.command("SEED", f"runs/{arm.name}/seed-SEED")]
        assert line.endswith(f" --seed SEED --run runs/{arm.name}/seed-SEED")


def test_a_folder_of_something_else_is_refused(read, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("")
    with pytest.raises(UserError, match="a study's folder must be empty or a study's own"):
        study.run(read(), tmp_path / "mine")


def test_what_no_run_can_do_is_refused_before_any_begins(read, tmp_path):
    for assignment, message in (
        ("data.source=nowhere", "got 'nowhere'"),
        ("train.backend=fast", "a backend must be one of auto"),
        ("train.device=cuda:99", "got 'cuda:99'"),
    ):
        with pytest.raises(UserError, match=message):
            study.run(read(assignments=["data.source=markov", assignment]), tmp_path / "study")
    book = tmp_path / "book.txt"
    book.write_text("the cat sat\n" * 300)
    with pytest.raises(UserError, match=r"book\.txt, .* must have a share for test; got data\.split=95/5/0"):
        study.run(read(data=str(book), assignments=["data.split=95/5/0"]), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_done(read, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = read(SMALL, seeds=1, data=str(corpus))
    (tmp_path / "study/runs/good/seed-1").mkdir(parents=True)
    (tmp_path / "study/runs/good/seed-1/diary.txt").write_text("")
    (tmp_path / "study/commands.txt").write_text("")
    message = r"every run of a study must end; 1 of 2 failed: good seed 1 .* exit code 2: a run folder must be empty"
    with pytest.raises(UserError, match=message):
        study.run(plan, tmp_path / "study", say=lambda _: None)
    assert [path.name for path in (tmp_path / "study/results").iterdir()] == ["bad-seed-1.json"]


@pytest.mark.slow
def test_a_study_that_is_stopped_or_killed_resumes(corpus, tmp_path, capsys, monkeypatch):
    """Ctrl-C saves and ends the runs. SIGKILL leaves them to end by themselves, and the next study waits for them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.toml").write_text(SMALL.rpartition("[[arms]]")[0])
    command = ["study", "one.toml", "--data", "text", "--seeds", "1", "--run", "out", "--set", "train.epochs=20"]
    log = tmp_path / "out/runs/good/seed-1/metrics.jsonl"

    def stop(number):
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen([sys.executable, "-m", "lm", *command], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200
        while not (log.exists() and log.stat().st_size > before + 1000) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        assert not list(tmp_path.glob("out/results/*"))
        return process.returncode, said

    code, said = stop(signal.SIGINT)
    assert code == 130
    assert "stopped by SIGINT; every run is saved; resume with the same command" in said
    assert "stopped by SIGINT after step" in (tmp_path / "out/runs/good/seed-1.log").read_text()
    code, _ = stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert main(command) == 0
    assert "1 of 1 runs" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, len(steps) + 1)), "no step twice: no two processes in one folder"
    assert len(json.loads((tmp_path / "out/results/good-seed-1.json").read_text())["epochs"]) == 20


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_moving_line_says_what_runs_and_fits_the_terminal(read, tmp_path, monkeypatch):
    terminal, said = Terminal(), []
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    plan = read(SMALL, seeds=2)
    first, other, *_ = plan.jobs()
    progress = StudyProgress(plan, tmp_path, [], said.append)
    assert said == ["study small: 2 arms x 2 seeds, 0 of 4 runs are done"]
    log = results.run_folder(tmp_path, first) / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    rows = [
        {"kind": "valid", "step": 9, "epoch": 1, "ppl": 1234.5, "best": True},
        {"kind": "train", "epoch": 2, "tokens_per_second": 9.0},
    ]
    foreign = '3\n{"kind": "valid"}\n'
    log.write_text("".join(json.dumps(row) + "\n" + foreign for row in rows) + '{"kind": "tr')
    progress._began -= 100.0
    progress._shown -= 100.0
    progress.show([first], stopped=False)
    # half a run in 100 s, three and a half to go
    assert terminal.getvalue().endswith("0/4 runs: good seed 1 epoch 1/2 valid 1,234.50, about 0:11:40 left")
    for line in (STARTS[0], {"kind": "overflow", "step": 3, "epoch": 1}, {"kind": "diverged", "epoch": 1, "what": ""}):
        log.write_text(json.dumps(line))
        assert progress._place(first) == (0, "")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("COLUMNS", "60")
    progress._shown -= 100.0
    progress.show([first, other], stopped=True)
    shown = terminal.getvalue().rpartition("\x1b[K")[2]
    assert shown.startswith("stopping, saving: good seed 1")
    assert len(shown) < 60
    found = row(first.arm, 1, 10.0)
    progress.finished(first, {"row": {**found["row"], "epochs": 2}, "diverged": None})
    assert said[-1] == "[1/4] good seed 1: best of 2 epochs: valid 10.00, test 10.00 (exact)"
    progress.finished(other, {"row": {**found["row"], "epochs": 2, "unit": "byte"}, "diverged": None})
    assert said[-1].endswith("test 10.00 (exact, per byte)")
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_results_of_another_text_are_not_the_studys(read, corpus, tmp_path):
    text = SMALL.rpartition("[[arms]]")[0].replace("epochs = 2", "epochs = 1")
    study.run(read(text, data=str(corpus), seeds=1), tmp_path / "out", say=lambda _: None)
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    assert study.run(read(text, data=str(other), seeds=1), tmp_path / "out", say=lambda _: None)[1] is None
    for split in ("valid", "test"):
        before = (other / f"{split}.txt").read_bytes()
        (other / f"{split}.txt").write_bytes(before + b"the cat\n")
        with pytest.raises(
            UserError, match=f"good seed 1 of another {split} text than .*other is now; restore that, or"
        ):
            study.run(read(text, data=str(other), seeds=2), tmp_path / "out", say=lambda _: None)
        (other / f"{split}.txt").write_bytes(before)
    shutil.rmtree(other)  # what is done is shown all the same
    assert study.run(read(text, data=str(other), seeds=1), tmp_path / "out", say=lambda _: None)[1] is None


def test_a_corpus_that_is_not_here_is_not_made_to_look_at_results(read, tmp_path):
    plan = read(assignments=[f"data.dir={tmp_path}/kept", "data.source=python-docs"], seeds=1)
    done = {job: {"scores": [{"split": "test", "data_sha256": "d"}]} for job in plan.jobs()}
    runner._require_same_text(done, tmp_path)
    assert not (tmp_path / "kept").exists()
