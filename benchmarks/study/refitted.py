"""The untrained part of benchmarks/push.py: variations of the fit, and how many sweeps."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from red.demo.experiment import calibration_rows, run_config
from red.prepare import calibration_batches, ready_calibration

from benchmarks.study import variations
from benchmarks.study.assembled import spread
from benchmarks.study.cells import Cell, _teacher_and_suite, measure
from benchmarks.study.lines import Lines
from benchmarks.study.teachers import Teacher
from benchmarks.study.variations import usual

SEEDS = (0, 1, 2)  # of the calibration text
SWEEPS = (1, 2, 3)
VARIATIONS: dict[str, Callable] = {
    "targets of later points": variations.later_targets,
    "writers of their own": variations.free_writers,
    "biases on q, k, v": functools.partial(variations.with_biases, everywhere=False),
    "biases everywhere": variations.with_biases,
    "second sweep, all documents alike": variations.swept_again,
    "writer ridge 1e-6": functools.partial(usual, fit_writer_ridge=1e-6),
    "map refitted once": variations.refitted_map,
    "map refitted three times": functools.partial(variations.refitted_map, times=3),
    "map by Fisher's information": variations.fisher_map,
    "map by what blocks put out": variations.heard_behind_blocks,
    "map by what blocks put out, writer ridge 1e-6": functools.partial(variations.heard_behind_blocks, writer_ridge=1e-6),
    "without massive directions": variations.without_massive_directions,
}
ELSEWHERE = ("writer ridge 1e-6", "map by what blocks put out", "map by what blocks put out, writer ridge 1e-6")
VARIED = {  # teacher and width → what is varied there
    ("chains", 32): tuple(name for name in VARIATIONS if name != "without massive directions"),  # it has none
    ("massive", 64): (*ELSEWHERE, "without massive directions"),
    ("rich", 40): ELSEWHERE,
}
SCORES = ("exact_match", "kl_reasoning", "kl_easy", "easy_perplexity", "easy_accuracy", "seconds")


@dataclass
class Refitted:
    """The cells of some teachers, and what has been found; `study` has the usual start's own cells of the test split, of untrained.py."""

    lines: Lines
    study: Lines
    smaller: dict = dataclasses.field(default_factory=dict)  # Cell fields

    def cell(self, width: int, seed: int, sweeps: int = 1) -> Cell:
        return Cell("fitted", width, seed, options={} if sweeps == 1 else {"fit_sweeps": sweeps}, **self.smaller)

    def get(self, cell: Cell, teacher: Teacher, name: str = "usual") -> dict | None:
        found = self.lines.get(_key(cell, teacher, name))
        return found if found is not None or name != "usual" else self.study.get(cell.key(teacher))

    def sweep_tasks(self, teacher: Teacher, width: int, sweeps: int) -> dict[str, Callable[[], dict]]:
        cells = [self.cell(width, seed, sweeps) for seed in SEEDS]
        return {_key(cell, teacher, "usual"): functools.partial(measure, cell, teacher.folder) for cell in cells if self.get(cell, teacher) is None}

    def tasks(self, name: str, teacher: Teacher, width: int) -> dict[str, Callable[[], dict]]:
        cells = [self.cell(width, seed) for seed in SEEDS]
        return {_key(cell, teacher, name): functools.partial(varied, cell, teacher.folder, VARIATIONS[name]) for cell in cells}

    def entry(self, teacher: Teacher, width: int, name: str = "usual", sweeps: int = 1) -> dict | None:
        """Spreads over the seeds that are there."""
        cells = [self.cell(width, seed, sweeps) for seed in SEEDS]
        found = [result for cell in cells if (result := self.get(cell, teacher, name)) is not None]
        return {"seeds": len(found), **{score: spread([result[score] for result in found]) for score in SCORES}} if found else None


def varied(cell: Cell, teacher_path: str, change: Callable) -> dict:
    """`benchmarks.study.cells.measure` of a student that a variation makes."""
    teacher, suite = _teacher_and_suite(teacher_path, cell)
    run = cell.run(suite.run.corpus)
    rows, config = calibration_rows(run, suite.tokenizer), run_config(run, teacher, "unused", "cpu")
    started = time.perf_counter()
    calibration = ready_calibration(teacher, config, rows=rows, tokenizer=suite.tokenizer)
    student = change(teacher, config, calibration, list(calibration_batches(rows, config.calibration_samples))).eval()
    seconds = time.perf_counter() - started
    return {**suite.full(student, generate=False), "seconds": seconds, "calibration_tokens": calibration.tokens, "parameters": student.num_parameters()}


def _key(cell: Cell, teacher: Teacher, name: str) -> str:
    return json.dumps([name, cell.key(teacher)])
