"""Several studies in one queue: whenever a process is free, it takes the most important run that is known to be needed by then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from red.demo.experiment import StudentRun
from red.demo.parallel import run_queue
from red.demo.summary import percent

from benchmarks.study.rows import measured_at
from benchmarks.study.trained import Study


def needed(studies: Sequence[Study], rows: Sequence[str], seeds: Sequence[int], stage: str) -> Iterator[tuple[Study, str, StudentRun, str]]:
    """`(study, row, run, split)` of every run that is known to be needed: the shorter horizons first, then study by study, row by row."""
    for place in range(max(len(study.horizons) for study in studies)):
        for study in studies:
            if place < len(study.horizons):
                for row in rows:
                    for run, split in study.needed(row, place, seeds, stage):
                        yield study, row, run, split


def execute(studies: Sequence[Study], rows: Sequence[str], seeds: Sequence[int], *, stage: str = "all", jobs: int | None = None) -> dict[str, str]:
    """Run what is missing; returns the tracebacks of what failed, after everything else has been saved."""
    handed: dict[str, tuple[Study, StudentRun, str]] = {}

    def next_job():
        for study, row, run, split in needed(studies, rows, seeds, stage):
            name = f"{study.name}: {row} {run.learning_rate:g} seed {run.seed}, {run.steps} steps, {split}"
            if name not in handed and study.get(run, split) is None:
                handed[name] = study, run, split
                return name, run, {"teacher_path": study.teacher.folder, "split": split, "device": "cpu", "evaluate_at": measured_at(run.steps)}
        return None

    def keep(name: str, result: dict) -> None:
        study, run, split = handed[name]
        result.pop("answers")
        study.lines.add(study.key(run, split), result)
        print(f"{name}: {percent(result['final']['exact_match'])}, {result['train_seconds']:.0f} s + {result['evaluate_seconds']:.0f} s", flush=True)

    for study in studies:
        _ = study.teacher_scores  # before any run, not in a thread of the queue
    missing = sum(study.get(run, split) is None for study, _, run, split in needed(studies, rows, seeds, stage))
    print(f"{missing} runs are missing, and what follows from them", flush=True)
    return run_queue(next_job, on_result=keep, processes=jobs, log=lambda text: None)
