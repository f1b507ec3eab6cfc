import copy
import importlib
import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lm import optim, stream
from lm.averages import estimate_statistics
from lm.config import TrainConfig
from lm.evaluator import Score, evaluate
from lm.events import Diverged, EndedEarly, EpochEnded, Interrupted, Started, Stepped, Validated
from lm.model import Objective
from lm.trainer import DivergedError, Trainer, TrainerState, _next_epoch, _seed


@pytest.fixture
def trainer(model, text, tokenizer):
    """`trainer(listeners, train settings, **model settings)` over a text that ends raggedly in 3 columns."""

    def make(listeners=(), settings=None, **model_settings):
        net, valid = model(**model_settings), text(20, seed=1)
        plain = {"epochs": 2, "batch_size": 3, "window": "7", "lr": 0.5, "optimizer": "sgd", "clip": None}
        config = TrainConfig(**plain | (settings or {}))
        data = stream.columns(text(40).ids, config.batch_size, tokenizer.eos)
        assert data.last < config.batch_size
        score = lambda: evaluate(net, valid, tokenizer, protocol="columns", batch_size=2)  # noqa: E731
        made = Trainer(net, config, data, score, listeners)
        made.scored = (valid, tokenizer)
        return made

    return make


def everything(trainer):
    """Every tensor and number that a run ends with."""
    found = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    kept = copy.deepcopy(trainer.state_dict())
    for number, state in kept["optimizer"]["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    found |= {f"averages.{name}": value for name, value in kept["averages"].get("model", {}).items()}
    found |= {f"state.{number}": value for number, value in enumerate(kept["carried"])}
    return found, kept["trainer"], kept["optimizer"]["param_groups"]


def assert_equal_to_the_bit(ours, theirs):
    assert ours[1:] == theirs[1:]
    assert ours[0].keys() == theirs[0].keys()
    for name, value in ours[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[0][name]), name
        else:
            assert value == theirs[0][name], name


CASES = {
    "sgd": ({"weight_decay": 1e-6}, {}),
    "momentum": ({"momentum": 0.9, "lr": 0.05, "schedule": "exponential"}, {"norm": "layer", "cell": "gru"}),
    "asgd": ({"optimizer": "asgd", "average_patience": None, "clip": 0.25}, {"alpha_fwd": 31 / 32}),
    "adam": ({"optimizer": "adam", "lr": 0.01, "schedule": "cosine"}, {"cell": "rnn_relu"}),
    "adamw": ({"optimizer": "adamw", "lr": 0.01, "warmup_steps": 9}, {"norm": "none"}),
    "mogrifier": ({"optimizer": "rmsprop", "lr": 0.01}, {"mogrifier_rounds": 2, "sum_layers": True, "num_layers": 2}),
    "mixture": ({}, {"decoder": "mixture", "experts": 3, "locked_dropout": True, "embedding_size": 5}),
    "adaptive": (
        {"optimizer": "asgd", "average_patience": None, "clip": 0.5},
        {"decoder": "adaptive", "sparse_embedding": True, "tied": False},
    ),
    "rmsprop": ({"optimizer": "rmsprop", "lr": 0.01, "average": True, "average_patience": None}, {"norm": "none"}),
    "plateau": ({"lr": 3.0, "clip": 0.5, "schedule": "plateau", "patience": 9}, {"cell": "rnn_tanh"}),
    "cell norm": ({"window": "awd{9}"}, {"cell_norm": True, "num_layers": 2}),
    "bfloat16": ({"precision": "bfloat16"}, {}),
    "bfloat16 decoder": ({"precision": "bfloat16-decoder"}, {}),
    "parts": ({"accumulate": 2}, {"num_layers": 2}),
    "sizes": (
        {"ar": 2.0, "tar": 1.0},
        {"num_layers": 2, "layer_sizes": [7, 12], "locked_dropout": True, "weight_dropout": 0.5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_bits(trainer, case):
    assert_resumed_with_the_same_bits(trainer, case)


def assert_resumed_with_the_same_bits(trainer, case):
    settings, model_settings = CASES[case]
    settings = {"window": "uniform{2..9}", "log_every": 3} | settings
    model_settings = {"dropout": 0.3, "embedding_dropout": 0.1} | model_settings
    events, kept = [], {}
    whole = trainer([events.append], settings, **model_settings)

    def keep(event):
        if isinstance(event, Stepped | EpochEnded):
            file = io.BytesIO()
            torch.save({"model": whole.model.state_dict(), **whole.state_dict()}, file)
            kept[whole.state.step] = file.getvalue()  # where events are deferred, beyond the event's step

    whole.listeners.append(keep)
    whole.fit()
    between = next(event.step for event in events if isinstance(event, EpochEnded))
    assert 3 < between < whole.state.step - 3
    expected = everything(whole)
    inside = next(step for step in kept if step > between)
    assert inside < whole.state.step
    for step in (3, between, inside):  # inside the first epoch, between two, inside the last
        again = []
        resumed = trainer([again.append], settings, seed=99, **model_settings)  # other weights, to be replaced
        torch.manual_seed(step)
        loaded = torch.load(io.BytesIO(kept[step]), weights_only=True)
        resumed.model.load_state_dict(loaded["model"])
        resumed.load_state_dict(loaded)
        resumed.fit()
        assert_equal_to_the_bit(everything(resumed), expected)
        assert logged(again) == logged(e for e in events if e.step > step)


@pytest.mark.parametrize("case", ["sgd", "asgd", "plateau"])
def test_a_run_whose_events_are_deferred_resumes_with_the_same_bits(trainer, case):
    """As on a GPU: the last step of a kept state is one whose events were just emitted."""
    assert_resumed_with_the_same_bits(lambda *given, **named: deferred(trainer(*given, **named)), case)


def logged(events):
    """Every logged number but times, of the events that a resumed run repeats."""
    rows = []
    for event in events:
        if isinstance(event, Stepped):
            rows.append((event.step, event.epoch, event.nll, event.epoch_nll, event.lr, event.grad_norm))
        elif isinstance(event, Validated):
            rows.append((event.step, event.epoch, event.score, event.best))
        elif isinstance(event, EpochEnded):
            rows.append((event.step, event.epoch, event.nll, event.tokens))
    return rows


def test_the_loss_falls_and_every_token_counts_once_an_epoch(trainer, text):
    events = []
    run = trainer([events.append], {"epochs": 4, "lr": 3.0})
    assert run.fit() == "epochs"
    ended = [e for e in events if isinstance(e, EpochEnded)]
    assert [e.tokens for e in ended] == [len(text(40).ids)] * 4
    assert ended[-1].nll < ended[0].nll
    steps = [e for e in events if isinstance(e, Stepped)]
    assert [e.step for e in steps] == list(range(1, len(steps) + 1))
    assert sum(e.nll * e.tokens for e in steps if e.epoch == 1) == pytest.approx(ended[0].nll)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_step_equal_the_whole_without_norm(trainer, cell, count):
    settings = {"batch_size": 5, "lr": 1.0, "momentum": 0.5, "clip": 0.5, "window": "uniform{2..9}", "ar": 2, "tar": 1}
    whole, parts = (
        trainer((), {**settings, "accumulate": accumulate}, norm="none", cell=cell) for accumulate in (1, count)
    )
    assert len(parts.parts) == count
    for run in (whole, parts):
        run.fit()
    ours, theirs = everything(parts), everything(whole)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)
    assert ours[1]["nll"] == pytest.approx(theirs[1]["nll"], rel=1e-6)
    assert ours[1]["step"] == theirs[1]["step"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sparse_gradient_trains_as_a_dense_one(trainer, accumulate):
    runs, norms = [], []
    for sparse in (True, False):
        events = []
        settings = {"clip": 0.1, "lr": 1.0, "accumulate": accumulate}
        run = trainer([events.append], settings, tied=False, sparse_embedding=sparse, norm="none")
        run.fit()
        runs.append(everything(run)[0])
        norms.append([event.grad_norm for event in events if isinstance(event, Stepped)])
    assert run.model.embedding.weight.grad.is_sparse is False
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0.1, "every step was clipped"


def test_statistics_see_the_parts_in_order(trainer):
    run = trainer((), {"batch_size": 4, "accumulate": 2, "max_steps": 1, "lr": 1e-12})
    alone = copy.deepcopy(run.model)
    run.fit()
    window = run.data.window(0, 7)
    for columns in (slice(0, 2), slice(2, 4)):
        hidden, _ = alone(window.inputs[:, columns])
        total, _ = alone.loss(hidden, window.targets[:, columns])
        (total / 28).backward()
    buffers = dict(alone.named_buffers())
    assert buffers["layers.norm_v_l0"].any()
    for name, value in run.model.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_order_of_events(trainer):
    events = []
    trainer([events.append], {"epochs": 2}).fit()
    kinds = [type(e) for e in events if not isinstance(e, Stepped)]
    assert kinds == [Started, Validated, EpochEnded, Validated, EpochEnded]
    assert events[0].tokens == events[-1].tokens


def test_the_state_is_carried_within_an_epoch_and_zero_at_its_start(trainer):
    run = trainer((), {"epochs": 2})
    seen = []
    run.model.layers.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]) if layer.training else None)
    run.fit()
    per_epoch = len(seen) // 2
    assert [state is None for state in seen] == ([True] + [False] * (per_epoch - 1)) * 2
    assert not any(part.requires_grad for state in seen if state is not None for part in state)


def test_one_seed_one_run(trainer):
    runs = [trainer((), {"seed": seed, "window": "uniform{2..9}"}, dropout=0.5) for seed in (1, 1, 2)]
    for number, run in enumerate(runs):
        torch.manual_seed(number)  # what came before the run does not matter
        run.fit()
    first, again, other = (everything(run) for run in runs)
    assert_equal_to_the_bit(first, again)
    assert not torch.equal(first[0]["model.decoder.weight"], other[0]["model.decoder.weight"])


def test_clipping_bounds_the_gradient_and_the_norm_is_from_before(trainer):
    seen, events = [], []

    def grads(_):
        norms = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
        if norms:
            seen.append(torch.stack(norms).norm().item())

    run = trainer([events.append, grads], {"clip": 0.05, "epochs": 1})
    run.fit()
    steps = [e for e in events if isinstance(e, Stepped)]
    assert max(seen) <= 0.0501
    assert min(e.grad_norm for e in steps) > 0.05


def test_awd_windows_scale_the_rate(trainer):
    events = []
    trainer([events.append], {"window": "awd{10}", "epochs": 1}).fit()
    steps = [e for e in events if isinstance(e, Stepped)]
    lengths = [b.position - a for a, b in zip([0, *(e.position for e in steps)], steps, strict=False)]
    assert [e.lr for e in steps] == [pytest.approx(0.5 * n / 10) for n in lengths]
    assert len(set(lengths)) > 1


def test_awd_windows_move_the_weights_at_their_own_rate(trainer):
    """Each step at the rate of its own window; `torch.optim.ASGD` takes that of the window before."""
    moved = []

    def look(event):
        after = run.model.decoder.bias.detach().clone()
        if isinstance(event, Stepped):
            moved.append((before[-1], event.lr, run.model.decoder.bias.grad.clone(), after))
        before.append(after)

    before = []
    run = trainer([look], {"window": "awd{10}", "epochs": 1, "optimizer": "asgd", "average_patience": None})
    run.fit()
    assert len({rate for _, rate, _, _ in moved}) > 1
    for start, rate, grad, end in moved:
        torch.testing.assert_close(end, start - rate * grad, rtol=1e-6, atol=1e-7)


def test_max_steps_stops_inside_an_epoch(trainer):
    events = []
    run = trainer([events.append], {"max_steps": 4, "epochs": 9})
    for _ in range(2):
        assert run.fit() == "max_steps"
        assert run.state.step == 4
        nats = events[-1].nats
        assert events[-1] == EndedEarly(1, 4, nats)
        score = run.validate()
        assert nats == score.nll / score.tokens
    assert [type(event) for event in events[-4:]] == [Interrupted, EndedEarly, Started, EndedEarly]


class Penalized(Objective):
    """A regularizer as one may be added: in the objective alone."""

    def forward(self, window, state, per_change):
        loss, nats, state = super().forward(window, state, per_change)
        return loss + 10 * nats.detach() * self.model.decoder.bias.square().sum(), nats, state


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_is_differentiated_and_not_reported(trainer, monkeypatch, accumulate):
    runs, seen = [], []
    for objective in (Objective, Penalized):
        monkeypatch.setattr("lm.trainer.Objective", objective)
        events = []
        run = trainer([events.append], {"max_steps": 1, "accumulate": accumulate})
        torch.nn.init.constant_(run.model.decoder.bias, 0.1)
        run.fit()
        runs.append(run)
        seen.append(next(e for e in events if isinstance(e, Stepped)))
    assert seen[0].nll == seen[1].nll
    assert seen[0].grad_norm < seen[1].grad_norm
    assert not torch.equal(runs[0].model.decoder.bias, runs[1].model.decoder.bias)
    assert torch.equal(runs[0].model.layers.weight_hh_l0, runs[1].model.layers.weight_hh_l0)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_penalize_as_the_whole_where_columns_end_early(trainer, text, tokenizer, monkeypatch, count):
    """A last window of two rows, whose second only one of four columns reaches: five targets, one change."""
    ids, told = text(40).ids, []

    class Told(Objective):
        def forward(self, window, state, per_change):
            told.append(per_change)
            return super().forward(window, state, per_change)

    monkeypatch.setattr("lm.trainer.Objective", Told)
    ids, norms = ids[: len(ids) - (len(ids) - 1) % 4], []
    settings = {"batch_size": 4, "window": str(len(ids) // 4 - 1), "max_steps": 2, "lr": 1e-6, "tar": 100.0}
    for accumulate in (1, count):
        run, events = trainer((), {**settings, "accumulate": accumulate}, norm="none", dropout=0.0), []
        data = stream.columns(ids, 4, tokenizer.eos)
        Trainer(run.model, run.config, data, run.validate, [events.append]).fit()
        norms.append([event.grad_norm for event in events if isinstance(event, Stepped)])
    first = len(ids) // 4 - 1
    assert told == [ratio for parts in (1, count) for ratio in [first / (first - 1)] * parts + [5.0] * parts]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("key", ["ar", "tar"])
def test_activations_are_penalized_and_not_reported(trainer, key):
    seen = []
    for factor in (0.0, 5.0):
        trainer([seen.append], {"max_steps": 1, key: factor}).fit()
    plain, penalized = (event for event in seen if isinstance(event, Stepped))
    assert plain.nll == penalized.nll
    assert plain.grad_norm != penalized.grad_norm


def test_a_request_to_stop_ends_after_the_step(trainer):
    events = []
    run = trainer([events.append, lambda e: run.stop("SIGTERM") if e.step == 3 else None], {})
    assert run.fit() == "SIGTERM"
    assert run.state.step == 3
    assert events[-1] == Interrupted(1, 3, "SIGTERM")


def test_early_stopping(trainer):
    run = trainer((), {"lr": 1e-12, "epochs": 50, "patience": 2})
    scores = iter([3.0, 2.0, 2.0, 2.5, 1.0])
    run.validate = lambda: Score("columns", 1.0, 1.0, next(scores), 1)
    assert run.fit() == "patience"
    assert (run.state.epoch, run.state.best, run.state.stale) == (4, 2.0, 2)


@pytest.mark.parametrize(("patience", "ends"), [(0, 3), (1, 4), (2, 6), (5, 8), (9, 11)])
def test_a_run_ends_where_averaging_would_begin(trainer, patience, ends):
    settings = {"stop_patience": patience, "epochs": len(CURVE), "window": "999", "lr": 1e-3}
    run = trainer((), settings)
    scripted(run, CURVE)
    assert run.fit() == ("patience" if ends < len(CURVE) else "epochs")
    assert run.state.epoch == ends


def test_plateau_history():
    config = TrainConfig(schedule="plateau", schedule_patience=1)
    progress, seen = TrainerState(), []
    for nats in (3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 1.0, 1.1):
        progress = _next_epoch(config, progress, nats)
        seen.append((progress.falls, progress.stale))
    assert seen == [(0, 0), (0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 0), (2, 1)]


def test_asgd_validates_the_average_and_trains_the_weights(trainer):
    run = trainer((), {"optimizer": "asgd", "average_patience": None, "epochs": 1, "lr": 2.0})
    seen = []
    validate = run.validate
    run.validate = lambda: (seen.append(run.model.decoder.weight.detach().clone()), validate())[1]
    run.fit()
    average = run.averages.model.decoder.weight
    assert torch.equal(seen[0], average)
    assert not torch.equal(run.model.decoder.weight, average)


CURVE = [9.0, 8.0, 8.5, 8.25, 8.0, 8.125, 7.0, 8.0625, 6.0, 6.5, 6.75]


def scripted(run, curve):
    """Lets the validations to come find these nats per token."""
    left = iter(curve)
    run.validate = lambda: Score("columns", 1.0, 1.0, next(left), 1)


@pytest.mark.parametrize(("patience", "begins"), [(0, 3), (1, 4), (2, 6), (3, 6), (5, 8), (9, None)])
def test_averaging_begins_after_the_epoch_of_the_law(trainer, patience, begins):
    """After 8.5, greater than 8 just before; after 8.25, one later; after 8.125 (8.0 is not greater than 8); ..."""
    settings = {"optimizer": "asgd", "average_patience": patience, "epochs": len(CURVE), "window": "999", "lr": 1e-3}
    run, averaging = trainer((), settings), {}
    scripted(run, CURVE)
    run.listeners.append(lambda e: averaging.update({e.epoch: run.averages}) if isinstance(e, EpochEnded) else None)
    run.fit()
    began = [epoch for epoch, found in averaging.items() if found is not None]
    assert began == list(range(begins or 99, len(CURVE) + 1))
    assert run.state.valid == tuple(CURVE)
    if begins:
        assert run.averages.steps == len(CURVE) - begins  # one step an epoch; none before the trigger


@pytest.mark.parametrize("epoch", range(1, 9))
def test_a_resumed_run_begins_to_average_where_it_would_have(trainer, epoch):
    settings = {"optimizer": "asgd", "average_patience": 2, "epochs": 8, "lr": 0.1}
    kept = {}
    whole = trainer((), settings, alpha_fwd=31 / 32, dropout=0.3)
    scripted(whole, CURVE)
    state = lambda: copy.deepcopy({"model": whole.model.state_dict(), **whole.state_dict()})  # noqa: E731
    whole.listeners.append(lambda e: kept.update({e.epoch: state()}) if isinstance(e, EpochEnded) else None)
    whole.fit()
    assert [bool(at["averages"]) for at in kept.values()] == [False] * 5 + [True] * 3
    resumed = trainer((), settings, seed=99, alpha_fwd=31 / 32, dropout=0.3)
    scripted(resumed, CURVE[epoch:])
    resumed.model.load_state_dict(kept[epoch]["model"])
    resumed.load_state_dict(kept[epoch])
    resumed.fit()
    assert_equal_to_the_bit(everything(resumed), everything(whole))


def test_averages_are_validated_with_separate_statistics_and_the_models_are_restored(trainer):
    run = trainer(
        (), {"optimizer": "asgd", "average_patience": None, "epochs": 1, "lr": 2.0}, dropout=0.5, alpha_fwd=31 / 32
    )
    validate, seen = run.validate, []

    def look():
        seen.append((copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.averages.model.state_dict())))
        return validate()

    run.validate = look
    raw = {}
    run.listeners.append(
        lambda e: raw.update(copy.deepcopy(run.model.state_dict())) if isinstance(e, Stepped) else None
    )
    run.fit()
    ((scored, kept),) = seen
    estimated = copy.deepcopy(run.averages.model)
    estimated.load_state_dict(scored | {name: raw[name] for name, _ in estimated.named_buffers()})
    estimate_statistics(estimated, run.data, "7")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, raw[name]), "after the validation the model is as the last step left it"
        assert torch.equal(scored[name], kept[name])
        assert torch.equal(scored[name], estimated.state_dict()[name])
        moves = not re.search(r"norm_[uv]_", name)
        assert torch.equal(scored[name], value) != moves, name


@pytest.mark.parametrize("where", ["loss", "gradient", "validation"])
def test_what_is_not_finite_stops_the_run_before_the_weights_move(trainer, where):
    events = []
    run = trainer([events.append], {"epochs": 1})
    if where == "loss":
        run.listeners.append(
            lambda e: torch.nn.init.constant_(run.model.decoder.bias, math.nan) if e.step == 3 else None
        )
    elif where == "gradient":
        run.listeners.append(lambda e: poison(run.model) if e.step == 3 else None)
    else:
        run.validate = lambda: Score("columns", math.nan, math.nan, math.nan, 1)
    with pytest.raises(DivergedError, match=f"the {where}.* is not finite after"):
        run.fit()
    assert isinstance(events[-1], Diverged)
    assert not any(isinstance(e, EpochEnded) for e in events)
    if where != "validation":
        assert run.state.step == 3
        assert torch.isfinite(run.model.embedding.weight).all()


def poison(model):
    return model.embedding.weight.register_hook(lambda grad: grad * math.inf)


def test_listeners_see_the_weights_that_were_scored(trainer):
    """Saving the best inside the event keeps the average; `last` is saved after, with the weights."""
    seen = {}
    run = trainer((), {"optimizer": "asgd", "average_patience": None, "epochs": 1, "lr": 2.0})
    run.listeners.append(lambda e: seen.update({type(e): run.model.decoder.weight.detach().clone()}))
    run.fit()
    assert not torch.equal(seen[Validated], seen[EpochEnded])
    assert torch.equal(seen[Validated], run.averages.model.decoder.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are read back once for several steps, as on a GPU; here on the CPU and on the device `meta`.


def deferred(run):
    run.deferred = True
    return run


def test_a_step_has_its_share_of_the_time_of_those_read_with_it(trainer):
    """So tokens per second are the same for all of them, however long their windows."""
    found = []
    run = deferred(trainer([found.append], {"window": "uniform{2..9}", "log_every": 5, "max_steps": 5}))
    run.fit()
    speeds = [event.tokens / event.seconds for event in found if isinstance(event, Stepped)]
    assert len({event.tokens for event in found if isinstance(event, Stepped)}) > 1
    assert speeds == pytest.approx([speeds[0]] * 5)


def without_times(events):
    return [
        replace(event, seconds=0.0, **({"following": 0} if isinstance(event, Stepped) else {}))
        if isinstance(event, Stepped | EpochEnded)
        else event
        for event in events
    ]


@pytest.mark.parametrize("case", CASES)
def test_numbers_read_back_later_are_the_same(trainer, case):
    settings, model_settings = CASES[case]
    settings = {"window": "uniform{2..9}", "log_every": 4, **settings}
    at_once, later, seen = [], [], []
    ours = deferred(trainer([later.append], settings, dropout=0.3, **model_settings))
    theirs = trainer([at_once.append], settings, dropout=0.3, **model_settings)
    ours.listeners.append(lambda e: seen.append((e.step, ours.state.step)) if isinstance(e, Stepped) else None)
    ours.fit()
    theirs.fit()
    assert_equal_to_the_bit(everything(ours), everything(theirs))
    assert without_times(later) == without_times(at_once)
    assert {done for _, done in seen if done % 4} == {e.step for e in later if isinstance(e, EpochEnded) and e.step % 4}
    assert [e.following for e in later if isinstance(e, Stepped)] == [done - step for step, done in seen]
    assert all(e.following == 0 for e in at_once if isinstance(e, Stepped))


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 1e-3, "clip": 0.1},
        {"optimizer": "adam", "lr": 0.01, "accumulate": 2},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "asgd", "average_patience": None},
    ],
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_named(trainer, where, settings):
    events = []
    run = deferred(trainer([events.append], {"epochs": 1, "log_every": 7, **settings}))
    calls, kept = [], []

    def forward(module, inputs, output):
        if run.model.training:
            calls.append(1)
            if run.state.step == 3 and not kept:
                kept.extend(copy.deepcopy(list(run.model.parameters())))
                return output * math.nan if where == "loss" else Poisoned.apply(output)

    run.model.embedding.register_forward_hook(forward)
    with pytest.raises(DivergedError, match=f"the {where}.* is not finite after 3 steps"):
        run.fit()
    assert len(calls) == 7 * run.config.accumulate, "read with the seventh step"
    assert [(type(e), e.step) for e in events] == [(Started, 0), *((Stepped, n) for n in (1, 2, 3)), (Diverged, 3)]
    assert [e.following for e in events[1:4]] == [6, 5, 4], "no checkpoint of a broken run"
    assert run.state.step == 3
    assert run.state.nll == events[3].epoch_nll
    for now, then in zip(run.model.parameters(), kept, strict=True):
        assert torch.equal(now, then)


class Poisoned(torch.autograd.Function):
    """The input; its gradient is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize("later", [False, True])
def test_a_run_that_diverged_trains_on_from_a_state_before(trainer, later):
    run = trainer((), {"epochs": 1, "lr": 0.1})
    run.deferred = later
    kept = copy.deepcopy({"model": run.model.state_dict(), **run.state_dict()})
    hook = poison(run.model)
    with pytest.raises(DivergedError):
        run.fit()
    hook.remove()
    run.model.load_state_dict(kept["model"])
    run.load_state_dict(kept)
    assert run.fit() == "epochs"
    assert not torch.equal(run.model.embedding.weight, kept["model"]["embedding.weight"])


def test_what_is_asked_of_a_run_is_read_back_first(trainer):
    events = []
    run = deferred(trainer([events.append], {"max_steps": 3, "log_every": 100}))
    run.fit()
    assert [type(e) for e in events] == [Started, Stepped, Stepped, Stepped, Interrupted, EndedEarly]
    whole = trainer((), {"max_steps": 3})
    whole.fit()
    assert run.state == whole.state
    run = deferred(trainer((), {"log_every": 100}))
    run._step(0, 7)
    assert run.state.nll == 0
    assert run.state_dict()["trainer"]["nll"] > 0


_ON_THE_CPU = ("aten::_assert_async", "aten::_fused_adam_", "aten::_fused_adamw_")  # read nothing back on a GPU
_WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")


MODELS = [
    *(pytest.param(optimizer, {}, id=optimizer) for optimizer in ("sgd", "asgd", "adam", "adamw")),
    pytest.param("sgd", {"decoder": "mixture", "experts": 3, "embedding_size": 5}, id="mixture"),
    pytest.param("rmsprop", {"mogrifier_rounds": 2, "cap_input_gate": True}, id="mogrifier"),
]


@pytest.mark.parametrize(("optimizer", "shape"), MODELS)
def test_a_step_that_is_not_logged_reads_nothing_back(trainer, monkeypatch, optimizer, shape):
    """Every operation of a step, inside our operators and the optimizer too, as a GPU would run them."""
    # what the CPU reads where a GPU compares on the device
    loss = importlib.import_module("rnnorm.ops.linear_cross_entropy")
    monkeypatch.setattr(loss, "_check_targets", loss._assert_in_range)
    monkeypatch.setattr("rnnorm.ops.library.math", SimpleNamespace(isfinite=lambda _: False))
    settings = {"optimizer": optimizer, "average_patience": None, "log_every": 100, "clip": 0.25, "accumulate": 2}
    dropped = {"dropout": 0.2, "embedding_dropout": 0.1}
    run = deferred(trainer((), settings, backend="scripted", num_layers=2, **dropped, **shape))
    run._step(0, 7)
    with torch.profiler.profile() as profile:
        run._step(7, 14)
        run._step(14, 21)
    assert len(profile.events()) > 100
    assert [
        event.name for event in profile.events() if event.name in _WAITS and not is_inside(event, _ON_THE_CPU)
    ] == []
    assert len(run._unread) == 3


def is_inside(event, names):
    while event is not None and event.name not in names:
        event = event.cpu_parent
    return event is not None


class Crossings(TorchDispatchMode):
    """Lists the operations between devices that move more than one number."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in pytree.tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
            self.found.append(func)
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_stays_on_its_device(trainer, monkeypatch, optimizer):
    """On `meta`, where no number can be read and no operation mixes devices."""
    dropped = {"dropout": 0.2, "embedding_dropout": 0.1}
    cpu = trainer((), {"optimizer": optimizer, "log_every": 100, "clip": 0.25}, backend="auto", **dropped)
    build = optim.build

    def unfused(model, config):
        optimizer = build(cpu.model, config)
        groups = [{**group, "params": list(model.parameters()), "fused": False} for group in optimizer.param_groups]
        return type(optimizer)(groups)

    monkeypatch.setattr(optim, "build", unfused)  # fused ones refuse `meta`
    run = deferred(Trainer(cpu.model.to("meta"), cpu.config, cpu.data, cpu.validate))
    run._step(0, 7)
    with Crossings() as crossings:
        run._step(7, 14)
    assert crossings.found == []
    window = run.parts[0][1].window(14, run.data.steps)
    assert (window.lengths.device.type, window.mask.device.type) == ("cpu", "meta")
    with pytest.raises(RuntimeError, match="meta"):
        run._read_back()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_seeded_as_by_torch(where, request):
    if where == "cuda":
        request.getfixturevalue("cuda")
    numbers = []
    for seed in (torch.manual_seed, lambda value: _seed(torch.device(where), value)):
        torch.rand(3, device=where)
        seed(2**64 - 3)
        numbers.append([torch.rand(5, device=device) for device in {"cpu", where}])
    assert all(map(torch.equal, *numbers))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@pytest.fixture
def on_cuda(trainer, cuda):
    """`on_cuda(…)`: as `trainer(…)`, on the GPU and with its kernels; the validation too."""

    def make(*given, **named):
        cpu = trainer(*given, **{"backend": "auto", **named})
        score = lambda: evaluate(cpu.model, *cpu.scored, protocol="columns", batch_size=2)  # noqa: E731
        return Trainer(cpu.model.to(cuda), cpu.config, cpu.data, score, cpu.listeners)

    return make


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "shape"), MODELS)
def test_a_step_on_a_gpu_waits_for_nothing(on_cuda, optimizer, shape, waiting_for_nothing):
    settings = {"optimizer": optimizer, "average_patience": None, "log_every": 100, "clip": 0.25}
    run = on_cuda((), settings, dropout=0.2, **shape)
    assert run.deferred
    run._step(0, 7)
    with waiting_for_nothing():
        run._step(7, 14)
        run._step(14, 21)
    run._read_back()
    assert run.state.nll > 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_gpu_equals_one_on_the_cpu(trainer, on_cuda, case):
    settings, model_settings = CASES[case]
    settings = {**settings, "max_steps": 6, "log_every": 4, "precision": "float32"}
    model_settings = {**model_settings, "weight_dropout": 0.0}  # whose masks each device draws by itself
    there, here = [], []
    on_cuda([there.append], settings, **model_settings).fit()
    trainer([here.append], settings, **model_settings).fit()
    for ours, theirs in zip(there, here, strict=True):
        if isinstance(ours, Stepped):
            assert (ours.step, ours.position) == (theirs.step, theirs.position)
            assert ours.nll == pytest.approx(theirs.nll, rel=1e-3)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_on_a_gpu_ends_with_the_same_bits(on_cuda, case):
    assert_resumed_with_the_same_bits(on_cuda, case)


@pytest.mark.gpu
def test_a_run_moves_between_devices(trainer, on_cuda):
    runs = [trainer, on_cuda, trainer, on_cuda]
    saved = None
    for number, make in enumerate(runs, 1):
        run = make((), {"max_steps": 2 * number, "optimizer": "adam", "lr": 0.01})
        if saved is not None:
            run.model.load_state_dict(saved["model"])
            run.load_state_dict(saved)
        run.fit()
        assert run.state.step == 2 * number
        saved = copy.deepcopy({"model": run.model.state_dict(), **run.state_dict()})
