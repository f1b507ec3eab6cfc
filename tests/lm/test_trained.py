"""A trained model as users have it: evaluation mode, exact scores, next words, samples, types."""

import inspect
import math
import shutil
import typing

import pytest
import torch

import lm
from lm import checkpoint, config, run, stream
from lm.adaptation import Adaptation
from lm.errors import UserError
from lm.evaluator import evaluate

LINES = "the cat sat\n\nthe zebra ran on a mat\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of two layers with dropout; read-only for the tests."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text").mkdir()
    text = "the cat sat on a mat\na dog ran and slept\n\nthe dog sat\n" * 20
    for split in ("train", "valid", "test"):
        (place / "text" / f"{split}.txt").write_text(text)
    tables = {
        "data": {"source": str(place / "text")},
        "model": {"hidden_size": 8, "num_layers": 2, "dropout": 0.5},
        "train": {"batch_size": 3, "max_steps": 30, "lr": 0.05, "backend": "reference"},
    }
    run.train(config.build(tables), place / "run", say=lambda _: None)
    return place / "run"


@pytest.fixture(scope="module")
def trained(folder):
    return lm.load(folder, backend="reference")


def everything(trained):
    return {name: value.clone() for name, value in trained.model.state_dict().items()}


def test_equal_calls_give_equal_results_and_change_nothing(trained):
    assert isinstance(trained, lm.TrainedModel)
    assert not any(module.training for module in trained.model.modules())
    before, random = everything(trained), torch.get_rng_state()
    inputs = torch.tensor([[1, 2], [3, 4]])
    for call in (
        lambda: trained.model(inputs)[0].tolist(),
        lambda: trained.score(LINES),
        lambda: trained.token_log_probs(LINES),
        lambda: trained.next_words("the cat"),
        lambda: trained.sample("the cat", length=5),
        lambda: trained.score_split("test"),
    ):
        assert call() == call()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in everything(trained).items())


def test_torchs_default_dtype_does_not_matter(folder, trained):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = lm.load(folder, backend="reference")
        assert everything(found).keys() == everything(trained).keys()
        assert all(torch.equal(value, everything(trained)[name]) for name, value in everything(found).items())
        assert found.score(LINES) == trained.score(LINES)
    finally:
        torch.set_default_dtype(before)


def test_loading_moves_no_random_number(folder):
    before = torch.get_rng_state()
    lm.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_is_scored_exactly(trained):
    """By the definition, one token at a time: zero state, `<eos>` first, every token once, float64 sum."""
    ids = []
    for line in LINES.splitlines():
        ids += [*trained.tokenizer.encode(line), trained.tokenizer.eos]
    total, state, before = 0.0, None, trained.tokenizer.eos
    with torch.no_grad():
        for token in ids:
            hidden, state = trained.model(torch.tensor([[before]]), state)
            total -= trained.model.log_probs(hidden)[0, 0, token].double().item()
            before = token
    score = trained.score(LINES)
    assert score.nll == pytest.approx(total, rel=1e-6)
    assert score.ppl == math.exp(score.nll / 12)
    assert (score.protocol, score.tokens, score.words, score.eos, score.unk) == ("exact", 12, 9, 3, 1)
    assert trained.score("the cat") == trained.score("the cat\n") == trained.score("\ufeffthe cat\r\n")
    tokens = trained.token_log_probs(LINES)
    assert " ".join(token.text for token in tokens) == "the cat sat <eos> <eos> the <unk> ran on a mat <eos>"
    assert -math.fsum(token.log_prob for token in tokens) == pytest.approx(score.nll, rel=1e-12)


def test_a_split_is_scored_as_its_text(trained, folder):
    text = (folder.parent / "text/test.txt").read_text()
    assert trained.score_split("test", protocol="exact") == trained.score(text)
    other = trained.score_split("test", protocol="chunk-mean", data=str(folder.parent / "text"))
    encoded = stream.encode(text.splitlines(), trained.tokenizer)
    expected = evaluate(trained.model, encoded, trained.tokenizer, protocol="chunk-mean")
    assert other.ppl == expected.ppl
    assert trained.score_split("test", groups=True).by_position
    for data, message in (("", r"or a folder .*got ''"), ("nowhere", "got 'nowhere'")):
        with pytest.raises(UserError, match=message):
            trained.score_split("test", data=data)


def test_next_words_are_the_model_s(trained):
    size = trained.tokenizer.size
    found = trained.next_words("the cat", size + 5)
    assert len(found) == size == len({token.text for token in found})
    assert sum(token.prob for token in found) == pytest.approx(1)
    assert found == sorted(found, key=lambda token: -token.log_prob)
    assert trained.next_words("the cat", 3) == found[:3]
    assert found[0].text == trained.sample("the cat", length=1, temperature=0).split(" ")[-1].replace("\n", "<eos>")
    after = trained.token_log_probs("the cat sat")[2]
    assert next(token for token in found if token.text == "sat").log_prob == pytest.approx(after.log_prob, rel=1e-5)
    assert trained.next_words() != trained.next_words("the")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.next_words(count=0), "a count must be at least 1; got 0"),
        (lambda m: m.next_words("\udcff"), "a prompt must be UTF-8 text"),
        (lambda m: m.sample(temperature=-1), "a temperature must be at least 0; got -1"),
        (
            lambda m: m.score("the c\udcfft"),
            r"the text must be UTF-8 text; got 'the c\\udcfft', whose character 6 is not UTF-8",
        ),
        (lambda m: m.score_lines("\ud800"), "the text must be UTF-8 text"),
        (lambda m: m.token_log_probs("\ud800"), "the text must be UTF-8 text"),
        (lambda m: m.score_split("dev"), "a split must be one of train, valid, test; got 'dev'; choose one"),
        (lambda m: m.score_adapted("dev", Adaptation()), "a split must be one of train, valid, test; got 'dev'"),
        (lambda m: m.score(""), "a text must hold at least 2 tokens; got 0; use a longer text"),
        (lambda m: m.sample(seed=-1), r"a seed must be from 0 to 2\^63 - 1; got -1"),
        (lambda m: m.sample(seed=2**70), r"a seed must be from 0 to 2\^63 - 1; got 1180591620717411303424"),
        (lambda m: m.score_split("test", chunk=0), "a chunk must be at least 1 step; got 0"),
        (lambda m: m.gradient_rms(segment=0), "the segment of dynamic must be at least 1, and finite; got 0"),
        (lambda m: m.score("<eos>"), "text must not hold the word <eos>"),
    ],
)
def test_bad_input(trained, call, message):
    with pytest.raises(UserError, match=message):
        call(trained)


def test_pieces_are_named_as_the_vocabulary_writes_them(trained, tokenizer):
    from lm import tokenizers

    lines = ["the cat sat on the mat", "a dog \u2581 ran"] * 20
    for kind, size in (("char", None), ("bpe", 300)):
        own = tokenizers.train(kind, lines, size)
        ids = own.encode("the \u2581 cat")
        assert "".join(own.piece(i) for i in ids).replace("\u2581", " ").split() == ["the", "cat"]
        assert own.piece(own.eos) == "<eos>"


def test_no_model_is_made_that_the_file_does_not_hold(folder, tmp_path):
    """A small file may ask for a large model: 12 GiB here."""
    resource = pytest.importorskip("resource")
    place = shutil.copytree(folder, tmp_path / "run")
    best = place / "checkpoints/best.safetensors"
    saved = checkpoint.load(best)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (15_000, 10**9):
        model = {**saved["config"]["model"], "hidden_size": size}
        checkpoint.save(best, {**saved, "config": {**saved["config"], "model": model}})
        with pytest.raises(UserError, match=r"must hold the model of its configuration; got one in \S+ that does not"):
            lm.load(place)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="a run must be a folder that `train` made"):
        lm.load(tmp_path)


def test_an_older_version_s_run_gets_one_refusal(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "old")
    for path in (place / "checkpoints").iterdir():
        path.rename(path.with_suffix(".pt"))
    for which in ("best", "last"):
        with pytest.raises(UserError, match=r"must be a safetensors file; got \S+\.pt, which an older version"):
            lm.load(place, which=which)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    settings = config.build(config.read_toml(place / "config.toml", ""))
    with pytest.raises(UserError, match=r"must be a safetensors file; got \S+\.pt, which an older version"):
        run.train(settings, place, say=lambda _: None)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def public():
    """Every function that users call, and its owner's name."""
    for name in lm.__all__:
        value = getattr(lm, name)
        if inspect.isclass(value):
            yield from (
                (f"{name}.{key}", member)
                for key, member in vars(value).items()
                if not key.startswith("_") and inspect.isfunction(member)
            )
        yield name, value


def test_what_users_call_is_typed_and_documented():
    names = set()
    for name, member in public():
        names.add(name)
        hints = typing.get_type_hints(member)
        assert typing.Any not in hints.values(), name
        assert "Any" not in str(hints), name
        assert member.__doc__, name
        if not inspect.isclass(member):
            given = inspect.signature(member).parameters.keys() - {"self"}
            assert given < hints.keys(), name
            if name != "load":
                assert ">>>" in member.__doc__ or name == "TrainedModel.score_split", name
    assert {"load", "TrainedModel.score", "TrainedModel.next_words", "TrainedModel.sample"} <= names


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'lm' has no attribute 'train_fast'"):
        lm.train_fast  # noqa: B018
