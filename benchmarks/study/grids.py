"""The tables of untrained students: their grids of cells, and what is put together of those that are there.

    main      every row × width × teacher × calibration seed
    size      the fitted start by the length of its calibration text
    domain    … by its kind: reasoning, easy text, both
    ridge     … by its two ridges: chosen on the validation split with seeds of its own, reported on the test split beside the default
    autoencoder   the paper's linear proxy
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from red.config import REDConfig

from benchmarks.study import autoencoder
from benchmarks.study.assembled import spread
from benchmarks.study.cells import Cell, measure, measure_teacher
from benchmarks.study.lines import Lines
from benchmarks.study.rows import ROWS, SEEDS, UNTRAINED_ROWS
from benchmarks.study.teachers import Teacher

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # rows of 112 tokens (of the varied teacher)
DOMAINS = {"reasoning": 1.0, "mixed": 0.5, "easy text": 0.0}  # the share of reasoning in the calibration text
READER_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WRITER_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_SEEDS = (100, 101, 102)
FITTED = "fitted"  # the row whose calibration is varied
SCORES = ("exact_match", "easy_accuracy", "easy_perplexity", "kl_easy", "kl_reasoning", "seconds", "calibration_tokens")


@dataclass
class Grids:
    """All cells of some teachers and widths, and their results."""

    lines: Lines
    teachers: Sequence[Teacher]
    varied: Teacher  # whose calibration the other tables vary
    widths: Callable[[Teacher], Sequence[int]]
    seeds: Sequence[int] = SEEDS
    rows: Sequence[str] = tuple(UNTRAINED_ROWS)
    smaller: dict = field(default_factory=dict)  # Cell fields that differ from their defaults

    def cell(self, row: str, width: int, seed: int, *, options: dict | None = None, **settings) -> Cell:
        start, own = ROWS[row]
        return Cell(start, width, seed, options={**own, **(options or {})}, **{**self.smaller, **settings})

    def sensitive(self) -> list[tuple[Teacher, int]]:
        """Where the calibration is varied: at half and a quarter of the width."""
        return [(self.varied, self.varied.width // part) for part in (2, 4) if self.varied.width // part in self.widths(self.varied)]

    # ---- the cells ----

    def tasks(self, table: str) -> dict[str, Callable[[], dict]]:
        """What makes each cell of a table, by its key; of `ridge` the validation part, whose result `chosen_ridges` reads."""
        if table == "autoencoder":
            return {_linear_key(*place): functools.partial(autoencoder.measure, *place[:3], place[3].folder) for place in self._linear()}
        cells = {"main": self._main, "size": self._size, "domain": self._domain, "ridge": self._ridge}[table]()
        tasks = {cell.key(teacher): functools.partial(measure, cell, teacher.folder) for teacher, cell in cells}
        if table == "main":
            tasks |= {_teacher_key(cell, teacher): functools.partial(measure_teacher, cell, teacher.folder) for teacher, cell in self._teachers()}
        return tasks

    def chosen_tasks(self) -> dict[str, Callable[[], dict]]:
        """The default's and the chosen ridges' cells on the test split."""
        cells = [(teacher, self.cell(FITTED, width, seed, options=options)) for teacher, width in self.sensitive()
                 for options in ({}, self.chosen_ridges(teacher, width) or {}) for seed in self.seeds]
        return {cell.key(teacher): functools.partial(measure, cell, teacher.folder) for teacher, cell in cells}

    def _teachers(self):
        return [(teacher, Cell("teacher", 0, 0, **self.smaller)) for teacher in self.teachers]

    def _main(self):
        return [(teacher, self.cell(row, width, seed)) for row in self.rows for teacher in self.teachers for width in self.widths(teacher) for seed in self.seeds]

    def _size(self):
        return [(teacher, self.cell(FITTED, width, seed, calibration_samples=size)) for teacher, width in self.sensitive() for size in SIZES for seed in self.seeds]

    def _domain(self):
        return [(teacher, self.cell(FITTED, width, seed, reasoning_share=share)) for teacher, width in self.sensitive() for share in DOMAINS.values()
                for seed in self.seeds]

    def _ridge(self):
        return [(teacher, self._ridged(width, seed, reader, writer)) for teacher, width in self.sensitive() for reader in READER_RIDGES
                for writer in WRITER_RIDGES for seed in RIDGE_SEEDS]

    def _ridged(self, width: int, seed: int, reader: float, writer: float) -> Cell:
        return self.cell(FITTED, width, seed, options={"fit_reader_ridge": reader, "fit_writer_ridge": writer}, split="validation")

    def _linear(self):
        return [(name, width, seed, teacher) for name in autoencoder.NAMES for teacher in self.teachers for width in self.widths(teacher) for seed in self.seeds[:1]]

    # ---- what there is of them ----

    def main(self) -> dict:
        """`{teacher: {"teacher": its own figures, "widths": {width: {row: …}}}}`."""
        found = {}
        for teacher, own in self._teachers():
            widths = {str(width): {row: entry for row in self.rows if (entry := self._entry([(teacher, self.cell(row, width, seed)) for seed in self.seeds]))}
                      for width in self.widths(teacher)}
            found[teacher.name] = {"teacher": self.lines.get(_teacher_key(own, teacher)), "widths": widths}
        return found

    def size(self) -> dict:
        """`{width: {size: …}}`, with the student's parameters."""
        return self._varied({str(size): {"calibration_samples": size} for size in SIZES})

    def domain(self) -> dict:
        """`{width: {domain: …}}`."""
        return self._varied({name: {"reasoning_share": share} for name, share in DOMAINS.items()})

    def ridge(self) -> dict:
        """`{width: {"validation": {reader: {writer: exact match}}, "default", "chosen": {…}, "options"}}`."""
        found = {}
        for teacher, width in self.sensitive():
            grid = {f"{reader:g}": {f"{writer:g}": self._mean(teacher, width, reader, writer) for writer in WRITER_RIDGES} for reader in READER_RIDGES}
            options = self.chosen_ridges(teacher, width)
            entries = {name: self._entry([(teacher, self.cell(FITTED, width, seed, options=ridges)) for seed in self.seeds])
                       for name, ridges in (("default", {}), ("chosen", options)) if ridges is not None}
            found[str(width)] = {"validation": grid, "options": options, **entries,
                                 "default_options": {name: REDConfig.__dataclass_fields__[name].default for name in ("fit_reader_ridge", "fit_writer_ridge")}}
        return found

    def autoencoder(self) -> dict:
        """`{teacher: {width: {start: …}}}`."""
        found: dict = {}
        for name, width, seed, teacher in self._linear():
            result = self.lines.get(_linear_key(name, width, seed, teacher))
            if result is not None:
                found.setdefault(teacher.name, {}).setdefault(str(width), {})[name] = result
        return found

    def chosen_ridges(self, teacher: Teacher, width: int) -> dict | None:
        """The ridges of the highest mean exact match on the validation split, of equals those with the lowest divergence; None while cells are missing."""
        scores = {(reader, writer): [self.lines.get(self._ridged(width, seed, reader, writer).key(teacher)) for seed in RIDGE_SEEDS]
                  for reader in READER_RIDGES for writer in WRITER_RIDGES}
        if any(None in results for results in scores.values()):
            return None
        reader, writer = max(scores, key=lambda place: (statistics.mean(result["exact_match"] for result in scores[place]),
                                                        -statistics.mean(result["kl_reasoning"] for result in scores[place])))
        return {"fit_reader_ridge": reader, "fit_writer_ridge": writer}

    def missing(self, table: str) -> int:
        tasks = self.tasks(table) | (self.chosen_tasks() if table == "ridge" else {})
        return sum(self.lines.get(key) is None for key in tasks)

    def _mean(self, teacher: Teacher, width: int, reader: float, writer: float) -> float | None:
        return spread([(self.lines.get(self._ridged(width, seed, reader, writer).key(teacher)) or {}).get("exact_match") for seed in RIDGE_SEEDS])["mean"]

    def _varied(self, settings: dict[str, dict]) -> dict:
        return {str(width): {name: entry for name, changed in settings.items()
                             if (entry := self._entry([(teacher, self.cell(FITTED, width, seed, **changed)) for seed in self.seeds]))}
                for teacher, width in self.sensitive()}

    def _entry(self, cells: list[tuple[Teacher, Cell]]) -> dict | None:
        """The figures of the seeds that are there: spreads, and means by steps and by layer."""
        done = [result for teacher, cell in cells if (result := self.lines.get(cell.key(teacher))) is not None]
        if not done:
            return None
        by_steps = {steps: statistics.mean(result["exact_match_by_steps"][steps] for result in done) for steps in done[0]["exact_match_by_steps"]}
        eranks = [spread(list(layer))["mean"] for layer in zip(*(result["erank"] for result in done), strict=True)]
        return {"seeds": len(done), **{key: spread([result[key] for result in done]) for key in SCORES}, "exact_match_by_steps": by_steps, "erank": eranks,
                "parameters": done[0]["parameters"]}


def _teacher_key(cell: Cell, teacher: Teacher) -> str:
    return json.dumps(["teacher", cell.key(teacher)])


def _linear_key(name: str, width: int, seed: int, teacher: Teacher) -> str:
    return json.dumps(["autoencoder", name, width, seed, teacher.key, autoencoder.TOKENS, autoencoder.LEARNING_RATE, autoencoder.STEPS])
