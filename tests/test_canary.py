"""The reasoning canary and the progress bar: what they say is true, and training does not notice them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from test_callbacks import Tracker
from tiny_models import build_tiny_tokenizer
from tiny_training import RecordingTrainer, make_trainer, settings_of, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback

from red.training import canary
from red.training import progress
from red.training.canary import CanaryCallback, canary_problems
from red.config import REDConfig
from red.demo.suite import CORPORA
from red.errors import REDError
from red.evaluate import exact_match
from red.example import teacher_path, tokenized
from red.training.progress import RateAndLosses


@pytest.fixture()
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(canary.logger, "warning", said.append)
    return said


def embedded_trainer(tmp_path, callbacks=None, **changes) -> RecordingTrainer:
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32), AutoTokenizer.from_pretrained(teacher_path())
    text = tokenized(CORPORA["chains"].documents(0, "train", 0.5), tokenizer, 4000)
    settings = settings_of(tmp_path, **{**dict(hidden_size=64, max_length=112, per_device_train_batch_size=4, canary_steps=2, canary_file="embedded", canary_samples=24), **changes})
    return RecordingTrainer(teacher, REDConfig(**settings), train_dataset=text, processing_class=tokenizer, callbacks=callbacks)


def of_canary(tracker: Tracker) -> list[tuple[int, dict]]:
    return [(step, logs) for step, logs in tracker.logs if any(name.startswith("canary/") for name in logs)]


def test_it_fires_and_its_numbers_are_those_of_evaluate(tmp_path, warnings):
    tracker = Tracker()
    trainer = embedded_trainer(tmp_path, [tracker], max_steps=5)
    problems, tokenizer = canary_problems("embedded", 24), trainer.processing_class
    first = exact_match(trainer.student, tokenizer, problems)["exact_match"]  # as many problems of each number of steps
    trainer.train()
    (zero, of_teacher), *checks = of_canary(tracker)
    assert zero == 0 and of_teacher["canary/teacher"] == pytest.approx(exact_match(trainer.teacher, tokenizer, problems)["exact_match"]) and of_teacher["canary/teacher"] > 0.7
    assert [step for step, _ in checks] == [0, 2, 4]
    assert checks[0][1]["canary/student"] == pytest.approx(first)
    assert all(logs["canary/share"] == logs["canary/student"] / of_teacher["canary/teacher"] and logs["canary/seconds"] > 0 for _, logs in checks)
    assert not warnings and trainer.student.training and any("canary/share" in entry for entry in trainer.state.log_history)


def test_a_student_that_is_its_teacher_has_all_of_the_score(tmp_path):
    tracker = Tracker()
    trainer = embedded_trainer(tmp_path, [tracker])
    watcher = next(one for one in trainer.callback_handler.callbacks if isinstance(one, CanaryCallback))
    trainer.projections.student = trainer.teacher
    watcher.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert of_canary(tracker)[-1][1]["canary/share"] == 1


def test_training_does_not_notice_it(tmp_path):
    losses = []
    for steps in (0, 1):
        trainer = embedded_trainer(tmp_path / str(steps), canary_steps=steps, canary_samples=8, max_steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_users_file_and_a_teacher_that_solves_none(tmp_path, tiny_teacher, warnings):
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"question": f"w{4 + index} w5", "answer": "#### 42"}) for index in range(5)))
    tracker = Tracker()
    settings = settings_of(tmp_path / "run", canary_steps=2, canary_file=str(tmp_path / "questions.jsonl"), canary_samples=3, max_steps=2)
    trainer = RecordingTrainer(tiny_teacher(), REDConfig(**settings), train_dataset=tokenised(), processing_class=build_tiny_tokenizer(), callbacks=[tracker])
    trainer.train()
    (_, of_teacher), *checks = of_canary(tracker)
    assert of_teacher["canary/teacher"] == 0 and len(warnings) == 1 and "none of the 3 canary problems" in warnings[0]
    assert [set(logs) - {"epoch", "step"} for _, logs in checks] == [{"canary/student", "canary/seconds"}] * 2


@pytest.mark.parametrize("change, message", [
    (dict(canary_steps=-1), "canary_steps=-1: must not be negative"), (dict(canary_steps=2), "needs canary_file"), (dict(canary_samples=0), "canary_samples=0: must be at least 1"),
    (dict(canary_steps=2, canary_file="missing.jsonl"), "'missing.jsonl' does not exist"), (dict(canary_steps=2, canary_file="embedded"), "needs the teacher's tokenizer"),
])
def test_settings_are_checked(change, message, tiny_teacher, tmp_path):
    with pytest.raises(REDError, match=message):
        make_trainer(tiny_teacher(), tmp_path, **change)


def test_problems():
    found = canary_problems("embedded", 10)
    assert [problem.steps for problem in found] == [2, 4, 6, 8, 2, 4, 6, 8, 2, 4] and len({problem.question for problem in found}) == 10


# ---- the progress bar ----

def test_the_bar_shows_the_parts_of_the_loss_and_true_tokens_a_second(tiny_teacher, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10000, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    trainer = make_trainer(tiny_teacher(), tmp_path, disable_tqdm=False, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    watcher, shown = next(one for one in trainer.callback_handler.callbacks if isinstance(one, RateAndLosses)), []
    begin = watcher.on_train_begin

    def watched(*args, **kwargs):
        begin(*args, **kwargs)
        monkeypatch.setattr(watcher.training_bar, "set_postfix", lambda numbers, refresh: shown.append(numbers))

    monkeypatch.setattr(watcher, "on_train_begin", watched)
    trainer.train()
    tokens = [sum(int(batch["token_mask"].sum()) for batch in trainer.seen[start:start + 4]) for start in (0, 4)]
    assert [numbers["tokens/s"] for numbers in shown] == [f"{count / 2:,.0f}" for count in tokens]  # the clock ticks twice a second
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(numbers["loss"], numbers["kl"]) for numbers in shown] == [(f"{entry['loss']:.4g}", f"{entry['kl']:.4g}") for entry in history]
    assert [type(one) for one in trainer.callback_handler.callbacks].count(ProgressCallback) == 0


def test_a_resumed_bar_begins_where_the_run_was(tiny_teacher, tmp_path, capsys):
    settings = dict(disable_tqdm=False, save_strategy="steps", save_steps=2)
    make_trainer(tiny_teacher(), tmp_path, max_steps=2, **settings).train()
    trainer = make_trainer(tiny_teacher(), tmp_path, max_steps=6, **settings)
    watcher, begins = next(one for one in trainer.callback_handler.callbacks if isinstance(one, RateAndLosses)), []
    begin = watcher.on_train_begin
    watcher.on_train_begin = lambda *args, **kwargs: (begin(*args, **kwargs), begins.append((watcher.training_bar.initial, watcher.training_bar.n)))[0]
    trainer.train(resume_from_checkpoint=True)
    assert begins == [(2, 2)] and re.search(r"6/6 \[", capsys.readouterr().err)


def test_without_a_bar_nothing_is_counted(tiny_teacher, tmp_path):
    assert not any(isinstance(one, RateAndLosses) for one in make_trainer(tiny_teacher(), tmp_path).callback_handler.callbacks)
