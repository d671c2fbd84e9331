"""What the effective rank costs on a CPU: `python benchmarks/erank_paths.py`, from the root of the repository.

    matrices   one large matrix at a time, rows of eigenvalues 1/i: an SVD, the exact path in both precisions, the estimate with its claimed and found error
    coverage   how many estimates lie inside their claimed error, to eRank 800
    check      one check of the trainer's watch (`erank_steps`) beside a training step of the embedded example
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import red
from red.demo.suite import CORPORA
from red.example import teacher_path, tokenized
from red_kernels import erank, erank_estimate


def timed(run: Callable, repeats: int) -> float:
    """Seconds, the best."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def drawn(rows: int, width: int, power: float = 0.5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, width + 1).float() ** -power


def matrices() -> None:
    for rows, width in ((2048, 1100), (2048, 1536), (4096, 2048), (4169, 3072)):
        x, repeats = drawn(rows, width), 3 if width < 3000 else 2
        paths = {"svdvals": lambda x=x: torch.linalg.svdvals(x), "float64": lambda x=x: erank(x), "float32": lambda x=x: erank(x, precision="float32"),
                 "estimate": lambda x=x: erank_estimate(x)}  # fmt: skip
        truth, estimate = erank(x).item(), erank_estimate(x)
        seconds = "  ".join(f"{name} {timed(run, repeats):.2f} s" for name, run in paths.items())
        print(f"[{rows}, {width}]  {seconds}  error {estimate.error.item() / truth:.2%} claimed, {abs(estimate.erank.item() / truth - 1):.2%} found", flush=True)


def coverage(seeds: int = 12) -> None:
    for power in (0.5, 0.3, 0.0):
        inside, claimed = 0, []
        for seed in range(seeds):
            x = drawn(1600, 1200, power, seed)
            truth, estimate = erank(x).item(), erank_estimate(x, tolerance=None, seed=seed)
            inside += abs(estimate.erank.item() - truth) <= estimate.error.item()
            claimed.append(estimate.error.item() / truth)
        print(f"[1600, 1200], eRank {truth:.0f}: {inside} of {seeds} inside, {min(claimed):.2%} to {max(claimed):.2%} claimed", flush=True)


class Steps(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)


def check() -> None:
    torch.set_num_threads(1)
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32), AutoTokenizer.from_pretrained(teacher_path())
    text, steps = tokenized(CORPORA["chains"].documents(0, "train", 0.5), tokenizer, 60_000), Steps()
    with tempfile.TemporaryDirectory() as folder:
        config = red.REDConfig(output_dir=folder, hidden_size=64, start="activation", max_length=112, per_device_train_batch_size=16, max_steps=20, learning_rate=2e-3,
                               erank_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1000)  # fmt: skip
        trainer = red.REDTrainer(teacher, config, train_dataset=text, processing_class=tokenizer, callbacks=[steps])
        trainer.train()
        watch = next(one for one in trainer.callback_handler.callbacks if isinstance(one, red.ERankCallback))
        price, step = timed(lambda: watch._check(trainer.args, trainer.state, trainer.control), 5), statistics.median(steps.seconds)
    print(f"a check {1e3 * price:.0f} ms, a step {1e3 * step:.0f} ms, one thread: {price / step / 50:.2%} of the time with erank_steps=50")


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    matrices()
    coverage()
    check()
