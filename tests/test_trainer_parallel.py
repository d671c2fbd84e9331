"""Two processes with gloo (DistributedDataParallel) train what one process trains with the same rows a step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_training import fork_two_processes, make_trainer, masters, settings_of, tokenised
from transformers import AutoModelForCausalLM

KEYS = ("loss", "grad_norm", "ce", "kl", "tap_mse")
MODES = {"default": dict(start="activation"), "faithful": dict(start="random", lrc_faithful=True)}


def train(folder: Path, mode: str, rows: int):
    """Three steps over 8 rows each in 2 micro-batches (`rows` a process and micro-batch), the state of this rank, and its log."""
    from tiny_models import build_tiny_model

    # rank 1 calibrates on other rows and must go on from rank 0's start all the same
    samples = 1 if os.environ.get("RANK") == "1" else 4
    trainer = make_trainer(build_tiny_model("qwen2", tied=True), folder / mode, tokenised(48), max_steps=3, calibration_samples=samples, gradient_accumulation_steps=2,
                           per_device_train_batch_size=rows, adam_epsilon=1e-3, max_grad_norm=0.5, **MODES[mode])
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    """What each worker runs."""
    import red
    from tiny_models import build_tiny_model, build_tiny_tokenizer

    for mode in MODES:
        trainer = train(folder, mode, rows=2)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel" and trainer.args.world_size == 2
        save_file(masters(trainer), folder / f"{mode}-{trainer.args.process_index}.safetensors")
        if trainer.args.process_index == 0:
            entries = [entry for entry in trainer.state.log_history if "loss" in entry]
            (folder / f"{mode}.json").write_text(json.dumps([[entry[key] for key in KEYS] for entry in entries]))
    watched = make_trainer(build_tiny_model(), folder / "watched", tokenised(48), max_steps=6, erank_steps=1, erank_patience=2, erank_floor=0.99, erank_stop=True)
    watched.train()
    assert watched.state.global_step == 1, "every rank stops at the step at which rank 0 sees the collapse"
    result = red.distill(build_tiny_model(), tokenised(), tokenizer=build_tiny_tokenizer(), **settings_of(folder / "distilled", max_steps=1))
    assert (result.path / "config.json").is_file(), "no rank may come back before the export is there"


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    fork_two_processes(main, folder)
    return folder


@pytest.mark.parametrize("mode", sorted(MODES))
def test_two_processes_equal_one(parallel, tmp_path, mode):
    first, second = (load_file(parallel / f"{mode}-{rank}.safetensors") for rank in (0, 1))
    for name, value in first.items():
        assert value.equal(second[name]), f"{name}: the ranks drifted apart"
    single = train(tmp_path, mode, rows=4)
    for name, value in masters(single).items():
        assert float((value - first[name]).abs().max()) <= 1e-5, name
    entries = [[entry[key] for key in KEYS] for entry in single.state.log_history if "loss" in entry]
    for found, expected in zip(json.loads((parallel / f"{mode}.json").read_text()), entries, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_distill_exports_once(parallel):
    """Both processes call red.distill; one of them writes."""
    student = AutoModelForCausalLM.from_pretrained(parallel / "distilled" / "student")
    assert student.config.hidden_size == 16
