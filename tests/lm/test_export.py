"""Exported files compute what the model does, in a process without this program."""

import json
import math
import os
import resource
import signal
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model

from lm import config, export, tokenizers
from lm.errors import UserError
from lm.model import LanguageModel
from lm.trained import TrainedModel


@pytest.fixture
def trained(model, tokenizer):
    """`trained(**model settings)`: a model whose statistics have moved."""

    def make(seed=0, **settings):
        net = model(seed, **settings)
        net(torch.randint(tokenizer.size, (20, 3)))
        counts = torch.ones(tokenizer.size)
        return TrainedModel(config.build({"model": {"hidden_size": 12, **settings}}), tokenizer, net, counts, {}, 1)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "settings"),
    [
        ("torchscript", {"cell_norm": True, "num_layers": 2, "tied": False, "embedding_size": 5}),
        ("torch-export", {"cell": "gru", "norm": "layer"}),
        ("onnx", {"guard": "clamp"}),
        ("torchscript", {"num_layers": 2, "layer_sizes": [7, 9], "norm": "none"}),
        ("onnx", {"num_layers": 2, "locked_dropout": True, "norm": "none"}),
    ],
)
def test_an_export_computes_what_the_model_does(trained, tmp_path, tokenizer, to, settings):
    for package in export.FORMATS[to].needs + export.FORMATS[to].check_needs:
        pytest.importorskip(package)
    source, path = trained(dropout=0.5, **settings), tmp_path / "new/file"
    source.model.train()
    worst = export.export(source, to, path)
    assert worst is not None
    assert worst < 1e-5
    assert source.model.training
    assert [found.name for found in path.parent.iterdir()] == ["file"]
    if to != "torchscript":
        assert b"export.py" not in path.read_bytes()  # nor any other place of the machine that wrote it
    assert tokenizers.from_state(json.loads(_tokenizer(to, path))).sha256 == tokenizer.sha256


def _tokenizer(to, path):
    found = {"tokenizer.json": ""}
    if to == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.load(str(path), _extra_files=found)
    elif to == "torch-export":
        with path.open("rb") as file:
            torch.export.load(file, extra_files=found)
    else:
        import onnx

        found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return found["tokenizer.json"]


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"num_layers": 2}, [(2, 3, 12)] * 2),
        ({"num_layers": 2, "locked_dropout": True}, [(2, 3, 12)] * 2),
        ({"num_layers": 2, "locked_dropout": True, "cell": "gru"}, [(2, 3, 12)]),
        ({"num_layers": 2, "layer_sizes": [7, 9]}, [(1, 3, 7), (1, 3, 7), (1, 3, 9), (1, 3, 9)]),
    ],
)
def test_the_state_of_a_file_is_the_documented_one(trained, settings, shapes):
    net = trained(**settings).model.eval()
    states, tokens = [torch.randn(shape) for shape in shapes], torch.randint(9, (4, 3))
    function = export._Function(net, make_loop=export._Steps)
    with torch.no_grad():
        scores, *after = function(tokens, *states)
        _, *between = function(tokens[:3], *states)
        last, *_ = function(tokens[3:], *between)
    assert [tuple(state.shape) for state in after] == shapes
    torch.testing.assert_close(last, scores[3:])


@pytest.mark.parametrize("fault", ["junk", "another"])
def test_a_file_that_is_wrong_gets_no_name(trained, tmp_path, monkeypatch, fault):
    form = export.FORMATS["torchscript"]

    def content(model, example, tokenizer):
        return b"junk" if fault == "junk" else form.content(trained(seed=2).model.eval(), example, tokenizer)

    monkeypatch.setattr(export, "FORMATS", {"torchscript": replace(form, content=content)})
    text = "must load in a fresh process; got an error" if fault == "junk" else "got a difference of"
    with pytest.raises(UserError, match=text):
        export.export(trained(seed=1), "torchscript", tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"mogrifier_rounds": 2}, {"cap_input_gate": True}, {"sum_layers": True}])
def test_models_without_a_plain_form_are_refused(trained, tmp_path, settings):
    with pytest.raises(UserError, match=r"a model to export must have model.mogrifier_rounds=0, .*; got "):
        export.export(trained(**settings), "torchscript", tmp_path / "file")
    assert not [*tmp_path.iterdir()]


def test_a_file_is_not_written_over(trained, tmp_path):
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(UserError, match=r"written to a new file; got .*file, which exists; choose another"):
        export.export(trained(), "torchscript", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/model must be writable"):
        export.export(trained(), "torch-export", tmp_path / "file/model")


@pytest.mark.parametrize("to", [*export.FORMATS, *export.TABLES])
def test_a_full_disk_is_one_clear_error(trained, tmp_path, to):
    if to in export.FORMATS:
        for package in export.FORMATS[to].needs:
            pytest.importorskip(package)
    source = trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_worst", lambda *_: None)
        with _file_limit(20), pytest.raises(UserError, match=r"new/file must be writable; File too large; check"):
            export.export(source, to, tmp_path / "new/file")
        assert not [*(tmp_path / "new").iterdir()]
        (tmp_path / "new").chmod(0o500)
        if not os.access(tmp_path / "new", os.W_OK):  # root writes everywhere
            with pytest.raises(UserError, match=r"new/file must be writable; Permission denied"):
                export.export(source, to, tmp_path / "new/file")


@contextmanager
def _file_limit(size):
    """Inside, no file may have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_missing_packages_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx needs the packages onnx, onnxscript; .*pip install 'rnnorm\[export\]'"):
        export.export(trained(), "onnx", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_run_here_is_said(trained, tmp_path, monkeypatch):
    form = export.FORMATS["torchscript"]
    monkeypatch.setattr(export, "FORMATS", {"torchscript": replace(form, check_needs=("a_runtime_of_elsewhere",))})
    assert export.export(trained(), "torchscript", tmp_path / "file") is None
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_alone_load_without_this_program(trained, tmp_path, tied):
    source, path = trained(tied=tied), tmp_path / "new/weights.safetensors"
    assert export.export(source, "safetensors", path) is None
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert tokenizers.from_state(json.loads(found["tokenizer"])).sha256 == source.tokenizer.sha256
    assert config.build(json.loads(found["settings"])) == source.config
    other = LanguageModel(source.config.model, source.tokenizer.size)
    load_model(other, path)
    for name, value in source.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with pytest.raises(UserError, match="must be written to a new file"):
        export.export(source, "safetensors", path)


def test_embeddings_are_word2vec_s_text(trained, tmp_path):
    source = trained()
    export.export(source, "embeddings", tmp_path / "words.txt")
    head, *rows = (tmp_path / "words.txt").read_text().splitlines()
    assert head == f"{source.tokenizer.size} 12"
    assert [row.split(" ")[0] for row in rows] == [source.tokenizer.piece(i) for i in range(source.tokenizer.size)]
    found = torch.tensor([[float(value) for value in row.split(" ")[1:]] for row in rows])
    assert torch.equal(found, source.model.embedding.weight)
    characters = replace(source, tokenizer=tokenizers.train("char", ["a b\t\u00a0cdefg"]))
    export.export(characters, "embeddings", tmp_path / "characters.txt")
    rows = (tmp_path / "characters.txt").read_text().split("\n")[1:-1]
    assert {"<U+0020>", "<U+0009>", "<U+00A0>"} <= {row.split(" ")[0] for row in rows}
    assert {len(row.split()) for row in rows} == {13}


def test_no_two_embeddings_have_one_name(trained, tmp_path):
    """A byte of a token from sentencepiece is named as `<0x09>` is."""
    source = trained()
    source = replace(source, model=LanguageModel(source.config.model, 270))
    pieces = tokenizers.train("bpe", ["if x:\t\ta\u00a0b" * 3, "a\tb\tc\u00a0d"] * 40, 270)
    assert pieces.size == 270
    export.export(replace(source, tokenizer=pieces), "embeddings", tmp_path / "pieces.txt")
    names = [row.split(" ")[0] for row in (tmp_path / "pieces.txt").read_text().split("\n")[1:-1]]
    assert len(names) == len({*names}) == 270
    assert {"<0x09>", "<U+0009>"} <= {*names}


@pytest.mark.slow
def test_a_file_that_computes_nan_is_not_taken_for_equal(trained):
    net, form = trained().model, export.FORMATS["torchscript"]
    content, worst = export._checked(trained(), form)
    assert worst <= export.TOLERANCE
    with torch.no_grad():
        net.decoder.bias.fill_(torch.nan)
    assert math.isnan(export._worst(net, form, content))
