"""What a demo's numbers say, in a table and in sentences. Every word here follows from the results: nothing assumes who wins.

`results` is the content of results.json, `details` that of details.json (may be empty).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NAMES = {"activation": "RED (activation)", "random": "LRC (random)"}

# Two shares of 400 problems each, one near 1/2: two standard errors of their difference. What is closer is not told apart.
NOISE = 0.07
EASY_NOISE = 0.015  # easy accuracies within this are called the same
ALIVE = 0.1  # below this share of the teacher's exact match a student's reasoning is called lost


def label(start: str) -> str:
    """A start's name with the method it stands for: `activation` → "RED (activation)"."""
    return NAMES.get(start, start)


def full_entries(outcome: dict) -> list[dict]:
    """The full measurements of a start: at its start, on the way, at its end."""
    return [entry for entry in outcome["history"] if "erank" in entry]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there and finite; None if nothing is."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return sum(found) / len(found) if found else None


def table_rows(results: dict, details: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows, as text, of the table that the terminal and the report show."""
    counts = list(next(iter(results["starts"].values()))["final"]["exact_match_by_steps"])
    heading = ["", "rate", "solved", *(f"{count} steps" for count in counts), "easy acc.", "easy ppl.",
               "eRank: start", "30 %", "end", "tokens to 90 %*"]
    teacher = results["teacher"]
    by_steps = details.get("teacher", {}).get("exact_match_by_steps", {})
    rows = [["teacher", "", percent(teacher["exact_match"]), *(percent(by_steps.get(count)) for count in counts),
             percent(teacher["easy_accuracy"]), number(teacher["easy_perplexity"]), "", "", number(mean(teacher["erank"]), 1), ""]]
    for start, outcome in results["starts"].items():
        final = outcome["final"]
        eranks = [number(mean(entry["erank"]), 1) for entry in full_entries(outcome)]
        eranks = [eranks[0], eranks[1] if len(eranks) > 2 else "", eranks[-1]]
        rows.append([label(start), f"{outcome['learning_rate']:g}", percent(final["exact_match"]),
                     *(percent(final["exact_match_by_steps"].get(count)) for count in counts), percent(final["easy_accuracy"]),
                     number(final["easy_perplexity"]), *eranks, study_tokens(details, start)])
    return heading, rows


def table(results: dict, details: dict) -> str:
    """The table for a terminal."""
    heading, rows = table_rows(results, details)
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths)))
             for row in [heading, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    note = "* mean ± standard deviation over the seeds of the full study (benchmarks/starts.py), not of this run"
    return "\n".join([*lines, note])


def sentences(results: dict, details: dict) -> list[str]:
    """What one sees, the verdict first."""
    starts = results["starts"]
    found = [_reasoning(results)]
    red, lrc = starts.get("activation"), starts.get("random")
    if red and lrc:
        found += [_easy(results, red, lrc), _erank(results, red, lrc)]
    if red:
        found += [_other(start, outcome, red) for start, outcome in starts.items() if start not in NAMES]
    found += [text for text in [_catching_up(results, details)] if text]
    return found


def headline(results: dict) -> str:
    """One line for the top of the report."""
    teacher = results["teacher"]["exact_match"] or 0.0
    scores = {start: outcome["final"]["exact_match"] for start, outcome in results["starts"].items()}
    if "activation" not in scores or "random" not in scores:
        best = max(scores, key=scores.get)
        return f"{label(best)} solves {percent(scores[best])}, its teacher {percent(teacher)}"
    red, lrc = scores["activation"], scores["random"]
    if red - lrc > NOISE:
        lost = "has lost it" if lrc < ALIVE * teacher else f"is {points(red - lrc)} behind"
        return f"RED kept {share(red, teacher)} of its teacher's reasoning; LRC {lost}"
    if lrc - red > NOISE:
        return f"RED lost here: LRC is {points(lrc - red)} ahead of it"
    return "No difference in reasoning between RED and LRC in this run"


def _reasoning(results: dict) -> str:
    starts, teacher = results["starts"], results["teacher"]["exact_match"]
    tokens = max(entry["tokens"] for outcome in starts.values() for entry in outcome["history"])
    scores = ", ".join(f"{label(start)} {percent(outcome['final']['exact_match'])}" for start, outcome in starts.items())
    text = f"Reasoning: after {tokens:,} training tokens the students solve {scores} of the held-out problems; the teacher {percent(teacher)}."
    if {"activation", "random"} <= set(starts):
        gap = starts["activation"]["final"]["exact_match"] - starts["random"]["final"]["exact_match"]
        if gap > NOISE:
            text += f" RED is {points(gap)} ahead of LRC at equal tokens."
        elif gap < -NOISE:
            text += f" RED lost: LRC is {points(-gap)} ahead of it at equal tokens."
        else:
            text += f" RED and LRC differ by {points(abs(gap))}, which is within the noise of this many problems."
        if gap > NOISE and starts["random"]["final"]["exact_match"] < ALIVE * teacher:
            text += " The LRC student cannot do the chains at all yet."
    return text


def _easy(results: dict, red: dict, lrc: dict) -> str:
    ours, theirs, teacher = (x["easy_accuracy"] for x in (red["final"], lrc["final"], results["teacher"]))
    text = f"Easy text: next-token accuracy RED {percent(ours)}, LRC {percent(theirs)}, teacher {percent(teacher)}"
    if abs(ours - theirs) <= EASY_NOISE:
        return text + ": on easy text nobody could tell the two apart."
    better = "RED" if ours > theirs else "LRC"
    return text + f": {better} is {points(abs(ours - theirs))} better there too."


def _erank(results: dict, red: dict, lrc: dict) -> str:
    teacher = mean(results["teacher"]["erank"])
    middle = [mean(full_entries(outcome)[len(full_entries(outcome)) // 2]["erank"]) for outcome in (red, lrc)]
    end = [mean(outcome["final"]["erank"]) for outcome in (red, lrc)]
    text = (f"Effective rank (mean over layers): teacher {number(teacher, 1)}; RED {number(middle[0], 1)} after 30 % of the training and "
            f"{number(end[0], 1)} at its end; LRC {number(middle[1], 1)} and {number(end[1], 1)}.")
    if None in middle:
        return text + " Where there is no number the hidden states have collapsed to one point."
    if middle[1] < 0.8 * middle[0]:
        return text + " LRC's hidden states use fewer directions than RED's: the collapse."
    return text + " LRC's hidden states show no collapse next to RED's here."


def _other(start: str, outcome: dict, red: dict) -> str:
    gap = outcome["final"]["exact_match"] - red["final"]["exact_match"]
    at = {entry["tokens"]: entry["exact_match"] for entry in red["history"]}
    early = [(entry["tokens"], entry["exact_match"], at[entry["tokens"]]) for entry in outcome["history"] if entry["tokens"] in at]
    tokens, theirs, ours = max(early, key=lambda entry: abs(entry[1] - entry[2]))
    verdict = "is as good as RED" if abs(gap) <= NOISE else f"is {points(abs(gap))} {'better' if gap > 0 else 'worse'} than RED"
    text = f"The other start, {label(start)}, {verdict} at the end"
    if abs(theirs - ours) > NOISE:
        text += f"; the greatest distance on the way was at {tokens:,} tokens, {percent(theirs)} against RED's {percent(ours)}"
    return text + "."


def _catching_up(results: dict, details: dict) -> str:
    known = details.get("tokens_to_90", {})
    said = [f"{label(start)} {study_tokens(details, start)}" for start in results["starts"] if start in known]
    if not said:
        return ""
    return f"Tokens to 90 % of the teacher's exact match, from the full study over {_seeds(known)} seeds, not from this run: {', '.join(said)}."


def _seeds(known: dict) -> int:
    return max(len(entry["per_seed"]) for entry in known.values())


def study_tokens(details: dict, start: str) -> str:
    """`81k ± 9k`; `> 1,075k` where not every seed got there within the longest training."""
    entry = details.get("tokens_to_90", {}).get(start)
    if entry is None:
        return "not measured"
    if entry["mean"] is None:
        return f"> {entry['budget'] / 1000:,.0f}k"
    return f"{entry['mean'] / 1000:,.0f}k ± {(entry['std'] or 0) / 1000:,.0f}k"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:.0f} points" if value >= 0.1 else f"{100 * value:.1f} points"


def share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %" if whole else percent(value)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
