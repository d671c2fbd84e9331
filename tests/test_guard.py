"""Steps that are not finite: masters and moments keep their bits, the step is counted, too many in a row end the run with its micro-batches on the disk."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import RecordingTrainer, make_trainer, masters, tokenised
from transformers import TrainerCallback

from red.training.checkpoint_folders import last_checkpoint
from red.errors import REDError

MICRO = 2  # micro-batches a step


class Poisoned(RecordingTrainer):
    """Multiplies the loss (and its gradient), the gradient alone, or one part of the loss by `value` in micro-batch `micro` of the `steps`."""

    steps, micro, value, where = (), 1, math.nan, "loss"

    def compute_loss(self, model, inputs, **kwargs):
        self.poisoned = model.training and self.state.global_step + 1 in self.steps and len(self.seen) % MICRO == self.micro
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.poisoned and self.where == "gradient":
            loss.register_hook(lambda grad: grad * self.value)
        return loss

    def _kd(self, *args):
        loss, ce, kl = super()._kd(*args)
        return (loss * self.value, ce, kl * self.value) if self.poisoned and self.where == "kl" else (loss, ce, kl)


class States(TrainerCallback):
    """Masters and moments after every step."""

    def __init__(self):
        self.masters, self.moments = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.masters.append(masters(self.trainer))
        found = self.trainer.optimizer.state_dict()["state"]
        self.moments.append({(index, name): torch.as_tensor(value).clone() for index, entry in found.items() for name, value in entry.items() if value is not None})


def poisoned(teacher, folder, *, steps, where="kl", micro=1, value=math.nan, data=None, callbacks=(), **changes):
    states = States()
    trainer = make_trainer(teacher, folder, data, trainer_class=Poisoned, callbacks=[states, *callbacks], gradient_accumulation_steps=MICRO, **changes)
    trainer.steps, trainer.where, trainer.micro, trainer.value, states.trainer = steps, where, micro, value, trainer
    return trainer, states


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("optim", "where", "micro", "value"), [("adamw_torch_fused", "kl", 1, math.nan), ("adamw_torch", "kl", 0, math.inf), ("sgd", "gradient", 0, math.nan),
                                                               ("adafactor", "kl", 0, math.nan)])
def test_a_skipped_step_keeps_every_bit(tiny_teacher, tmp_path, optim, where, micro, value):
    """Steps 1 and 3 of 4 are not finite. The others train; momentum and weight decay would move what a zeroed gradient does not."""
    trainer, states = poisoned(tiny_teacher(), tmp_path, steps=(1, 3), where=where, micro=micro, value=value, optim=optim, weight_decay=0.1)
    begin = masters(trainer)
    trainer.train()
    after = states.masters
    assert same(begin, after[0]) and not states.moments[0], "the first step"
    assert not same(after[0], after[1])
    assert same(after[1], after[2]) and same(states.moments[1], states.moments[2])
    assert not same(after[2], after[3]) and all(value.isfinite().all() for value in after[3].values())
    assert (optim == "sgd") or not same(states.moments[2], states.moments[3])
    assert all(torch.equal(factor.weight, expected) for factor, expected in zip(trainer.projections, pushed(trainer), strict=True))
    assert trainer.guard.skipped == 2 and trainer.state.global_step == 4


def pushed(trainer) -> list[torch.Tensor]:
    trainer.projections.push_forward()
    return [factor.weight.clone() for factor in trainer.projections]


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_what_is_left_is_the_run_without_that_step(tiny_teacher, tmp_path, limit):
    """Constant learning rate, step 2 of 3 dropped: the masters are those of training on the rows of steps 1 and 3 alone."""
    data, settings = tokenised(60), dict(train_sampling_strategy="sequential", max_grad_norm=limit)
    dropped, states = poisoned(tiny_teacher(), tmp_path / "a", steps=(2,), data=data, max_steps=3, **settings)
    dropped.train()
    plain = make_trainer(tiny_teacher(), tmp_path / "b", data, max_steps=2, gradient_accumulation_steps=MICRO, **settings)
    plain.train_dataset = torch.utils.data.Subset(plain.train_dataset, [*range(4), *range(8, 12)])
    plain.train()
    assert torch.equal(plain.seen[2]["input_ids"], dropped.seen[4]["input_ids"])
    assert same(masters(dropped), masters(plain))


def test_the_log_counts_and_leaves_out(tiny_teacher, tmp_path, caplog):
    """Log lines every 2 steps: the window of a dropped step has the mean over the other one; a window of nothing has no loss."""
    settings = dict(max_steps=6, logging_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer, _ = poisoned(tiny_teacher(), tmp_path / "a", steps=(2, 3, 4), **settings)
        metrics = trainer.train().metrics
    assert [record.message for record in caplog.records if "Not finite" in record.message] == [
        f"Not finite in step {step}: kl. The step is skipped ({row} in a row, {row} in all; max_skipped_steps=10)." for step, row in ((2, 1), (3, 2), (4, 3))]
    alone, _ = poisoned(tiny_teacher(), tmp_path / "b", steps=(), max_steps=1)
    alone.train()
    lines = {entry["step"]: entry for entry in trainer.state.log_history if "learning_rate" in entry}
    first = next(entry for entry in alone.state.log_history if "loss" in entry)
    for key in ("loss", "ce", "kl", "tap_mse"):
        assert lines[2][key] == pytest.approx(first[key], rel=1e-6), key
    assert "loss" not in lines[4] and "kl" not in lines[4] and "grad_norm" not in lines[4]
    assert math.isfinite(lines[6]["loss"]) and lines[6]["loss"] == pytest.approx(lines[6]["ce"] + lines[6]["kl"] + 0.2 * lines[6]["tap_mse"], rel=1e-5)
    assert [lines[step]["skipped_steps"] for step in (2, 4, 6)] == [1, 3, 3]
    assert math.isfinite(metrics["train_loss"]) and "skipped_steps" not in first


def test_the_count_goes_on_after_resuming(tiny_teacher, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    poisoned(tiny_teacher(), tmp_path, steps=(1,), max_steps=2, **settings)[0].train()
    resumed, _ = poisoned(tiny_teacher(), tmp_path, steps=(4,), max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.guard.skipped == 2


@pytest.mark.parametrize(("where", "micro", "named", "written"), [("kl", 1, "kl", [1]), ("gradient", 0, "the gradient, though every loss is", [0, 1])])
def test_too_many_in_a_row_end_the_run(tiny_teacher, tmp_path, where, micro, named, written):
    """Step 3 is skipped, 4 is fine, 5 and 6 are the two in a row. The message names part and file, the file holds those micro-batches, the checkpoint stands."""
    trainer, states = poisoned(tiny_teacher(), tmp_path, steps=(3, 5, 6), where=where, micro=micro, max_skipped_steps=2, max_steps=8, save_strategy="steps", save_steps=4,
                               data=tokenised(60))
    path = tmp_path / "nonfinite-batch-6.safetensors"
    with pytest.raises(REDError, match=f"Not finite in step 6: {named}.*2 steps in a row.*max_skipped_steps=2.*{path}.*max_grad_norm"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-4" and same(states.masters[3], masters(trainer))
    batches = load_file(path)
    for index, place in enumerate(written):
        expected = trainer.seen[5 * MICRO + place]
        assert {name for name in batches if name.startswith(f"{index}.")} == {f"{index}.{name}" for name in expected}
        assert all(torch.equal(batches[f"{index}.{name}"], value) for name, value in expected.items())
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["step"] == 6 and len(facts["micro_batches"]) == len(written) and facts["skipped_in_a_row"] == 2
    assert "model.layers.0.mlp.down_proj.weight" in facts["student_gradients_not_finite"]
    if where == "kl":
        assert facts["micro_batches"][0]["kl"] == facts["micro_batches"][0]["loss"] == "nan" and math.isfinite(facts["micro_batches"][0]["ce"])
    resumed, _ = poisoned(tiny_teacher(), tmp_path, steps=(), max_steps=8, save_strategy="steps", save_steps=4, data=tokenised(60))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


def test_the_limit_must_be_a_step(tiny_teacher, tmp_path):
    with pytest.raises(REDError, match="max_skipped_steps=0: must be at least 1"):
        make_trainer(tiny_teacher(), tmp_path, max_skipped_steps=0)
    trainer, _ = poisoned(tiny_teacher(), tmp_path, steps=(2,), max_skipped_steps=1)
    with pytest.raises(REDError, match="1 step in a row was skipped"):
        trainer.train()


def test_the_guard_reads_once_a_step(tiny_teacher, tmp_path, monkeypatch):
    """Three flags, just before the optimiser: as often as there are steps, however many micro-batches these have."""
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(tuple(self.shape)), real(self))[1])
    for micro_batches in (1, 4):
        trainer = make_trainer(tiny_teacher(), tmp_path / str(micro_batches), tokenised(60), max_steps=3, logging_steps=100, gradient_accumulation_steps=micro_batches,
                               train_sampling_strategy="sequential")
        reads.clear()
        trainer.train()
        assert len(trainer.seen) == 3 * micro_batches and reads.count((3,)) == 3


def test_a_run_of_skipped_steps_alone_has_trained_nothing(tiny_teacher, tmp_path):
    trainer, _ = poisoned(tiny_teacher(), tmp_path, steps=(1, 2, 3), max_steps=3)
    with pytest.raises(REDError, match=r"All 3 steps were skipped.*red doctor"):
        trainer.train()
