"""Markdown tables of assembled studies, each with what it takes to read it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from red.demo.study_plot import order
from red.demo.summary import label, mean, number, percent, tokens_text

from benchmarks.study.trained import NOTHING

PAPERS = {("random", "T=1"): "random", ("random", "T=40"): "random, T=40", ("activation", "T=1"): "activation", ("activation", "T=40"): "activation, T=40"}


def markdown(found: dict) -> str:
    """One study's table: mean ± standard deviation over the seeds that are there."""
    steps, lines = str(found["settings"]["steps"]), []
    if found["rows"]:
        first = next(iter(next(iter(found["rows"].values()))["horizons"][steps]["seeds"].values()))["history"]
        lines = [f"| start | learning rate | seeds | exact match at {first[-1]['tokens'] / 1000:.0f}k tokens | easy accuracy | KL to the teacher: easy, reasoning | "
                 "eRank at the start, 30 %, end | tokens to 90 % of the teacher | with the calibration's |", "|---|---|---|---|---|---|---|---|---|",
                 f"| teacher | | | {percent(found['teacher']['exact_match'])} | {percent(found['teacher']['easy_accuracy'])} | | "
                 f"{number(mean(found['teacher']['erank']), 1)} | | |"]
    for row in order(found):
        entry, reached = found["rows"][row]["horizons"][steps], found["rows"][row]["tokens_to_90"]
        rates = _marked(entry["learning_rate"], found["grid"])
        if reached["steps"] != found["settings"]["steps"]:
            rates += f"; {_marked(reached['learning_rate'], found['grid'])} for {reached['steps']} steps"
        scores = [f"{100 * entry[key]['mean']:.1f} ± {100 * entry[key]['std']:.1f} %" for key in ("exact_match", "easy_accuracy")]
        with_calibration = tokens_text({**reached, **reached["with_calibration"]}) if "with_calibration" in reached else "–"
        lines.append(f"| {label(row)} | {rates} | {len(entry['seeds'])} | {' | '.join(scores)} | {_divergence(entry)} | {_eranks(entry)} | "
                     f"{tokens_text(reached)}{_resolved(reached)} | {with_calibration} |")
    said = [note for note in notes(found) if not note.startswith("†") or any("†" in line for line in lines)]
    return "\n".join([*lines, "", *(f"* {note}" for note in said)])


def two_by_two(found: dict) -> str:
    """The paper's 2 × 2, start against temperature, at the first horizon: exact match, and easy accuracy for the general ability. Empty if a row is missing."""
    steps = str(found["settings"]["steps"])
    if set(PAPERS.values()) - set(found["rows"]):
        return ""
    lines = ["| start | T | exact match | easy accuracy |", "|---|---|---|---|"]
    for (start, temperature), row in PAPERS.items():
        entry = found["rows"][row]["horizons"][steps]
        scores = [f"{100 * entry[key]['mean']:.1f} ± {100 * entry[key]['std']:.1f} %" for key in ("exact_match", "easy_accuracy")]
        lines.append(f"| {label(start)} | {temperature[2:]} | {' | '.join(scores)} |")
    return "\n".join(lines)


def notes(found: dict) -> list[str]:
    """What the table does not say by itself."""
    settings = found["settings"]
    histories = [seed["history"] for row in found["rows"].values() for horizon in row["horizons"].values() for seed in horizon["seeds"].values()]
    spaces = [later["tokens"] - earlier["tokens"] for history in histories for earlier, later in itertools.pairwise(history)]
    kinds = len(histories[0][0]["exact_match_by_steps"]) if histories else 0
    said = [
        f"Over {len(found['seeds'])} seed{'s' if len(found['seeds']) > 1 else ''} where the column does not say fewer. Exact match, easy accuracy: mean ± standard deviation. Tokens: mean and, in "
        "brackets, the range of the seeds; `> x` where a seed did not get there in x tokens; `±` the distance to the measurement before.",
        f"Tokens are real ones, without padding. The students were measured {min(spaces) / 1000:.0f}k to {max(spaces) / 1000:.0f}k tokens apart: a smaller "
        "difference does not show, and equal seeds do not mean no spread. The calibration's tokens are training text that is read before the training.",
        f"Tokens to 90 % is the first measurement there, on a curve that is noisy: {kinds} × {settings['problems']} problems a measurement, {kinds} × "
        f"{settings['final_problems']} at the start, at 30 % of the steps and at the end. KL in nats per token.",
        f"A row of which a seed misses in {settings['steps']} steps was swept and run again with a longer schedule of its own, and its tokens are those of "
        f"the longer run. That sweep tries the row's best two rates, or all where none had reached {100 * NOTHING:g} %.",
        "† The best rate lies at the edge of the grid " + ", ".join(f"{rate:g}" for rate in found["grid"]) + ": a better one may lie outside.",
    ] if histories else []
    if found["missing"]:
        said.append(f"Not run yet: {'; '.join(found['missing'])}.")
    return said


def _marked(rate: float, grid: Sequence[float]) -> str:
    return f"{rate:g}" + (" †" if rate in (min(grid), max(grid)) else "")


def _resolved(reached: dict) -> str:
    """How finely the tokens are known: the widest gap before a measurement that found a seed there."""
    gaps = [gap for gap in reached.get("resolution", []) if gap]
    return f" ± {max(gaps) / 1000:.0f}k" if gaps else ""


def _divergence(entry: dict) -> str:
    values = [(entry.get(key) or {}).get("mean") for key in ("kl_easy", "kl_reasoning")]
    return "–" if None in values else ", ".join(f"{value:.3f}" for value in values)


def _eranks(entry: dict) -> str:
    """Mean over layers and seeds of the three full measurements."""
    runs = [[mean(point["erank"]) for point in seed["history"] if "erank" in point] for seed in entry["seeds"].values()]
    return ", ".join(number(mean(point), 1) for point in zip(*runs, strict=True))
