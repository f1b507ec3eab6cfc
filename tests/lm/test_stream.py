"""The stream by hand; the windows of any plan over any columns partition it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from lm import stream, tokenizers
from lm.errors import UserError
from lm.text import Text

POLICIES = some.one_of(
    some.integers(1, 12).map(str),
    some.tuples(some.integers(1, 9), some.integers(0, 9)).map(lambda p: f"uniform{{{p[0]}..{p[0] + p[1]}}}"),
    some.integers(1, 20).map(lambda n: f"awd{{{n}}}"),
)


def test_a_stream_is_the_words_of_each_line_then_eos():
    lines = ["the cat  sat ", "", "\tthe <unk>\r", "caf\u00e9 dog"]
    table = tokenizers.train("word", lines[:3])
    found = stream.encode(lines, table)
    the, unk, eos = table.encode("the")[0], table.unk, table.eos
    cat, sat = table.encode("cat sat")
    assert found.ids.tolist() == [the, cat, sat, eos, eos, the, unk, eos, unk, unk, eos]
    assert found.ids.dtype == np.int64
    assert (found.words, found.eos, found.unk) == (7, 4, 3)
    assert found.bytes == len("the cat sat\n\nthe <unk>\ncaf\u00e9 dog\n".encode())


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_lossless_stream_is_the_whole_text(kind: str):
    content = "  a \t b\u4f60\n\n c".encode()
    table = tokenizers.train(kind, Text(content))
    found = stream.encode(Text(content), table)
    assert table.to_bytes(found.ids.tolist()) == content
    assert (found.words, found.eos, found.bytes, found.characters) == (3, 2, 14, 12)
    assert [found.units(unit) for unit in ("word", "token", "character", "byte")] == [5, len(found.ids), 12, 14]
    assert found.counts(table.size).tolist() == np.bincount(found.ids, minlength=table.size).tolist()


def test_no_line_is_no_token():
    found = stream.encode([], tokenizers.train("word", ["a"]))
    assert (found.ids.shape, found.words, found.eos, found.bytes) == ((0,), 0, 0, 0)


def test_columns_by_hand():
    cut = stream.columns(np.arange(10, 21), 4, eos=7)
    inputs, targets = cut.gather(0, cut.steps)
    assert targets.tolist() == [[10, 13, 16, 19], [11, 14, 17, 20], [12, 15, 18, 0]]
    assert inputs.tolist() == [[7, 12, 15, 18], [10, 13, 16, 19], [11, 14, 17, 0]]
    assert cut.last == 3
    first, last = cut.window(0, 1), cut.window(1, 3)
    assert first.lengths is None
    assert first.mask is None
    assert last.lengths is not None
    assert last.mask is not None
    assert last.lengths.tolist() == [2, 2, 2, 1]
    assert last.mask.tolist() == [[True] * 4, [True, True, True, False]]


def test_nothing_is_padded_when_the_columns_are_equal():
    cut = stream.columns(np.arange(12), 4, eos=0)
    assert cut.last == 4
    assert cut.window(2, 3).mask is None
    assert cut.window(0, 3).lengths is None


@settings(deadline=None, max_examples=200)
@given(some.data(), some.integers(1, 9), POLICIES, some.integers(0, 2**63 - 1), some.integers(0, 5))
def test_windows_partition_the_stream(data, width: int, policy: str, seed: int, epoch: int):
    ids = np.array(data.draw(some.lists(some.integers(0, 30), min_size=2 * width, max_size=150)))
    cut = stream.columns(ids, width, eos=31)
    steps = cut.steps
    read: list[list[tuple[int, int]]] = [[] for _ in range(width)]
    windows = stream.plan(policy, steps, seed, epoch)
    assert windows[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(windows))
    assert windows[-1][1] == steps
    assert windows[-1][1] - windows[-1][0] > 1
    for start, stop in windows:
        window = cut.window(start, stop)
        lengths = torch.full((width,), stop - start) if window.lengths is None else window.lengths
        assert lengths.min() >= 1
        for b, length in enumerate(lengths.tolist()):
            pairs = zip(window.inputs[:length, b].tolist(), window.targets[:length, b].tolist(), strict=True)
            read[b] += pairs
            assert not window.targets[length:, b].any()
            if window.mask is not None:
                assert window.mask[:, b].tolist() == [i < length for i in range(stop - start)]
    pairs = [pair for column in read for pair in column]
    assert [target for _, target in pairs] == ids.tolist()
    assert [token for token, _ in pairs] == [31, *ids[:-1].tolist()]
    sizes = [len(column) for column in read]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=100)
@given(some.data(), some.integers(1, 9), some.integers(1, 9))
def test_parts_hold_the_columns_once(data, width: int, count: int):
    ids = np.arange(data.draw(some.integers(2 * width, 60)))
    cut = stream.columns(ids, width, eos=0)
    stretches = stream.parts(width, count)
    assert [start for start, _ in stretches] + [width] == [0] + [stop for _, stop in stretches]
    sizes = [stop - start for start, stop in stretches]
    assert max(sizes) - min(sizes) <= 1
    shares = [cut.part(*stretch) for stretch in stretches if stretch[0] < stretch[1]]
    steps = cut.steps
    assert torch.equal(torch.cat([share.gather(0, steps)[1] for share in shares], 1), cut.gather(0, steps)[1])
    for start, stop in ((0, steps), (max(0, steps - 2), steps), (0, 1)):
        whole, windows = cut.window(start, stop), [share.window(start, stop) for share in shares]
        active = [window.targets.numel() if window.mask is None else int(window.mask.sum()) for window in windows]
        assert active == [share.active(start, stop) for share in shares]
        assert sum(active) == cut.active(start, stop)
        assert torch.equal(torch.cat([window.inputs for window in windows], 1), whole.inputs)
        lengths = [torch.full(w.inputs.shape[1:], stop - start) if w.lengths is None else w.lengths for w in windows]
        assert torch.cat(lengths).sum() == sum(active)
        assert torch.cat(lengths).min() >= 1


def test_a_plan_is_of_its_seed_and_epoch():
    plan = stream.plan("uniform{2..128}", 5000, 3, 1)
    assert plan == stream.plan("uniform{2..128}", 5000, 3, 1)
    assert plan != stream.plan("uniform{2..128}", 5000, 3, 2)
    assert plan != stream.plan("uniform{2..128}", 5000, 4, 1)
    lengths = [stop - start for start, stop in plan[:-1]]
    assert min(lengths) >= 2
    assert max(lengths) <= 128


def test_a_fixed_plan_joins_a_last_window_of_one():
    assert stream.plan(4, 9, 0, 0) == [(0, 4), (4, 9)]
    assert stream.plan("4", 10, 0, 0) == [(0, 4), (4, 8), (8, 10)]
    assert stream.plan(1, 3, 0, 0) == [(0, 1), (1, 3)]
    assert stream.plan(64, 1, 0, 0) == [(0, 1)]


def test_every_length_of_a_uniform_range_is_drawn():
    law, generator = stream.policy("uniform{2..5}"), np.random.default_rng(0)
    assert {law.draw(generator) for _ in range(200)} == {2, 3, 4, 5}
    assert law.rate_scale(3) == 1.0


def test_the_awd_law():
    law, generator = stream.policy("awd{70}"), np.random.default_rng(0)
    lengths = np.array([law.draw(generator) for _ in range(20000)])
    halved = lengths < 52
    assert abs(halved.mean() - 0.05) < 0.01
    assert abs(lengths[~halved].mean() - 69.5) < 0.2  # int() takes half a step off the normal's mean
    assert abs(lengths[~halved].std() - 5) < 0.2
    assert abs(lengths[halved].mean() - 34.5) < 1
    assert min(stream.policy("awd{5}").draw(generator) for _ in range(100)) == 5
    assert law.rate_scale(35) == 0.5


@pytest.mark.parametrize("text", ["0", "-3", "uniform{5..2}", "uniform{0..4}", "awd{0}", "6.5", "", "uniform", True])
def test_a_wrong_policy_names_the_forms(text):
    with pytest.raises(UserError, match=r"such as 64, uniform\{2..128\} or awd\{70\}; got .*"):
        stream.policy(text)


@pytest.mark.parametrize("width", [6, 0])
def test_too_few_tokens(width: int):
    with pytest.raises(UserError, match=f"at least 2 tokens for each of its columns; got 11 tokens for {width}"):
        stream.columns(np.arange(11), width, eos=0)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 2), (2, 2), (2, 3)])
def test_a_window_outside_or_too_short_is_refused(start: int, stop: int):
    cut = stream.columns(np.arange(11), 4, eos=0)
    with pytest.raises(ValueError, match="must"):
        cut.window(start, stop)


def test_columns_that_are_held_elsewhere_give_the_same_windows(monkeypatch):
    """As on another device: windows are slices of a table."""
    monkeypatch.setattr(stream, "_SOME", 8)  # two rows
    for count in (11, 12, 17, 29):  # of 17, the last row is ragged and looked at alone
        cut = stream.columns(np.arange(5, 5 + count), 4, eos=3)
        held = dataclasses.replace(cut, held=cut._table())
        for ours, theirs in ((held, cut), (held.part(1, 4), cut.part(1, 4))):
            for start, stop in ((0, 2), (0, cut.steps), (cut.steps - 2, cut.steps)):
                for one, other in zip(
                    vars(ours.window(start, stop)).values(), vars(theirs.window(start, stop)).values(), strict=True
                ):
                    assert (one is None and other is None) or torch.equal(one, other)
        moved = cut.to(torch.device("meta"))
        assert (moved.held.shape, moved.window(0, 2).targets.device.type) == ((cut.steps + 1, 4), "meta")
