"""What results say together: quartiles of each arm, paired sign tests, the table for a person."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lm import provenance
from lm.evaluator import finite
from lm.study.plan import Arm, Study

MEASURES = ("valid_exact", "valid_chunk_mean", "test_exact", "test_chunk_mean")
BITS = ("valid_bits_per_byte", "test_bits_per_byte")  # measures too, of arms whose perplexities do not compare
BY_BITS = (
    "Perplexities of these arms are per different units, or per pieces of different vocabularies, and do not compare: "
    "the arms are compared by bits per byte of the text. (Words that are read as <unk> need not be spelled, which "
    "lowers the bits of a tokenizer of words.)"
)
Row = dict[str, Any]


def sign_test(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any]:
    """Returns the exact paired sign test between two arms over the seeds that both have.

    With w seeds where `first` is lower, l where `second` is, n = w + l, ties left out:
    `p = min(1, 2 sum_{k <= min(w, l)} C(n, k) / 2^n)`, two-sided.

    Arguments:
        first, second: perplexity by seed; infinity for a run that diverged.
    """
    pairs = [(first[seed], second[seed]) for seed in first.keys() & second.keys()]
    lower, higher = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    n = lower + higher
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1)) / 2**n
    return {"lower": lower, "higher": higher, "ties": len(pairs) - n, "p": min(1.0, 2 * tail)}


def per(score: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what the perplexities of a score or a log's line are per: the unit, and of pieces the vocabulary.
    Perplexities compare only where both are equal."""
    unit = str(score.get("unit", "word"))  # older versions have words alone
    return unit, str(score.get("vocabulary_sha256", "")) if unit == "token" else ""


def quantile(values: Sequence[float], share: float) -> float:
    """Returns a quantile by linear interpolation (numpy's default); infinities are values like others."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))


def value(row: Mapping[str, Any], measure: str) -> float:
    """Returns a measure of a run: infinity where it diverged, whatever it reached before."""
    found = row[measure]
    return math.inf if row["diverged"] or found is None else found


def finishes(row: Mapping[str, Any]) -> bool | None:
    """Returns whether the program of the paper's authors would have ended with a perplexity for this run; None if
    unknown.

    It takes `math.exp` of each window's loss, which raises OverflowError where ours trains on; and it continues with
    values that are not numbers, which is what ours calls diverged.
    """
    if row["diverged"] or row["overflowed_at"] is not None:
        return False
    return None if row["first_window"] is None else True


def summarize(study: Study, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the results so far say, as JSON can hold it: null for the infinity of a diverged run.

    Among arms of one base (which differ by the grid), the one of the lowest median valid perplexity
    (`exact`) is `selected`; sign tests are between selected arms, on the test perplexity (`exact`). Where perplexities
    are not `per` the same, both are by `BITS`, and arms have these measures too. An arm's
    `finishing` holds the same measures over the runs that the authors' program would have finished, see `finishes`.
    """
    rows = [result["row"] for result in results]
    by_arm = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in study.arms}
    alike = len({per(score) for result in results for score in result["scores"]}) < 2
    valid, test = ("valid_exact", "test_exact") if alike else BITS
    measures = MEASURES if alike else (*MEASURES, *BITS)
    arms = [_arm(arm, by_arm[arm.name], measures) for arm in study.arms if by_arm[arm.name]]
    selected = set(_selected(arms, valid))
    seeds = {name: {row["seed"]: value(row, test) for row in by_arm[name]} for name in selected}
    tests = [
        {"first": first, "second": second, **sign_test(seeds[first], seeds[second])}
        for first, second in itertools.combinations([arm["arm"] for arm in arms if arm["arm"] in selected], 2)
    ]
    finite_arms = [{**_finite_measures(arm), "selected": arm["arm"] in selected} for arm in arms]
    return {
        "study": study.name,
        "description": study.description,
        "seeds": study.seeds,
        "options": _anywhere(study.options),
        "runs": len(rows),
        "runs_planned": len(study.jobs()),
        "arms": finite_arms,
        "sign_tests": {"measure": test, "pairs": tests},
        **provenance.collect(results),
    }


def by_bits(summary: Mapping[str, Any]) -> bool:
    """Returns whether the arms of a summary are compared by bits per byte: their perplexities do not compare."""
    return bool(summary["sign_tests"].get("measure") == BITS[1])


def _arm(arm: Arm, rows: list[Row], measures: Sequence[str]) -> dict[str, Any]:
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    return {
        "arm": arm.name,
        "base": arm.base,
        "cell": arm.settings.model.cell,
        "norm": arm.settings.model.norm,
        "epochs": arm.settings.train.epochs,
        "runs": len(rows),
        "diverged": sum(row["diverged"] for row in rows),
        "published": arm.published,
        **_measures(rows, measures),
        "finishing": finishing(rows, measures),
        "tokens_per_second": quantile(speeds, 0.5) if speeds else None,
        "command": _anywhere(arm.command("SEED", f"runs/{arm.name}/seed-SEED")),
    }


def finishing(rows: Sequence[Row], measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """Returns the measures over those of an arm's runs that the authors' program would have finished, how many they
    are, and of how many it is unknown."""
    known = [finishes(row) for row in rows]
    inside = [row for row, finished in zip(rows, known, strict=True) if finished]
    return _finite_measures({"runs": len(inside), "unknown": known.count(None), **_measures(inside, measures)})


def _measures(rows: Sequence[Row], measures: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Quartiles and extremes of each measure over runs; None where there is no run."""
    shares = {"median": 0.5, "q1": 0.25, "q3": 0.75, "min": 0.0, "max": 1.0}
    values = {name: [value(row, name) for row in rows] for name in measures}
    return {
        name: {label: quantile(found, share) if found else None for label, share in shares.items()}
        for name, found in values.items()
    }


def _finite_measures(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {**arm, **{name: finite(arm[name]) for name in (*MEASURES, *BITS) if name in arm}}


def _anywhere(command: Sequence[str]) -> list[str]:
    """The command without this machine's path of the text."""

    def is_place(before: str, word: str) -> bool:
        names_text = before == "--data" or word.strip().startswith("data.source=")
        return names_text and os.sep in word and "hf:" not in word  # a data set of the hub is the same anywhere

    return [
        ("FOLDER" if before == "--data" else "data.source=FOLDER") if is_place(before, word) else word
        for before, word in zip(["", *command], command, strict=False)
    ]


def _selected(arms: Sequence[Mapping[str, Any]], measure: str) -> list[str]:
    """The best arm of each base."""
    best: dict[str, Mapping[str, Any]] = {}
    for arm in arms:
        held = best.setdefault(arm["base"], arm)
        if arm[measure]["median"] < held[measure]["median"]:
            best[arm["base"]] = arm
    return [arm["arm"] for arm in best.values()]


def table(summary: Mapping[str, Any]) -> str:
    """Returns the arms as a table for a person: medians over seeds; where one is published to compare with, also how
    many runs the authors' program would have finished, with the median of those, and the published one. Bits per byte
    where the arms are compared by these."""
    names = {"valid": "valid_exact", "test": "test_exact", "valid chunk-mean": "valid_chunk_mean"}
    if by_bits(summary):
        names = dict(zip(("valid bits/byte", "test bits/byte"), BITS, strict=True))
    compared = any(arm["published"] for arm in summary["arms"])
    heads = [*names, *(["finishing runs", "their chunk-mean", "published"] if compared else [])]
    width = max([3, *(len(arm["arm"]) for arm in summary["arms"])])
    lines = [f"{'arm':{width}} {'runs':>5} {'diverged':>8}" + "".join(f" {head:>16}" for head in heads)]
    for arm in summary["arms"]:
        shown = [shown_median(arm, name) for name in names.values()]
        if compared:
            finishing = arm["finishing"]
            shown += [shown_finishing(arm), shown_median(finishing, "valid_chunk_mean"), f"{arm['published'] or '-'}"]
        lines.append(f"{arm['arm']:{width}} {arm['runs']:5} {arm['diverged']:8}" + "".join(f" {s:>16}" for s in shown))
    return "\n".join([*lines, *([BY_BITS] if by_bits(summary) else [])])


def shown_finishing(arm: Mapping[str, Any]) -> str:
    """Returns as text how many runs of an arm the authors' program would have finished, of those where it is known."""
    unknown = arm["finishing"]["unknown"]
    known = f"{arm['finishing']['runs']} of {arm['runs'] - unknown}"
    return "unknown" if unknown == arm["runs"] else f"{known}, {unknown} unknown" if unknown else known


def shown_median(arm: Mapping[str, Any], measure: str) -> str:
    """Returns an arm's median as text: `diverged` where a diverged run decides it, `-` without a measurement."""
    median = arm[measure]["median"]
    return "diverged" if median is None and arm.get("diverged") else shown(median, digits(measure))


def digits(measure: str) -> int:
    """Returns how many decimal places of a measure are shown."""
    return 3 if measure in BITS else 2


def shown(ppl: float | None, digits: int = 2) -> str:
    """Returns a perplexity as text, one beyond a million by its power of ten; `-` for None."""
    return "-" if ppl is None else f"{ppl:,.{digits}f}" if ppl < 1e6 else f"{ppl:.1e}"
