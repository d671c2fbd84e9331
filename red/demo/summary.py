"""What a demo's numbers say, in a table and in sentences. Every word here follows from the results: nothing assumes who wins.

`results` is the content of results.json, `details` that of details.json (may be empty).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from red.demo.experiment import StudentRun

NAMES = {"activation": "RED (activation)", "random": "LRC (random)"}

EASY = 0.015  # easy accuracies that are closer get no winner
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


def margin(one: float, other: float, count: int) -> float:
    """Two standard errors of the difference of two shares of `count` problems each: what is closer is not told apart.

    With one success and one failure added to each (Agresti and Caffo 2000), so that a share of 0 or 1 has an error too.
    """
    shares = [(share * count + 1) / (count + 2) for share in (one, other)]
    return 2 * math.sqrt(sum(share * (1 - share) for share in shares) / (count + 2))


def _margin(one: dict, other: dict, details: dict) -> float:
    """`margin` of two measurements (entries of a history, or what a start has at its end) of the same problems."""
    settings = details.get("settings", {})
    of_each = settings.get("final_problems", StudentRun.final_problems) if "erank" in one else settings.get("problems", StudentRun.problems)
    return margin(one["exact_match"], other["exact_match"], of_each * len(one["exact_match_by_steps"]))


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
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in [heading, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    note = "* mean and range over the seeds of the full study (benchmarks/starts.py), not of this run"
    return "\n".join([*lines, note])


def sentences(results: dict, details: dict) -> list[str]:
    """What one sees, the verdict first."""
    starts = results["starts"]
    found = [_reasoning(results, details)]
    red, lrc = starts.get("activation"), starts.get("random")
    if red and lrc:
        found += [_easy(results, red, lrc), _erank(results, red, lrc)]
    if red:
        found += [_other(start, outcome, red, details) for start, outcome in starts.items() if start not in NAMES]
    found += [text for text in [_catching_up(details)] if text]
    return found


def conditions(details: dict) -> list[str]:
    """How the students were compared, and what in it is not as published. Figures of the study only where it has them."""
    found = ["Same teacher, same text in the same order, same optimiser: the students differ in how their projections start."]
    if options := details.get("settings", {}).get("options"):
        found.append(f"All have these settings besides: {json.dumps(options)}.")
    else:
        found.append("The objective is the same but for one clause: the two output taps of a layer compare with the teacher's output at the kept "
                     "channels where a start selects channels, as RED does, and with its projection where a start mixes them, as LRC does.")
        public = _studied(details, "random, public LRC objective")
        found.append("LRC here is LRC's start under our objective; the published objective is a row of the study"
                     + (f" and took {public} tokens to 90 % of the teacher." if public else "."))
        plain, normalised = _studied(details, "activation, plain taps"), _studied(details, "activation")
        found.append("Dividing each tap's error by the teacher's mean square there is ours"
                     + (f": in the study RED's start took {normalised} tokens to 90 % of the teacher with it, {plain} without." if plain and normalised else "."))
    if given := details.get("given_rates"):
        found.append(f"Learning rates given by hand: {', '.join(f'{label(start)} {rate:g}' for start, rate in given.items())}; the others are "
                     "those that one common grid gave.")
    else:
        found.append("Each has the learning rate that one common grid gave it.")
    return found


def headline(results: dict, details: dict) -> str:
    """One line for the top of the report."""
    teacher = results["teacher"]["exact_match"] or 0.0
    scores = {start: outcome["final"]["exact_match"] for start, outcome in results["starts"].items()}
    if "activation" not in scores or "random" not in scores:
        best = max(scores, key=scores.get)
        return f"{label(best)} solves {percent(scores[best])}, its teacher {percent(teacher)}"
    red, lrc = scores["activation"], scores["random"]
    noise = _margin(results["starts"]["activation"]["final"], results["starts"]["random"]["final"], details)
    if red - lrc > noise:
        lost = "has lost it" if lrc < ALIVE * teacher else f"is {points(red - lrc)} behind"
        return f"RED kept {share(red, teacher)} of its teacher's reasoning; LRC {lost}"
    if lrc - red > noise:
        return f"RED lost here: LRC is {points(lrc - red)} ahead of it"
    return f"No difference beyond {points(noise)} between the reasoning of RED and LRC in this run"


def _reasoning(results: dict, details: dict) -> str:
    starts, teacher = results["starts"], results["teacher"]["exact_match"]
    tokens = max(entry["tokens"] for outcome in starts.values() for entry in outcome["history"])
    scores = ", ".join(f"{label(start)} {percent(outcome['final']['exact_match'])}" for start, outcome in starts.items())
    text = f"Reasoning: after {tokens:,} training tokens the students solve {scores} of the held-out problems; the teacher {percent(teacher)}."
    if {"activation", "random"} <= set(starts):
        red, lrc = starts["activation"]["final"], starts["random"]["final"]
        gap, noise = red["exact_match"] - lrc["exact_match"], _margin(red, lrc, details)
        if gap > noise:
            text += f" RED is {points(gap)} ahead of LRC at equal tokens (± {points(noise)})."
        elif gap < -noise:
            text += f" RED lost: LRC is {points(-gap)} ahead of it at equal tokens (± {points(noise)})."
        else:
            text += f" RED and LRC differ by {points(abs(gap))}: no difference beyond the {points(noise)} that this many problems can tell apart."
        if gap > noise and starts["random"]["final"]["exact_match"] < ALIVE * teacher:
            text += " The LRC student cannot do the chains at all yet."
    return text


def _easy(results: dict, red: dict, lrc: dict) -> str:
    ours, theirs, teacher = (x["easy_accuracy"] for x in (red["final"], lrc["final"], results["teacher"]))
    text = f"Easy text: next-token accuracy RED {percent(ours)}, LRC {percent(theirs)}, teacher {percent(teacher)}"
    if abs(ours - theirs) <= EASY:
        return text + f": RED and LRC are within {points(abs(ours - theirs))} of each other."
    better = "RED" if ours > theirs else "LRC"
    return text + f": {better} is {points(abs(ours - theirs))} better there."


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


def _other(start: str, outcome: dict, red: dict, details: dict) -> str:
    gap, noise = outcome["final"]["exact_match"] - red["final"]["exact_match"], _margin(outcome["final"], red["final"], details)
    at = {entry["tokens"]: entry for entry in red["history"]}
    early = [(entry, at[entry["tokens"]]) for entry in outcome["history"] if entry["tokens"] in at]
    theirs, ours = max(early, key=lambda pair: abs(pair[0]["exact_match"] - pair[1]["exact_match"]))
    verdict = f"is {points(abs(gap))} {'better' if gap > 0 else 'worse'} than RED" if abs(gap) > noise else f"shows no difference from RED beyond {points(noise)}"
    text = f"The other start, {label(start)}, {verdict} at the end"
    if abs(theirs["exact_match"] - ours["exact_match"]) > _margin(theirs, ours, details):
        text += (f"; the greatest distance on the way was at {theirs['tokens']:,} tokens, {percent(theirs['exact_match'])} against RED's "
                 f"{percent(ours['exact_match'])}")
    return text + "."


def _catching_up(details: dict) -> str:
    """Every row of the study, fewest tokens first, whether or not it is in this run."""
    known = details.get("tokens_to_90", {})
    if not known:
        return ""
    rows = sorted(known, key=lambda row: _order(known[row]))
    said = [f"{label(row)} {_studied(details, row)}" for row in rows]
    spacing = f" (measured every {_thousands(entry['spacing'])})" if (entry := next(iter(known.values()))).get("spacing") else ""
    return (f"Tokens to 90 % of the teacher's exact match{spacing}, from the full study over {_seeds(known)} seeds, not from this run: "
            f"{'; '.join(said)}.")


def _order(entry: dict) -> float:
    """Fewest tokens first; behind them those of which a seed did not get there, most seeds first."""
    if entry["mean"] is not None:
        return entry["mean"]
    return 2 * entry["budget"] - sum(tokens is not None for tokens in entry["per_seed"])


def _seeds(known: dict) -> int:
    return max(len(entry["per_seed"]) for entry in known.values())


def study_tokens(details: dict, start: str) -> str:
    """What a table says of a start's tokens to 90 % of the teacher."""
    return _studied(details, start) or "not measured"


def _studied(details: dict, row: str) -> str | None:
    entry = details.get("tokens_to_90", {}).get(row)
    return tokens_text(entry) if entry else None


def tokens_text(entry: dict) -> str:
    """`88k (81k–102k)`: mean and range of the seeds; `> 1,075k` where a seed did not get there within the longest training."""
    reached = [tokens for tokens in entry["per_seed"] if tokens is not None]
    if entry["mean"] is None:
        return f"> {_thousands(entry['budget'])}" + (f" ({len(reached)} of {len(entry['per_seed'])} seeds sooner)" if reached else "")
    low, high = _thousands(min(reached)), _thousands(max(reached))
    spread = "" if len(reached) == 1 else f" ({low}–{high})" if low != high else " (every seed)"
    return _thousands(entry["mean"]) + spread


def _thousands(tokens: float) -> str:
    return f"{tokens / 1000:,.0f}k" if tokens else "0"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:.0f} points" if value >= 0.1 else f"{100 * value:.1f} points"


def share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %" if whole else percent(value)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
