"""One method of the example: trained from the embedded teacher at stated settings, scored on held-out problems, timed."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoTokenizer

from red.lori.config import PRESETS
from red.lori.demo.problems import ANSWER_PREFIX, problems
from red.lori.distillation import distill
from red.lori.evaluate import accuracy, latency
from red.lori.files import load

METHODS = ("explicit_cot", "no_cot", "coconut", "codi", "lori", "lori_no_anchor", "lori_no_second_order")
LATENCY_PROBLEMS = 40


@dataclass(frozen=True)
class MethodRun:
    """The settings that decide a run's numbers; every method has the same but its learning rate."""

    method: str
    learning_rate: float
    seed: int = 0
    steps: int = 500
    batch: int = 64
    train_problems: int = 12800
    problems: int = 500
    switches: dict = field(default_factory=dict)  # other settings of LoRiConfig


def teacher_path() -> str:
    """The folder of the embedded explicit teacher."""
    return str(files(__package__) / "teacher")


def run_method(run: MethodRun, *, teacher: str | None = None, trajectories: str | Path | None = None,
               keep: str | Path | None = None) -> dict:
    """Train a student by one method, starting from the teacher's weights, and score it.

    Args:
        run: the settings; the method explicit_cot is the teacher itself and trains nothing.
        teacher: folder of an explicit teacher; None: the embedded one.
        trajectories: folder where runs on the same problems share the teacher's trajectories.
        keep: folder for the trained model.

    Returns:
        `{"accuracy", "accuracy_by_steps" (on the test split), "validation_accuracy" (to choose by), "tokens" (words said, mean), "latent_steps", "latency_ms",
        "parameters", "train_seconds", "settings", "preset", "history"}`.
    """
    teacher = teacher or teacher_path()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same numbers whatever the machine's cores
    try:
        began, history = time.perf_counter(), []
        with tempfile.TemporaryDirectory(prefix="red-lori-") as place:
            if run.method == "explicit_cot":
                model, tokenizer, facts = load(teacher, dtype=torch.float32)
            else:
                tokenizer = AutoTokenizer.from_pretrained(teacher)
                with contextlib.redirect_stdout(io.StringIO()):  # without a progress bar transformers prints every log line
                    result = distill(teacher, problems("train", run.train_problems, run.seed), tokenizer=tokenizer, preset=run.method,
                                     output_dir=f"{place}/run",
                                     trajectories_dir=None if trajectories is None else f"{trajectories}/{run.seed}", answer_prefix=ANSWER_PREFIX, seed=run.seed, **run.switches,
                                     per_device_train_batch_size=run.batch, per_device_eval_batch_size=run.batch, max_steps=run.steps, learning_rate=run.learning_rate,
                                     weight_decay=0.01, warmup_steps=30, lr_scheduler_type="linear", logging_steps=50, save_strategy="no", report_to="none",
                                     disable_tqdm=True, use_cpu=True, teacher_dtype="float32")
                model, facts = result.model.eval(), result.trainer.facts
                history = [{key: entry[key] for key in ("step", "loss", "task", "rationale", "anchor")}
                           for entry in result.trainer.state.log_history if "loss" in entry]
                if keep is not None:
                    shutil.copytree(result.path, keep)
        seconds = time.perf_counter() - began
        held_out = problems("test", run.problems)
        score = accuracy(model, tokenizer, held_out, facts, max_new_tokens=32)
        score["validation_accuracy"] = accuracy(model, tokenizer, problems("validation", run.problems), facts, max_new_tokens=32)["accuracy"]
        score["latency_ms"] = latency(model, tokenizer, held_out[:LATENCY_PROBLEMS], facts)
    finally:
        torch.set_num_threads(threads)
    return {**score, "latent_steps": facts.latent_steps, "parameters": sum(p.numel() for p in model.parameters()), "train_seconds": seconds,
            "settings": asdict(run), "preset": PRESETS[run.method], "history": history}

