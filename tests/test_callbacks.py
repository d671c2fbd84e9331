"""ERankCallback: it fires, logs, warns of a collapsed student, stops, and costs nothing when it is off."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import make_trainer, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from red.training import erank_callback as callbacks
from red.training.erank_callback import ERankCallback, lowest_share
from red.demo.suite import CORPORA
from red.erank import hidden_erank, stream_eranks
from red.errors import REDError
from red.example import teacher_path, tokenized


class Tracker(TrainerCallback):
    """What a tracker is told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture()
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(callbacks.logger, "warning", said.append)
    return said


def collapse(trainer) -> None:
    """Everything that writes to the stream writes to its first channel only, so the stream has one direction."""
    with torch.no_grad():
        for factor in trainer.projections:
            if factor.name.endswith("embed_tokens.weight"):
                factor.master[:, 1:] = 0
            elif factor.side == "output":
                factor.master[1:] = 0
    trainer.projections.push_forward()


def eranks(tracker, step):
    return next(logs for at, logs in tracker.logs if at == step and "erank/share" in logs)


def test_it_fires_and_logs(tiny_teacher, tmp_path, warnings):
    tracker, teacher, held_out = Tracker(), tiny_teacher(), tokenised(40, seed=3)
    trainer = make_trainer(teacher, tmp_path, eval_data=held_out, callbacks=[tracker], erank_steps=2, max_steps=5)
    trainer.train()
    assert [step for step, logs in tracker.logs if "erank/share" in logs] == [0, 2, 4]
    (of_teacher,) = [logs for _, logs in tracker.logs if "erank_teacher/mean" in logs]
    assert {"erank_teacher/embedding", "erank_teacher/layer_1", "erank_teacher/layer_2"} <= of_teacher.keys()
    truth = hidden_erank(teacher, None, [example["input_ids"] for example in held_out])
    assert [of_teacher[f"erank_teacher/{name}"] for name in ("embedding", "layer_1", "layer_2")] == pytest.approx(truth, rel=1e-3)
    first = eranks(tracker, 0)
    values = [first[f"erank/{name}"] for name in ("embedding", "layer_1", "layer_2")]
    assert first["erank/mean"] == pytest.approx(sum(values) / 3) and first["erank/share"] == pytest.approx(lowest_share(values, truth), rel=1e-3)
    assert eranks(tracker, 4)["erank/layer_2"] != first["erank/layer_2"], "the student moved"
    assert not warnings and any("erank/share" in entry for entry in trainer.state.log_history)
    assert trainer.student.training, "measuring leaves the mode alone"


def test_training_does_not_notice_it(tiny_teacher, tmp_path):
    losses = []
    for steps in (0, 1):
        trainer = make_trainer(tiny_teacher(), tmp_path / str(steps), erank_steps=steps)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert any(isinstance(one, ERankCallback) for one in trainer.callback_handler.callbacks) == bool(steps)
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("stop", (False, True))
def test_a_collapsed_student_is_warned_of_once_and_stopped(stop, tiny_teacher, tmp_path, warnings):
    tracker = Tracker()
    trainer = make_trainer(tiny_teacher(), tmp_path, callbacks=[tracker], learning_rate=1e-9, max_steps=8, erank_steps=1, erank_patience=3, erank_stop=stop)
    collapse(trainer)
    trainer.train()
    shares = [logs["erank/share"] for _, logs in tracker.logs if "erank/share" in logs]
    assert max(shares) < 0.25 and len(warnings) == 1
    assert "erank_floor" in warnings[0] and "after 2 steps" in warnings[0]
    assert trainer.state.global_step == (2 if stop else 8)


def test_a_check_above_the_floor_starts_anew(tiny_teacher, tmp_path, warnings, monkeypatch):
    shares = iter([0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(callbacks, "lowest_share", lambda *_: next(shares))
    trainer = make_trainer(tiny_teacher(), tmp_path, max_steps=6, erank_steps=1, erank_stop=True)
    trainer.train()
    assert trainer.state.global_step == 5 and len(warnings) == 1


def test_a_resumed_run_remembers_the_checks_before_it(tiny_teacher, tmp_path, warnings, monkeypatch):
    settings = dict(erank_steps=1, erank_stop=True, erank_patience=5, save_strategy="steps", save_steps=2)
    monkeypatch.setattr(callbacks, "lowest_share", lambda *_: 0.1)
    make_trainer(tiny_teacher(), tmp_path, max_steps=2, **settings).train()  # checks at 0, 1 and 2
    assert not warnings
    trainer = make_trainer(tiny_teacher(), tmp_path, max_steps=8, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and len(warnings) == 1, "0, 1, 2 and 2 again are three checks; 3 and 4 make five"


@pytest.mark.parametrize("start, collapses", (("random", True), ("activation", False)))
def test_the_random_start_of_the_embedded_example_is_seen(start, collapses, tmp_path, warnings):
    """LRC's start collapses within a few steps; RED's does not."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    text = tokenized(CORPORA["chains"].documents(0, "train", 0.5), tokenizer, 9000)
    trainer = make_trainer(teacher, tmp_path, text, hidden_size=64, start=start, max_length=112, per_device_train_batch_size=4, max_steps=10, learning_rate=2e-3,
                           erank_steps=5, erank_patience=2)
    trainer.train()
    assert len(warnings) == collapses


def test_packed_rows_give_what_documents_give(tiny_model):
    from red.data.loading import collate, pack

    model, examples = tiny_model(), tokenised(30)
    rows = pack(examples, 16, pad_token_id=0)
    batch = collate([rows[i] for i in range(len(rows))])
    truth = hidden_erank(model, None, [example["input_ids"] for example in examples])
    assert stream_eranks(model, batch, max_tokens=10**6) == pytest.approx(truth, rel=1e-4)


def test_share_of_ranks():
    assert lowest_share([2.0, 8.0], [4.0, 4.0]) == 0.5
    assert lowest_share([math.nan, 4.0], [16.0, 4.0]) == 1 / 16
    assert lowest_share([3.0, 2.0], [math.nan, 4.0]) == 0.5
    assert math.isnan(lowest_share([3.0], [math.nan]))


@pytest.mark.parametrize("change, message", [
    (dict(erank_steps=-1), "erank_steps=-1: must not be negative"), (dict(erank_floor=0.0), "erank_floor=0.0: must lie between 0 and 1"),
    (dict(erank_floor=1.5), "erank_floor=1.5"), (dict(erank_patience=0), "erank_patience=0: must be at least 1"),
])
def test_settings_are_checked(change, message, tiny_teacher, tmp_path):
    with pytest.raises(REDError, match=message):
        make_trainer(tiny_teacher(), tmp_path, **change)


def test_no_rows_to_watch():
    with pytest.raises(REDError, match="erank_steps needs rows to watch, and there are 0 tokens"):
        ERankCallback(None, (), steps=1)
