"""One untrained student: calibrated, started, measured. It takes seconds."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from dataclasses import dataclass, field

from red.demo.experiment import StudentRun, calibration_rows, run_config, teacher_and_tokenizer
from red.demo.suite import CORPORA, Suite, corpus_of
from red.prepare import calibration_batches, ready_calibration, start_projections

from benchmarks.study.teachers import Teacher

DEFAULTS = StudentRun(start="", learning_rate=0.0)


@dataclass(frozen=True)
class Cell:
    """The settings of one untrained student; `calibration_samples` rows of its teacher's text, which `seed` and `reasoning_share` decide."""

    start: str
    width: int
    seed: int
    split: str = "test"
    options: dict = field(default_factory=dict)  # REDConfig fields
    calibration_samples: int = DEFAULTS.calibration_samples
    reasoning_share: float = DEFAULTS.reasoning_share
    problems: int = 250  # of each step count
    easy_texts: int = DEFAULTS.easy_texts
    erank_tokens: int = DEFAULTS.erank_tokens

    def key(self, teacher: Teacher) -> str:
        return json.dumps([dataclasses.asdict(self), teacher.key], sort_keys=True)

    def run(self, corpus: str = "chains") -> StudentRun:
        """The student run that would begin so."""
        return StudentRun(start=self.start, learning_rate=0.0, seed=self.seed, hidden_size=self.width, calibration_samples=self.calibration_samples,
                          reasoning_share=self.reasoning_share, final_problems=self.problems, easy_texts=self.easy_texts,
                          erank_tokens=self.erank_tokens, options=self.options, corpus=corpus, length=CORPORA[corpus].length)


def measure(cell: Cell, teacher_path: str) -> dict:
    """`{"exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "kl_easy", "kl_reasoning", "erank", "seconds" (of calibration and
    start), "calibration_tokens", "parameters" (of the student)}`."""
    teacher, suite = _teacher_and_suite(teacher_path, cell)
    run = cell.run(suite.run.corpus)
    rows = calibration_rows(run, suite.tokenizer)
    config = run_config(run, teacher, "unused", "cpu")
    started = time.perf_counter()
    calibration = ready_calibration(teacher, config, rows=rows, tokenizer=suite.tokenizer)
    student = start_projections(teacher, config, calibration, calibration_batches(rows, config.calibration_samples)).student
    seconds = time.perf_counter() - started
    return {**suite.full(student, generate=False), "seconds": seconds, "calibration_tokens": calibration.tokens, "parameters": student.num_parameters()}


def measure_teacher(cell: Cell, teacher_path: str) -> dict:
    """The teacher's own figures on a cell's suite."""
    teacher, suite = _teacher_and_suite(teacher_path, cell)
    return {**suite.full(teacher, generate=False), "parameters": teacher.num_parameters()}


@functools.lru_cache(maxsize=8)
def _loaded(path: str, sizes: tuple):
    teacher, tokenizer = teacher_and_tokenizer(path, "cpu")
    split, problems, easy_texts, erank_tokens = sizes
    run = dataclasses.replace(DEFAULTS, final_problems=problems, easy_texts=easy_texts, erank_tokens=erank_tokens,
                              corpus=corpus_of(path))
    return teacher, Suite(tokenizer, run, split, teacher)


def _teacher_and_suite(path: str, cell: Cell):
    """Kept for the next cell: what is measured depends on the split and the sizes alone."""
    return _loaded(path, (cell.split, cell.problems, cell.easy_texts, cell.erank_tokens))
