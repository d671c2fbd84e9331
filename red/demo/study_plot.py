"""The pictures of README and docs, from the numbers of benchmarks/starts.py and benchmarks/untrained.py.

    starts      one width: what the main starts solve as they train, and the tokens that every start needs
    widths      several widths: what the main starts solve as they train
    untrained   what every start solves before any training, by width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from red.demo.summary import label
from red.files import atomic_write_text
from red.report.drawing import ROLES, STYLE, svg


# The starts that are drawn in a colour of their own, the same in every picture; the others share the grey.
MAIN = {"fitted": "start2", "pca": "start3", "balanced": "start4", "activation + readers": "start5", "activation": "start0", "random": "start1"}
LOUD = ("fitted", "activation", "random")  # ours, RED's and LRC's
WIDTH_MARKERS = "os^Dv"


def write_starts_figure(study: dict, path: str | Path) -> list[Path]:
    """Write `path` (light) and its neighbour `…-dark.svg`, for `<picture>`; returns both.

    Args:
        study: the content of benchmarks/results/starts.json.
        path: of the light picture, ending in .svg.
    """
    return _write(lambda: _draw(study), path, "Exact match over tokens, and tokens to 90 percent, for every start")


def write_widths_figure(studies: Sequence[dict], path: str | Path) -> list[Path]:
    """Exact match over training tokens of the main starts, a panel for each width.

    Args:
        studies: contents of benchmarks/results/starts*.json of one teacher, the widest first.
        path: of the light picture, ending in .svg.
    """
    return _write(lambda: _draw_widths(studies), path, "Exact match over training tokens of the main starts, by the student's width")


def write_untrained_figure(table: dict, path: str | Path) -> list[Path]:
    """Exact match before any training, a line for each start and a mark for each width.

    Args:
        table: `{width: {row: {"exact_match": {"mean", "per_seed"}}}}`, as benchmarks/results/untrained.json has it for one teacher.
        path: of the light picture, ending in .svg.
    """
    return _write(lambda: _draw_untrained(table), path, "Exact match of students before any training, by start and width")


def _write(draw: Callable, path: str | Path, description: str) -> list[Path]:
    path = Path(path)
    written = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    for dark, place in enumerate(written):
        atomic_write_text(place, svg(draw(), description, page=False, dark=bool(dark)))
    return written


def order(study: dict) -> list[str]:
    """The rows, fewest tokens to 90 % first; who never got there last, by what it solved."""
    def key(row: str):
        entry = study["rows"][row]
        mean = entry["tokens_to_90"]["mean"]
        first = next(iter(entry["horizons"].values()))
        return (mean is None, mean or 0, -first["exact_match"]["mean"])
    return sorted(study["rows"], key=key)


def _draw(study: dict):
    rows = order(study)
    roles = _roles(rows)
    with plt.rc_context(STYLE):
        height = max(3.9, 0.27 * len(rows) + 1)
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, height), width_ratios=(1.15, 1), gridspec_kw={"wspace": 0.7})
        _curves(left, study, [row for row in rows if roles[row] != "muted"], roles)
        left.set_title("Held-out problems solved (dashed: teacher)")
        _tokens(right, study, rows, roles)
    return figure


def _draw_widths(studies: Sequence[dict]):
    shown = [row for row in MAIN if any(row in study["rows"] for study in studies)]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(studies), figsize=(max(5.4, 3.7 * len(studies)), 3.4), sharey=True, squeeze=False)
        for axes, study in zip(panels[0], studies, strict=True):
            _curves(axes, study, [row for row in order(study) if row in MAIN], MAIN)
            axes.set_title(f"width {study['width']} of {study['teacher_width']}")
        lines = [Line2D([], [], color=ROLES[MAIN[row]], linewidth=2.4 if row in LOUD else 1.4) for row in shown]
        figure.legend(lines, [label(row) for row in shown], loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=min(6, len(shown)), frameon=False,
                      labelcolor=ROLES["ink"], fontsize=9)
    return figure


def _curves(axes, study: dict, rows: Sequence[str], roles: dict[str, str]) -> None:
    """Mean over the seeds of the first horizon's runs, with the range of the seeds as a band, at the steps that all of them were measured at."""
    axes.axhline(100 * study["teacher"]["exact_match"], color=ROLES["teacher"], linestyle=(0, (5, 3)), linewidth=1.4)
    for row in reversed(rows):
        first = next(iter(study["rows"][row]["horizons"].values()))
        seeds = [{entry["step"]: entry for entry in seed["history"]} for seed in first["seeds"].values()]
        steps = sorted(set.intersection(*map(set, seeds)))
        tokens = [sum(seed[step]["tokens"] for seed in seeds) / len(seeds) / 1000 for step in steps]
        scores = [[100 * seed[step]["exact_match"] for seed in seeds] for step in steps]
        loud = row in LOUD
        axes.plot(tokens, [sum(point) / len(point) for point in scores], color=ROLES[roles[row]], linewidth=2.4 if loud else 1.4,
                  alpha=1.0 if loud else 0.8, clip_on=False, zorder=4 if loud else 3)
        axes.fill_between(tokens, [min(point) for point in scores], [max(point) for point in scores], color=ROLES[roles[row]], alpha=0.10, linewidth=0)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_xlabel("training tokens (thousands)")


def _draw_untrained(table: dict):
    widths = list(table)
    rows = sorted({row for by_row in table.values() for row in by_row}, key=lambda row: -_solved(table, row))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.3 * len(rows) + 1.2))
        for place, row in enumerate(rows):
            colour = ROLES[MAIN.get(row, "muted")]
            for width, marker in zip(widths, WIDTH_MARKERS, strict=False):
                score = table[width].get(row)
                if score is not None:
                    axes.plot([100 * value for value in score["exact_match"]["per_seed"]], [place] * len(score["exact_match"]["per_seed"]), "|",
                              color=colour, alpha=0.45, markersize=7, clip_on=False)
                    axes.plot(100 * score["exact_match"]["mean"], place, marker, color=colour, markersize=6, clip_on=False, zorder=4)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(ROLES[MAIN.get(row, "muted")])
            tick.set_fontweight("bold" if row in LOUD else "normal")
        axes.invert_yaxis()
        axes.set_xlim(-1, 102)
        axes.set_xticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
        axes.grid(True, axis="both")
        axes.set_title("Held-out problems solved before any training")
        marks = [Line2D([], [], color=ROLES["muted"], marker=marker, linestyle="") for marker in WIDTH_MARKERS[: len(widths)]]
        axes.legend(marks, [f"width {width}" for width in widths], loc="lower right", frameon=False, labelcolor=ROLES["muted"], fontsize=9)
    return figure


def _solved(table: dict, row: str) -> float:
    """The mean over the widths of what a row solves."""
    scores = [by_row[row]["exact_match"]["mean"] for by_row in table.values() if row in by_row]
    return sum(scores) / len(scores)


def _tokens(axes, study: dict, rows: Sequence[str], roles: dict[str, str]) -> None:
    """A line per row: the mean of the seeds' tokens to 90 % as a bar, the seeds as dots; an open end where a seed never got there."""
    budget = max(study["rows"][row]["tokens_to_90"]["budget"] for row in rows) / 1000
    for place, row in enumerate(rows):
        entry, colour = study["rows"][row]["tokens_to_90"], ROLES[roles[row]]
        reached = [tokens / 1000 for tokens in entry["per_seed"] if tokens is not None]
        if entry["mean"] is None:
            length, text = entry["budget"] / 1000, f"> {entry['budget'] / 1000:,.0f}k"
            axes.barh(place, length, 0.55, color=colour, alpha=0.25)
        else:
            length, text = entry["mean"] / 1000, f"{entry['mean'] / 1000:,.0f}k"
            axes.barh(place, length, 0.55, color=colour, alpha=0.85)
        axes.plot(reached, [place] * len(reached), "o", color=ROLES["ink"], markersize=2.8)
        axes.text(max([length, *reached]) + 0.02 * budget, place, text, va="center", fontsize=9, color=ROLES["ink"])
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(ROLES[roles[row]])
        tick.set_fontweight("bold" if row in LOUD else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * budget)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_title("Tokens to 90 % of the teacher (thousands)")


def _roles(rows: Sequence[str]) -> dict[str, str]:
    """The main starts in their colours, the best two of the others in what is left, the rest grey."""
    others = [row for row in rows if row not in MAIN]
    return {row: MAIN[row] for row in rows if row in MAIN} | {row: f"start{place + 6}" if place < 2 else "muted" for place, row in enumerate(others)}
