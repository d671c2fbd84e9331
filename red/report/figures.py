"""The pictures of a run: curves over its steps, effective rank by layer, channels, reasoning against text, tasks."""

from __future__ import annotations


import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from red.report.drawing import MARKERS, ROLES, STYLE, numbers, plt, svg
from red.report.run import Run, finite_number, thinned
import itertools

BINS = 256  # columns of the channel map
DASHED = (0, (5, 3))
TINTS = {"warm": (225, 60, 75), "cool": (70, 130, 200)}  # of pictures whose pixels cannot follow the theme: readable on white and on black
CURVES = (  # title, unit of the axis, the logged values with their names, and whether the axis is logarithmic
    (
        "loss",
        "",
        (
            ("loss", "loss"),
            ("ce", "cross entropy"),
            ("kl", "KL"),
            ("task", "task"),
            ("anchor", "anchor"),
            ("rationale", "rationale"),
            ("cot", "chain of thought"),
            ("eval_loss", "held out"),
        ),
        True,
    ),
    ("error of the taps", "", (("tap_mse", "taps"),), True),
    ("canary: problems solved, share of the teacher's", "%", (("canary/share", "canary"),), False),
    ("effective rank, lowest share of the teacher's", "%", (("erank/share", "eRank"),), False),
    ("learning rate", "", (("learning_rate", "learning rate"),), False),
    ("gradient norm", "", (("grad_norm", "gradient norm"),), True),
    ("tokens a second", "", (("tokens_per_second", "tokens/s"),), False),
)


def curves(run: Run) -> list[str]:
    """One picture for each thing that was logged at two steps or more."""
    drawn = []
    for title, unit, wanted, logarithmic in CURVES:
        lines = [(label, points) for name, label in wanted if len(points := run.series(name)) > 1 and any(value for _, value in points)]
        if lines:
            drawn.append(_curve(title, unit, lines, logarithmic))
    return drawn


def _curve(title: str, unit: str, lines, logarithmic: bool) -> str:
    scale = 100 if unit == "%" else 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.0, 2.6))
        for place, (label, points) in enumerate(lines):
            points = thinned(points)
            axes.plot(
                [step for step, _ in points],
                [scale * value for _, value in points],
                color=ROLES[f"start{(place + 1) % 8}"],
                label=label,
                linewidth=1.7,
                marker=MARKERS[place] if len(points) <= 24 else None,
                clip_on=False,
                zorder=3,
            )
        values = [scale * value for _, points in lines for _, value in points]
        if logarithmic and min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if max(values) < 40 * min(values) and f"{value:.0e}"[0] in "25" else "")
            )
        else:
            axes.set_ylim(bottom=min(0, min(values)), top=max(values) * 1.08 or 1)
        if unit:
            axes.axhline(100, color=ROLES["teacher"], linestyle=DASHED, linewidth=1.2)
            axes.set_ylim(0, max(104, *values))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.tick_params(which="minor", length=0)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=ROLES["muted"], handlelength=1.6)
        return svg(figure, f"{title}, by training step")


def erank_layers(run: Run) -> str:
    """eRank by layer of the teacher, and of the student at its start and its end."""
    teacher, start, end = (run.ranks(which) for which in ("teacher", "start", "end"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 3.0))
        for values, role, line, mark, label in (
            (teacher, "teacher", DASHED, "o", "teacher"),
            (start, "start1", (0, (1.4, 1.2)), "s", "student, start"),
            (end if run.method != "compress" else [], "start0", "-", "D", f"student, {'end' if run.finished else 'last'}"),
        ):
            if values:
                axes.plot(range(len(values)), numbers(values), color=ROLES[role], linestyle=line, marker=mark, label=label, clip_on=False, zorder=3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer (0 = embedding)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8, labelcolor=ROLES["muted"])
        return svg(figure, "Effective rank by layer of the teacher and of the student at its start and its end")


def channels(run: Run) -> str:
    """The teacher's channels, sorted by importance: how much each counts, at which depth, and how much of it the student keeps."""
    found = run.channels
    scores, kept, depths = found.get("scores"), found.get("kept"), found.get("mean_square")
    order = np.argsort(-(scores if scores is not None else kept), kind="stable")
    panels = [
        (name, height)
        for name, height, there in (("scores", 1.5, scores is not None), ("depths", 1.7, depths is not None), ("kept", 0.95, kept is not None))
        if there
    ]
    with plt.rc_context(STYLE):
        figure, drawn = plt.subplots(
            len(panels),
            1,
            figsize=(10.8, sum(height for _, height in panels) + 0.3),
            sharex=True,
            squeeze=False,
            height_ratios=[height for _, height in panels],
            gridspec_kw={"hspace": 0.42},
        )
        width = len(order)
        for axes, (name, _) in zip(drawn[:, 0], panels, strict=True):
            axes.set_xlim(0, width)
            if name == "scores":
                values = _binned(scores[order], width)
                axes.fill_between(np.linspace(0, width, len(values)), values, values.min() * 0.9 or 0, color=ROLES["start1"], alpha=0.35, linewidth=0)
                axes.plot(np.linspace(0, width, len(values)), values, color=ROLES["start1"], linewidth=1.6)
                if values.min() > 0 and values.max() > 8 * values.min():
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
                    axes.tick_params(which="minor", length=0)
                axes.set_title("importance: mean activation, pooled over the layers")
            elif name == "depths":
                _picture(axes, _relative(_binned(depths[:, order], width)), width, "cool")
                axes.set_title("mean square of the normalised stream, by depth (log; the stronger the colour, the more)")
                axes.set_ylabel("norm")
                axes.set_yticks([0.5, len(depths) - 0.5], ["first", "last"])
            else:
                shares = _binned(kept[order], width)
                axes.bar((np.arange(len(shares)) + 0.5) * width / len(shares), 100 * shares, width / len(shares), color=ROLES["start0"], linewidth=0)
                axes.set_ylim(0, 104)
                axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
                axes.set_title("share of each that the student keeps" if not run.get("channels", "selected") else "channels that the student keeps")
        drawn[-1, 0].set_xlabel("channels of the teacher's residual stream, the most important first")
        return svg(figure, "Importance of the teacher's channels, and the share of each that the student keeps")


def reasoning(run: Run) -> str:
    """The canary's share against the cross entropy on the training text at the same steps, joined in time; "" where there are no two."""
    losses = run.series("ce") or run.series("loss")
    points = (
        [(step, min(losses, key=lambda entry: abs(entry[0] - step)), share) for step, share in run.series("canary/share") if step] if losses else []
    )
    apart = min((late[0] - early[0] for early, late in itertools.pairwise(losses)), default=0)
    points = [(step, entry[1], share) for step, entry, share in points if abs(entry[0] - step) <= apart]
    if len(points) < 2:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 2.9))
        shown = thinned(points, 100)
        axes.plot(
            [loss for _, loss, _ in shown],
            [100 * share for _, _, share in shown],
            color=ROLES["start0"],
            marker="o",
            linewidth=1.4,
            clip_on=False,
            zorder=3,
        )
        for step, loss, share in (shown[0], shown[-1]):
            axes.annotate(
                f"step {step:.0f}", (loss, 100 * share), textcoords="offset points", xytext=(4, -12), ha="left", fontsize=8, color=ROLES["muted"]
            )
        axes.axhline(100, color=ROLES["teacher"], linestyle=DASHED, linewidth=1.2)
        axes.set_ylim(0, max(104, *(100 * share for _, _, share in points)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.margins(x=0.12)
        axes.set_xlabel("cross entropy on the training text (better to the right)")
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6, prune="both"))
        axes.set_title("problems solved, share of the teacher's")
        return svg(figure, "Share of the teacher's problems that the student solves, against its cross entropy")


def tasks(judgement: dict) -> str:
    """Dots of teacher and student for every score of `red eval` between 0 and 1; "" where there is none."""
    rows = [
        row
        for row in judgement["rows"]
        if isinstance(row, dict)
        and all(0 <= (finite_number(row.get(side)) or 0) <= 1 for side in ("teacher", "student"))
        and finite_number(row.get("teacher")) is not None
        and finite_number(row.get("student")) is not None
    ][:40]
    if not rows:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(rows) + 0.9))
        for place, row in enumerate(rows):
            axes.plot([100 * row["teacher"], 100 * row["student"]], [place, place], color=ROLES["muted"], linewidth=1.2, zorder=2)
            axes.plot(100 * row["teacher"], place, "o", color=ROLES["teacher"], markersize=8, clip_on=False, zorder=3)
            axes.plot(100 * row["student"], place, "D", color=ROLES["start0"], markersize=7, clip_on=False, zorder=4)
        axes.set_yticks(range(len(rows)), [_plain_label(f"{row.get('task')} · {row.get('metric')}") for row in rows])
        axes.invert_yaxis()
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-1, 101)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.grid(True, axis="x")
        return svg(figure, "Scores of teacher (circle) and student (diamond) by task")


def _plain_label(text: str) -> str:
    """Nothing in it is a formula."""
    return text[:60].replace("\\", "/").replace("$", r"\$")


def _binned(values: np.ndarray, width: int) -> np.ndarray:
    """Means over at most BINS columns of the last axis."""
    edges = np.unique(np.linspace(0, width, min(width, BINS) + 1).astype(int))
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)


def _relative(values: np.ndarray) -> np.ndarray:
    """Logarithms from 0 to 1, between the 2nd and the 98th of a hundred."""
    logs = np.log(np.maximum(values, 1e-12))
    low, high = np.quantile(logs, (0.02, 0.98))
    return np.clip((logs - low) / max(high - low, 1e-9), 0, 1)


def _picture(axes, shades: np.ndarray, width: int, tint: str) -> None:
    """Shades [rows, columns] from 0 to 1 as an image of one colour and as much opacity: it shows on a light and on a dark page."""
    pixels = np.zeros((*shades.shape, 4))
    pixels[..., :3], pixels[..., 3] = np.array(TINTS[tint]) / 255, shades
    axes.imshow(pixels, aspect="auto", interpolation="none", extent=(0, width, len(shades), 0))
    axes.grid(False)
