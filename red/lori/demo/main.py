"""run_demo: every method from one teacher at equal steps, a table, and whether the teacher's trajectories are low-rank."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import torch
from transformers.utils import logging as transformers_logging

from red.demo.folder import OutputFolder
from red.errors import REDError
from red.lori.data import encode_rows
from red.lori.demo import spectrum
from red.lori.demo.experiment import METHODS, MethodRun, run_method, teacher_path
from red.lori.demo.problems import ANSWER_PREFIX, NUMBERS, problems
from red.lori.files import load
from red.lori.model import special_ids
from red.lori.trajectories import stream
from red.report import provenance

LABELS = {"explicit_cot": "explicit CoT (teacher)", "no_cot": "no CoT", "coconut": "COCONUT", "codi": "CODI, offline teacher", "codi_joint": "CODI, joint",
          "lori": "LoRi", "lori_no_anchor": "LoRi without anchor", "lori_no_second_order": "LoRi without 2nd order"}


def learning_rates() -> dict[str, float]:
    """By method: the best of the same grid on the validation split (benchmarks/lori.py)."""
    return json.loads((files(__package__) / "learning_rates.json").read_text())["rates"]


def run_demo(output_dir: str | Path = "runs/demo-lori", *, methods: Sequence[str] | None = None, seeds: Sequence[int] = (0,), steps: int | None = None,
             overwrite: bool = False, log: Callable[[str], None] = print) -> dict:
    """Train every method from the embedded teacher and compare them.

    Args:
        output_dir: gets results.json and spectrum.svg; missing or empty.
        methods: names of presets; None: all that are compared.
        seeds: of problems, order, projection and new weights; one run of each method a seed.
        steps: optimiser steps of every student; None: MethodRun's.
        overwrite: replace an earlier demo in `output_dir`, once this one has succeeded.
        log: gets every line of output.

    Returns:
        The content of results.json.

    Raises:
        REDError: an unknown method, no seeds, fewer than one step, or an unusable output folder.
    """
    began, rates = time.perf_counter(), learning_rates()
    methods = tuple(methods or METHODS)
    for method in methods:
        if method not in rates and method != "explicit_cot":
            raise REDError(f"method={method!r} takes no part in the example; use {', '.join(LABELS)}.")
    if not seeds or (steps is not None and steps < 1):
        raise REDError(f"seeds={list(seeds)}, steps={steps}: at least one seed and one step are needed.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = OutputFolder(output_dir, overwrite=overwrite)
    try:
        given = {} if steps is None else {"steps": steps}
        log(f"Follow a table of {NUMBERS} numbers for 1 to 5 hops. "
            f"Students start from the teacher's weights; {steps or MethodRun.steps} steps of {MethodRun.batch} problems each.")
        results = {}
        for method in methods:
            runs = [run_method(MethodRun(method, rates.get(method, 0.0), seed=seed, **given), trajectories=folder.staging / "cache")
                    for seed in (seeds if method != "explicit_cot" else seeds[:1])]
            results[method] = summary(runs)
            log(line(method, results[method]))
        found = {"methods": results, "low_rank": low_rank(folder.staging / "spectrum.svg"), "versions": provenance.versions(), "commit": provenance.commit(),
                 "device": provenance.device("cpu"), "seconds": time.perf_counter() - began}
        shutil.rmtree(folder.staging / "cache", ignore_errors=True)
        provenance.write_json(folder.staging / "results.json", found)
        folder.publish()
    except BaseException:
        folder.discard()
        raise
    log("\n" + table(results) + "\n\n" + low_rank_sentence(found["low_rank"]))
    log(f"Numbers  {folder.path / 'results.json'}\nSpectrum {folder.path / 'spectrum.svg'}\n{found['seconds']:.0f} s on {found['device']}, one thread")
    return found


def summary(runs: Sequence[dict]) -> dict:
    """Means over the seeds; `spread` is the largest accuracy less the smallest."""
    scores = [run["accuracy"] for run in runs]
    by_steps = {steps: fmean(run["accuracy_by_steps"][steps] for run in runs) for steps in runs[0]["accuracy_by_steps"]}
    return {"accuracy": fmean(scores), "accuracy_by_steps": by_steps,
            "latency_ms": fmean(run["latency_ms"] for run in runs), "tokens": fmean(run["tokens"] for run in runs), "latent_steps": runs[0]["latent_steps"],
            "seeds": [run["settings"]["seed"] for run in runs], "spread": max(scores) - min(scores), "learning_rate": runs[0]["settings"]["learning_rate"],
            "train_seconds": fmean(run["train_seconds"] for run in runs), "runs": list(runs)}


def low_rank(plot_to: Path | None = None, *, count: int = 500) -> dict:
    """The energy spectra of the embedded teacher's trajectories on validation problems, and of the shuffled control."""
    teacher, tokenizer, _ = load(teacher_path(), dtype=torch.float32)
    bot, eot = special_ids(tokenizer)
    rows = encode_rows(problems("validation", count), tokenizer, answer_prefix=ANSWER_PREFIX)
    found = spectrum.spectra([one.states for one in stream(teacher.model, rows, pad=tokenizer.pad_token_id, bot=bot, eot=eot)])
    if plot_to is not None:
        spectrum.plot(found, plot_to)
    return found


def low_rank_sentence(found: dict) -> str:
    """What the spectra say."""
    ranks = {name: [found[name][mode]["rank_90"] for mode in ("channels", "layers")] for name in ("trajectories", "shuffled")}
    layers, channels = found["shape"]
    return (f"90 % of the energy of the teacher's trajectories lies in {ranks['trajectories'][0]} of {channels} channel directions "
            f"and {ranks['trajectories'][1]} of {layers} layer directions; with every channel shuffled over the tokens it takes {ranks['shuffled'][0]} and {ranks['shuffled'][1]}.")


def line(method: str, result: dict) -> str:
    """One method as a row of the table."""
    by_steps = " ".join(f"{100 * share:5.0f}" for share in result["accuracy_by_steps"].values())
    spread = f"±{50 * result['spread']:.1f}" if len(result["seeds"]) > 1 else ""
    return (f"{LABELS[method]:<23} {100 * result['accuracy']:6.1f} {spread:<5} {by_steps}  {result['tokens']:6.1f} {result['latent_steps']:7d} "
            f"{result['latency_ms']:9.1f} {result['train_seconds']:8.0f}")


def table(results: dict) -> str:
    """Accuracy in percent, in all and by the number of hops, words said, latent steps, milliseconds an answer and seconds of training."""
    hops = " ".join(f"{name:>5}" for name in next(iter(results.values()))["accuracy_by_steps"])
    head = f"{'method':<23} {'solved':>6} {'':<5} {hops}  {'tokens':>6} {'latent':>7} {'ms/answer':>9} {'train s':>8}"
    return "\n".join([head, *(line(method, result) for method, result in results.items())])
