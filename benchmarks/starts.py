"""Every start under one trainer, one grid of learning rates and the same text: `python benchmarks/starts.py --stage all --jobs 4`.

    sweep   every row × every rate, one seed, judged on the validation split: the rate of each row
    study   every row × three seeds at its rate, reported on the test split; who does not reach 90 % of the teacher's exact match in the
            first horizon is swept and run again with a longer one (a schedule of its own), up to the last
    figure  docs/starts.svg, docs/starts-dark.svg and the table for README

Each finished run is a line of starts_runs.jsonl at once, and is not run again: an interrupted study goes on where it was, and `--no-run`
only puts together what is there. The results are starts.json, and red/demo/learning_rates.json, which the demo reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from red import starts
from red.demo import known, record
from red.demo.experiment import StudentRun, Suite, teacher_and_tokenizer
from red.demo.parallel import run_parallel
from red.demo.study_plot import order, write_starts_figure
from red.demo.summary import label, percent, tokens_text
from red.example import teacher_path

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
HORIZONS = (150, 450)  # optimiser steps
SWEEP_SEED = 100
SEEDS = (0, 1, 2)
EVERY = 15  # steps between measurements: about 20k tokens
TIED = 0.02  # exact match: a rate this close to the best is as good, and the faster one is taken
NOTHING = 0.1  # exact match: a row below it at every rate has not shown which rate is good
ROWS = {
    **{name: (name, {}) for name in starts.names()},
    "activation, no norm scale": ("activation", {"norm_scale": False}),
    "activation, plain taps": ("activation", {"tap_normalize": False}),  # squared errors as they are, as in LRC's public code and as we read RED
    "random, public LRC objective": ("random", {"lrc_faithful": True}),  # T = 40 and its reductions (arXiv 2505.12781, public code)
}
RULE = (f"highest exact match at the end on the validation split (seed {SWEEP_SEED}); of the rates within {TIED} of it the one with the "
        "highest mean exact match along the run, then the lowest perplexity on easy text")
LONGER = (f"a longer horizon sweeps only the best two rates of a row where some rate had reached {100 * NOTHING:g} % in the horizon before, else the "
          "whole grid")


class Runs:
    """The finished runs, a line of JSON each; a line that an interruption cut short does not count."""

    def __init__(self, folder: Path, teacher: str, sizes: dict, jobs: int | None, may_run: bool = True):
        self.file, self.teacher, self.sizes, self.jobs, self.may_run = folder / "starts_runs.jsonl", teacher, sizes, jobs, may_run
        self.teacher_hash = hashlib.sha256((Path(teacher) / "model.safetensors").read_bytes()).hexdigest()[:16]
        self.done: dict[str, dict] = {}  # lines of the file by key
        self.commits: set[str] = set()  # of the runs that were used
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.file.read_text().splitlines() if self.file.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.done[entry["key"]] = entry
        if self.file.is_file() and not self.file.read_text().endswith("\n"):
            self.file.write_text(self.file.read_text() + "\n")  # so that the next line does not continue the cut one

    def run(self, row: str, rate: float, seed: int, steps: int) -> StudentRun:
        start, options = ROWS[row]
        return StudentRun(start=start, learning_rate=rate, seed=seed, steps=steps, options=options, **self.sizes)

    def key(self, run: StudentRun, split: str) -> str:
        return json.dumps([dataclasses.asdict(run), split, self.teacher_hash], sort_keys=True)

    def get(self, run: StudentRun, split: str) -> dict:
        entry = self.done[self.key(run, split)]
        self.commits.add(entry["commit"])
        return entry["result"]

    def execute(self, wanted: Sequence[StudentRun], split: str) -> None:
        """Run what is missing, the longest first; SystemExit if any failed, after the others have been saved."""
        missing = {f"{run.start}{' ' + json.dumps(run.options) if run.options else ''} {run.learning_rate:g} seed {run.seed}": run
                   for run in sorted(wanted, key=lambda run: -run.steps) if self.key(run, split) not in self.done}
        print(f"{split}: {len(wanted)} runs, {len(missing)} of them to do", flush=True)
        if missing and not self.may_run:
            raise SystemExit(f"{len(missing)} runs are not in {self.file}, the first of them {next(iter(missing))}; leave --no-run out to make them")

        def keep(name: str, result: dict) -> None:
            result.pop("answers")
            key = self.key(missing[name], split)
            line = json.dumps(record.finite({"key": key, "result": result, "commit": record.commit()})) + "\n"
            with open(self.file, "a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self.done[key] = json.loads(line)
            print(f"{name}: {percent(result['final']['exact_match'])} after {missing[name].steps} steps, "
                  f"{result['train_seconds']:.0f} s + {result['evaluate_seconds']:.0f} s", flush=True)

        settings = {name: {"teacher_path": self.teacher, "split": split, "device": "cpu", "evaluate_at": list(range(0, run.steps, EVERY))}
                    for name, run in missing.items()}
        _, failures = run_parallel(missing, settings, processes=self.jobs, on_result=keep, log=lambda text: None)
        if failures:
            raise SystemExit("\n".join(f"{name} failed:\n{trace}" for name, trace in failures.items()))


def ranked(results: dict[float, dict]) -> list[float]:
    """The rates, best first, by RULE."""
    left, found = dict(results), []
    while left:
        top = max(result["final"]["exact_match"] for result in left.values())
        close = [rate for rate, result in left.items() if result["final"]["exact_match"] >= top - TIED]
        found.append(max(close, key=lambda rate: _merit(left[rate])))
        del left[found[-1]]
    return found


def _merit(result: dict) -> tuple[float, float]:
    history = [entry["exact_match"] for entry in result["history"]]
    return statistics.mean(history), -(result["final"]["easy_perplexity"] or float("inf"))


def tokens_to(share: float, history: list[dict]) -> int | None:
    """The tokens at the first measurement with an exact match of at least `share`; None if there is none, or nothing to reach."""
    if share <= 0:
        return None  # the teacher itself solves nothing
    return next((entry["tokens"] for entry in history if entry["exact_match"] >= share), None)


def spread(values: Sequence[float | None]) -> dict:
    """Mean and sample standard deviation; no mean if one value is missing."""
    known_values = [value for value in values if value is not None]
    if not known_values or len(known_values) < len(values):
        return {"mean": None, "std": None, "per_seed": list(values)}
    std = statistics.stdev(known_values) if len(known_values) > 1 else 0.0
    return {"mean": statistics.mean(known_values), "std": std, "per_seed": list(values)}


def sweep(runs: Runs, rows: dict[str, Sequence[float]], steps: int) -> dict[str, dict[float, dict]]:
    """Results by row and rate, on the validation split."""
    wanted = {row: {rate: runs.run(row, rate, SWEEP_SEED, steps) for rate in rates} for row, rates in rows.items()}
    runs.execute([run for by_rate in wanted.values() for run in by_rate.values()], "validation")
    return {row: {rate: runs.get(run, "validation") for rate, run in by_rate.items()} for row, by_rate in wanted.items()}


def study(runs: Runs, args) -> dict:
    """The whole content of starts.json."""
    swept: dict[str, dict] = {row: {} for row in args.rows}
    rows: dict[str, dict] = {row: {"start": ROWS[row][0], "options": ROWS[row][1], "horizons": {}} for row in args.rows}
    teacher = _teacher(runs, args)
    rates = {row: args.grid for row in args.rows}
    for place, steps in enumerate(args.horizons):
        for row, results in sweep(runs, rates, steps).items():
            swept[row][str(steps)] = {"chosen": ranked(results)[0], "rates": {f"{rate:g}": _short(result) for rate, result in results.items()}}
            best = max(result["final"]["exact_match"] for result in results.values())
            rates[row] = ranked(results)[:2] if best >= NOTHING else list(results)
        if args.stage == "sweep":
            break
        runs.execute([_run(runs, swept, row, seed, steps) for row in rates for seed in args.seeds], "test")
        for row in list(rates):
            found = {str(seed): runs.get(_run(runs, swept, row, seed, steps), "test") for seed in args.seeds}
            rows[row]["horizons"][str(steps)] = _horizon(swept[row][str(steps)]["chosen"], found)
            reached = [tokens_to(0.9 * teacher["exact_match"], result["history"]) for result in found.values()]
            tokens = [entry["tokens"] for entry in next(iter(found.values()))["history"]]
            rows[row]["tokens_to_90"] = {**spread(reached), "steps": steps, "budget": tokens[-1], "spacing": tokens[-1] / (len(tokens) - 1),
                                         "learning_rate": swept[row][str(steps)]["chosen"]}
            if None not in reached or place + 1 == len(args.horizons):
                del rates[row]
        if not rates:
            break
    return {"rows": rows, "sweep": swept, "rates_rule": f"{RULE}; {LONGER}", "grid": list(args.grid), "teacher": teacher, "seeds": list(args.seeds),
            "settings": {**dataclasses.asdict(runs.run(args.rows[0], 0.0, 0, args.horizons[0])), "measured_every": EVERY, "teacher": runs.teacher_hash},
            "versions": record.versions(), "commit": sorted(runs.commits), "put_together_at": record.commit(), "device": record.device("cpu")}


def _run(runs: Runs, swept: dict, row: str, seed: int, steps: int) -> StudentRun:
    return runs.run(row, swept[row][str(steps)]["chosen"], seed, steps)


def _short(result: dict) -> dict:
    return {**{key: result["final"][key] for key in ("exact_match", "easy_accuracy", "easy_perplexity")},
            "mean_exact_match": _merit(result)[0]}


def _horizon(rate: float, found: dict[str, dict]) -> dict:
    scores = {key: spread([result["final"][key] for result in found.values()]) for key in ("exact_match", "easy_accuracy", "easy_perplexity")}
    seconds = statistics.mean(result["train_seconds"] for result in found.values())
    return {"learning_rate": rate, **scores, "train_seconds": seconds,
            "seeds": {seed: {"history": result["history"], "final": result["final"]} for seed, result in found.items()}}


def _teacher(runs: Runs, args) -> dict:
    model, tokenizer = teacher_and_tokenizer(runs.teacher, "cpu")
    return Suite(tokenizer, runs.run(args.rows[0], 0.0, 0, args.horizons[0]), "test").full(model)


def shipped(found: dict, earlier: dict) -> dict:
    """What the demo needs: rates of the first horizon, the best other start, tokens to 90 %. A sweep alone keeps the tokens of `earlier`."""
    first = {row: next(iter(horizons.values())) for row, horizons in found["sweep"].items()}
    names = [row for row in first if row in starts.names()]
    others = {row: {"final": best, "history": [{"exact_match": best["mean_exact_match"]}]} for row in names if row not in ("activation", "random")
              for best in [first[row]["rates"][f"{first[row]['chosen']:g}"]]}
    rule = f"the best of the other starts, each at its best rate: {RULE.replace('rates', 'starts')}"
    return {"written_by": "benchmarks/starts.py", "steps": found["settings"]["steps"], "grid": found["grid"],
            "rates": {row: first[row]["chosen"] for row in names}, "rates_rule": f"of the common grid {found['grid']}: {RULE}",
            "best_other": ranked(others)[0] if others else None, "best_other_rule": rule,
            "tokens_to_90": {row: entry["tokens_to_90"] for row, entry in found["rows"].items() if "tokens_to_90" in entry}
            or earlier.get("tokens_to_90", {}), "commit": found["commit"]}


def markdown(found: dict) -> str:
    """README's table, mean ± standard deviation over the seeds, and what it takes to read it."""
    steps = str(found["settings"]["steps"])
    budget = next(iter(found["rows"].values()))["horizons"][steps]["seeds"][str(found["seeds"][0])]["history"][-1]["tokens"]
    lines = [f"| start | learning rate | exact match at {budget / 1000:.0f}k tokens | easy accuracy | tokens to 90 % of the teacher |",
             "|---|---|---|---|---|",
             f"| teacher | | {percent(found['teacher']['exact_match'])} | {percent(found['teacher']['easy_accuracy'])} | |"]
    for row in order(found):
        first, reached = found["rows"][row]["horizons"][steps], found["rows"][row]["tokens_to_90"]
        rates = _marked(first["learning_rate"], found["grid"])
        if reached["steps"] != found["settings"]["steps"]:
            rates += f"; {_marked(reached['learning_rate'], found['grid'])} for {reached['steps']} steps"
        scores = [f"{100 * first[key]['mean']:.1f} ± {100 * first[key]['std']:.1f} %" for key in ("exact_match", "easy_accuracy")]
        lines.append(f"| {label(row)} | {rates} | {' | '.join(scores)} | {tokens_text(reached)} |")
    said = [note for note in notes(found) if not note.startswith("†") or any("†" in line for line in lines)]
    return "\n".join([*lines, "", *(f"* {note}" for note in said)])


def _marked(rate: float, grid: Sequence[float]) -> str:
    return f"{rate:g}" + (" †" if rate in (min(grid), max(grid)) else "")


def notes(found: dict) -> list[str]:
    """What the table does not say by itself."""
    settings, seeds = found["settings"], found["seeds"]
    histories = [seed["history"] for row in found["rows"].values() for horizon in row["horizons"].values() for seed in horizon["seeds"].values()]
    spaces = [later["tokens"] - earlier["tokens"] for history in histories for earlier, later in zip(history, history[1:])]
    kinds = len(histories[0][0]["exact_match_by_steps"])
    return [
        f"Over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}. Exact match and easy accuracy: mean ± standard deviation. Tokens: mean and, in brackets, "
        "the range of the seeds; `> x` where a seed did not get there in x tokens.",
        f"Tokens are real ones, without padding. The students were measured every {settings['measured_every']} steps, {min(spaces) / 1000:.0f}k to "
        f"{max(spaces) / 1000:.0f}k tokens apart: a smaller difference does not show, and equal seeds do not mean no spread.",
        f"Tokens to 90 % is the first measurement there, on a curve that is noisy: {kinds} × {settings['problems']} problems a measurement, {kinds} × "
        f"{settings['final_problems']} at 30 % of the steps and at the end.",
        f"A row of which a seed misses in {settings['steps']} steps was swept and run again with a longer schedule of its own, and its tokens are those of "
        f"the longer run. That sweep tries the row's best two rates, or all where none had reached {100 * NOTHING:g} %.",
        "† The best rate lies at the edge of the grid " + ", ".join(f"{rate:g}" for rate in found["grid"]) + ": a better one may lie outside."
    ]


def main(words: Sequence[str] | None = None) -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("sweep", "study", "figure", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=None, help="runs at once, one thread each (default: one per core)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--no-run", action="store_true", help="stop where a run is missing instead of making it")
    parser.add_argument("--smoke", metavar="TEACHER", default=None,
                        help="two rows, one rate, one seed and four steps on this teacher, to see that it runs; needs --out")
    args = parser.parse_args(words)
    if args.out is None and (set(ROWS) - set(args.rows) or set(SEEDS) - set(args.seeds)):
        parser.error("fewer --rows or --seeds than all need --out: they would replace the study's results")
    args.grid, args.horizons, sizes, teacher = GRID, HORIZONS, {}, args.smoke or teacher_path()
    if args.smoke:
        if args.out is None:
            parser.error("--smoke needs --out: its numbers must not replace the study's")
        args.rows, args.seeds, args.grid, args.horizons = ["activation", "random", "pca"], [0], GRID[:1], (2, 4)
        sizes = {"problems": 2, "final_problems": 2, "easy_texts": 4, "erank_tokens": 200, "rows": 2, "calibration_samples": 4}
    results = args.out or root / "benchmarks/results"
    if args.stage != "figure":
        found = study(Runs(results, teacher, sizes, args.jobs, may_run=not args.no_run), args)
        rates = results / "learning_rates.json" if args.out else known.FILE
        record.write_json(rates, shipped(found, json.loads(rates.read_text()) if rates.is_file() else {}))
        if args.stage == "sweep":
            return
        record.write_json(results / "starts.json", found)
    found = json.loads((results / "starts.json").read_text())
    write_starts_figure(found, (results if args.out else root / "docs") / "starts.svg")
    print(markdown(found))


if __name__ == "__main__":
    main()
