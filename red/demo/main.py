"""run_demo: teacher, LRC, RED and the best other start at equal tokens, a table, a report and a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from red import example
from red import starts as registry
from red.demo import known as study
from red.demo import report, summary
from red.demo.experiment import StudentRun, Suite, pick_device, teacher_and_tokenizer
from red.demo.folder import OutputFolder
from red.demo.parallel import available_cores, run_parallel
from red.errors import REDError
from red.evaluate import words
from red.report import provenance

MEASUREMENTS = 10  # of a student on its way, besides its start
EXPORTED = "activation"  # the student that the user keeps


def run_demo(output_dir: str | Path = "runs/demo", *, steps: int = 150, starts: Sequence[str] | None = None,
             learning_rates: Mapping[str, float] | None = None, seed: int = 0, processes: int | None = None, device: str = "auto",
             teacher_path: str | Path | None = None, overwrite: bool = False, log: Callable[[str], None] = print, **settings) -> dict:
    """Train the students in parallel processes of one thread each, and show what became of their reasoning.

    Args:
        output_dir: gets results.json, details.json, report.html and student/ (a Hugging Face checkpoint); missing or empty.
        steps: optimiser steps of every student.
        starts: names; None: `random` (LRC), `activation` (RED) and the best other one of the sweep.
        learning_rates: by start, instead of the swept ones; a start that was not swept needs one.
        seed: of the training text, its order and the starts.
        processes: students that train at once; None: one per core.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        teacher_path: a teacher with the example's tokenizer; None: the embedded one.
        overwrite: an earlier demo in `output_dir` is replaced, once this one has succeeded; a folder with anything else is still refused.
        log: gets every line of output.
        **settings: further fields of StudentRun, such as `hidden_size`.

    Returns:
        The content of results.json.

    Raises:
        REDError: bad settings, unusable output folder, unknown start, or a student that failed (the others' results are kept aside and named).
    """
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = study.load()
    starts = tuple(dict.fromkeys(starts or ("random", "activation", found["best_other"])))
    given = dict(learning_rates or {})
    _check(starts, given, steps, processes)
    runs = {start: StudentRun(start=start, learning_rate=given.get(start) or study.rate(found, start), seed=seed, steps=steps, **settings)
            for start in starts}
    folder = OutputFolder(output_dir, overwrite=overwrite)
    measured = False
    try:
        results, details = _measure(runs, folder, found, processes, device, str(teacher_path or example.teacher_path()), log)
        results = provenance.finite({"seconds": time.perf_counter() - began, **results})
        details = provenance.finite({**details, "given_rates": given})
        provenance.write_json(folder.staging / "results.json", results)
        provenance.write_json(folder.staging / "details.json", details)
        measured = True
        report.write_report(results, folder.staging / "report.html", details)
        folder.publish()
    except _SomeFailed as failed:
        raise REDError(f"{failed}. What the others found is kept in {folder.staging}; {folder.path} is as it was.") from None
    except BaseException as error:
        if measured and folder.staging.is_dir():
            log(f"The numbers are kept in {folder.staging}: {type(error).__name__} came after the last measurement.")
        else:
            folder.discard()
        raise
    _show(results, details, folder.path, log)
    return results


def _check(starts: Sequence[str], given: Mapping[str, float], steps: int, processes: int | None) -> None:
    """REDError for what could only fail later."""
    for start in (*starts, *given):
        registry.get(start)
    if steps < 1:
        raise REDError(f"steps={steps}: a student needs at least 1 optimiser step.")
    if processes is not None and processes < 1:
        raise REDError(f"processes={processes}: at least 1 student must train at a time. Leave it out for one per core.")
    for start, rate in given.items():
        if start not in starts:
            raise REDError(f"A learning rate is given for start={start!r}, which does not take part; the starts are {', '.join(starts)}. Add it to starts.")
        if not 0 < rate < math.inf:
            raise REDError(f"The learning rate of start={start!r} is {rate:g}; it must be above 0 and finite.")


class _SomeFailed(Exception):
    """Some students failed; what the others found has been written."""


def _measure(runs: dict[str, StudentRun], folder: OutputFolder, found: dict, processes: int | None, device: str, teacher_path: str,
             log: Callable[[str], None]) -> tuple[dict, dict]:
    """Everything that takes time. Returns (results without their seconds, details)."""
    run = next(iter(runs.values()))
    log(f"Teacher: {teacher_path}")
    teacher, tokenizer = teacher_and_tokenizer(teacher_path, device)
    suite = Suite(tokenizer, run, "test")
    scores = suite.full(teacher)
    answers = {"teacher": suite.answers(teacher)}
    width = run.hidden_size or teacher.config.hidden_size // 2
    log(f"  exact match {scores['exact_match']:.1%}, easy text {scores['easy_accuracy']:.1%}, hidden size {teacher.config.hidden_size}")
    log(f"Students: hidden size {width}, {run.steps} steps of {run.rows} rows of {run.length} tokens, {processes or available_cores()} at a time")

    light = [round(run.steps * i / MEASUREMENTS) for i in range(MEASUREMENTS)]
    jobs = {start: {"teacher_path": teacher_path, "evaluate_at": light, "split": "test", "device": device} for start in runs}
    if EXPORTED in runs:
        jobs[EXPORTED]["export_to"] = str(folder.staging / "student")
    students, failures = run_parallel(runs, jobs, processes=processes, log=log)
    if failures:
        provenance.write_json(folder.staging / "finished.json", students)
        raise _SomeFailed(f"{' and '.join(failures)} failed with the traceback above")
    students = {start: students[start] for start in runs}  # in the order asked for, not in that of finishing
    digests = {outcome["data_digest"] for outcome in students.values()}
    if len(digests) > 1:
        raise REDError(f"The students did not see the same batches (digests {sorted(digests)}), so they cannot be compared. This is a bug.")

    answers |= {start: outcome["answers"] for start, outcome in students.items()}
    note = {}
    if EXPORTED in runs:
        answers[EXPORTED] = _answers_of_export(folder.staging / "student", tokenizer, suite, device)
        different = sum(said != students[EXPORTED]["answers"][question] for question, said in answers[EXPORTED].items())
        if different:
            note = {"note": f"The exported checkpoint answers {different} of {len(answers[EXPORTED])} problems otherwise than the student did after "
                            "its training. Their logits were compared at the export, so two tokens were probably equally likely up to rounding. "
                            "The scores are the student's."}
    results = {
        "teacher": {key: scores[key] for key in ("exact_match", "easy_accuracy", "easy_perplexity", "erank")},
        "starts": {start: {key: outcome[key] for key in ("learning_rate", "history", "final")} for start, outcome in students.items()},
        "versions": provenance.versions(), "commit": provenance.commit(),
    }
    details = {
        "settings": {**dataclasses.asdict(run), "hidden_size": width, "start": list(runs), "learning_rate": found["rates_rule"], "split": "test"},
        "teacher": {"hidden_size": teacher.config.hidden_size, "exact_match_by_steps": scores["exact_match_by_steps"]},
        "train_seconds": {start: outcome["train_seconds"] for start, outcome in students.items()},
        "data_digest": digests.pop(), "device": provenance.device(pick_device(device)),
        "problem": _problem(suite, answers),
        "best_other": {"start": found["best_other"], "rule": found["best_other_rule"]},
        "tokens_to_90": found.get("tokens_to_90", {}),
        **note,
    }
    return results, details


def _answers_of_export(path: Path, tokenizer, suite: Suite, device: str) -> dict[str, str]:
    """The exported checkpoint's own answers to the problems that are shown, computed as the student's were."""
    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(pick_device(device)).eval()
    with _one_thread():
        return suite.answers(student)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in red.demo.worker: another number of threads adds in another order, and may choose another of two equal tokens."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _problem(suite: Suite, answers: dict[str, dict[str, str]]) -> dict:
    """The first held-out problem of four steps that the teacher solves (else the first), and what everyone says to it."""
    shown = [problem for problem in suite.problems[4] if problem.question in answers["teacher"]]
    solved = [problem for problem in shown if words(answers["teacher"][problem.question]) == words(problem.answer)]
    chosen = (solved or shown)[0]
    return {"question": chosen.question, "answer": chosen.answer, "said": {who: said[chosen.question] for who, said in answers.items()}}


def _show(results: dict, details: dict, path: Path, log: Callable[[str], None]) -> None:
    """The table, what it says, one problem, and where everything is."""
    log("\n" + summary.table(results, details) + "\n")
    for sentence in summary.sentences(results, details):
        log(f"* {sentence}")
    log("\nHow they were compared. " + " ".join(summary.conditions(details)))
    problem = details["problem"]
    width = max(len(summary.label(who)) for who in ("right answer", *problem["said"]))
    log(f"\nThe first held-out problem of four steps that the teacher solves:\n  {problem['question']}")
    log(f"  {'right answer':<{width}}  {problem['answer']}")
    for who, said in problem["said"].items():
        mark = "right" if words(said) == words(problem["answer"]) else "wrong"
        log(f"  {summary.label(who):<{width}}  {said}   [{mark}]")
    log(f"\nReport   {path / 'report.html'}\nNumbers  {path / 'results.json'}")
    if (path / "student").is_dir():
        log(f"Student  {path / 'student'}  (the RED student; AutoModelForCausalLM.from_pretrained loads it)")
    log(f"{results['seconds']:.0f} s on {details['device']}")
    if "note" in details:
        log(f"Note: {details['note']}")
