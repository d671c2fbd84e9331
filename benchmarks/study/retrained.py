"""The trained part of benchmarks/push.py: recipes that differ from the study's in one thing, beside the study's own runs of the same seeds and text."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from red.demo.experiment import StudentRun, run_student

from benchmarks.study import recipes
from benchmarks.study.assembled import spread
from benchmarks.study.lines import Lines
from benchmarks.study.rows import EVERY, GRID, SWEEP_SEED
from benchmarks.study.teachers import Teacher
from benchmarks.study.trained import REACHED, Study, ranked, results_file

STEPS = 150
SEEDS = (0, 1)  # of the test split
ADAM = (5e-4, 1e-3, 2e-3)  # rates


@dataclass(frozen=True)
class Recipe:
    """One change; of several rates the one that is best on the validation split is tested."""

    start: str
    part: int  # the student has this part of the teacher's width: 2 or 4
    change: Callable | None = None
    rates: tuple[float, ...] = ()  # () takes the rate of the study's own run
    options: dict = field(default_factory=dict)  # REDConfig fields


def _fading(start: str, shape: str) -> Recipe:
    return Recipe(start, 4, functools.partial(recipes.fading, shape=shape))


def _optimiser(name: str, rates: tuple[float, ...]) -> Recipe:
    return Recipe("fitted", 4, functools.partial(recipes.optimiser, name=name), rates)


RECIPES = {  # in the order in which they are run
    "taps fade, linear": _fading("fitted", "linear"),
    "Muon": _optimiser("muon", ADAM),
    "fitted in three sweeps": Recipe("fitted", 4, options={"fit_sweeps": 3}),
    "low rank 32": Recipe("activation", 2, functools.partial(recipes.low_rank, rank=32)),
    "low rank 8": Recipe("activation", 2, functools.partial(recipes.low_rank, rank=8)),
    "Adam, β2 .95": Recipe("fitted", 4, options={"adam_beta2": 0.95}),
    "whitened projections": Recipe("fitted", 4, recipes.whitened, ADAM),
    "own weights": Recipe("fitted", 4, recipes.own_weights, ADAM),
    "SGD, momentum .9": _optimiser("sgd", (0.01, 0.03, 0.1)),
    "taps fade, cosine": _fading("fitted", "cosine"),
    "Adam, β2 .99": Recipe("fitted", 4, options={"adam_beta2": 0.99}),
    "Shampoo": _optimiser("shampoo", ADAM),
    "taps fade, linear (pca)": _fading("pca", "linear"),
    "taps fade, linear (RED)": _fading("activation", "linear"),
    "low rank 8 (RED)": Recipe("activation", 4, functools.partial(recipes.low_rank, rank=8), (2e-3, 4e-3, 8e-3)),
}


@dataclass
class Retrained:
    """The runs of some recipes and what has been found.

    Args:
        results: the folder of starts*_runs.jsonl, the study's own runs.
        sizes: StudentRun fields that differ from their defaults.
    """

    lines: Lines
    teacher: Teacher
    results: Path
    sizes: dict = field(default_factory=dict)
    _studies: dict[int, Study] = field(default_factory=dict)

    def study(self, part: int) -> Study:
        width = self.teacher.width // part
        file = results_file(self.results, self.teacher.name, width, part == 2)
        if part not in self._studies:
            self._studies[part] = Study(self.teacher, width, Lines(file.with_name(f"{file.stem}_runs.jsonl")))
        return self._studies[part]

    def rates(self, recipe: Recipe) -> tuple[float, ...]:
        return recipe.rates or ((self.study(recipe.part).chosen(recipe.start, 0) or GRID[1]),)

    def run(self, recipe: Recipe, rate: float, seed: int) -> StudentRun:
        run = self.study(recipe.part).run(recipe.start, rate, seed, STEPS)
        return dataclasses.replace(run, options={**run.options, **recipe.options}, **self.sizes)

    def key(self, name: str, run: StudentRun, split: str) -> str:
        return json.dumps([name, self.study(RECIPES[name].part).key(run, split)])

    def swept(self, name: str) -> dict[float, dict | None]:
        recipe = RECIPES[name]
        return {rate: self.lines.get(self.key(name, self.run(recipe, rate, SWEEP_SEED), "validation")) for rate in self.rates(recipe)}

    def chosen(self, name: str) -> float | None:
        rates = self.rates(RECIPES[name])
        if len(rates) == 1:
            return rates[0]
        found = self.swept(name)
        return None if None in found.values() else ranked(found)[0]

    def tasks(self, name: str) -> dict[str, Callable[[], dict]]:
        """The runs that are known to be needed by now, by their keys."""
        recipe, rate = RECIPES[name], self.chosen(name)
        wanted = [(self.run(recipe, each, SWEEP_SEED), "validation") for each in self.rates(recipe) if len(self.rates(recipe)) > 1]
        if rate is not None:
            wanted += [(self.run(recipe, rate, seed), "test") for seed in SEEDS]
        return {self.key(name, run, split): functools.partial(trained, run, self.teacher.folder, split, recipe.change) for run, split in wanted}

    def tests(self, name: str) -> dict[int, dict]:
        """What the seeds gave that are there."""
        rate = self.chosen(name)
        found = {} if rate is None else {seed: self.lines.get(self.key(name, self.run(RECIPES[name], rate, seed), "test")) for seed in SEEDS}
        return {seed: result for seed, result in found.items() if result is not None}

    def usual(self, start: str, part: int) -> tuple[float | None, dict[int, dict]]:
        """The study's own rate and runs of those seeds."""
        study = self.study(part)
        return study.chosen(start, 0), {seed: result for seed, result in study.tests(start, 0, SEEDS).items() if result is not None}

    def summary(self, rate: float | None, tests: dict[int, dict], part: int) -> dict | None:
        """Means over the seeds at the steps that both kinds of run were measured at: every EVERY-th."""
        if not tests:
            return None
        least = REACHED * self.study(part).teacher_scores["exact_match"]
        histories = [[entry for entry in result["history"] if entry["step"] % EVERY == 0] for result in tests.values()]
        return {"rate": rate, "seeds": len(tests), "start": statistics.mean(history[0]["exact_match"] for history in histories),
                "along": statistics.mean(entry["exact_match"] for history in histories for entry in history),
                "exact_match": [result["final"]["exact_match"] for result in tests.values()],
                **{key: spread([result["final"].get(key) for result in tests.values()])["mean"] for key in ("kl_reasoning", "easy_perplexity")},
                "tokens_to_90": [next((entry["tokens"] for entry in history if entry["exact_match"] >= least), None) for history in histories],
                "parameters": next(iter(tests.values())).get("trained_parameters"),
                "train_seconds": statistics.mean(result["train_seconds"] for result in tests.values())}


def trained(run: StudentRun, teacher_path: str, split: str, change: Callable | None) -> dict:
    """One run, measured at every EVERY-th step."""
    count = []

    def prepare(trainer) -> None:
        if change is not None:
            change(trainer)
        count.append(sum(master.numel() for master in trainer.projections.parameters()))

    result = run_student(run, teacher_path=teacher_path, evaluate_at=range(0, run.steps + 1, EVERY), split=split, device="cpu", change=prepare)
    result.pop("answers")
    return {**result, "trained_parameters": count[0]}
