"""README's picture, from the numbers of benchmarks/starts.py: what each start solves as it trains, and the tokens it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from red.demo.plots import ROLES, STYLE, svg
from red.demo.summary import label
from red.files import atomic_write_text


def write_starts_figure(study: dict, path: str | Path) -> list[Path]:
    """Write `path` (light) and its neighbour `…-dark.svg`, for `<picture>`; returns both.

    Args:
        study: the content of benchmarks/results/starts.json.
        path: of the light picture, ending in .svg.
    """
    path = Path(path)
    written = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    for dark, place in enumerate(written):
        atomic_write_text(place, svg(_draw(study), "Exact match over tokens, and tokens to 90 percent, for every start", page=False, dark=bool(dark)))
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
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 3.9), width_ratios=(1.15, 1), gridspec_kw={"wspace": 0.7})
        _curves(left, study, rows, roles)
        _tokens(right, study, rows, roles)
    return figure


def _curves(axes, study: dict, rows: Sequence[str], roles: dict[str, str]) -> None:
    """Mean over the seeds of the first horizon's runs, with the range of the seeds as a band."""
    axes.axhline(100 * study["teacher"]["exact_match"], color=ROLES["teacher"], linestyle=(0, (5, 3)), linewidth=1.4)
    for row in reversed(rows):
        first = next(iter(study["rows"][row]["horizons"].values()))
        histories = [seed["history"] for seed in first["seeds"].values()]
        tokens = [entry["tokens"] / 1000 for entry in histories[0]]
        scores = [[100 * entry["exact_match"] for entry in point] for point in zip(*histories)]
        loud = row in ("activation", "random", rows[0])
        axes.plot(tokens, [sum(point) / len(point) for point in scores], color=ROLES[roles[row]], linewidth=2.4 if loud else 1.4,
                  alpha=1.0 if loud else 0.8, clip_on=False, zorder=4 if loud else 3)
        axes.fill_between(tokens, [min(point) for point in scores], [max(point) for point in scores], color=ROLES[roles[row]], alpha=0.10, linewidth=0)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_title("Held-out problems solved (dashed: teacher)")
    axes.set_xlabel("training tokens (thousands)")


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
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_color(ROLES[roles[row]])
        tick.set_fontweight("bold" if row in ("activation", "random", rows[0]) else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * budget)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_title("Tokens to 90 % of the teacher (thousands)")


def _roles(rows: Sequence[str]) -> dict[str, str]:
    """RED and LRC in their colours, the best other row in the third, the rest from what is left, the teacher's grey if it runs out."""
    fixed = {"activation": "start0", "random": "start1"}
    others = [row for row in rows if row not in fixed]
    return fixed | {row: f"start{place + 2}" if place < 6 else "muted" for place, row in enumerate(others)}
