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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import red
from red.demo.experiment import StudentRun
from red.demo.worker import EVENT


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
    failures: dict[str, str] = {}
    lock = threading.Lock()
    children: set[subprocess.Popen] = set()
    stopped = threading.Event()
    width = max(map(len, runs), default=0)

    def say(text: str) -> None:
        with lock:
            log(text)

    def work(name: str) -> None:
        if stopped.is_set():
            return
        started = time.perf_counter()
        result, trace = _run_one(name, runs[name], settings[name], children, stopped, lambda entry: say(_progress(name, width, runs[name], entry)))
        if stopped.is_set():
            return  # it was ended with the others
        with lock:
            if result is None:
                failures[name] = trace
                log(f"{name}: failed after {time.perf_counter() - started:.0f} s; the other runs go on\n{trace}")
            else:
                results[name] = result
                if on_result is not None:
                    on_result(name, result)

    workers = max(1, min(processes or available_cores(), len(runs)))
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                waiting = [pool.submit(work, name) for name in runs]
                for future in waiting:
                    future.result()
            except BaseException:  # Ctrl-C, or on_result could not write: no child may outlive this
                stopped.set()
                for child in list(children):
                    child.kill()
                raise
    finally:
        stopped.set()
    return results, failures


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
