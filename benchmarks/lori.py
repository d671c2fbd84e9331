"""LoRi and its baselines on the embedded example, and RED then LoRi: `python -m benchmarks.lori tune|table|longer|corners|switches`.

    tune      every method with every learning rate of the same grid, the best on the validation split: red/lori/demo/learning_rates.json
    table     every method at its rate, several seeds, on the test split
    longer    who learned something, and who did not, with four times the steps; the better of two rates on the validation split at seed 0
    corners   the teacher narrowed by RED, then both made latent by LoRi: accuracy, parameters, latency
    switches  LoRi's open switches, one changed at a time (lori_switches.py)
The last four write their part of benchmarks/results/lori.json. Every run is kept in benchmarks/results/lori_runs.jsonl and not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import red
from benchmarks.lori_runs import RESULTS, best_rate, kept, write
from benchmarks.lori_switches import switches
from red.files import atomic_write_json
from red.lori.demo.experiment import METHODS, MethodRun, run_method, teacher_path
from red.lori.demo.main import learning_rates, low_rank, summary, table
from red.lori.demo.problems import ANSWER_PREFIX, problems
from red.lori.files import Facts, load, save
from red.lori.model import LatentModel

RATES = Path(red.__file__).parent / "lori" / "demo" / "learning_rates.json"
GRID = (1e-3, 3e-3, 6e-3)
SEEDS = (0, 1)
TUNED = ("lori", "codi", "no_cot", "coconut", "codi_joint")  # the two ablations take LoRi's rate
NARROW = 32  # of 64


def tune(results: Path = RESULTS, rates: Path = RATES) -> None:
    scores = {method: {rate: kept(MethodRun(method, rate), results)["validation_accuracy"] for rate in GRID} for method in TUNED}
    best = {method: max(found, key=found.get) for method, found in scores.items()}
    best |= {method: best["lori"] for method in METHODS if method.startswith("lori_")}
    atomic_write_json(rates, {"what": "best of the grid by validation accuracy at seed 0; the ablations take LoRi's", "grid": GRID,
                              "rates": best,
                              "validation": {method: {f"{rate:g}": score for rate, score in found.items()} for method, found in scores.items()}})


def full_table(results: Path = RESULTS, seeds=SEEDS) -> None:
    rates, methods = learning_rates(), {}
    for method in (*METHODS[:-3], "codi_joint", *METHODS[-3:]):
        runs = [kept(MethodRun(method, rates.get(method, 0.0), seed=seed), results) for seed in (seeds if method != "explicit_cot" else seeds[:1])]
        methods[method] = summary(runs)
    print(table(methods))
    write(results, {"methods": methods, "low_rank": low_rank()})


def longer(results: Path = RESULTS, steps: int = 2000, rates=(1e-3, 3e-3), methods=("lori", "codi", "codi_joint", "coconut", "no_cot"), seeds=SEEDS) -> None:
    found = {}
    for method in methods:
        rate = best_rate(method, rates, results, steps=steps)
        found[method] = summary([kept(MethodRun(method, rate, seed=seed, steps=steps), results) for seed in seeds])
    print(table(found))
    write(results, {"longer": {"steps": steps, "rates": rates, "methods": found}})


def corners(results: Path = RESULTS, steps: int = 600, latent_steps: int = 2000, rate: float = 1e-3) -> None:
    """Teacher and narrowed teacher, each explicit and latent, with the training steps and the rate that `longer` found to be enough for the teacher."""
    torch.set_num_threads(1)
    found = {}
    teacher, tokenizer, _ = load(teacher_path(), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        texts = [{"prompt": row.question, "completion": f" <bot> {' '.join(row.steps)} <eot> {ANSWER_PREFIX} {row.answer}"}
                 for row in problems("train", 6400, 7)]
        narrowed = red.distill(teacher_path(), texts, hidden_size=NARROW, output_dir=f"{place}/red", max_length=128, per_device_train_batch_size=16,
                               max_steps=steps, learning_rate=2e-3, warmup_steps=30, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0)
        save(f"{place}/narrow", LatentModel(narrowed.student, latent_steps=0), tokenizer, Facts("explicit", 0, False, ANSWER_PREFIX, "explicit_cot"))
        for name, folder in (("teacher", teacher_path()), ("student", f"{place}/narrow")):
            for kind, method in (("explicit", "explicit_cot"), ("latent", "lori")):
                outcome = run_method(MethodRun(method, rate, steps=latent_steps), teacher=folder, trajectories=f"{place}/{name}")
                kept_keys = ("accuracy", "accuracy_by_steps", "tokens", "latent_steps", "parameters", "latency_ms", "train_seconds")
                found[f"{name} {kind}"] = {key: outcome[key] for key in kept_keys}
                print(f"{name} {kind}: {found[f'{name} {kind}']}", flush=True)
    write(results, {"corners": {"hidden_size": [teacher.config.hidden_size, NARROW], "narrowed_by": f"red.distill, start fitted, {steps} steps",
                                 "latent_steps_of_training": latent_steps, "learning_rate": rate, **found}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "table", "longer", "corners", "switches"))
    {"tune": tune, "table": full_table, "longer": longer, "corners": corners, "switches": switches}[parser.parse_args().what]()
