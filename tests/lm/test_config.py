import re
import tomllib

import pytest

from lm import config, stream
from lm.errors import UserError


def test_every_preset_is_a_valid_configuration():
    names = config.presets()
    assert {"default", "tied-512", "gru-online", "zaremba-small", "zaremba-medium", "zaremba-large"} <= set(names)
    for cell in ("rnn", "lstm"):
        for norm in ("online", "layer", "none"):
            built = config.build(config.preset(f"paper-{cell}-{norm}"))
            assert built.model.norm == norm
            assert built.model.cell.startswith(cell)
    assert all(config.build(config.preset(name)) and text for name, text in names.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper-lstm-online", {"train.lr": 6.5, "train.epochs": 25, "model.alpha_fwd": 1 - 2**-13}),
        ("paper-lstm-layer", {"train.lr": 3.25, "train.epochs": 25}),
        ("paper-lstm-none", {"train.lr": 3.5, "train.epochs": 25}),
        ("paper-rnn-online", {"train.lr": 1.7, "train.epochs": 40, "model.alpha_fwd": 1 - 2**-14}),
        ("paper-rnn-layer", {"train.lr": 0.95, "train.epochs": 40}),
        ("paper-rnn-none", {"train.lr": 0.5, "train.epochs": 40}),
    ],
)
def test_the_papers_recipe(name, expected):
    found = config.flatten(config.build(config.preset(name)))
    shared = {
        "data.source": "ptb",
        "model.hidden_size": 200,
        "model.num_layers": 1,
        "model.tied": True,
        "model.dropout": 0.0,
        "model.embedding_range": 0.1,
        "model.guard": "scale",
        "model.control_floor": 1e-5 if "online" in name else "none",
        "model.alpha_bwd": 1 - 2**-7 if "rnn" in name else 1 - 2**-5,
        "train.optimizer": "sgd",
        "train.weight_decay": 1e-6,
        "train.batch_size": 20,
        "train.window": "uniform{2..128}",
        "train.clip": "none",
        "train.schedule": "constant",
        "train.momentum": 0.0,
        "train.precision": "float32",
    }
    assert {key: found[key] for key in shared | expected} == shared | expected


PTB = {"data.source": "ptb", "data.tokenizer": "word", "model.cell": "lstm", "model.norm": "none"}
PYTORCH = PTB | {"model.num_layers": 2, "model.hidden_size": 200, "model.tied": True, "model.embedding_range": 0.1}
PYTORCH |= {"train.optimizer": "sgd", "train.lr": 20.0, "train.batch_size": 20, "train.window": "35"}
PYTORCH |= {"train.schedule": "plateau", "train.schedule_factor": 0.25, "train.schedule_patience": 0}
PYTORCH |= {"train.clip": 0.25, "train.epochs": 40, "model.dropout": 0.2, "train.weight_decay": 0.0}
VARIATIONAL = PYTORCH | {"model.locked_dropout": True, "model.recurrent_dropout": 0.2}
AWD = PTB | {"model.layer_sizes": [1150, 1150, 400], "model.embedding_size": 400, "model.tied": True}
AWD |= {"model.embedding_dropout": 0.1, "model.input_dropout": 0.4, "model.dropout": 0.25, "model.output_dropout": 0.4}
AWD |= {"model.weight_dropout": 0.5, "model.locked_dropout": True, "train.optimizer": "asgd", "train.lr": 30.0}
AWD |= {"train.batch_size": 20, "train.window": "awd{70}", "train.clip": 0.25, "train.weight_decay": 1.2e-6}
AWD |= {"train.ar": 2.0, "train.tar": 1.0, "train.average_patience": 5, "train.epochs": 500}
MIXTURE = {"model.embedding_size": 280, "model.layer_sizes": [960, 960, 620], "model.decoder": "mixture"}
MOGRIFIER = PTB | {"model.num_layers": 2, "model.tied": True, "model.mogrifier_rounds": 5, "model.mogrifier_rank": 84}
MOGRIFIER |= {"model.input_dropout": 0.729, "model.dropout": 0.291, "model.recurrent_dropout": 0.387}
MOGRIFIER |= {"model.output_dropout": 0.716, "model.cap_input_gate": True, "model.sum_layers": True}
MOGRIFIER |= {"train.optimizer": "rmsprop", "train.lr": 0.0023, "train.batch_size": 64, "train.window": "70"}


def zaremba(units, dropout, steps, clip, hold, divisor, epochs, spread):
    """Zaremba et al.: rate 1 on the sum of the nats of the steps, so `steps` on their mean."""
    return PTB | {
        **{"model.num_layers": 2, "model.hidden_size": units, "model.dropout": dropout, "model.tied": False},
        **{"train.optimizer": "sgd", "train.batch_size": 20, "train.window": f"{steps}", "train.lr": 1.0 * steps},
        **{"train.clip": pytest.approx(clip / steps), "train.schedule": "exponential", "train.schedule_hold": hold},
        **{"train.schedule_factor": pytest.approx(1 / divisor), "train.epochs": epochs, "model.init_range": spread},
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch-200", PYTORCH),
        ("pytorch-650", PYTORCH | {"model.hidden_size": 650, "model.dropout": 0.5}),
        ("variational-200", VARIATIONAL),
        (
            "variational-650",
            VARIATIONAL | {"model.hidden_size": 650, "model.dropout": 0.5, "model.recurrent_dropout": 0.3},
        ),
        ("zaremba-small", zaremba(200, 0.0, 20, 5, 4, 2, 13, 0.1)),
        ("zaremba-medium", zaremba(650, 0.5, 35, 5, 6, 1.2, 39, 0.05)),
        ("zaremba-large", zaremba(1500, 0.65, 35, 10, 14, 1.15, 55, 0.04)),
        ("awd-ptb", AWD),
        (
            "awd-wt2",
            AWD
            | {"data.source": "wikitext-2", "model.input_dropout": 0.65, "model.dropout": 0.2}
            | {"train.batch_size": 80, "train.epochs": 750},
        ),
        (
            "mos-ptb",
            AWD
            | MIXTURE
            | {"model.experts": 15, "model.latent_dropout": 0.29, "model.dropout": 0.225}
            | {"train.lr": 20.0, "train.batch_size": 12},
        ),
        (
            "mogrifier-ptb",
            MOGRIFIER
            # theirs are of the sum of the nats of 70 steps
            | {
                "train.clip": pytest.approx(10 / 70, rel=2e-3),
                "train.weight_decay": pytest.approx(2.5e-4 / 70, rel=0.01),
            },
        ),
    ],
)
def test_the_recipes_of_the_literature(name, expected):
    found = config.flatten(config.build(config.preset(name)))
    assert {key: found[key] for key in expected} == expected


def test_the_written_form_is_read_back_equal():
    built = config.build({"model": {"cell": "gru", "alpha_fwd": 0.1 + 0.2}, "train": {"clip": "none", "window": 35}})
    text = config.to_toml(built)
    assert config.build(tomllib.loads(text)) == built
    assert "# learning rate\nlr = " in text
    assert 'max_steps = "none"' in text


def test_a_list_is_written_on_one_line_and_read_back():
    built = config.build(config.preset("awd-ptb"))
    assert "\nlayer_sizes = [1150, 1150, 400]\n" in config.to_toml(built)
    assert config.build(tomllib.loads(config.to_toml(built))) == built
    given = config.assignment("model.layer_sizes", [7, 5])
    assert given == "model.layer_sizes=[7, 5]"
    assert config.override({}, [given]) == {"model": {"layer_sizes": [7, 5]}}


def test_rnn_is_short_for_rnn_tanh():
    assert config.build({"model": {"cell": "rnn"}}).model.cell == "rnn_tanh"


def test_assignments_are_toml_or_bare_text():
    tables = config.override(
        {"train": {"lr": 1.0, "epochs": 2}},
        ["train.lr=0.5", "model.cell=gru", "train.clip=none", 'data.source="a b"', "model.tied=false"],
    )
    assert tables == {
        "train": {"lr": 0.5, "epochs": 2, "clip": "none"},
        "model": {"cell": "gru", "tied": False},
        "data": {"source": "a b"},
    }
    built = config.build(tables)
    assert (built.train.clip, built.train.epochs, built.model.tied) == (None, 2, False)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trian": {}}, "trian must be a known section; got 'trian'; the known ones are data, model, train"),
        (
            {"train": {"lrr": 1}},
            r"train.lrr must be a known key of \[train\]; .* the known ones are epochs, max_steps",
        ),
        (
            {"model": {"cell": "lstn"}},
            "model.cell must be 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu'; got 'lstn'",
        ),
        ({"model": {"norm": "batch"}}, "model.norm must be 'none', 'online', 'layer' or 'rms'; got 'batch'"),
        ({"model": {"guard": "clip"}}, "model.guard must be 'scale', 'clamp' or 'none'; got 'clip'"),
        ({"eval": {"protocol": "fast"}}, "eval.protocol must be 'exact' or 'chunk-mean'; got 'fast'"),
        ({"model": {"alpha_fwd": 0.0}}, "model.alpha_fwd must be greater than 0; got 0.0"),
        ({"model": {"alpha_bwd": 1.5}}, "model.alpha_bwd must be less than or equal to 1; got 1.5"),
        ({"train": {"lr": "fast"}}, "train.lr must be a valid number; got 'fast'"),
        ({"train": {"epochs": 2.5}}, "train.epochs must be a valid integer; got 2.5"),
        ({"train": {"epochs": True}}, "train.epochs must be a valid integer; got True"),
        ({"train": {"lr": float("nan")}}, "train.lr must be"),
        ({"train": {"window": "uniform(2,128)"}}, "train.window: a window must be"),
        ({"train": {"window": 0}}, "train.window: a window must be"),
        ({"train": {"window": True}}, "train.window must be a valid string; got True"),
        ({"train": 3}, "train must be a valid dictionary or instance of TrainConfig; got 3"),
        (
            {"model": {"layer_sizes": [20, 10]}},
            "model.layer_sizes must have a size for each of the layers of model.num_layers; got 2 for 1",
        ),
        (
            {"model": {"cell": "gru", "mogrifier_rounds": 2}},
            "model.mogrifier_rounds and .* with the cell lstm; got gru",
        ),
        (
            {"model": {"num_layers": 2, "layer_sizes": [9, 8], "sum_layers": True}},
            r"model.sum_layers must be used with layers of one size; got \[9, 8\]",
        ),
        ({"model": {"decoder": "adaptive"}}, "model.decoder=adaptive must have an untied decoder; got a tied one"),
        ({"model": {"sparse_embedding": True}}, "model.sparse_embedding must have an untied decoder; got a tied one"),
        (
            {"model": {"sparse_embedding": True, "tied": False}, "train": {"optimizer": "sgd", "momentum": 0.5}},
            "model.sparse_embedding must be trained with train.optimizer sgd or asgd .*; got sgd, 0.5 and 0;",
        ),
        ({"model": {"cell": "gru", "cell_norm": True}}, "model.cell_norm must be used with the cell lstm; got gru"),
        (
            {"model": {"norm": "none", "cell_norm": True}},
            "model.cell_norm must be used with a norm; got model.norm=none",
        ),
        ({"model": {"dropout": 1.0}}, "model.dropout must be less than 1; got 1.0"),
    ],
)
def test_a_wrong_value_is_one_clear_line(tables, message):
    with pytest.raises(UserError, match=message) as caught:
        config.build(tables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "ptb",
        "none",
        "my texts",
        "1984",
        "2024-01-01",
        "1e3",
        "nan",
        "true",
        "[]",
        '"quoted"',
        " spaced ",
        "",
        "1\nb = 2",
    ],
)
def test_an_assignment_of_text_is_read_back_as_it_was(text):
    written = config.assignment("data.source", text)
    assert config.override({}, [written]) == {"data": {"source": text}}
    assert text != "ptb" or written == "data.source=ptb", "no quotes where none are needed"


@pytest.mark.parametrize("assignment", ["train.lr", "lr=1", "train.=1", ".lr=1", "=1", ""])
def test_a_wrong_assignment(assignment):
    with pytest.raises(UserError, match=r"--set must be section.key=value"):
        config.override({}, [assignment])


@pytest.mark.parametrize(
    ("chosen", "without", "given"),
    [
        ("data.split=80/10/10", "data.source=ptb", "data.source=hf:me/texts"),
        ("data.split=80/10/10", "data.source=.", "data.source=*.txt"),
        ("data.encoding=latin-1", "data.source=markov", "data.source=text.txt.gz"),
        ("data.encoding=latin-1", "data.source=hf:me/texts", "data.source=."),
        ("data.encoding=latin-1", "data.source=rows.parquet", "data.source=*.txt"),
        ("data.column=body", "data.source=wikitext-2", "data.source=hf:me/texts"),
        ("data.column=body", f"data.source={__file__}", "data.source=rows.parquet"),
        ("data.column=body", "data.source=python-docs", "data.source=."),
        ("data.min_count=3", "data.tokenizer=bpe", "data.tokenizer=word"),
        ("data.tokenizer_sample=99", "data.tokenizer=char", "data.tokenizer=bpe"),
        ("model.embedding_range=0.2", "model.init_range=0.1", "model.init_range=none"),
        ("model.alpha_fwd=0.5", "model.norm=layer", "model.norm=online"),
        ("model.alpha_bwd=0.5", "model.norm=layer", "model.norm=online"),
        ("model.control_floor=0.1", "model.norm=rms", "model.norm=online"),
        ("model.guard=clamp", "model.norm=none", "model.norm=online"),
        ("model.locked_dropout=true", "model.dropout=0.0", "model.output_dropout=0.1"),
        ("model.mogrifier_rank=2", "model.mogrifier_rounds=0", "model.mogrifier_rounds=2"),
        ("model.experts=2", "model.decoder=softmax", "model.decoder=mixture"),
        ("model.latent_dropout=0.2", "model.decoder=softmax", "model.decoder=mixture"),
        ("model.cutoffs=[9]", "model.decoder=softmax", "model.decoder=adaptive"),
        ("train.momentum=0.9", "train.optimizer=adam", "train.optimizer=asgd"),
        ("train.average_patience=2", "train.average=false", "train.average=true"),
        ("train.average=true", "train.stop_patience=5", "train.stop_patience=6"),
        ("train.schedule_factor=0.1", "train.schedule=cosine", "train.schedule=plateau"),
        ("train.schedule_hold=2", "train.schedule=plateau", "train.schedule=exponential"),
        ("train.schedule_patience=2", "train.schedule=exponential", "train.schedule=plateau"),
    ],
)
def test_a_setting_without_effect_is_warned_of_where_it_was_chosen(chosen, without, given):
    name = chosen.partition("=")[0]

    def warned(other, names, *assignments):
        settings = config.build(config.override({}, ["model.tied=false", other, *assignments]))
        return [*config.without_effect(settings, names)]

    (line,) = warned(without, {name, "train.lr"}, chosen)
    assert line.startswith(f"warning: {name} has no effect without ")
    assert given.startswith("data.source") or given.partition("=")[0] in line
    assert not warned(without, {"train.lr"}, chosen), "the preset's"
    assert not warned(without, {name, "train.lr"}), "the default"
    assert not warned(given, {name, "train.lr"}, chosen)


@pytest.mark.parametrize(
    ("source", "kind"), [("text8", "char"), ("ptb-char", "char"), ("enwik8", "byte"), ("ptb", "word")]
)
def test_a_corpus_is_trained_by_the_tokens_that_it_is_measured_by(source, kind):
    assert config.build({"data": {"source": source}}).data.tokenizer == kind
    named = {"data": {"source": source, "tokenizer": "unigram"}}
    assert config.build(named).data.tokenizer == "unigram"
    assert config.build(config.override(config.preset("default"), [f"data.source={source}"])).data.tokenizer == kind


def test_units_that_layers_and_embedding_have_of_their_own_are_warned_of():
    sizes = ["model.num_layers=2", "model.layer_sizes=[5, 4]", "model.hidden_size=9"]
    for more, count in (([], 0), (["model.embedding_size=3"], 1)):
        settings = config.build(config.override({}, [*sizes, *more]))
        assert len([*config.without_effect(settings, {"model.hidden_size"})]) == count


@pytest.mark.parametrize("table", [3, "x", [{"lr": 1.0}], None])
def test_a_value_is_put_into_a_table_only(table):
    with pytest.raises(UserError, match=r"train must be a table of settings; got .*; write \[train\]"):
        config.override({"train": table}, ["train.lr=1"])


def test_an_unknown_preset_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"must be one of awd-ptb, .*default, .*zaremba-small.*got 'papr'"):
        config.preset("papr")
    with pytest.raises(UserError, match="does not exist"):
        config.preset(str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text("[train\n")
    with pytest.raises(UserError, match=r"a preset must be TOML; .*mine\.toml"):
        config.preset(str(tmp_path / "mine.toml"))


def test_a_preset_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('description = "mine"\n[train]\nlr = 2.0\n')
    assert config.build(config.preset(str(tmp_path / "mine.toml"))).train.lr == 2.0


@pytest.mark.parametrize("arm", ["rnn-online", "rnn-layer", "rnn-none", "lstm-online", "lstm-layer", "lstm-none"])
def test_a_steady_preset_is_the_papers_with_clipping_and_nothing_else(arm):
    steady, literal = (config.build(config.preset(f"paper-{arm}{end}")) for end in ("-steady", ""))
    assert (steady.train.clip, literal.train.clip) == (5.0, None)
    assert steady.model_copy(update={"train": steady.train.model_copy(update={"clip": None})}) == literal


def test_a_preset_of_ones_own_may_change_another(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "paper-rnn-online-steady"\n[train]\nlr = 2.0\n[eval]\nchunk = 3\n')
    assert config.build(config.preset(str(tmp_path / "mine.toml"))) == config.build(
        config.override(config.preset("paper-rnn-online"), ["train.clip=5.0", "train.lr=2.0", "eval.chunk=3"])
    )


@pytest.mark.parametrize("base", ['"papr"', '"mine.toml"', "3", "[]"])
def test_a_base_is_a_preset_by_name(tmp_path, base):
    (tmp_path / "mine.toml").write_text(f"base = {base}\n")
    got = base.replace('"', "'")
    with pytest.raises(UserError, match="a preset's base must be one of awd-ptb, .*default, .*; got " + re.escape(got)):
        config.preset(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("text", ["train = 3", 'train = "x"', "[[train]]"])
def test_a_section_on_a_base_that_is_no_table(tmp_path, text):
    (tmp_path / "mine.toml").write_text(f'base = "paper-rnn-online"\n{text}\n')
    with pytest.raises(UserError, match="train must be a"):
        config.build(config.preset(str(tmp_path / "mine.toml")))


def test_every_key_is_described():
    found = list(config.describe())
    default = config.flatten(config.build(config.preset("default")))
    told = dict(line.strip().split("  ", 1) for line in found if re.match(r"  \w+\.", line))
    assert [name.partition("=")[0] for name in told] == [*default]
    assert {name.partition("=")[2].strip('"') for name in told if name.startswith("train.epochs")} == {"4"}
    assert all(len(meaning) > 3 for meaning in told.values())
    assert [line for line in found if line.startswith("[")] == [f"[{name}]" for name in config.Config.model_fields]
    assert max(map(len, found)) <= 106


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, "0x" + "f" * 5000])
def test_values_that_python_cannot_read(tmp_path, text):
    (tmp_path / "mine.toml").write_text(f"[train]\nlr = {text}\n")
    with pytest.raises(UserError, match=r"a preset must be TOML; .*mine\.toml|train\.lr must .*got a huge number"):
        config.build(config.preset(str(tmp_path / "mine.toml")))
    with pytest.raises(UserError, match=r"train\.lr must .*; got .*") as fault:
        config.build(config.override({}, [f"train.lr={text}"]))
    assert len(str(fault.value)) < 400


@pytest.mark.parametrize("key", ["train.batch_size", "train.warmup_steps", "model.hidden_size", "eval.chunk"])
def test_counts_have_an_end(key):
    with pytest.raises(UserError, match=f"{key} must be less than or equal to (10{{9}}|9{{9}}); got 10{{10}};"):
        config.build(config.override({}, [f"{key}=10000000000"]))


def test_an_empty_source_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.absolute(config.build({"data": {"source": ""}}).data).source == ""
    assert config.absolute(config.build({"data": {"source": "."}}).data).source == str(tmp_path)


def test_paths_are_text():
    with pytest.raises(UserError, match=r"must be UTF-8, as config\.toml is; got 'a\\udcffb'"):
        config.absolute(config.build({"data": {"source": "a\udcffb"}}).data)


def test_paths_hold_no_nul():
    with pytest.raises(UserError, match="must not hold the character NUL"):
        config.absolute(config.build({"data": {"source": "a\0b"}}).data)


@pytest.mark.parametrize(("old", "new"), [("none", "float32"), ("bfloat16", "bfloat16")])
def test_a_run_that_names_its_precision_as_version_0_1_does_still_loads(old, new):
    assert config.TrainConfig(autocast=old).precision == new


def test_what_tells_runs_apart():
    given = ["train.epochs=9", "model.cell=gru", "data.dir=/elsewhere", "train.device=cpu"]
    found = config.telling(config.build(config.override(config.preset("default"), given)))
    assert {*found} == {*config._LEADING, "train.epochs"}
    assert (found["model.cell"], found["train.epochs"], found["train.lr"]) == ("gru", 9, 0.004)


def test_the_steps_of_an_evaluation_are_those_of_a_window():
    """A window has nine digits at most."""
    assert stream.policy(str(config.build({"eval": {"chunk": 10**9 - 1}}).eval.chunk))
    with pytest.raises(UserError, match=r"eval\.chunk must .*; got 1000000000"):
        config.build({"eval": {"chunk": 10**9}})
