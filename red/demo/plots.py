"""The demo's figures: bars by steps, lines over tokens, eRank by layer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from red.demo.summary import full_entries, label
from red.report.drawing import MARKERS, ROLES, STYLE, numbers, plt, svg


def colour_roles(starts: Sequence[str]) -> dict[str, str]:
    """Each start's role: RED always the first colour, LRC the second, the others what follows, in order."""
    order = [name for name in ("activation", "random") if name in starts] + [name for name in starts if name not in ("activation", "random")]
    fixed = {"activation": "start0", "random": "start1"}
    others = [f"start{i}" for i in range(2, 8)]
    return {name: fixed.get(name) or others[sum(n not in fixed for n in order[: order.index(name)]) % len(others)] for name in order}


def by_steps(results: dict, details: dict) -> str:
    """Bars: exact match by the problems' number of steps, teacher beside the starts."""
    starts, roles = results["starts"], colour_roles(list(results["starts"]))
    teacher = details.get("teacher", {}).get("exact_match_by_steps")
    series = [(None, teacher)] if teacher else []
    series += [(start, outcome["final"]["exact_match_by_steps"]) for start, outcome in starts.items()]
    counts = list(series[-1][1])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10.8, 2.8))
        width = 0.8 / len(series)
        for place, (start, shares) in enumerate(series):
            x = [i + (place - (len(series) - 1) / 2) * width for i in range(len(counts))]
            heights = [100 * (shares.get(count) or 0) for count in counts]
            axes.bar(x, heights, width * 0.86, color=ROLES["teacher" if start is None else roles[start]])
            for left, height in zip(x, heights, strict=True):
                axes.text(left, height + 1.5, f"{height:.0f}", ha="center", va="bottom", fontsize=7.5, color=ROLES["muted"])
        axes.set_xticks(range(len(counts)), [f"{count} steps" for count in counts])
        _percent_axis(axes, "problems solved", 112)
        return svg(figure, "Exact match by number of steps, in percent, for the teacher and each start")


def over_tokens(results: dict, key: str, title: str) -> str:
    """Lines: a score ("exact_match" or "easy_accuracy") over the training tokens, the teacher dashed."""
    starts, roles = results["starts"], colour_roles(list(results["starts"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 3.0))
        top = 100 * (results["teacher"][key] or 0)
        axes.axhline(top, color=ROLES["teacher"], linestyle=(0, (5, 3)), linewidth=1.4)
        for place, (start, outcome) in enumerate(starts.items()):
            entries = [entry for entry in outcome["history"] if entry.get(key) is not None]
            axes.plot([entry["tokens"] / 1000 for entry in entries], [100 * entry[key] for entry in entries], color=ROLES[roles[start]],
                      marker=MARKERS[place % len(MARKERS)], clip_on=False, zorder=3)
        highest = max([top, *(100 * (entry.get(key) or 0) for outcome in starts.values() for entry in outcome["history"])])
        _percent_axis(axes, title, max(1.0, highest * 1.06))
        axes.set_xlabel("training tokens (thousands)")
        axes.set_xlim(left=0)
        return svg(figure, f"{title} over training tokens for each start, with the teacher's value")


def erank_layers(results: dict) -> str:
    """One panel per start: eRank per layer of the teacher and of the student at its start, after 30 % and at its end."""
    starts, roles = results["starts"], colour_roles(list(results["starts"]))
    teacher = results["teacher"]["erank"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(starts), figsize=(3.6 * len(starts), 2.9), sharey=True, squeeze=False)
        for axes, (start, outcome) in zip(panels[0], starts.items(), strict=True):
            axes.plot(range(len(teacher)), numbers(teacher), color=ROLES["teacher"], linestyle=(0, (5, 3)), linewidth=1.4, label="teacher")
            entries = full_entries(outcome)
            names = ["start", "30 %", "end"] if len(entries) == 3 else [f"{entry['tokens']:,} tokens" for entry in entries]
            for place, (entry, name) in enumerate(zip(entries, names, strict=True)):
                last = place == len(entries) - 1
                axes.plot(range(len(entry["erank"])), numbers(entry["erank"]), color=ROLES[roles[start]], marker="ovs"[place % 3],
                          linestyle="-" if last else (0, (1, 1.2)) if place == 0 else (0, (4, 1.5)), alpha=1.0 if last else 0.45 if place == 0 else 0.75,
                          linewidth=2.2 if last else 1.6, label=name)
            axes.set_title(label(start))
            axes.set_xlabel("layer (0 = embedding)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, fontsize=8, labelcolor=ROLES["muted"], loc="best", handlelength=2.4)
        panels[0][0].set_ylabel("effective rank")
        panels[0][0].set_ylim(bottom=0)
        return svg(figure, "Effective rank per layer: teacher, and each start at its start, after 30 percent and at the end")


def _percent_axis(axes, title: str, top: float) -> None:
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MultipleLocator(20 if top > 60 else 10) if top > 20 else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if value <= 100 else ""))
    axes.set_title(title)
