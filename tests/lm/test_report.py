"""A report of a study and of runs, from logs that are written here: nothing is trained."""

import base64
import html
import json
import math
import re
import shlex
import shutil
import subprocess
import types
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rnnorm
from lm import config, provenance, report, study
from lm.cli import main
from lm.errors import UserError
from lm.report import figures, page, sources
from lm.study import results

STUDY = """
description = "What the page <shows> & tells"
seeds = 3
[[arms]]
name = "lstm-online"
published = 30.0
[[arms]]
name = "lstm-none"
model.norm = "none"
[[arms]]
name = "rnn-online"
model.cell = "rnn_tanh"
"""
STREAM = [-0.5, -0.25, 0.125, 0.25, 0.5]
GATES = {"lstm": "ifgo", "rnn_tanh": "h"}
BANDS = [{"name": name, "tokens": 5, "nll": 10.0, "ppl": 7.4} for name in ("place 1", "place 2", "<eos>")]


def lines_of(arm, seed, epochs=3):
    """What a run logs, some of it."""
    cell, online = arm.settings.model.cell, arm.settings.model.norm == "online"
    gate = {"low": 0.0, "high": 1.0, "counts": [1] * 20, "saturated": 0.1}
    for epoch in range(1, epochs + 1):
        at = {"step": 10 * epoch, "epoch": epoch}
        yield {"kind": "train", **at, "tokens_per_second": 1000.0 * seed}
        yield {"kind": "valid", **at, "ppl": 60.0 - epoch - seed, "best": True}
        statistics = {f"norm_{name}_l0": STREAM for name in ("mean", "var", "u", "v")} if online else {}
        yield {
            "kind": "internals",
            **at,
            "statistics": statistics,
            "gates": {f"{name}_l0": gate for name in GATES[cell]},
        }
        yield {"kind": "epoch", **at, "ppl": 55.0, "seconds": 2.0}


def scores_of(ppl):
    extra = {"data_sha256": "d" * 64, "vocabulary_sha256": "v" * 64}
    for split in ("valid", "test"):
        yield {"split": split, "protocol": "exact", "ppl": ppl, "by_position": BANDS, "by_frequency": BANDS, **extra}
        yield {"split": split, "protocol": "chunk-mean", "ppl": ppl + 1, **extra}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study's folder: one run of the arm lstm-none diverged before its first epoch ended."""
    base = tmp_path_factory.mktemp("report")
    (base / "paper.toml").write_text(STUDY)
    plan, found = study.read(base / "paper.toml", data="/somewhere/text"), []
    for job in plan.jobs():
        diverged = job.arm.name == "lstm-none" and job.seed == 2
        rows = [] if diverged else list(lines_of(job.arm, job.seed))
        found.append(save(base / "study", job, rows, 40.0 + job.seed, "loss" if diverged else None))
    results.write(base / "study", plan, found)
    return base / "study"


def save(folder, job, rows, ppl, diverged):
    """A run of a study, over, with this log."""
    run = results.run_folder(folder, job)
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return results.save(folder, job, [] if diverged else list(scores_of(ppl)), diverged)


# By seed: T0, perplexity, and the step at which the authors' program stops; of lstm-online.
STARTS = {1: (19, 40.0, None), 2: (81, 90.0, None), 3: (124, 2e7, 4), 4: (32, 41.0, None), 5: (103, None, 7)}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A study whose logs tell how its runs began: lstm-online as `STARTS`, the last one diverged; lstm-none from the
    same windows, all at 60."""
    base = tmp_path_factory.mktemp("started")
    (base / "starts.toml").write_text(STUDY.partition('[[arms]]\nname = "rnn-online"')[0])
    plan, found = study.read(base / "starts.toml", seeds=len(STARTS)), []
    for job in plan.jobs():
        T0, ppl, overflow = STARTS[job.seed]
        if job.arm.name == "lstm-none":
            ppl, overflow = 60.0, None
        at = {"step": 1, "epoch": 1}
        rows = [{"kind": "start", **at, "position": T0, "loss": 9.25, "grad_norm": T0 / 4}]
        rows += [{"kind": "overflow", **at, "step": overflow}] if overflow else []
        rows += [line | {"recurrent": {"weight_hh_l0": 8.5}} for line in lines_of(job.arm, job.seed)]
        found.append(save(base / "study", job, rows, ppl, "loss" if ppl is None else None))
    results.write(base / "study", plan, found)
    return base / "study"


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return out


class Reader(HTMLParser):
    """Checks that tags nest; keeps links, images, and the text of each table's rows."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.alts, self.tables, self.tags = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.sources += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.alts.append(found["alt"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def reader(page):
    """What a page holds."""
    found = Reader()
    found.feed(page.read_text())
    return found


@pytest.fixture(scope="module")
def read(written):
    return reader(written / "index.html")


def test_the_page_is_whole_and_needs_nothing_else(written, read):
    text = (written / "index.html").read_text()
    assert read.open == []
    assert read.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in read.sources)
    assert not read.tags & {"script", "link", "iframe"}
    assert "url(" not in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media print" in text
    assert "What the page &lt;shows&gt; &amp; tells" in text
    assert "/somewhere" not in text, "no path of this machine"
    assert "data.source=FOLDER" in text
    assert "d" * 64 in text


def test_the_table_is_of_the_results(read, written):
    arms, tests, runs = read.tables[:3]
    rows = {row[0]: row[1:] for row in arms + tests}
    heads = ["runs", "diverged", "test", "valid", "valid, chunk-mean", "published", "ours / published", "tokens/s"]
    assert rows["arm"] == heads
    assert rows["lstm-online"] == [
        *["3", "0", "42.00 [41.5, 42.5]", "42.00 [41.5, 42.5]"],
        *["43.00 [42.5, 43.5]", "30", "1.433", "2,000"],
    ]
    assert rows["lstm-none"][:4] == ["3", "1", "43.00 [42.0, ∞]", "43.00 [42.0, ∞]"]
    assert rows["lstm-online against lstm-none"] == ["1", "0", "2", "1"]
    assert "lstm-online against rnn-online" not in rows
    assert "| rnn-online | 3 | 0 | 42.00 [41.5, 42.5] |" in (written / "table.md").read_text()
    assert runs[0] == ["arm", "seed", "best epoch", "test", "valid", "valid, chunk-mean"]
    assert ["lstm-online", "2", "3 of 3", "42.00", "42.00", "43.00"] in runs
    assert ["lstm-none", "2", "diverged: loss", "-", "-", "-"] in runs


def test_every_figure_is_a_file_and_says_what_it_is(written, read):
    names = {path.stem for path in (written / "figures").iterdir()}
    assert names == {
        *("curves-lstm", "curves-rnn_tanh", "valid-chunk-mean", "valid-exact", "test-exact", "by-frequency"),
        *("by-position", "statistics-lstm-online", "statistics-rnn-online", "gates-lstm", "gates-rnn_tanh", "speed"),
    }
    assert len(read.alts) == len(names)
    assert all(len(alt) > 20 for alt in read.alts)
    for name in names:
        assert (written / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (written / f"figures/{name}.svg").read_bytes()
    assert b"<svg" in base64.b64decode(read.sources[0].partition(",")[2])
    assert {path.name for path in written.iterdir()} == {
        *("index.html", "figures", "table.md", "runs.csv", "arms.csv", "epochs.csv", "summary.json")
    }


def test_a_figure_is_the_same_each_time(folder, written, tmp_path):
    (source,) = report.load([folder])
    with figures.styled():
        again = page._save(figures.curves(source, "lstm"), tmp_path, "again")
    assert again == (written / "figures/curves-lstm.svg").read_bytes()


def test_curves_are_medians_with_quartiles(folder):
    (source,) = report.load([folder])
    axes = figures.curves(source, "lstm").axes[0]
    online, none = axes.lines[:2]
    assert online.get_label() == "lstm-online"
    assert list(online.get_ydata()) == [60.0 - epoch - 2 for epoch in (1, 2, 3)]
    assert none.get_label() == "lstm-none (1 of 3 diverged)"
    assert list(none.get_ydata()) == [60.0 - epoch - 1 for epoch in (1, 2, 3)]
    assert [line.get_marker() for line in axes.lines] == [".", ".", "x"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


def test_a_distant_run_is_reported_as_text(folder):
    (source,) = report.load([folder])
    arm = source.selected[0]
    source.of(arm)[0].result["row"]["test_exact"] = 12_345.0
    axes = figures.finals(source, "test_exact").axes[0]
    assert axes.get_xlim()[1] < 60
    assert [text.get_text() for text in axes.texts] == ["12,345 →", "1 of 3 diverged"]


def test_many_distant_runs_are_reported_as_a_range(folder):
    (source,) = report.load([folder])
    for arm, scale in zip(source.selected, (1.0, 1e3, 1e9), strict=True):
        for entry in source.of(arm):
            entry.result["row"]["test_exact"] = scale * (40 + entry.result["row"]["seed"])
    texts = [text.get_text() for text in figures.finals(source, "test_exact").axes[0].texts]
    assert texts == ["41,000 →  43,000 →  1 of 3 diverged", "3 from 4.1e+10 to 4.3e+10 →"]


def test_boxes_count_a_run_that_diverged(folder):
    """Of three runs, one of which diverged, the median is the worse of the others, the greatest beyond the axis."""
    (source,) = report.load([folder])
    axes = figures.finals(source, "test_exact").axes[0]
    drawn = [(*line.get_xdata(), line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 2]
    least, median, greatest = sorted({left for left, right, place in drawn if left == right and round(place) == 1})
    assert (least, median, greatest > axes.get_xlim()[1]) == (41.0, 43.0, True)


def test_medians_are_shown_for_all_and_for_those_that_finish(started, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "all_of", lambda _: {})
    assert main(["report", str(started), "--out", str(tmp_path)]) == 0
    read = reader(tmp_path / "index.html")
    head, online, none = ([row[3], *row[6:9]] for row in read.tables[0])
    assert head == ["finishing runs", "valid, chunk-mean", "their chunk-mean", "published"]
    assert online == ["3 of 5", "91.00 [42.0, 2.0e+07]", "42.00 [41.5, 66.5]", "30"]
    assert none == ["5 of 5", "61.00 [61.0, 61.0]", "61.00 [61.0, 61.0]", ""]
    rows = read.tables[2]
    assert rows[0][:8] == [
        *("arm", "seed", "T0", "largest loss", "largest gradient", "‖W_hh‖", "overflow at step", "best epoch")
    ]
    assert rows[3][:8] == ["lstm-online", "3", "124", "9.25", "31", "8.5", "4", "3 of 3"]
    assert rows[5][6:] == ["7", "diverged: loss", "-", "-", "-"]
    assert rows[6][6] == ""
    assert "exceeds 709" in (tmp_path / "index.html").read_text()


def test_final_perplexity_against_the_first_window(started):
    (source,) = report.load([started])
    figure, caption = figures.all_of(source)["first-window-lstm"]
    assert "T0, the length of the run's first window" in caption
    (axes,) = figure.axes
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    online, none = points[:5], points[5:]
    top = axes.get_ylim()[1]
    assert [round(line.get_xdata()[0]) for line in none] == [20, 82, 125, 33, 104]
    assert [line.get_xdata()[0] - line.get_xdata()[0] // 1 for line in online] == pytest.approx([0.4] * 5)
    assert [line.get_ydata()[0] for line in online] == [41.0, 91.0, top, 42.0, top]
    assert [line.get_marker() for line in online] == ["o", "o", "o", "o", "x"]
    assert [line.get_markerfacecolor() == "white" for line in online[:4]] == [False, False, True, False]
    assert {line.get_marker() for line in none} == {"s"}
    (published,) = (line for line in axes.lines if list(line.get_xdata()) == [0, 1])
    assert set(published.get_ydata()) == {30.0}
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["lstm-online", "lstm-none", "published median", "the authors' program stops", "diverged"]
    assert axes.get_ylabel() == "perplexity, valid, chunk-mean"
    # a run without a score, of an older version, or all windows alike
    source.of(source.selected[1])[0].result["row"]["valid_chunk_mean"] = None
    assert "lstm-none (4 of 5 known)" in [
        line.get_label() for line in figures.first_windows(source, "lstm").axes[0].lines
    ]
    for entry in source.of(source.selected[0]):
        entry.result["row"]["first_window"] = None
    known = figures.first_windows(source, "lstm").axes[0]
    assert known.lines[0].get_label() == "lstm-online (0 of 5 known)"
    for entry in source.entries:
        entry.result["row"]["first_window"] = 35
    assert figures.first_windows(source, "lstm") is None


def test_a_study_of_an_older_version_is_shown(folder, written, tmp_path, monkeypatch):
    """Its summary does not tell which runs would have finished; and a report's own folder lacks the results."""
    monkeypatch.setattr(figures, "all_of", lambda _: {})
    shutil.copytree(folder, tmp_path / "study")
    shutil.copytree(folder, tmp_path / "tables", ignore=shutil.ignore_patterns("results", "runs"))
    for place in (tmp_path / "study", tmp_path / "tables"):
        summary = json.loads((place / "summary.json").read_text())
        for arm in summary["arms"]:
            del arm["finishing"]
        (place / "summary.json").write_text(json.dumps(summary))
        assert main(["report", str(place), "--out", str(place / "out")]) == 0
        assert (place / "out/table.md").read_text() == (written / "table.md").read_text()


@pytest.mark.parametrize(("low", "high"), [(30.0, 31.0), (100.0, 700.0), (2.0, 1e9), (50.0, 50.0)])
def test_axes_have_few_and_plain_numbers(low, high):
    with figures.styled():
        figure, axes = figures._figure(3.0)
        axes.plot([0, 1], [low, high])
        end = figures._scale(axes, "y", [low, high], widest=math.inf)
        figure.canvas.draw()
    bottom, top = axes.get_ylim()
    shown = [text.get_text() for text in axes.get_yticklabels() if bottom <= text.get_position()[1] <= top]
    assert (top, bottom < low, top > high) == (end, True, True)
    assert 2 <= len(shown) <= 12
    assert all(re.fullmatch(r"[\d,.]+", text) for text in shown)


def write_run(folder, norm="online"):
    """A run folder by itself, as much of it as a report reads."""
    settings = config.build({"model": {"norm": norm}})
    arm = study.Arm(folder.name, folder.name, "default", (), None, settings)
    rows = [*lines_of(arm, 1), {"kind": "final", "epoch": 3, "split": "valid", "protocol": "exact", "ppl": 50.0}]
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml(settings))
    content = "".join(json.dumps({"data_sha256": "d", "vocabulary_sha256": "v"} | row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(content)


def test_runs_by_themselves(folder, tmp_path, monkeypatch):
    """Runs that a study did not make: no test score, no chunk-mean; each an arm."""
    monkeypatch.chdir(tmp_path)
    for name, norm in (("one", "online"), ("two", "layer")):
        write_run(tmp_path / name, norm)
    only = lambda source: {"curves-lstm": (figures.curves(source, "lstm"), "caption")}  # noqa: E731
    monkeypatch.setattr(figures, "all_of", only)
    assert main(["report", "one", "two", str(folder), "--out", "out"]) == 0
    text = (tmp_path / "out/index.html").read_text()
    assert text.count("<h1>") == 2
    assert (tmp_path / "out/runs/figures/curves-lstm.png").exists()
    assert (tmp_path / "out/paper/runs.csv").exists()
    table = (tmp_path / "out/runs/table.md").read_text()
    assert table.splitlines()[0] == "| arm | runs | diverged | test | valid | tokens/s |"
    assert "| one | 1 | 0 | - | 50.00 | 1,000 |" in table
    assert "train --preset one/config.toml --run ANOTHER" in text
    assert "python -m lm study paper.toml --seeds 3 --data FOLDER" in text
    with pytest.raises(UserError, match="a report shows each run and study once"):
        report.load([tmp_path / "one", tmp_path / "one"])
    (tmp_path / "x").mkdir()
    shutil.copytree("one", "x/one")
    names = [arm["arm"] for arm in report.load([tmp_path / "one", tmp_path / "x/one"])[0].summary["arms"]]
    assert names == [f"{tmp_path.name}/one", "x/one"]


def test_runs_whose_names_are_alike_or_odd(tmp_path):
    """Separate figures for names that give the same file name; every name in the legends, as it is."""
    names = ["a b", "a+b", "_x", "r$_$", "$x^$"]
    for name in names:
        write_run(tmp_path / name)
    (source,) = report.load([tmp_path / name for name in names])
    with figures.styled():
        made = figures.all_of(source)
        curves = page._save(made["curves-lstm"][0], tmp_path, "curves").decode()
        page._save(made["speed"][0], tmp_path, "speed")
    statistics = [name for name in made if name.startswith("statistics-")]
    assert statistics == ["statistics-a-b", "statistics-a-b-2", "statistics-_x", "statistics-r-_-", "statistics--x--"]
    shown = [text.get_text().strip() for text in made["curves-lstm"][0].legends[0].get_texts()]
    assert shown == names
    assert all(f"{name}</text>" in curves for name in names)


def test_file_names_are_their_own():
    assert figures.file_names(["a b", "a-b-2", "a+b", "a/b", "lr=0.5_x"]) == [
        "a-b",
        "a-b-2",
        "a-b-3",
        "a-b-4",
        "lr=0.5_x",
    ]


@pytest.mark.parametrize("options", [["--data", "FOLDER", "--set", "train.lr=0.5 "], [], None])
def test_the_command_of_a_study_has_its_options(folder, tmp_path, options):
    shutil.copytree(folder, tmp_path / "study")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("options") == ["--data", "FOLDER"]
    told = summary if options is None else summary | {"options": options}
    (tmp_path / "study/summary.json").write_text(json.dumps(told))
    commands = "".join(page._provenance(report.load([tmp_path / "study"])[0])).partition("<pre>")[2]
    expected = ["--data", "FOLDER"] if options is None else options  # as an older version did, which kept none
    words = ["python", "-m", "lm", "study", "paper.toml", "--seeds", "3", *expected]
    assert shlex.split(html.unescape(commands.partition("\n")[0])) == words


def test_the_command_of_a_run_names_its_own_text_where_it_is_now(tmp_path):
    """That of the standard input is kept in the folder, which was moved since."""
    folder, _ = run_of(tmp_path, "one", 1, "text.txt")
    command = ["train", "--preset", f"{folder}/config.toml", "--run", "ANOTHER"]
    assert report.load([folder])[0].summary["arms"][0]["command"] == command, "a text that lies elsewhere"
    (folder / "text.txt").write_text("the cat\n")
    (arm,) = report.load([folder])[0].summary["arms"]
    assert arm["command"] == [*command[:3], "--data", f"{folder}/text.txt", *command[3:]]


def test_studies_of_one_name_lie_apart(folder, tmp_path, monkeypatch):
    """Two of them, and one that has the name of what runs are shown under."""
    monkeypatch.chdir(tmp_path)
    for place, name in (("u/S1", "S1"), ("v/S1", "S1"), ("w", "runs")):
        shutil.copytree(folder, place)
        summary = json.loads((folder / "summary.json").read_text())
        told = {"study": name, "description": f"of {place}"}
        (tmp_path / place / "summary.json").write_text(json.dumps(summary | told))
    write_run(tmp_path / "one")
    monkeypatch.setattr(figures, "all_of", lambda _: {})
    assert main(["report", "u/S1", "v/S1", "w", "one", "--out", "out"]) == 0
    text = (tmp_path / "out/index.html").read_text()
    names = ["S1 in u/S1", "S1 in v/S1", "runs in w", "runs"]
    assert re.findall("<h1>(.*)</h1>", text) == names
    assert f"<title>{' and '.join(names)}: report</title>" in text
    assert "python -m lm study S1.toml --seeds 3" in text
    for place, ours in (("u/S1", "S1-in-u-S1"), ("v/S1", "S1-in-v-S1"), ("w", "runs-in-w")):
        assert (tmp_path / "out" / ours / "summary.json").read_text() == (tmp_path / place / "summary.json").read_text()
        assert (tmp_path / "out" / ours / "table.md").exists()
    assert "| one |" in (tmp_path / "out/runs/table.md").read_text()
    with pytest.raises(UserError, match="a report shows each run and study once; got u/S1, u/S1"):
        report.load([Path("u/S1"), Path("u/S1")])


def test_a_report_over_another_leaves_nothing_of_it(folder, tmp_path, monkeypatch):
    write_run(tmp_path / "one")
    monkeypatch.setattr(figures, "_MEASURED", None, raising=False)
    drawn = lambda source: {  # noqa: E731
        name: (figures.curves(source, "lstm"), "caption") for name in (["a"] if source.folder is None else ["a", "b"])
    }
    monkeypatch.setattr(figures, "all_of", drawn)
    both, one, out = [folder, tmp_path / "one"], [tmp_path / "one"], tmp_path / "out"
    fresh, seen = tmp_path / "fresh", tmp_path / "fresh-both"
    page.write(report.load(one), fresh)
    page.write(report.load(both), seen)

    def names(place):
        return {path.relative_to(place) for path in place.rglob("*") if path.is_file()}

    page.write(report.load(both), out)
    page.write(report.load(one), out)
    assert names(out) == names(fresh)
    page.write(report.load(both), out)
    assert names(out) == names(seen)
    page.write(report.load([folder]), out)
    (out / "figures/mine.txt").write_text("x")
    page.write(report.load(one), out)
    assert names(out) - names(fresh) == {Path(name) for name in ("figures/mine.txt", *page._TABLES)}


def test_lines_that_are_torn_are_passed_over(tmp_path):
    write_run(tmp_path / "one")
    (before,) = report.load([tmp_path / "one"])
    log = tmp_path / "one/metrics.jsonl"
    log.write_bytes(b'3\n{"kind": "valid"}\n\xff\n' + log.read_bytes() + b'{"kind": "inter')
    (after,) = report.load([tmp_path / "one"])
    assert after == before


@pytest.mark.parametrize(
    ("name", "what"), [("summary.json", "a study's summary"), ("results/lstm-none-seed-3.json", "a result")]
)
@pytest.mark.parametrize("content", [b'{"study": "pa', b"\xff\xfe\xfd", b"[]", b'{"study": "paper"}'])
def test_a_damaged_file_of_a_study_is_named(folder, tmp_path, capsys, name, what, content):
    shutil.copytree(folder, tmp_path / "study")
    (tmp_path / "study" / name).write_bytes(content)
    assert main(["report", str(tmp_path / "study")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {what} must be ")
    assert f"study/{name}" in said
    assert said.endswith("; move it away and give the command of the study again\n")


def test_a_folder_that_is_neither(tmp_path, capsys):
    with pytest.raises(UserError, match="a report must be of run folders and of studies"):
        report.load([tmp_path])
    assert main(["report", str(tmp_path)]) == 2
    assert "which is neither; check the path" in capsys.readouterr().err


def test_a_folder_of_other_things_is_not_written_over(folder, written, tmp_path, capsys):
    page = written / "index.html"
    ours = [page.read_text(), page.read_text().replace('<meta name="generator" content="rnnorm report">\n', "")]
    for number, (name, content) in enumerate(
        [("index.html", "mine"), ("notes.txt", "mine"), *(("index.html", text) for text in ours)]
    ):
        out = tmp_path / str(number)
        out.mkdir()
        (out / name).write_text(content)
        assert main(["report", str(folder), "--out", str(out)]) == (2 if content == "mine" else 0)
        if content == "mine":
            message = f"or over an earlier report; got {out}, which holds something else; choose another with --out"
            assert message in capsys.readouterr().err
            assert [path.name for path in out.iterdir()] == [name]
            assert (out / name).read_text() == "mine"
        else:
            assert (out / name).read_text() == ours[0]
    (tmp_path / "file").write_text("mine")
    assert main(["report", str(folder), "--out", str(tmp_path / "file")]) == 2


def test_a_report_that_was_stopped_is_written_again(folder, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "markdown", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["report", str(folder), "--out", str(tmp_path / "out")])
    assert "not complete" in (tmp_path / "out/index.html").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "not complete" not in (tmp_path / "out/index.html").read_text()


def test_markdown_has_a_column_of_dashes_for_each_head(folder):
    heads, dashes, *_ = page.markdown(report.load([folder])[0]).splitlines()
    assert heads.count("|") == dashes.count("|")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(written, tmp_path, width):
    """Headless Chromium at a phone's and a desk's width: nothing is wider than that, figures have their colours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here (apt packages it as chromium)")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "page.html").write_text((written / "index.html").read_text())
    # In a frame of the width that is meant: a window of Chromium's has a least width of its own.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:5000px;border:0"></iframe>'
        "<script>onload = () => { const page = frames[0].document.documentElement;"
        "document.title = page.scrollWidth + ' of ' + page.clientWidth }</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [browser, *options, f"--user-data-dir={tmp_path}/profile", "--window-size=1300,5000", "--dump-dom"]
    shot = tmp_path / "shot.png"
    command += [f"--screenshot={shot}", frame.as_uri()]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    scroll, client = map(int, re.search(r"<title>(\d+) of (\d+)</title>", told).groups())
    assert (client, scroll <= client) == (width, True)
    pixels = image.open(shot).convert("RGB").crop((0, 0, width, 5000))
    colors = {color for _, color in pixels.getcolors(maxcolors=1 << 24)}
    assert {(0, 114, 178), (102, 102, 102)} <= colors, "the arms' colours"


def test_every_norm_has_a_color_and_every_cell_a_label():
    assert {*figures._COLORS} == {*rnnorm.norms.KINDS}
    assert {*figures._CELLS} == {*rnnorm.CELLS}


def run_of(place, name, epochs=2, text="book", unit="word", *assignments, vocabulary="v"):
    """A run's folder with a log that is written here."""
    folder = place / name
    folder.mkdir()
    settings = config.override(config.preset("default"), [f"data.source=/texts/{text}", *assignments])
    (folder / "config.toml").write_text(config.to_toml(config.build(settings)))
    arm = study.Arm(name, name, "default", (), None, config.build(settings))
    told = {"unit": unit, "data_sha256": text, "vocabulary_sha256": vocabulary}
    rows = [row | (told if row["kind"] == "valid" else {}) for row in lines_of(arm, 1, epochs)]
    score = {"protocol": "exact", "ppl": 50.0, **told}
    bits = {"bits_per_character": 1.25, "bits_per_byte": 1.5}
    if epochs:
        rows.append({"kind": "final", "split": "valid", "step": 10 * epochs, "epoch": epochs, **score, **bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, {"split": "test", **score, **bits}


def test_runs_on_different_texts_share_no_axis(tmp_path):
    one, _ = run_of(tmp_path, "one")
    other, _ = run_of(tmp_path, "other", 3, "book", "word", "model.norm=layer")
    chinese, _ = run_of(tmp_path, "chinese", 2, "chinese", "character", "data.tokenizer=char")
    pieces, _ = run_of(tmp_path, "pieces", 2, "book", "token", "data.tokenizer=bpe")
    found = report.load([one, other, chinese, pieces])
    assert [source.name for source in found] == ["runs on book (1)", "runs on chinese", "runs on book (3)"]
    assert [[arm["arm"] for arm in source.selected] for source in found] == [["one", "other"], ["chinese"], ["pieces"]]
    assert [source.unit for source in found] == ["word", "character", "token"]
    text = report.write(found, tmp_path / "page").read_text()
    for told in ("Perplexity per character;", "bits per character", "1.250 (valid)", "1.500 (valid)", "texts/chinese"):
        assert told in text
    assert report.load([one])[0].name == "runs"


def test_runs_with_different_vocabularies_of_pieces_share_no_axis(tmp_path):
    kinds = {"a": ("token", "p"), "b": ("token", "q"), "c": ("token", "p"), "d": ("word", "v"), "e": ("word", "w")}
    runs = [run_of(tmp_path, name, 2, "book", unit, vocabulary=v)[0] for name, (unit, v) in kinds.items()]
    found = [[arm["arm"] for arm in source.selected] for source in report.load(runs)]
    assert found == [["a", "c"], ["b"], ["d", "e"]]


def test_a_study_of_different_units_is_shown_by_bits_per_byte(tmp_path):
    """Words have the greater perplexity and the fewer bits."""
    text = 'seeds = 2\n[grid]\n"data.tokenizer" = ["word", "char"]\n[[arms]]\nname = "a"\n'
    (tmp_path / "units.toml").write_text(text + '[[arms]]\nname = "b"\nmodel.norm = "none"\n')
    plan, found = study.read(tmp_path / "units.toml"), []
    for job in plan.jobs():
        unit, ppl, bits = ("word", 50.0, 1.25) if "word" in job.arm.name else ("character", 5.0, 2.5)
        bits += job.seed / 8 + 0.5 * job.arm.name.startswith("b")
        start = {"kind": "start", "step": 1, "epoch": 1, "position": 9 * job.seed, "loss": 9.0, "grad_norm": 1.0}
        rows = [
            start,
            *(row | ({"bits_per_byte": bits} if row["kind"] == "valid" else {}) for row in lines_of(job.arm, 1)),
        ]
        run = results.run_folder(tmp_path / "study", job)
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = [score | {"unit": unit, "bits_per_byte": bits} for score in scores_of(ppl)]
        found.append(results.save(tmp_path / "study", job, scores, None))
    results.write(tmp_path / "study", plan, found)
    (source,) = report.load([tmp_path / "study"])
    assert [arm["arm"] for arm in source.selected] == ["a_tokenizer=word", "b_tokenizer=word"]
    heads, rows = page._results(source)
    assert heads[3:5] == ["test, bits per byte", "valid, bits per byte"]
    assert rows[0][:4] == ["a_tokenizer=word *", "2", "0", "1.438 [1.406, 1.469]"]
    assert not any(head in ("test", "valid") for head in heads)
    with figures.styled():
        made = figures.all_of(source)
    assert {name for name in made if not name.startswith(("statistics", "gates"))} == {
        *("curves-lstm", "valid-bits-per-byte", "test-bits-per-byte", "first-window-lstm", "speed")
    }
    for name, label in (("curves-lstm", 1), ("first-window-lstm", 1), ("valid-bits-per-byte", 0)):
        axes = made[name][0].axes[0]
        assert "bits per byte" in (axes.get_xlabel(), axes.get_ylabel())[label]
        assert "perplexity" not in made[name][1]
    assert list(made["curves-lstm"][0].axes[0].lines[0].get_ydata()) == [1.4375] * 3
    text = report.write([source], tmp_path / "page").read_text()
    assert "compared by bits per byte of the text" in text
    assert "the lower exact bits per byte of the test text" in text


def test_the_versions_are_those_that_trained_the_run(tmp_path):
    here = provenance.versions()
    logs = {
        "old": [],
        "one": [(0, {**here, "torch": "1.0"})],
        "two": [(0, {**here, "torch": "1.0"}), (10, {**here, "torch": "2.0"})],
        "since": [(10, here)],
    }
    for name, logged in logs.items():
        folder, _ = run_of(tmp_path, name)
        lines = [{"kind": "versions", "step": step, "epoch": 1, "versions": found} for step, found in logged]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def shown(*names):
        (source,) = report.load([tmp_path / name for name in names])
        return source.summary["versions"]

    assert shown("old") == {name: ["unknown"] for name in here}
    assert shown("one", "old")["torch"] == ["1.0", "unknown"]
    assert shown("two")["torch"] == ["1.0, then 2.0"]
    assert shown("two")["python"] == [here["python"]]
    assert shown("since")["torch"] == [f"unknown, then {here['torch']}"]


def test_a_run_has_its_training_curve_settings_text_and_test_column(tmp_path):
    folder, score = run_of(tmp_path, "one", 2, "book", "word", "train.lr=0.5")
    (source,) = report.load([folder])
    axes = figures.curves(source, "lstm").axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[58.0, 57.0], [55.0, 55.0]]
    assert axes.get_ylabel() == "perplexity"
    heads, rows = page._results(source)
    assert dict(zip(heads, rows[0], strict=True))["test"] == "-"
    text = report.write([source], tmp_path / "page").read_text()
    assert "train.lr (default 0.004)</td><td>0.5" in text
    assert "texts/book" in text
    lines = [{"step": 10, **score, "ppl": 9.0}, {"step": 20, **score, "ppl": 8.0}, {"step": 20, **score, "ppl": 7.0}]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    heads, rows = page._results(report.load([folder])[0])
    assert dict(zip(heads, rows[0], strict=True))["test"] == "7.00", "the last, of the best checkpoint's step"
    bands = {"by_position": [{"name": "place 1", "tokens": 5, "ppl": 7.4}]}
    final = [{"step": 20, **score, "split": "valid", **bands}]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in final))
    (source,) = report.load([folder])
    assert len(source.entries[0].bands("by_position")) == 1, "of valid, which the log scores without them"
    stopped = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (folder / "metrics.jsonl").write_text("".join(stopped))
    scored = [{"step": 20, **score, "split": split, "ppl": ppl} for split, ppl in (("valid", 6.0), ("train", 5.0))]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    heads, rows = page._results(report.load([folder])[0])
    assert rows[0][heads.index("valid")] == "6.00", "of a run that was stopped, what eval has kept"
    assert "5.00" not in rows[0]


@pytest.mark.parametrize(
    ("kind", "changed", "wrong"),
    [
        ("valid", {"step": ...}, "no step"),
        ("valid", {"ppl": "50"}, "ppl='50'"),
        ("valid", {"ppl": 0}, "ppl=0"),
        ("start", {"loss": None}, "loss=None"),
        ("epoch", {"seconds": None}, "seconds=None"),
        ("train", {"tokens_per_second": []}, "tokens_per_second=[]"),
        ("internals", {"gates": {"i_l0": {"low": 0.0}}}, "no gates.i_l0.high"),
        ("internals", {"statistics": {"norm_mean_l0": [0.0, 1.0]}}, "statistics.norm_mean_l0=[0.0, 1.0]"),
        ("final", {"protocol": ["exact"]}, "protocol=['exact']"),
        ("score", {"protocol": ["exact"]}, "protocol=['exact']"),
        ("score", {"by_position": [{"name": "place 1", "tokens": "5", "ppl": 7.4}]}, "by_position.0.tokens='5'"),
    ],
)
def test_a_line_that_was_edited_is_left_out_with_a_warning(tmp_path, capsys, kind, changed, wrong):
    folder, score = run_of(tmp_path, "one")
    paths = {"log": folder / "metrics.jsonl", "scores": folder / "scores.jsonl"}
    start = {"kind": "start", "step": 1, "epoch": 1, "position": 5, "loss": 9.0, "grad_norm": 1.0}
    rows = {"log": [start, *map(json.loads, paths["log"].read_text().splitlines())], "scores": [{"step": 20, **score}]}
    name = "scores" if kind == "score" else "log"
    row = next(row for row in rows[name] if name == "scores" or row["kind"] == kind)
    edited = {key: value for key, value in {**row, **changed}.items() if value is not ...}
    for each, path in paths.items():
        lines = [*rows[each], *([edited] if each == name else [])]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder), "--out", str(tmp_path / "page")]) == 0
    place = f"{paths[name]}, {'score' if kind == 'score' else 'line'} {len(rows[name]) + 1},"
    assert capsys.readouterr().err == f"warning: {place} must be as it was written; got {wrong}; it is left out\n"
    assert page._results(report.load([folder], lambda _: None)[0])[1][0][-2] == "50.00", "of the lines that are whole"


def test_one_epoch_has_one_label_and_none_says_so(tmp_path):
    (source,) = report.load([run_of(tmp_path, "one", 1)[0]])
    for figure in (figures.curves(source, "lstm"), figures.statistics(source, source.selected[0])):
        figure.draw_without_rendering()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    text = report.write(report.load([run_of(tmp_path, "none", 0)[0]]), tmp_path / "page").read_text()
    assert "No epoch has ended yet" in text
    assert "<h2>Figures</h2>" not in text
    assert "No epoch has ended" not in report.write([source], tmp_path / "other").read_text()


def test_bands_of_other_vocabularies_keep_their_own_counts_and_their_order(tmp_path):
    names = {
        "small": ["10-99 times", "1,000-9,999 times", "<unk>", "<eos>"],
        "large": ["1-9 times", "10-99 times", "<eos>"],
    }
    for number, (name, bands) in enumerate(names.items(), 7):
        folder, score = run_of(tmp_path, name)
        groups = [{"name": band, "tokens": number, "nll": 1.0, "ppl": 2.0 * number} for band in bands]
        kept = {"step": 20, **score, "by_frequency": groups}
        (folder / "scores.jsonl").write_text(json.dumps(kept) + "\n")
    (source,) = report.load([tmp_path / name for name in names])
    text = "".join(page._bands(source))
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert [html.unescape(row[0]) for row in rows] == [
        *("1-9 times", "10-99 times", "1,000-9,999 times", "<unk>", "<eos>"),
    ]
    assert rows[0][1:] == ("8", "", "16.0")
    assert rows[1][1:] == ("", "14.0 (7)", "16.0 (8)")
    axes = figures.bands(source, "by_frequency").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1-9", "10-99", "1,000-9,999", "<unk>", "<eos>"]
    assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in axes.lines)


def test_a_run_beyond_what_exp_can_hold_counts_as_diverged(tmp_path):
    folder, score = run_of(tmp_path, "one")
    (folder / "scores.jsonl").write_text(json.dumps({"step": 20, **score, "ppl": None}) + "\n")
    (source,) = report.load([folder])
    assert source.entries[0].result["row"]["diverged"]
    assert source.summary["arms"][0]["diverged"] == 1


def test_a_run_without_a_validation_is_among_those_of_its_text(tmp_path, monkeypatch):
    first, _ = run_of(tmp_path, "one")
    young, _ = run_of(tmp_path, "young", 0)
    pieces, _ = run_of(tmp_path, "pieces", 2, "book", "token", vocabulary="p")
    saved = {"data_sha256": {"valid": "book"}, "tokenizer": {}, "trainer": {"step": 0}}
    monkeypatch.setattr(sources.checkpoint, "load", lambda path: saved)
    for tokenizer, among in (("word", "v"), ["one", "young"]), (("token", "p"), ["pieces", "young"]):
        named = types.SimpleNamespace(unit=tokenizer[0], sha256=tokenizer[1])
        monkeypatch.setattr(sources.tokenizers, "from_state", lambda state, named=named: named)
        found = report.load([first, pieces, young])
        assert among in [[entry.arm for entry in source.entries] for source in found]


def test_eight_runs_of_one_norm_have_lines_of_their_own(tmp_path):
    (source,) = report.load([run_of(tmp_path, f"run-{number}")[0] for number in range(8)])
    assert len({str(figures._line(arm, source.selected)) for arm in source.selected}) == 8


def test_statistics_of_the_cell_are_labelled():
    assert [figures._place(name) for name in ("norm_mean_l0", "cell_norm_mean_l1")] == ["l0", "cell l1"]


def test_the_gates_of_runs_of_other_depths_are_all_shown(tmp_path):
    for name, layers in (("one", 1), ("two", 2)):
        folder, _ = run_of(tmp_path, name, 1)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["kind"] == "internals":
                row["gates"] = {
                    f"{letter}_l{n}": row["gates"][f"{letter}_l0"] for n in range(layers) for letter in "ifgo"
                }
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = report.load([tmp_path / "one", tmp_path / "two"])
    axes = figures.gates(source, "lstm").axes
    assert [each.get_title() for each in axes] == [f"{letter}: 10%" for letter in "ifgo"] * 2
    assert all(each.axison for each in axes)
    assert [axes[0].get_ylabel(), axes[4].get_ylabel()] == ["one", "two"]


def test_names_of_folders_are_shown_as_they_are(tmp_path):
    for name in ("a|b", "<i>&", "bell\x07"):
        write_run(tmp_path / name)
    (source,) = report.load([tmp_path / name for name in ("a|b", "<i>&", "bell\x07")])
    rows = page.markdown(source).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| a\\|b", "| &lt;i&gt;&amp;", "| bell\\x07"]
    with figures.styled():
        drawn = page._save(figures.curves(source, "lstm"), tmp_path, "curves").decode()
    xml.etree.ElementTree.fromstring(drawn)
