"""Runs of the LoRi example that are made once: a line each in benchmarks/results/lori_runs.jsonl, so that a study that is stopped goes on where it was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from red.lori.demo.experiment import MethodRun, run_method
from red.report import provenance

RESULTS = Path(__file__).parent / "results"
RUNS = "lori_runs.jsonl"
CACHE = Path(tempfile.gettempdir()) / "red-lori-trajectories"  # known by the hash of teacher, problems and settings
SUBSPACE = ("energy", "rank_layers", "rank_channels", "normalize_layers", "rationale_layers")  # runs that differ in these share no trajectories
COMMIT = provenance.commit()  # now: the file of runs, which is tracked, is going to grow


def kept(run: MethodRun, results: Path = RESULTS) -> dict:
    """The run's outcome: as it was kept, or made now and kept."""
    found = known(run, results)
    if found is None:
        own = "-".join(f"{name}={run.switches[name]}" for name in SUBSPACE if name in run.switches)
        found = provenance.finite({**run_method(run, trajectories=CACHE / own if own else CACHE), "commit": COMMIT})
        with (results / RUNS).open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{run.method:<22} lr {run.learning_rate:g} seed {run.seed} {run.steps} steps {run.switches or ''}: validation {found['validation_accuracy']:.3f}, "
              f"test {found['accuracy']:.3f} {list(found['accuracy_by_steps'].values())} {found['train_seconds']:.0f} s", flush=True)
    return found


def best_rate(method: str, rates, results: Path = RESULTS, **settings) -> float:
    """The rate with the best validation accuracy at seed 0."""
    scores = {rate: kept(MethodRun(method, rate, **settings), results)["validation_accuracy"] for rate in rates}
    return max(scores, key=scores.get)


def write(results: Path, part: dict) -> None:
    """Put a part of the results into lori.json, beside the others."""
    path = results / "lori.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    provenance.write_json(path, {**before, **part, "versions": provenance.versions(), "commit": COMMIT, "device": f"{provenance.device('cpu')}, 1 thread"})


def known(run: MethodRun, results: Path = RESULTS) -> dict | None:
    """The run's outcome, if it was kept."""
    path, settings = results / RUNS, asdict(run)
    found = (json.loads(text) for text in path.read_text().splitlines()) if path.is_file() else ()
    return next((one for one in found if {"switches": {}, **one["settings"]} == settings), None)
