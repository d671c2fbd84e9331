"""Two processes with gloo: a NaN or a SIGTERM that one of them sees is acted on by both at the same step; both write into one checkpoint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import RecordingTrainer, fork_two_processes, make_trainer, masters, tokenised
from transformers import TrainerCallback

from red.training.checkpoint_folders import MANIFEST, fault
from red.errors import REDError, Terminated

SETTINGS = dict(gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)


class Rank1(RecordingTrainer):
    """Rank 1's loss is NaN in the `steps`, but its gradient is not: only the agreement tells rank 0."""

    steps: tuple[int, ...] = ()

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.args.process_index == 1 and self.state.global_step + 1 in self.steps:
            _, parts = self.guard._seen[-1]
            parts[1] = torch.nan
        return loss


class TerminateRank0(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if args.process_index == 0 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """What each worker runs: it notes what it saw."""
    from tiny_models import build_tiny_model

    def make(name: str, steps=(), **changes):
        trainer = make_trainer(build_tiny_model(), folder / name, tokenised(48), trainer_class=Rank1, **{**SETTINGS, **changes})
        trainer.steps = steps
        return trainer

    seen = {}
    skipping = make("skipping", steps=(1, 3), max_steps=4)
    skipping.train()
    seen["skipped"] = skipping.guard.skipped
    rank = skipping.args.process_index
    save_file(masters(skipping), folder / f"skipping-{rank}.safetensors")

    try:
        make("failing", steps=(3, 4), max_steps=6, max_skipped_steps=2).train()
    except REDError as error:
        seen["failed"] = str(error)

    terminated = make("terminated", max_steps=4)
    terminated.add_callback(TerminateRank0())
    try:
        terminated.train()
    except Terminated as end:
        seen["terminated"] = [terminated.state.global_step, end.code]
    resumed = make("terminated", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    save_file(masters(resumed), folder / f"resumed-{rank}.safetensors")
    whole = make("whole", max_steps=4)
    whole.train()
    save_file(masters(whole), folder / f"whole-{rank}.safetensors")
    try:
        make("nothing", max_steps=2).train(resume_from_checkpoint=True)
    except REDError as error:
        seen["nothing"] = str(error)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    fork_two_processes(main, folder)
    return folder, [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_skip_what_one_saw(parallel):
    folder, seen = parallel
    assert [found["skipped"] for found in seen] == [2, 2]
    first, second = (load_file(folder / f"skipping-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_both_end_and_the_one_writes(parallel):
    folder, (zero, one) = parallel
    assert "Not finite in step 4: the loss. 2 steps in a row" in zero["failed"] and "Another rank wrote" in zero["failed"]
    assert "Not finite in step 4: kl. 2 steps in a row" in one["failed"] and "nonfinite-batch-4-rank1.safetensors" in one["failed"]
    assert sorted(path.name for path in (folder / "failing").iterdir()) == ["checkpoint-2", "nonfinite-batch-4-rank1.json", "nonfinite-batch-4-rank1.safetensors"]


def test_both_stop_on_a_signal_to_one(parallel):
    """In step 3, and go on from there; the checkpoint has the files of both."""
    folder, seen = parallel
    assert [found["terminated"] for found in seen] == [[3, 143]] * 2
    saved = folder / "terminated" / "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth", "projections.safetensors"} <= json.loads((saved / MANIFEST).read_text())["files"].keys() and fault(saved) is None
    for rank in (0, 1):
        resumed, whole = (load_file(folder / f"{name}-{rank}.safetensors") for name in ("resumed", "whole"))
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_both_are_told_that_there_is_nothing_to_resume(parallel):
    assert all("no checkpoint-N folder" in found["nothing"] for found in parallel[1])
