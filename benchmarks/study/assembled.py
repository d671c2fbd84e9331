"""The finished runs of a study put together, whatever part of it there is: the content of starts.json, and what the demo is given of it."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

from red import starts
from red.report import provenance

from benchmarks.study.rows import EVERY, ROWS, measured_at
from benchmarks.study.trained import LONGER, RULE, Study, merit, ranked

FINAL = ("exact_match", "easy_accuracy", "easy_perplexity", "kl_easy", "kl_reasoning")


def assembled(study: Study, seeds: Sequence[int]) -> dict:
    """`{"rows": {row: {"start", "options", "horizons": {steps: …}, "tokens_to_90"}}, "sweep": {row: {steps: …}}, "missing": [what is not there], …}`.

    A row stands in "rows" with its first test run, and its figures are of the seeds that are there.
    """
    rows: dict[str, dict] = {}
    swept: dict[str, dict] = {}
    missing: list[str] = []
    for row, (start, options) in ROWS.items():
        horizons: dict[str, dict] = {}
        reached: dict = {}
        done: dict[int, dict] = {}
        for place, steps in enumerate(study.horizons):
            if place and not (done and study.goes_on(row, place, list(done))):
                break  # every seed that is there got to 90 %
            found = study.sweep(row, place)
            there = {rate: result for rate, result in found.items() if result is not None}
            if len(there) < len(found):
                missing.append(f"{row}, {steps} steps: {len(found) - len(there)} of {len(found)} rates")
            if study.chosen(row, place) is None:
                break
            swept.setdefault(row, {})[str(steps)] = {"chosen": study.chosen(row, place), "rates": {f"{rate:g}": _short(result) for rate, result in found.items()}}
            tests = study.tests(row, place, seeds)
            done = {seed: result for seed, result in tests.items() if result is not None}
            if len(done) < len(tests):
                missing.append(f"{row}, {steps} steps: seed {', '.join(str(seed) for seed in tests if seed not in done)}")
            if done:
                horizons[str(steps)] = _horizon(study.chosen(row, place), done)
                reached = _tokens(study, row, place, done)
        if horizons:
            rows[row] = {"start": start, "options": options, "horizons": horizons, "tokens_to_90": reached}
    first = study.run("activation", 0.0, 0, study.horizons[0])
    return {"teacher_name": study.teacher.name, "teacher_width": study.teacher.width, "width": study.width, "rows": rows, "sweep": swept, "missing": missing,
            "rates_rule": f"{RULE}; {LONGER}", "grid": list(study.grid), "teacher": study.teacher_scores, "seeds": list(seeds),
            "settings": {**dataclasses.asdict(first), "measured_every": EVERY, "measured_at": measured_at(study.horizons[0]), "teacher": study.teacher.key},
            "versions": provenance.versions(), "commit": sorted(study.lines.commits), "put_together_at": provenance.commit(), "device": provenance.device("cpu")}


def spread(values: Sequence[float | None]) -> dict:
    """Mean and sample standard deviation; no mean if one value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "std": None, "per_seed": list(values)}
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": statistics.mean(known), "std": std, "per_seed": list(values)}


def _short(result: dict) -> dict:
    return {**{key: result["final"].get(key) for key in FINAL}, "mean_exact_match": merit(result)[0]}


def _horizon(rate: float, found: dict[int, dict]) -> dict:
    scores = {key: spread([result["final"].get(key) for result in found.values()]) for key in FINAL}
    seconds = statistics.mean(result["train_seconds"] for result in found.values())
    return {"learning_rate": rate, **scores, "train_seconds": seconds,
            "seeds": {str(seed): {"history": result["history"], "final": result["final"]} for seed, result in found.items()}}


def _tokens(study: Study, row: str, place: int, found: dict[int, dict]) -> dict:
    """Tokens to 90 % of the teacher: of training, and with the tokens of the calibration, which are read before it.

    `resolution` is, for each seed, the distance to the measurement before the one that found it there.
    """
    rate, steps = study.chosen(row, place), study.horizons[place]
    trained, resolution, calibration = [], [], []
    for seed, result in found.items():
        tokens = [entry["tokens"] for entry in result["history"]]
        at = study.reached(result["history"])
        trained.append(None if at is None else tokens[at])
        resolution.append(None if at is None else tokens[at] - tokens[at - 1] if at else 0)
        calibration.append(study.calibration_tokens(study.run(row, rate, seed, steps), result))
    histories = [[entry["tokens"] for entry in result["history"]] for result in found.values()]
    return {**spread(trained), "resolution": resolution, "steps": steps, "budget": histories[0][-1], "learning_rate": rate,
            "spacing": max(later - earlier for tokens in histories for earlier, later in itertools.pairwise(tokens)),
            "calibration_tokens": statistics.mean(calibration),
            "with_calibration": spread([None if tokens is None else tokens + before for tokens, before in zip(trained, calibration, strict=True)])}


def shipped(found: dict) -> dict:
    """What the demo needs: rates of the first horizon, the best other start, tokens to 90 %."""
    steps = found["settings"]["steps"]
    first = {row: horizons[str(steps)] for row, horizons in found["sweep"].items()}
    names = [row for row in first if row in starts.names()]
    others = {row: {"final": best, "history": [{"step": steps, "exact_match": best["mean_exact_match"]}]} for row in names
              if row not in ("activation", "random") for best in [first[row]["rates"][f"{first[row]['chosen']:g}"]]}
    rule = f"the best of the other starts, each at its best rate: {RULE.replace('rates', 'starts')}"
    return {"written_by": "benchmarks/starts.py", "steps": steps, "grid": found["grid"],
            "rates": {row: first[row]["chosen"] for row in names}, "rates_rule": f"of the common grid {found['grid']}: {RULE}",
            "best_other": ranked(others)[0] if others else None, "best_other_rule": rule,
            "tokens_to_90": {row: entry["tokens_to_90"] for row, entry in found["rows"].items()}, "commit": found["commit"]}
