"""Several student runs at once, each in a process of its own with one thread.

Processes, because a student of this size keeps one core busy and no more; children of `python -m`, not of multiprocessing, so that
they start the same from a script, a notebook or a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import red
from red.demo.experiment import StudentRun
from red.demo.worker import EVENT

Job = tuple[str, StudentRun, dict]  # a run, its name, and the other arguments of `run_student`


def available_cores() -> int:
    """The cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(runs: Mapping[str, StudentRun], settings: Mapping[str, dict], *, processes: int | None = None,
                 on_result: Callable[[str, dict], None] | None = None, log: Callable[[str], None] = print,
                 ) -> tuple[dict[str, dict], dict[str, str]]:
    """Train all `runs`, at most `processes` at a time, in the given order.

    Args:
        runs: the student runs by name.
        settings: for every name the other arguments of `run_student` (teacher_path, evaluate_at, split, export_to, device).
        processes: None: one per core. More than there are cores would only slow each other.
        on_result: called with name and result as soon as a run has finished, one call at a time.
        log: gets the progress lines.

    Returns:
        `(results, failures)`: a failed run's traceback, also logged, does not disturb the others.
    """
    results: dict[str, dict] = {}

    def keep(name: str, result: dict) -> None:
        results[name] = result
        if on_result is not None:
            on_result(name, result)

    waiting = iter(runs)

    def next_job() -> Job | None:
        name = next(waiting, None)
        return None if name is None else (name, runs[name], settings[name])

    failures = run_queue(next_job, processes=min(processes or available_cores(), len(runs)), on_result=keep, log=log, width=max(map(len, runs), default=0))
    return results, failures


def run_queue(next_job: Callable[[], Job | None], *, on_result: Callable[[str, dict], None], processes: int | None = None,
              log: Callable[[str], None] = print, width: int = 0) -> dict[str, str]:
    """Train what `next_job` hands out, at most `processes` runs at a time, until it has nothing and nothing is running.

    Args:
        next_job: `(name, run, settings)` of the next run, or None for the moment: a run that finishes may bring forth others. It, `on_result` and
            `log` are called one at a time.
        width: of the names in the progress lines.
        Others as in `run_parallel`.

    Returns:
        The tracebacks of the failed runs, by name.
    """
    failures: dict[str, str] = {}
    changed = threading.Condition()
    children: set[subprocess.Popen] = set()
    stopped = threading.Event()
    running = 0

    def take() -> Job | None:
        nonlocal running
        with changed:
            while not stopped.is_set():
                job = next_job()
                if job is not None:
                    running += 1
                    return job
                if not running:
                    break
                changed.wait()
        return None

    def say(text: str) -> None:
        with changed:
            log(text)

    def work() -> None:
        nonlocal running
        while (job := take()) is not None:
            name, run, settings = job
            started = time.perf_counter()
            result, trace = _run_one(name, run, settings, children, stopped, lambda entry, name=name, run=run: say(_progress(name, width, run, entry)))
            if stopped.is_set():
                return  # it was ended with the others
            with changed:
                if result is None:
                    failures[name] = trace
                    log(f"{name}: failed after {time.perf_counter() - started:.0f} s; the other runs go on\n{trace}")
                else:
                    on_result(name, result)
                running -= 1
                changed.notify_all()

    def stop() -> None:
        stopped.set()
        with changed:
            changed.notify_all()
        for child in list(children):
            child.kill()

    workers = max(1, available_cores() if processes is None else processes)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in as_completed([pool.submit(work) for _ in range(workers)]):
                    future.result()
            except BaseException:  # Ctrl-C, or a result could not be kept: no child may outlive this
                stop()
                raise
    finally:
        stopped.set()
    return failures


def _run_one(name: str, run: StudentRun, settings: dict, children: set, stopped: threading.Event,
             report: Callable[[dict], None]) -> tuple[dict | None, str]:
    """`(result, "")` or `(None, traceback)` of one child process."""
    with tempfile.TemporaryDirectory(prefix="red-demo-") as folder:
        job, answer, errors = (Path(folder) / file for file in ("job.json", "result.json", "stderr"))
        job.write_text(json.dumps({"run": asdict(run), **settings}))
        with open(errors, "w") as stderr:
            child = subprocess.Popen([sys.executable, "-m", "red.demo.worker", str(job), str(answer)], stdout=subprocess.PIPE,
                                     stderr=stderr, text=True, env=_environment())
            children.add(child)
            if stopped.is_set():  # ended between its start and its entry in the list
                child.kill()
            try:
                for line in child.stdout:
                    if line.startswith(EVENT):
                        report(json.loads(line[len(EVENT) :]))
                child.wait()
            finally:
                children.discard(child)
        if child.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text()), ""
        return None, errors.read_text().strip() or f"the process of {name} ended with {child.returncode} and said nothing"


def _environment() -> dict[str, str]:
    """One thread (oversubscribed ones cost up to 100×), no network, and this very `red`."""
    source = str(Path(red.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _progress(name: str, width: int, run: StudentRun, entry: dict) -> str:
    return (f"  {name:<{width}}  step {entry['step']:>4}/{run.steps}  {entry['tokens']:>7,} tokens  "
            f"exact match {entry['exact_match']:6.1%}  easy text {entry['easy_accuracy']:6.1%}  {entry['seconds']:4.0f} s")
