"""The page: one HTML file that needs nothing else, and the figures and tables beside it."""

import base64
import html
import io
import itertools
import math
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm import config, files
from lm.errors import UserError
from lm.report import figures
from lm.report.sources import Source, in_order
from lm.study.statistics import BITS, BY_BITS, digits, shown, shown_finishing, shown_median
from lm.tracking import LARGEST_EXPONENT, START

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 0 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.wrap :is(th, td) { white-space: normal; overflow-wrap: anywhere; text-align: left; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; break-inside: avoid; } figure img { width: 100%; height: auto; }
figcaption, .note { font-size: .85rem; color: #444; }
pre { font-size: .8rem; background: #f5f5f5; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { th, td { padding: .2rem .35rem; } table { font-size: .8rem; } }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; } .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } table { font-size: 8pt; } th, td { padding: .1rem .3rem; } h2 { break-after: avoid; }
}
"""
_MEASURES = {"test": "test_exact", "valid": "valid_exact", "valid, chunk-mean": "valid_chunk_mean"}
_MEASURES_BY_BITS = {"test, bits per byte": "test_bits_per_byte", "valid, bits per byte": "valid_bits_per_byte"}
_BITS = {"bits per character": "bits_per_character", "bits per byte": "bits_per_byte"}
_TABLES = ("runs.csv", "arms.csv", "epochs.csv", "summary.json")
_MARK = '<meta name="generator" content="rnnorm report">'
_UNMARKED = ": report</title>\n<style>\n:root { color-scheme: light; }"  # in what versions without the mark wrote


def write(sources: Sequence[Source], out: Path) -> Path:
    """Writes `index.html`, `figures/NAME.png` and `.svg`, `table.md`, and a study's tables; returns the page's path.

    Everything of several sources lies in folders of their names, but the page.

    Raises:
        UserError: the folder holds something that is no earlier report's; it cannot be written.
    """
    place = out / "index.html"
    _require_own(out, sources)
    if not place.exists():  # so that a report that is stopped midway is known as one
        files.write_whole(place, _page("", ["<p>This report is not complete.</p>"]).encode())
    sections, written = [], {}
    for source, name in zip(sources, figures.file_names([source.name for source in sources]), strict=True):
        folder = out / name if len(sources) > 1 else out
        with figures.styled():
            made = figures.all_of(source)
            written[folder] = {*made}
            images = [_image(_save(figure, folder, file), caption) for file, (figure, caption) in made.items()]
        sections.append(_section(source, images))
        files.write_whole(folder / "table.md", markdown(source).encode())
        if source.folder is not None and source.folder.resolve() != folder.resolve():
            for table in _TABLES:
                shutil.copyfile(source.folder / table, folder / table)
    _sweep(out, written)
    files.write_whole(place, _page(" and ".join(source.name for source in sources), sections).encode())
    return place


def _sweep(out: Path, written: Mapping[Path, Collection[str]]) -> None:
    """Removes what an earlier report has left in this one's folder: figures and tables of other sources.

    Arguments:
        written: the names of this report's figures, by folder.
    """
    for folder in [out, *(path for path in out.iterdir() if path.is_dir())]:
        if not (folder / "table.md").is_file():
            continue
        for path in [*folder.glob("figures/*.png"), *folder.glob("figures/*.svg")]:
            if path.stem not in written.get(folder, ()):
                path.unlink()
        if folder not in written:
            for name in ("table.md", *(_TABLES if folder != out else ())):
                (folder / name).unlink(missing_ok=True)
            for place in (folder / "figures", folder):
                with suppress(OSError):  # it is not there, or holds something else
                    place.rmdir()


def _require_own(out: Path, sources: Sequence[Source]) -> None:
    """Refuses a folder that is not for this report: neither new or empty, nor an earlier report's, nor its study's."""
    page = out / "index.html"
    if page.is_file():
        text = page.read_text("utf-8", errors="replace")
        fits = _MARK in text or _UNMARKED in text
    else:
        own = any(source.folder is not None and source.folder.resolve() == out.resolve() for source in sources)
        fits = not out.exists() or (out.is_dir() and (own or not any(out.iterdir())))
    if fits:
        return
    raise UserError(
        f"a report must be written to a new or empty folder, or over an earlier report; got {out}, which holds "
        "something else; choose another with --out"
    )


def _page(title: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{_MARK}\n'
        f"<title>{html.escape(title)}: report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _save(figure: "Figure", place: Path, name: str) -> bytes:
    """Writes a figure as PNG and SVG; returns the SVG."""
    for form, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        content = io.BytesIO()
        figure.savefig(content, format=form, **options)
        files.write_whole(place / "figures" / f"{name}.{form}", content.getvalue())
    return content.getvalue()


def _section(source: Source, images: Sequence[str]) -> str:
    summary = source.summary
    parts = [f"<h1>{html.escape(source.name)}</h1>"]
    if summary["description"]:
        parts.append(f"<p>{html.escape(summary['description'])}</p>")
    missing = summary["runs_planned"] - summary["runs"]
    if missing:
        parts.append(f"<p><strong>Not complete: {missing} of {summary['runs_planned']} runs are missing.</strong></p>")
    heads, rows = _results(source)
    parts += ["<h2>Results</h2>", _table(heads, rows), f'<p class="note">{html.escape(_note(source))}</p>']
    if not any(entry.result["epochs"] for entry in source.entries):
        parts.append("<p><strong>No epoch has ended yet: there is nothing to draw.</strong></p>")
    if images:
        parts += ["<h2>Figures</h2>", '<div class="figures">', *images, "</div>"]
    parts += [*_settings(source), *_sign_tests(source), *_runs(source), *_bands(source), *_provenance(source)]
    return "\n".join(parts)


def _note(source: Source) -> str:
    """What one must know to read the table of arms."""
    arms = source.summary["arms"]
    said = [f"Perplexity per {source.unit}; test is what eval --split test has scored of the best checkpoint."]
    if source.folder is not None:
        per = f". {BY_BITS}" if source.by_bits else f"; per {source.unit}."
        said = [f"Medians over seeds, quartiles in brackets{per}"]
    if any(arm["diverged"] for arm in arms):
        said.append(
            "A run whose loss, gradient or validation was not finite, or whose perplexity is beyond e^700, diverged: "
            "it counts as infinitely bad."
        )
    if any(arm["published"] for arm in arms):
        said.append(
            "Exact perplexity (test, valid) and chunk-mean are two measures, not to be compared; published "
            "medians are chunk-mean on the validation text."
        )
    if _compared(arms):
        said.append(
            "Finishing runs are those that the authors' program would have finished; it stops with an overflow where "
            f'the mean loss of a training window exceeds {LARGEST_EXPONENT:g}. "Their chunk-mean" is the median over '
            "these; the other medians and the ratio are over all runs."
        )
    if any(not arm["selected"] for arm in arms):
        said.append("Of the arms of a grid, the one marked * was best on the validation text; the figures show it.")
    return " ".join(said)


def _compared(arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether to show medians over the runs that the authors' program would have finished: where there are published
    ones, and it is known of a run that did not diverge."""
    known = any(arm["finishing"]["unknown"] < arm["runs"] - arm["diverged"] for arm in arms)
    return known and any(arm["published"] for arm in arms)


def _results(source: Source) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of the table of arms."""
    arms = source.summary["arms"]
    always = () if source.folder else ("test_exact",)
    all_measures = _MEASURES_BY_BITS if source.by_bits else _MEASURES
    measures = {
        head: name for head, name in all_measures.items() if name in always or any(arm[name]["median"] for arm in arms)
    }
    published, compared = any(arm["published"] for arm in arms), _compared(arms)
    grid = any(not arm["selected"] for arm in arms)
    bits = {head: found for head, key in _BITS.items() if (found := _bits(source, key))}
    heads = [
        *("arm", "runs", "diverged"),
        *(["finishing runs"] if compared else []),
        *measures,
        *bits,
        *(["their chunk-mean"] if compared else []),
        *(["published", "ours / published"] if published else []),
        "tokens/s",
    ]
    rows = []
    for arm in arms:
        row = [arm["arm"] + (" *" if grid and arm["selected"] else ""), str(arm["runs"]), str(arm["diverged"])]
        row += [shown_finishing(arm)] if compared else []
        row += [_spread(arm, name) for name in measures.values()]
        row += [found.get(arm["arm"], "") for found in bits.values()]
        row += [_spread(arm["finishing"], "valid_chunk_mean")] if compared else []
        if published:
            ours, theirs = arm["valid_chunk_mean"]["median"], arm["published"]
            row += [f"{theirs:g}" if theirs else "", shown(ours / theirs, 3) if ours and theirs else ""]
        rows.append([*row, f"{arm['tokens_per_second']:,.0f}" if arm["tokens_per_second"] else ""])
    return heads, rows


def _bits(source: Source, key: str) -> dict[str, str]:
    """By arm: the exact bits of runs whose tokens are not words, of test where it was scored, else of valid."""
    fits = {"character": "bits_per_character", "token": "bits_per_byte", "byte": "bits_per_byte"}
    if source.folder is not None or fits.get(source.unit) != key:
        return {}
    found: dict[str, str] = {}
    for entry in source.entries:
        exact = {score["split"]: score for score in entry.result["scores"] if score["protocol"] == "exact"}
        for split in ("test", "valid"):
            if split in exact and exact[split].get(key) is not None:
                found.setdefault(entry.arm, f"{exact[split][key]:.3f} ({split})")
    return found


def _settings(source: Source) -> list[str]:
    """What was trained on which text, and the settings in which the runs differ from the default preset."""
    if not source.settings:
        return []
    of = source.settings
    default: dict[str, Any] = {}
    for flat in of.values():
        default |= config.differing(flat)
    named = {"text": [_place(flat["data.source"]) for flat in of.values()]}
    for key, usual in default.items():
        named[f"{key} (default {usual})"] = [str(flat[key]) for flat in of.values()]
    explanation = "The text, and each setting that differs from the default preset."
    rows = [[name, *values] for name, values in named.items()]
    return ["<h2>Settings</h2>", f'<p class="note">{explanation}</p>', _table(["setting", *of], rows, wrap=True)]


def _place(source: str) -> str:
    """A text's name: of a file or folder, the last parts of its path."""
    return "/".join(Path(source).parts[-2:]) if "/" in source else source


def _spread(arm: Mapping[str, Any], measure: str) -> str:
    """A median, with the quartiles where there are several runs."""
    found = arm[measure]
    text = shown_median(arm, measure)
    if arm["runs"] < 2 or found["median"] is None:
        return text
    low, high = (math.inf if found[name] is None else found[name] for name in ("q1", "q3"))
    places = digits(measure) if measure in BITS else 1
    return f"{text} [{', '.join('∞' if math.isinf(each) else shown(each, places) for each in (low, high))}]"


def markdown(source: Source) -> str:
    """Returns the table of arms as Markdown."""
    heads, rows = _results(source)
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text as a cell of Markdown shows it as it is."""
    return html.escape(text, quote=False).replace("|", "\\|")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], wrap: bool = False) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in row) + "</tr>\n" for row in rows)
    attribute = ' class="wrap"' if wrap else ""
    table = f"<table{attribute}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="scroll">{table}</div>'


def _image(content: bytes, caption: str) -> str:
    data, text = base64.b64encode(content).decode(), html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _sign_tests(source: Source) -> list[str]:
    summary = source.summary
    cells = {arm["arm"]: arm["cell"] for arm in summary["arms"]}
    pairs = [
        p
        for p in summary["sign_tests"]["pairs"]
        if p["lower"] + p["higher"] and cells[p["first"]] == cells[p["second"]]
    ]
    if not pairs:
        return []
    rows = [
        [f"{p['first']} against {p['second']}", str(p["lower"]), str(p["higher"]), str(p["ties"]), f"{p['p']:.3g}"]
        for p in pairs
    ]
    explanation = (
        "Exact two-sided sign test over the seeds that both arms have: on how many the first arm has the lower exact "
        f"{source.quantity} of the test text, on how many the higher; arms of one cell (summary.json has all). With n "
        "seeds, p is at least 2 / 2^n."
    )
    return [
        "<h2>Paired sign tests</h2>",
        f'<p class="note">{explanation}</p>',
        _table(["arms", "lower", "higher", "ties", "p"], rows),
    ]


def _runs(source: Source) -> list[str]:
    """The table of runs: how each began and how it ended. A column that no run has a value for is left out."""
    found = [entry.result for entry in source.entries]
    if not found:
        return []
    measures = _MEASURES_BY_BITS if source.by_bits else _MEASURES
    heads = {
        "arm": [result["row"]["arm"] for result in found],
        "seed": [str(result["row"]["seed"]) for result in found],
        "T0": _column(found, "first_window", "d"),
        "largest loss": _column(found, "start_loss", ".4g"),
        "largest gradient": _column(found, "start_grad_norm", ".4g"),
        "‖W_hh‖": _column(found, "recurrent_norm", ".4g"),
        "overflow at step": _column(found, "overflowed_at", ",d"),
        "best epoch": [_ended(result) for result in found],
        **{head: [shown(result["row"][name], digits(name)) for result in found] for head, name in measures.items()},
    }
    shown_heads = {head: column for head, column in heads.items() if {*column} - {"", "-"}}
    explanation = (
        "T0 is the length of the first window; largest loss and gradient (its norm before clipping) are of the first "
        f"{START} steps; ‖W_hh‖ is the norm of the recurrent weights after the first epoch; overflow is the first step "
        f"whose loss exceeds {LARGEST_EXPONENT:g}."
    )
    rows = zip(*shown_heads.values(), strict=True)
    note = [f'<p class="note">{html.escape(explanation)}</p>'] if "T0" in shown_heads else []
    return ["<h2>Runs</h2>", *note, _table([*shown_heads], rows)]


def _column(found: Sequence[Mapping[str, Any]], name: str, form: str) -> list[str]:
    values = [result["row"][name] for result in found]
    return ["" if value is None else f"{value:{form}}" for value in values]


def _ended(result: Mapping[str, Any]) -> str:
    """At which epoch a run was best, or what diverged."""
    row = result["row"]
    best = "" if row.get("best_epoch") is None else f"{row['best_epoch']} of {row['epochs']}"
    return f"diverged: {result['diverged']}" if row["diverged"] else best


def _bands(source: Source) -> list[str]:
    """Tables of the bands, the first run of each arm."""
    parts = []
    for name, title in (("by_frequency", "frequency"), ("by_position", "position")):
        arms = [(arm["arm"], source.of(arm)[0].bands(name)) for arm in source.selected if source.of(arm)]
        arms = [(arm, groups) for arm, groups in arms if groups]
        if arms:
            held = [{group["name"]: group for group in groups} for _, groups in arms]
            rows = [[band, *_band([each.get(band) for each in held])] for band in in_order(itertools.chain(*held))]
            parts += [
                f"<h2>Exact perplexity by {title}</h2>",
                '<p class="note">The first seed of each arm; where arms differ in the number of tokens, as with other '
                "vocabularies, it stands behind each perplexity.</p>",
                _table(["tokens", "number", *(arm for arm, _ in arms)], rows),
            ]
    return parts


def _band(groups: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """One row of the bands: the number of tokens, and each arm's perplexity."""
    numbers = {group["tokens"] for group in groups if group is not None}
    shared = f"{numbers.pop():,}" if len(numbers) == 1 else ""

    def cell(group: Mapping[str, Any] | None) -> str:
        if group is None or group["ppl"] is None:
            return ""
        return f"{group['ppl']:,.1f}" + ("" if shared else f" ({group['tokens']:,})")

    return [shared, *map(cell, groups)]


def _provenance(source: Source) -> list[str]:
    """Commands, versions and checksums."""
    summary = source.summary
    commands = ["python -m lm " + shlex.join(arm["command"]) for arm in summary["arms"]]
    facts = [[name, ", ".join(values)] for name, values in summary["versions"].items()]
    for what in ("data_sha256", "vocabulary_sha256"):
        facts += [[f"{what}, {split}", " ".join(values)] for split, values in summary[what].items()]
    note = "The same settings again, in another folder:"
    if source.folder is not None:
        note = "The study, then each of its runs; SEED and FOLDER stand for the seed and for the folder of the text."
        placed = any("data.source=FOLDER" in arm["command"] for arm in summary["arms"])
        options = summary.get("options", ["--data", "FOLDER"] if placed else [])  # older versions kept none
        words = ["study", f"{summary['study']}.toml", "--seeds", str(summary["seeds"]), *options]
        commands.insert(0, "python -m lm " + shlex.join(words))
    return [
        "<h2>Commands</h2>",
        f'<p class="note">{note}</p>',
        f"<pre>{html.escape(chr(10).join(commands))}</pre>",
        "<h2>Versions and checksums</h2>",
        _table(["what", "which"], facts, wrap=True),
    ]
