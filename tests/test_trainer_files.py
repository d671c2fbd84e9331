"""Checkpoints of a REDTrainer: interrupted and resumed equals uninterrupted bit for bit; a folder rebuilds the student exactly."""

from __future__ import annotations

import json

import pytest
import torch
from reference_lrc import random_batch
from safetensors.torch import load_file
from tiny_training import VARIANTS, Interrupt, make_trainer, masters, tokenised
from transformers import AutoModelForCausalLM

from red import starts
from red.training.checkpoint_folders import MANIFEST
from red.training.checkpoints import PROJECTIONS_FILE
from red.errors import REDError
from red.training.projections import Projections
from red.student import build_student


SETTINGS = dict(max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="linear",
                warmup_steps=2, weight_decay=0.01, max_grad_norm=0.5)
MODES = {"default": dict(start="activation"), "faithful": dict(start="random", lrc_faithful=True), "no taps": dict(start="pca", tap_weight=0.0)}
PARTS = ("loss", "ce", "kl", "tap_mse", "grad_norm", "learning_rate", "epoch", "step")


def lines(trainer) -> dict[int, dict]:
    return {entry["step"]: {key: entry[key] for key in PARTS} for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_resumed_equals_uninterrupted(tiny_teacher, tmp_path, family, mode):
    """Interrupted in step 5, two steps after the checkpoint and in the second epoch; resumed by a new trainer in the same folder."""
    def make(folder: str, callbacks=None):
        return make_trainer(tiny_teacher(family, tied=family == "qwen2"), tmp_path / folder, callbacks=callbacks, **SETTINGS, **MODES[mode])

    whole = make("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("broken", [Interrupt(5)]).train()
    torch.manual_seed(99)  # the generator must come from the checkpoint
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)

    assert len(resumed.seen) == 3 * 2 and all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(resumed.seen, whole.seen[6:], strict=True))
    for name, value in masters(whole).items():
        assert torch.equal(masters(resumed)[name], value), name
    for (name, value), other in zip(whole.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(value, other), name
    first, second = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys() != {}.keys()
    for index, moments in first["state"].items():
        assert all(torch.equal(value, second["state"][index][key]) for key, value in moments.items()), index
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    assert lines(resumed) == lines(whole) and len(lines(whole)) == 6


def test_parts_add_up_after_resuming_between_two_log_lines(tiny_teacher, tmp_path):
    """A checkpoint at step 3 with a log line every 2 steps: the next line covers step 4 alone, in the loss and in its parts."""
    settings = {**SETTINGS, "logging_steps": 2}
    whole = make_trainer(tiny_teacher(), tmp_path / "whole", **{**settings, "logging_steps": 1})
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tiny_teacher(), tmp_path / "broken", callbacks=[Interrupt(5)], **settings).train()
    resumed = make_trainer(tiny_teacher(), tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    found, expected = lines(resumed), lines(whole)
    assert sorted(found) == [2, 4, 6]
    for key in ("loss", "ce", "kl", "tap_mse"):
        assert found[4][key] == pytest.approx(expected[4][key], rel=1e-6), key
        assert found[6][key] == pytest.approx((expected[5][key] + expected[6][key]) / 2, rel=1e-6), key


@pytest.mark.parametrize("variant", ["llama-tied", "llama-biases", "qwen3"])
def test_a_checkpoint_rebuilds_the_student(tiny_teacher, tmp_path, variant):
    """From teacher + projections.safetensors, and as a plain model by transformers: the same numbers, bit for bit."""
    family, settings = VARIANTS[variant]
    teacher = tiny_teacher(family, **settings)
    trainer = make_trainer(teacher, tmp_path, save_strategy="steps", save_steps=2, start="orthogonal")
    trainer.train()
    folder, ids = tmp_path / "checkpoint-4", random_batch()["input_ids"]
    state = load_file(folder / PROJECTIONS_FILE)
    student = build_student(teacher, 16)
    Projections(teacher, student, starts.get("random")(starts.StartContext(teacher, 16))).load_state_dict(state)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = trainer.student.eval()(ids).logits
        assert torch.equal(student.eval()(ids).logits, logits)
        assert torch.equal(plain(ids).logits, logits)
        older = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert not torch.allclose(older(ids).logits, logits, atol=1e-3)
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(state, torch.float32)


def test_save_model_writes_both(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path / "run")
    trainer.save_model(tmp_path / "here")
    trainer.save_model()
    for folder in (tmp_path / "here", tmp_path / "run"):
        assert {"config.json", "model.safetensors", PROJECTIONS_FILE} <= {path.name for path in folder.iterdir()}
        assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
        assert load_file(folder / PROJECTIONS_FILE)["channels"].tolist() == trainer.projections.channels.tolist()


@pytest.mark.parametrize("first, second, message", [("activation", "pca", "selects channels, and start='pca' selects none"), ("pca", "activation", "selects no channels, and start='activation' selects some")])
def test_another_kind_of_start_is_refused(tiny_teacher, tmp_path, first, second, message):
    """The taps were compared with gathered targets in the one, with projected ones in the other."""
    make_trainer(tiny_teacher(), tmp_path, save_strategy="steps", save_steps=1, max_steps=1, start=first).train()
    with pytest.raises(REDError, match=f"checkpoint-1 began with a start that {message}.*Resume with the start"):
        make_trainer(tiny_teacher(), tmp_path, max_steps=2, start=second).train(resume_from_checkpoint=True)


def test_load_best_model_at_end(tiny_teacher, tmp_path):
    """The first checkpoint is made the best one; afterwards student, projections and file agree."""
    trainer = make_trainer(tiny_teacher(), tmp_path, eval_data=tokenised(5, seed=3), eval_strategy="steps", eval_steps=2, save_strategy="steps",
                           save_steps=2, max_steps=6, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    expected = load_file(best / PROJECTIONS_FILE)
    for name, value in masters(trainer).items():
        assert torch.equal(value, expected[name]), name
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.student.state_dict().items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_checkpoint_without_projections_is_refused(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-4" / PROJECTIONS_FILE).unlink()
    with pytest.raises(REDError, match="checkpoint-4 has no projections.safetensors"):
        make_trainer(tiny_teacher(), tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_width_is_refused(tiny_teacher, tmp_path):
    make_trainer(tiny_teacher(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(REDError, match="shape .*this student needs .*hidden_size"):
        make_trainer(tiny_teacher(), tmp_path, hidden_size=12).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_teacher_is_refused(tiny_teacher, tmp_path):
    """Equal shapes, other weights: the projections would silently produce another student."""
    make_trainer(tiny_teacher(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(REDError, match="another (teacher|model)"):
        make_trainer(tiny_teacher(seed=1), tmp_path).train(resume_from_checkpoint=True)


def test_a_torn_checkpoint_is_refused(tiny_teacher, tmp_path):
    make_trainer(tiny_teacher(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / PROJECTIONS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    (path.parent / MANIFEST).unlink()  # with one, the file is not even opened: test_checkpoints.py
    with pytest.raises(REDError, match="projections.safetensors cannot be read.*older checkpoint"):
        make_trainer(tiny_teacher(), tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_resume_goes_on_with_the_same_channels_and_tap_weights(tiny_teacher, tmp_path):
    """A resumed run that would calibrate on other rows must still train against the channels and weights of the checkpoint."""
    first = make_trainer(tiny_teacher(), tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    again = make_trainer(tiny_teacher(), tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=2, calibration_samples=1)
    assert not torch.equal(again.taps.mean_square, first.taps.mean_square)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.taps.mean_square, first.taps.mean_square)
    assert torch.equal(again.projections.channels, first.projections.channels)
