"""Tests, tables and figure of `benchmarks.proof`, from the lines of its trials alone."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from store.atomic import replace_file
from trainer.comparison.results import RESULTS, read_results
from trainer.comparison.statistics import ALPHA, correct, difference, mean_and_sample_std

TASKS: Final = ("organs", "disease")
STARTS: Final = (
    "scratch", "restoration", "mae", "classification", "joint", "mae-joint",
    "classification-shuffled", "classification-frame",
)  # fmt: skip
PLANNED: Final = (
    ("scratch", "restoration"), ("scratch", "mae"), ("scratch", "classification"),
    ("scratch", "joint"), ("scratch", "mae-joint"),
    ("restoration", "joint"), ("mae", "mae-joint"),
    ("classification-shuffled", "classification"), ("classification-frame", "classification"),
)  # fmt: skip
"""Comparisons that were planned before the campaign: a gain is the second minus the first."""
GAIN_HEADER: Final = (
    "from", "to", "trials", "gain", "95 % interval", "p paired", "p Holm", "p Welch"
)  # fmt: skip
_CONTROLS: Final = ("shuffled", "frame")
_NAMES: Final = {"organs": "organs, mean Dice", "disease": "disease, AUC"}

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """One comparison: the second start minus the first, trial by trial."""

    one: str
    other: str
    num: int
    """Trials that both have."""
    mean: float
    low: float
    high: float
    """95 % confidence interval of the paired difference."""
    p_paired: float
    p_welch: float


# Results


def gather_results(compared: Path, pools: dict[str, int]) -> list[Line]:
    """The lines of all trials: task, start, labels, trial, score; Dice of test phantoms and organs.

    compared
        Folder with TASK/TRIAL/START, each a result of `semgen compare`.
    pools
        Labeled cases that a trial draws from, by task.
    """
    lines = []
    for folder in compared.glob("*/*/*"):
        for found in read_results(folder):
            line = {name: found[name] for name in ("task", "start", "score", "failed", "seed")}
            line["labels"] = round(found["label_fraction"] * pools[found["task"]])
            line["trial"] = int(folder.parent.name)
            share = f"{found['label_fraction']:g}"
            cases = folder / "trials" / line["task"] / line["start"] / share / "0-0" / "cases.csv"
            line["cases"], line["organs"] = (
                _read_dice(cases) if line["score"] is not None else ({}, {})
            )
            lines.append(line)
    return lines


def read_complete(file: Path, num_lines: int) -> list[Line]:
    """The lines of a results.jsonl, of those trials that have `num_lines` of them."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = Counter(line["trial"] for line in lines)
    return [line for line in lines if found[line["trial"]] == num_lines]


def _read_dice(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Mean Dice of each test phantom, and of each organ; nothing for a classification."""
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if "dice" in row]
    columns = [name for name in (rows[0] if rows else ()) if name.startswith("dice ")]
    organs = {
        name.removeprefix("dice "): round(float(np.nanmean([float(row[name]) for row in rows])), 4)
        for name in columns
    }
    return {row["case"]: round(float(row["dice"]), 4) for row in rows}, organs


def write_results(lines: Sequence[Line], out: Path) -> str:
    """Write results.jsonl, tables.md and figure.png to `out`; returns the tables."""
    out.mkdir(parents=True, exist_ok=True)
    lines = sorted(lines, key=_order)
    with replace_file(out / RESULTS) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    blocks, panels = [], {}
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        panels[_NAMES[task]] = planned_gains(own)
        blocks += [f"### {_NAMES[task]}\n", _scores_table(own), _planned_table(own)]
        if len({line["labels"] for line in own}) > 1:
            blocks.append(_by_labels_table(own))
        if own[0]["organs"]:
            blocks.append(_organs_table(own))
    text = "\n".join(blocks) or "No trial has a score yet.\n"
    with replace_file(out / "tables.md") as partial:
        partial.write_text(text)
    if lines:
        draw_gains(panels, out / "figure.png")
    return text


def _order(line: Line) -> tuple[int, ...]:
    return (
        TASKS.index(line["task"]), line["trial"], STARTS.index(line["start"]), line["labels"]
    )  # fmt: skip


def split_start(start: str) -> tuple[str, str]:
    """Kind and control ("shuffled", "frame" or "") of a start."""
    kind, _, control = start.rpartition("-")
    return (kind, control) if control in _CONTROLS else (start, "")


# Statistics


def scores_by_trial(lines: Sequence[Line], start: str, labels: int | None) -> dict[int, float]:
    """The score of each trial; for labels None, its mean over all numbers of labels.

    A trial without all of them is left out.
    """
    wanted = {line["labels"] for line in lines} if labels is None else {labels}
    found: dict[int, list[float]] = {}
    for line in lines:
        if line["start"] == start and line["labels"] in wanted and line["score"] is not None:
            found.setdefault(line["trial"], []).append(line["score"])
    return {n: float(np.mean(scores)) for n, scores in found.items() if len(scores) == len(wanted)}


def compare_starts(lines: Sequence[Line], one: str, other: str, labels: int | None) -> Gain | None:
    """The gain of `other` over `one`; None where fewer than two trials have both."""
    ones, others = (scores_by_trial(lines, start, labels) for start in (one, other))
    both = sorted(ones.keys() & others.keys())
    if len(both) < 2:
        return None
    pair = [ones[n] for n in both], [others[n] for n in both]
    gains = np.subtract(pair[1], pair[0])
    mean, error = float(gains.mean()), float(stats.sem(gains))
    reach = error * float(stats.t.ppf(1 - ALPHA / 2, len(both) - 1))
    p_paired = float(stats.ttest_1samp(gains, 0).pvalue) if error else float(mean == 0)
    return Gain(
        one=one, other=other, num=len(both), mean=mean, low=mean - reach, high=mean + reach,
        p_paired=p_paired, p_welch=difference(*pair).p_welch,
    )  # fmt: skip


def planned_gains(lines: Sequence[Line], labels: int | None = None) -> list[tuple[Gain, float]]:
    """The planned comparisons that have trials, each with its paired p after Holm's correction."""
    gains = [g for pair in PLANNED if (g := compare_starts(lines, *pair, labels)) is not None]
    return list(zip(gains, correct([gain.p_paired for gain in gains]), strict=True))


def _share_better(lines: Sequence[Line], gain: Gain) -> str:
    """On how many test phantoms the second start is better, in the mean over common trainings."""
    cases: dict[str, dict[tuple[int, int], dict[str, float]]] = {gain.one: {}, gain.other: {}}
    for line in lines:
        if line["start"] in cases and line["cases"]:
            cases[line["start"]][line["trial"], line["labels"]] = line["cases"]
    both = cases[gain.one].keys() & cases[gain.other].keys()
    gains: dict[str, list[float]] = {}
    for key in both:
        for case, dice in cases[gain.other][key].items():
            gains.setdefault(case, []).append(dice - cases[gain.one][key][case])
    better = sum(float(np.nanmean(found)) > 0 for found in gains.values())
    return f"{better} of {len(gains)}" if gains else ""


# Tables


def _scores_table(lines: Sequence[Line]) -> str:
    numbers = sorted({line["labels"] for line in lines})
    body = []
    for start in _starts(lines):
        cells = []
        for labels in (*numbers, None):
            mean, std = mean_and_sample_std(list(scores_by_trial(lines, start, labels).values()))
            spread = "" if math.isnan(std) else f" ± {100 * std:.1f}"
            cells.append("" if math.isnan(mean) else f"{100 * mean:.1f}{spread}")
        trials = f"{len(scores_by_trial(lines, start, None))}"
        failed = sum(line["start"] == start and line["score"] is None for line in lines)
        body.append([start, *cells, trials + (f" ({failed} trainings failed)" if failed else "")])
    return markdown_table(["start", *(f"{n} labels" for n in numbers), "mean", "trials"], body)


def _planned_table(lines: Sequence[Line]) -> str:
    body = [
        [*gain_cells(gain, holm), _share_better(lines, gain)] for gain, holm in planned_gains(lines)
    ]
    return markdown_table([*GAIN_HEADER, "test phantoms better"], body)


def gain_cells(gain: Gain, holm: float) -> list[str]:
    """The cells of a comparison below `GAIN_HEADER`."""
    return [
        gain.one, gain.other, f"{gain.num}", f"{100 * gain.mean:+.1f}",
        f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}", _p(gain.p_paired), _p(holm),
        _p(gain.p_welch),
    ]  # fmt: skip


def _by_labels_table(lines: Sequence[Line]) -> str:
    """Gains by number of labels; a star: p < 0.05 after Holm's correction within that number."""
    numbers = sorted({line["labels"] for line in lines})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for labels in numbers:
        for gain, holm in planned_gains(lines, labels):
            star = "*" if holm < ALPHA else ""
            cells.setdefault((gain.one, gain.other), {})[labels] = f"{100 * gain.mean:+.1f}{star}"
    body = [[*pair, *(found.get(n, "") for n in numbers)] for pair, found in cells.items()]
    return markdown_table(["from", "to", *(f"{n} labels" for n in numbers)], body)


def _organs_table(lines: Sequence[Line]) -> str:
    """Dice of each organ, over all trials and numbers of labels."""
    organs = list(lines[0]["organs"])
    body = []
    for start in _starts(lines):
        found = [line["organs"] for line in lines if line["start"] == start and line["organs"]]
        body.append([start, *(f"{100 * np.mean([one[o] for one in found]):.1f}" for o in organs)])
    return markdown_table(["start", *(organ.replace("_", " ") for organ in organs)], body)


def _starts(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["start"] for line in lines))


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


# Figure


def draw_gains(panels: Mapping[str, Sequence[tuple[Gain, float]]], file: Path) -> None:
    """Draw gains with their 95 % intervals to a PNG, a panel for each title."""
    import matplotlib as mpl  # noqa: PLC0415 (takes seconds)

    mpl.use("Agg", force=False)
    from matplotlib import pyplot  # noqa: PLC0415

    rows = max(len(gains) for gains in panels.values())
    size = 1.5 + 3.2 * len(panels), 1.3 + 0.25 * rows  # inches
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=size, dpi=120, squeeze=False, sharex=True, sharey=True
    )
    for (title, gains), axes in zip(panels.items(), all_axes[0], strict=True):
        means, low, high = (
            100 * np.array([getattr(gain, name) for gain, _ in gains])
            for name in ("mean", "low", "high")
        )
        names = [f"{gain.other} over {gain.one}" for gain, _ in gains]
        axes.errorbar(
            means, names, xerr=(means - low, high - means), fmt="o", markersize=4, capsize=3,
            linewidth=1.4, color="C0",
        )  # fmt: skip
        axes.axvline(0, color="0.5", linewidth=1)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("gain in points")
        axes.margins(y=0.1)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0][0].invert_yaxis()
    figure.tight_layout()
    with replace_file(file) as partial:
        figure.savefig(partial, metadata={"Software": None})
    pyplot.close(figure)
