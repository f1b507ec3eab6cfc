"""The figures of a report. Colours follow the norm. A function returns None where nothing was measured."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.report.sources import Entry, Source, in_order
from lm.study.statistics import finishes, quantile, shown, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with colour blindness, and in print.
_COLORS = {"online": "#0072b2", "layer": "#d55e00", "rms": "#009e73", "none": "#666666"}
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)), (0, (9, 4)))
_CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN, relu"}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_OPEN = "Open points: runs in which the authors' program stops with an overflow."
_CURVES = (
    "{} on the validation text after each epoch (in columns). Median over seeds, band from the lower to the "
    "upper quartile; a cross is a run that diverged, at its last epoch: from then on it counts as infinitely bad."
)
_OF_RUNS = (
    "perplexity after each epoch: with points on the validation text (in columns), thin on the training text, the mean "
    "over the epoch in training mode. A cross is a run that diverged, at its last epoch."
)
_FIRST_WINDOWS = (
    "{} at the best checkpoint against T0, the length of the run's first window; each run a point, arms "
    "side by side. "
    f"{_OPEN} Points on the upper edge lie beyond it; a cross there is a run that diverged."
)
_FINALS = {
    "valid_chunk_mean": "Validation perplexity at the best checkpoint, by the paper's measure (chunk-mean): each run a "
    f"point, boxes are quartiles, diamonds the published medians. {_OPEN}",
    "valid_exact": "Exact perplexity on the validation text, at the best checkpoint.",
    "test_exact": "Exact perplexity on the test text, scored once, at the checkpoint that is best on validation.",
}
_FINALS_BY_BITS = {
    "valid_bits_per_byte": "Bits per byte of the validation text (exact), at the best checkpoint.",
    "test_bits_per_byte": "Bits per byte of the test text (exact), scored once, at the checkpoint best on validation.",
}
_BANDS = {"by_frequency": "how often the training text holds the word", "by_position": "place in the line"}
_STATISTICS = (
    "the normalization's statistics (mean, var) and its control (u, v) over channels: median, 10 to 90 % and extremes "
    "after each epoch of one run."
)
_GATES = (
    "how often each gate takes which value, after the last epoch of one run; beside its name, the share of values "
    "within 5 % of an end of the range."
)
_WIDTH = 5.2  # inches: text stays readable where a phone shows it at its own width
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a name is shown as it is, its `$` too
    "svg.fonttype": "none",  # text as text: a tenth of the bytes, in the reader's own font
    "svg.hashsalt": "rnnorm",  # the same figure is the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures look as a report's."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def all_of(source: Source) -> dict[str, tuple["Figure", str]]:
    """Returns every figure that the source has values for, by file name, with its caption."""
    found: dict[str, tuple[Figure | None, str]] = {}
    cells = list(dict.fromkeys(arm["cell"] for arm in source.selected))
    for cell in cells:
        caption = _CURVES.format(source.quantity) if source.folder else _OF_RUNS
        found[f"curves-{cell}"] = curves(source, cell), f"{_CELLS[cell]}: {caption}"
    for measure, caption in (_FINALS_BY_BITS if source.by_bits else _FINALS).items():
        found[measure.replace("_", "-")] = finals(source, measure), caption
    for cell in cells:
        caption = f"{_CELLS[cell]}: {_FIRST_WINDOWS.format(source.quantity)}"
        found[f"first-window-{cell}"] = first_windows(source, cell), caption
    for name, what in () if source.by_bits else _BANDS.items():  # a band is of tokens, which are not the same then
        caption = f"Exact perplexity by {what}; median over seeds."
        found[name.replace("_", "-")] = bands(source, name), caption
    names = file_names([arm["arm"] for arm in source.selected])
    for arm, file in zip(source.selected, names, strict=True):
        found[f"statistics-{file}"] = statistics(source, arm), f"{arm['arm']}: {_STATISTICS}"
    for cell in cells:
        found[f"gates-{cell}"] = gates(source, cell), f"{_CELLS[cell]}: {_GATES}"
    found["speed"] = speed(source), "Training speed, tokens per second, median over runs, as they ran."
    return {name: (figure, caption) for name, (figure, caption) in found.items() if figure is not None}


def file_names(names: Sequence[str]) -> list[str]:
    """Returns for each name one that any file may have: other characters are dashes, and a number tells apart what
    becomes the same."""
    found: list[str] = []
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "-_.=" else "-" for letter in name)
        numbered = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        found.append(next(each for each in numbered if each not in found))
    return found


def curves(source: Source, cell: str) -> "Figure | None":
    """Validation perplexity against epoch, for the arms of a cell."""
    figure, axes = _figure(3.0)
    arms = [arm for arm in source.selected if arm["cell"] == cell]
    name = "valid_bits_per_byte" if source.by_bits else "valid_ppl"
    lines = [(arm, _by_epoch(source.of(arm), name)) for arm in arms]
    lines = [(arm, quartiles) for arm, quartiles in lines if quartiles or arm["diverged"]]
    if not lines:
        return None
    trained = {arm["arm"]: _trained(source, arm) for arm in arms}
    plotted = [ppl for _, quartiles in lines for low, middle, _ in quartiles.values() for ppl in (low, middle)]
    top = _scale(axes, "y", [*plotted, *(ppl for curve in trained.values() for ppl in curve.values())])
    for arm, quartiles in lines:
        low, middle, high = np.array([*quartiles.values()]).reshape(-1, 3).T
        label = _label(arm) + (f" ({arm['diverged']} of {arm['runs']} diverged)" if arm["diverged"] else "")
        label += " (beyond the axis)" if top < middle.min(initial=math.inf) < math.inf else ""
        look: Any = {"color": _color(arm), "ls": _line(arm, arms), "marker": ".", "ms": 4, "lw": 1.5}
        axes.plot([*quartiles], middle, **look, label=label)
        if curve := trained[arm["arm"]]:
            axes.plot([*curve], [*curve.values()], color=_color(arm), ls=_line(arm, arms), lw=0.7, marker="_", ms=4)
        band: Any = {"color": _color(arm), "alpha": 0.18, "lw": 0}
        axes.fill_between([*quartiles], np.minimum(low, top), np.minimum(high, top), **band)
    for arm in arms:
        for entry in source.of(arm):
            if entry.result["row"]["diverged"]:
                epoch, ppl = max(_validated(entry, name).items(), default=(0, top))
                look = {"marker": "x", "ms": 7, "mew": 2, "color": _color(arm), "ls": ""}
                axes.plot([epoch], [min(ppl, top)], **look, clip_on=False, zorder=5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{source.quantity}, validation" if source.folder else "perplexity")
    _whole(axes)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


def _trained(source: Source, arm: Mapping[str, Any]) -> dict[int, float]:
    """A run's training perplexity by epoch; nothing of a study, whose arms have many runs."""
    rows = [] if source.folder else [row for entry in source.of(arm) for row in entry.result["epochs"]]
    return {row["epoch"]: row["train_ppl"] for row in rows if row["train_ppl"] is not None}


def _by_epoch(entries: Sequence[Entry], name: str) -> dict[int, list[float]]:
    """The quartiles of a measure after each epoch; a run that diverged counts as infinity from then on."""
    runs = [(entry.result["row"]["diverged"], _validated(entry, name)) for entry in entries]
    found: dict[int, list[float]] = {}
    for epoch in sorted({epoch for _, by_epoch in runs for epoch in by_epoch}):
        reached = [by_epoch.get(epoch, math.inf) for diverged, by_epoch in runs if diverged or epoch in by_epoch]
        found[epoch] = [quantile(reached, share) for share in (0.25, 0.5, 0.75)]
    return found


def _validated(entry: Entry, name: str) -> dict[int, float]:
    """A run's validations by epoch; infinity where the perplexity is beyond what exp can hold."""
    by_epoch = {row["epoch"]: row[name] for row in entry.result["epochs"] if name in row}
    return {epoch: math.inf if ppl is None else ppl for epoch, ppl in by_epoch.items()}


def finals(source: Source, measure: str) -> "Figure | None":
    """A box for each arm, with its runs as points and its published median."""
    arms = source.selected
    runs = [[entry.result["row"] for entry in source.of(arm)] for arm in arms]
    runs = [[row for row in rows if row["diverged"] or row[measure] is not None] for rows in runs]
    reached = [row[measure] for rows in runs for row in rows if not row["diverged"]]
    if not reached:
        return None
    figure, axes = _figure(0.7 + 0.36 * len(arms))
    published = [arm["published"] if measure == "valid_chunk_mean" else None for arm in arms]
    top = _scale(axes, "x", [*reached, *filter(None, published)])
    for place, (arm, rows, theirs) in enumerate(zip(arms, runs, published, strict=True)):
        found = [value(row, measure) for row in rows]
        if len(found) > 1:
            _box(axes, found, place, _color(arm), top)
        inside = [row for row in rows if value(row, measure) <= top]
        for number, row in enumerate(inside):
            offset = 0.3 * (number / (len(inside) - 1) - 0.5) if len(inside) > 1 else 0.0
            _point(axes, (row[measure], place + offset), row, arm)
        if theirs:
            axes.plot([theirs], [place], "D", ms=6, mfc="white", mec="black", zorder=4, label="published median")
        beyond = [shown(ppl, 0) for ppl in sorted(found) if top < ppl < math.inf]  # off the axis, shown as text
        beyond = [f"{len(beyond)} from {beyond[0]} to {beyond[-1]}"] if len(beyond) > 2 else beyond
        notes = [f"{text} →" for text in beyond]
        notes += [f"{arm['diverged']} of {arm['runs']} diverged"] if arm["diverged"] else []
        if notes:
            at: Any = {
                "xycoords": axes.get_yaxis_transform(),
                "ha": "right",
                "va": "center",
                "fontsize": 8,
                "color": _color(arm),
                "bbox": {"fc": "white", "ec": "none", "pad": 1},
            }
            axes.annotate("  ".join(notes), (1.0, place), **at)
    if axes.texts:  # at the right, where they would lie on points
        axes.set_xlim(right=axes.get_xlim()[1] * (axes.get_xlim()[1] / axes.get_xlim()[0]) ** 0.5)
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(source.quantity)
    if any(published):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[:1], labels[:1], loc="outside upper right", fontsize=8)
    return figure


def first_windows(source: Source, cell: str) -> "Figure | None":
    """The final measure against the length of the first window, a point for each run of the arms of a cell."""
    measure = "valid_chunk_mean" if any(arm["published"] for arm in source.selected) else "valid_exact"
    measure = "valid_bits_per_byte" if source.by_bits else measure
    arms = [arm for arm in source.selected if arm["cell"] == cell]
    runs = [[entry.result["row"] for entry in source.of(arm)] for arm in arms]
    runs = [[row for row in rows if row["diverged"] or row[measure] is not None] for rows in runs]
    runs = [[row for row in rows if row["first_window"] is not None] for rows in runs]
    if len({row["first_window"] for rows in runs for row in rows}) < 2:  # of older versions, or the windows are equal
        return None
    figure, axes = _figure(3.0)
    every = [row for rows in runs for row in rows]
    published = {arm["arm"]: arm["published"] for arm in arms if arm["published"] and measure == "valid_chunk_mean"}
    top = _scale(axes, "y", [*(value(row, measure) for row in every), *published.values()])
    for number, (arm, rows, marker) in enumerate(zip(arms, runs, itertools.cycle(_MARKERS))):
        aside = 1.2 * (number - (len(arms) - 1) / 2)
        label = _label(arm) + (f" ({len(rows)} of {arm['runs']} known)" if len(rows) < arm["runs"] else "")
        axes.plot([], [], marker, color=_color(arm), label=label)
        if arm["arm"] in published:
            axes.axhline(published[arm["arm"]], color=_color(arm), ls=":", lw=1)
        for row in rows:
            _point(axes, (row["first_window"] + aside, min(value(row, measure), top)), row, arm, marker, size=6)
    if published:
        axes.plot([], [], ":", color="black", lw=1, label="published median")
    if any(finishes(row) is False and not row["diverged"] for row in every):
        axes.plot([], [], "o", color="black", mfc="white", label="the authors' program stops")
    if any(row["diverged"] for row in every):
        axes.plot([], [], "x", color="black", label="diverged")
    axes.set_xlabel("T0, steps of the first window")
    shown_measure = "valid" if source.by_bits else measure.replace("_", ", ", 1).replace("_", "-")
    axes.set_ylabel(f"{source.quantity}, {shown_measure}")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure


def bands(source: Source, name: str) -> "Figure | None":
    """Perplexity of each band, a line for each arm; words joined, `<unk>` and `<eos>` apart."""
    figure, axes = _figure(3.0)
    order: dict[str, None] = {}
    lines: list[tuple[Mapping[str, Any], dict[str, float]]] = []
    for arm in source.selected:
        found: dict[str, list[float]] = {}
        for entry in source.of(arm):
            for group in () if entry.result["row"]["diverged"] else entry.bands(name):
                if group["ppl"] is not None:
                    found.setdefault(group["name"], []).append(group["ppl"])
        order |= dict.fromkeys(found)
        lines.append((arm, {band: quantile(values, 0.5) for band, values in found.items()}))
    if not order:
        return None
    places = {band: place for place, band in enumerate(in_order(order))}
    for arm, medians in lines:
        look: Any = {"color": _color(arm), "marker": ".", "lw": 1.2, "ls": _line(arm, source.selected, ("norm",))}
        for special in (False, True):
            at = sorted((places[band], ppl) for band, ppl in medians.items() if band.startswith("<") == special)
            label = "_" if special or not at else _label(arm)
            axes.plot([x for x, _ in at], [y for _, y in at], **look | ({"ls": ""} if special else {}), label=label)
    shown = [band.removesuffix(" times").removeprefix("place ") for band in places]
    axes.set_xticks(range(len(places)), shown, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlabel("times in the training text" if name == "by_frequency" else "place in the line")
    axes.set_ylabel("perplexity")
    _scale(axes, "y", [ppl for _, medians in lines for ppl in medians.values()], widest=math.inf)
    axes.legend(fontsize=8)
    return figure


def statistics(source: Source, arm: Mapping[str, Any]) -> "Figure | None":
    """The running statistics and control states of one run of an arm over its epochs."""
    entry = _shown(source, arm)
    if entry is None or not entry.internals[-1]["statistics"]:
        return None
    figure, grid = _grid(3.6, 2, 2)
    names = list(entry.internals[-1]["statistics"])
    for axes, kind in zip(grid.flat, ("mean", "var", "u", "v"), strict=True):
        for number, name in enumerate(name for name in names if f"norm_{kind}_" in name):
            complete = [row for row in entry.internals if None not in row["statistics"].get(name, [None])]
            epochs = [row["epoch"] for row in complete]
            values = np.array([row["statistics"][name] for row in complete]).reshape(-1, 5).T
            color = f"C{number}" if number else _color(arm)
            axes.fill_between(epochs, values[0], values[4], color=color, alpha=0.10, lw=0)
            axes.fill_between(epochs, values[1], values[3], color=color, alpha=0.25, lw=0)
            axes.plot(epochs, values[2], color=color, lw=1.5, marker=".", ms=4, label=_place(name))
        axes.set_title(kind)
        _whole(axes)
    if sum("norm_mean_" in name for name in names) > 1:
        grid[0, 0].legend()
    figure.supxlabel("epoch", fontsize=9)
    return figure


def _place(name: str) -> str:
    """Where a statistic belongs, as a legend shows it: `cell l0` of `cell_norm_mean_l0`."""
    return ("cell " if name.startswith("cell_") else "") + name.rpartition("_")[2]


def gates(source: Source, cell: str) -> "Figure | None":
    """Histograms of the gates of one run of each arm of a cell."""
    shown = [(arm, entry) for arm in source.selected if arm["cell"] == cell and (entry := _shown(source, arm))]
    shown = [(arm, entry) for arm, entry in shown if entry.internals[-1]["gates"]]
    if not shown:
        return None
    columns = [_of_last_layer(list(entry.internals[-1]["gates"])) for _, entry in shown]
    figure, grid = _grid(0.5 + 1.05 * len(shown), len(shown), max(map(len, columns)))
    for row, (arm, entry), names in zip(grid, shown, columns, strict=True):
        several = len({name.partition("_")[0] for name in names}) < len(names)
        for axes in row[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(row, names, strict=False):
            gate = entry.internals[-1]["gates"][name]
            edges = np.linspace(gate["low"], gate["high"], len(gate["counts"]) + 1)
            share = np.array(gate["counts"]) / max(1, sum(gate["counts"]))
            axes.bar(edges[:-1], share, np.diff(edges), align="edge", color=_color(arm), alpha=0.8)
            title = name.replace("_", " ") if several else name.partition("_")[0]
            axes.set_title(f"{title}: {gate['saturated']:.0%}" if gate["saturated"] is not None else name)
            axes.set_yticks([])
            axes.set_xticks([gate["low"], gate["high"]])
            axes.grid(visible=False)
            axes.spines["left"].set_visible(False)
        row[0].set_ylabel(arm["arm"], rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _of_last_layer(gates: list[str]) -> list[str]:
    """The gates that a row has room for: all of them, or those of the last layer."""
    last = gates[-1].partition("_")[2]
    return gates if len(gates) <= 4 else [name for name in gates if name.partition("_")[2] == last]


def speed(source: Source) -> "Figure | None":
    """Tokens per second of each arm."""
    arms = [arm for arm in source.selected if arm["tokens_per_second"]]
    if not arms:
        return None
    figure, axes = _figure(0.7 + 0.3 * len(arms))
    bars = axes.barh(
        [arm["arm"] for arm in arms],
        [arm["tokens_per_second"] for arm in arms],
        color=[_color(arm) for arm in arms],
        height=0.6,
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens/s")
    return figure


def _figure(height: float) -> tuple["Figure", "Axes"]:
    """A figure with one pair of axes."""
    figure, grid = _grid(height, 1, 1)
    return figure, grid[0, 0]


def _grid(height: float, rows: int, columns: int) -> tuple["Figure", Any]:
    """A figure with an array of axes, [rows, columns]. Not pyplot's: nothing keeps it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _whole(axes: "Axes") -> None:
    """Epochs: whole numbers at the ticks, also where there is one epoch alone."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim(round(low + high) / 2 - 0.6, round(low + high) / 2 + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _scale(axes: "Axes", name: str, values: Sequence[float], widest: float = 8.0) -> float:
    """Scales an axis to hold the values but those above `widest` times the least; returns where it ends.

    Linear within a factor of 2, else logarithmic, with a handful of plain numbers at the ticks.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least = min((value for value in values if 0 < value < math.inf), default=1.0)
    most = max((value for value in values if value <= widest * least), default=least)
    margin = (most / least) ** 0.06 if most > least else 1.02
    low, high = least / margin, most * margin
    axis = getattr(axes, f"{name}axis")
    if high > 2 * low:
        getattr(axes, f"set_{name}scale")("log")
        subs = (1, 1.5, 2, 3, 4, 6, 8) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=20 if len(subs) > 1 else 10))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    getattr(axes, f"set_{name}lim")(low, high)
    return high


def _point(
    axes: "Axes",
    at: tuple[float, float],
    row: Mapping[str, Any],
    arm: Mapping[str, Any],
    marker: str = "o",
    size: int = 4,
) -> None:
    """One run: open where the authors' program stops, a cross where it diverged."""
    look: Any = {"color": _color(arm), "ms": size, "mfc": "white" if finishes(row) is False else _color(arm)}
    axes.plot(*at, "x" if row["diverged"] else marker, **look, clip_on=False, zorder=3)


def _box(axes: "Axes", found: Sequence[float], place: float, color: str, top: float) -> None:
    """Quartiles and extremes of all runs; the infinity of one that diverged lies far beyond `top`."""
    shares = {"whislo": 0.0, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 1.0}
    box_stats = {name: min(quantile(found, share), 1e3 * top) for name, share in shares.items()}
    box = axes.bxp([box_stats], positions=[place], orientation="horizontal", widths=0.55, showfliers=False)
    for part in (line for lines in box.values() for line in lines):
        part.set_color(color)


def _shown(source: Source, arm: Mapping[str, Any]) -> Entry | None:
    """The run whose inside is shown: the first that did not diverge, else the first."""
    found = [entry for entry in source.of(arm) if entry.internals]
    return min(found, key=lambda entry: entry.result["row"]["diverged"], default=None)


def _color(arm: Mapping[str, Any]) -> str:
    return _COLORS[arm["norm"]]


def _line(arm: Mapping[str, Any], among: Sequence[Mapping[str, Any]], alike: Sequence[str] = ("cell", "norm")) -> str:
    """A line style that no other arm of the same colour has."""
    same = [each["arm"] for each in among if all(each[key] == arm[key] for key in alike)]
    return _LINES[same.index(arm["arm"]) % len(_LINES)]


def _label(arm: Mapping[str, Any]) -> str:
    """The arm's name, as a legend shows it: one that begins with `_` would be left out."""
    name: str = arm["arm"]
    return f" {name}" if name.startswith("_") else name
