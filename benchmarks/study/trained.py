"""One teacher at one width: which runs the study needs, what has been found, which learning rate is taken.

For every row and horizon: a sweep, every rate of the grid with one seed, judged on the validation split; then every seed at the chosen
rate, reported on the test split. A row of which a seed does not reach 90 % of the teacher's exact match goes on to the next horizon, with a sweep and a
schedule of its own.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer

from red.demo.experiment import StudentRun, calibration_tokens, teacher_and_tokenizer
from red.demo.suite import CORPORA, Suite

from benchmarks.study.lines import Lines
from benchmarks.study.rows import EVERY, GRID, HORIZONS, ROWS, SWEEP_SEED, measured_at
from benchmarks.study.teachers import Teacher

TIED = 0.02  # exact match: a rate this close to the best is as good, and the faster one is taken
NOTHING = 0.1  # exact match: a row below it at every rate has not shown which rate is good
REACHED = 0.9  # of the teacher's exact match
RULE = (f"highest exact match at the end on the validation split (seed {SWEEP_SEED}); of the rates within {TIED} of it the one with the "
        "highest mean exact match along the run, then the lowest perplexity on easy text")
LONGER = (f"a longer horizon sweeps only the best two rates of a row where some rate had reached {100 * NOTHING:g} % in the horizon before, else the "
          "whole grid")
# The fields that a run's key has always had. A later field is left out of it at its default, so that finished runs keep their keys.
KEYED = {"start", "learning_rate", "seed", "steps", "hidden_size", "rows", "length", "warmup_steps", "reasoning_share", "calibration_samples", "problems",
         "final_problems", "easy_texts", "erank_tokens", "options"}

Wanted = tuple[StudentRun, str]  # a run and the split that it is measured on


@dataclass
class Study:
    """One teacher at one width, and its finished runs."""

    teacher: Teacher
    width: int
    lines: Lines
    sizes: dict = field(default_factory=dict)  # StudentRun fields that differ from their defaults
    grid: Sequence[float] = GRID
    horizons: Sequence[int] = HORIZONS
    refine: bool = False  # a test run that was not measured at every step of `measured_at` counts as missing

    @property
    def name(self) -> str:
        return f"{self.teacher.name} {self.width}"

    def run(self, row: str, rate: float, seed: int, steps: int) -> StudentRun:
        start, options = ROWS[row]
        half = 2 * self.width == self.teacher.width
        text = {"corpus": self.teacher.corpus, "length": CORPORA[self.teacher.corpus].length}
        return StudentRun(start=start, learning_rate=rate, seed=seed, steps=steps, hidden_size=None if half else self.width, options=options,
                          **{**text, **self.sizes})

    def key(self, run: StudentRun, split: str) -> str:
        settings = {part.name: getattr(run, part.name) for part in dataclasses.fields(run)
                    if part.name in KEYED or getattr(run, part.name) != _default(part)}
        return json.dumps([settings, split, self.teacher.key], sort_keys=True)

    def get(self, run: StudentRun, split: str) -> dict | None:
        """The run's result, if it has finished (and was measured finely enough)."""
        result = self.lines.get(self.key(run, split))
        if result is None or not (self.refine and split == "test"):
            return result
        return result if set(measured_at(run.steps)) <= {entry["step"] for entry in result["history"]} else None

    def sweep(self, row: str, place: int) -> dict[float, dict | None]:
        """What each rate of a horizon gave; empty where its rates are not known yet."""
        rates = self.rates(row, place)
        return {rate: self.get(self.run(row, rate, SWEEP_SEED, self.horizons[place]), "validation") for rate in rates or ()}

    def rates(self, row: str, place: int) -> list[float] | None:
        """The rates that a horizon sweeps, by LONGER; None while the horizon before it has not been swept."""
        if place == 0:
            return list(self.grid)
        before = self.sweep(row, place - 1)
        if not before or None in before.values():
            return None
        best = max(result["final"]["exact_match"] for result in before.values())
        return ranked(before)[:2] if best >= NOTHING else list(before)

    def chosen(self, row: str, place: int) -> float | None:
        """The rate of a horizon, by RULE; None while its sweep is not whole."""
        found = self.sweep(row, place)
        return None if not found or None in found.values() else ranked(found)[0]

    def tests(self, row: str, place: int, seeds: Sequence[int]) -> dict[int, dict | None]:
        """What each seed gave at the chosen rate."""
        rate = self.chosen(row, place)
        return {seed: None if rate is None else self.get(self.run(row, rate, seed, self.horizons[place]), "test") for seed in seeds}

    def goes_on(self, row: str, place: int, seeds: Sequence[int]) -> bool:
        """Whether a horizon is needed: the one before has every seed, and not every seed got there."""
        if place == 0:
            return True
        found = list(self.tests(row, place - 1, seeds).values())
        return None not in found and any(self.reached(result["history"]) is None for result in found)

    def needed(self, row: str, place: int, seeds: Sequence[int], stage: str = "all") -> Iterator[Wanted]:
        """The runs of a row and horizon that are known to be needed by now, whether or not they have finished."""
        if not self.goes_on(row, place, seeds):
            return
        for rate in self.rates(row, place) or ():
            yield self.run(row, rate, SWEEP_SEED, self.horizons[place]), "validation"
        rate = self.chosen(row, place)
        if rate is not None and stage == "all":
            for seed in seeds:
                yield self.run(row, rate, seed, self.horizons[place]), "test"

    @cached_property
    def teacher_scores(self) -> dict:
        """The teacher's own full measurement on the test split, kept with the runs."""
        sizes = {name: getattr(self.run("activation", 0.0, 0, 1), name) for name in ("final_problems", "easy_texts", "erank_tokens")}
        key = json.dumps(["teacher", sizes, self.teacher.key], sort_keys=True)
        if self.lines.get(key) is None:
            model, tokenizer = teacher_and_tokenizer(self.teacher.folder, "cpu")
            self.lines.add(key, Suite(tokenizer, self.run("activation", 0.0, 0, 1), "test").full(model))
        return self.lines.get(key)

    def reached(self, history: list[dict]) -> int | None:
        """Where a run first had 90 % of its teacher's exact match: the place in its history."""
        least = REACHED * self.teacher_scores["exact_match"]
        return next((place for place, entry in enumerate(history) if entry["exact_match"] >= least), None) if least > 0 else None

    def calibration_tokens(self, run: StudentRun, result: dict) -> int:
        """The tokens that a run was calibrated on; runs of an earlier date do not say so, and their text does."""
        if "calibration_tokens" not in result:
            result["calibration_tokens"] = calibration_tokens(run, self._tokenizer)
        return result["calibration_tokens"]

    @cached_property
    def _tokenizer(self):
        return AutoTokenizer.from_pretrained(self.teacher.folder)


def results_file(folder: Path, teacher: str, width: int, half: bool) -> Path:
    """`starts.json` is the embedded teacher at half its width, which the demo and README show."""
    return folder / ("starts.json" if teacher == "chains" and half else f"starts_{teacher.replace(' ', '_')}_{width}.json")


def ranked(results: dict[float, dict]) -> list[float]:
    """The rates, best first, by RULE."""
    left, found = dict(results), []
    while left:
        top = max(result["final"]["exact_match"] for result in left.values())
        close = [rate for rate, result in left.items() if result["final"]["exact_match"] >= top - TIED]
        found.append(max(close, key=lambda rate: merit(left[rate])))
        del left[found[-1]]
    return found


def merit(result: dict) -> tuple[float, float]:
    """Mean exact match along the run, at every EVERY-th step and its end (whatever else was measured), and how little easy text surprises."""
    last = result["history"][-1]["step"]
    scores = [entry["exact_match"] for entry in result["history"] if entry["step"] % EVERY == 0 or entry["step"] == last]
    return statistics.mean(scores), -(result["final"]["easy_perplexity"] or float("inf"))


def _default(part: dataclasses.Field):
    return part.default if part.default is not dataclasses.MISSING else part.default_factory()
