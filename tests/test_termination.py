"""SIGTERM: the step is finished, its checkpoint saved, the exit code 143; the resumed run ends with the bits of one that was not disturbed."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from tiny_training import make_trainer, masters, settings_of, tokenised
from transformers import TrainerCallback

import red
from red import cli
from red.training.checkpoint_folders import fault, last_checkpoint
from red.errors import Terminated


class Terminate(TrainerCallback):
    """Sends this process SIGTERM in step `at`, twice, as a launcher and the system do."""

    def __init__(self, at: int):
        self.at = at

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)


SETTINGS = dict(max_steps=6, gradient_accumulation_steps=2, lr_scheduler_type="linear")


@pytest.fixture(scope="module")
def whole(tiny_teacher, tmp_path_factory):
    """A run that nobody disturbed."""
    trainer = make_trainer(tiny_teacher(), tmp_path_factory.mktemp("whole"), **SETTINGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", [dict(save_strategy="no"), dict(save_strategy="epoch")], ids=lambda found: found["save_strategy"])
def test_saves_stops_and_goes_on(tiny_teacher, tmp_path, caplog, whole, strategy):
    """Whatever the save strategy; the message names the folder."""
    stopped = make_trainer(tiny_teacher(), tmp_path / "run", callbacks=[Terminate(3)], **SETTINGS, **strategy)
    with pytest.raises(SystemExit, match="SIGTERM: saved .*run/checkpoint-3.*--resume") as end:
        stopped.train()
    assert isinstance(end.value, Terminated) and end.value.code == 143 and "saved" in caplog.text
    assert stopped.state.global_step == 3 and fault(tmp_path / "run" / "checkpoint-3") is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "after the training the signal does what it does"
    resumed = make_trainer(tiny_teacher(), tmp_path / "run", **SETTINGS, **strategy)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 3 * 2 and all(torch.equal(value, masters(resumed)[name]) for name, value in masters(whole).items())


@pytest.mark.parametrize("terminated", [True, False])
def test_the_end_keeps_what_is_needed(tiny_teacher, tmp_path, terminated):
    """With save_total_limit=1 and the best checkpoint behind, Trainer removes the last one at the end of a training, in place: not the one that SIGTERM saved, and never another program's."""
    best = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    trainer = make_trainer(tiny_teacher(), tmp_path / "run", eval_data=tokenised(5, seed=3), callbacks=[Terminate(5)] * terminated, save_total_limit=1, **best, **SETTINGS)
    if terminated:
        with pytest.raises(Terminated, match="checkpoint-5"):
            trainer.train()
    else:
        trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.args.save_total_limit == 1
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", *["checkpoint-5"] * terminated}
    assert last_checkpoint(tmp_path / "run").name == ("checkpoint-5" if terminated else "checkpoint-2")


def test_somebody_elses_handler_stays(tiny_teacher, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("other"))
    try:
        trainer = make_trainer(tiny_teacher(), tmp_path, callbacks=[Terminate(1)], **SETTINGS)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["other", "other"] and trainer.state.global_step == 6


def test_the_command_line(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch, capfd):
    """`red distill` exits with 143 and exports nothing; --resume CHECKPOINT and --resume are understood."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "corpus.txt").write_text("".join(f"w{4 + index % 50} w{5 + index % 40} w{6 + index % 30}\n" for index in range(120)))
    given = settings_of(tmp_path / "run", teacher_model_name_or_path=tmp_path / "teacher", train_file=tmp_path / "corpus.txt", **SETTINGS)
    command = ["distill", *(f"--{name}={value}" for name, value in given.items())]
    exported = []
    monkeypatch.setattr(red.REDTrainer, "export", lambda self, path: exported.append(self.state.global_step))
    real = red.REDTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(Terminate(4))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(red.REDTrainer, "train", train)
        assert cli.main(command) == 143
    assert exported == [] and [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert cli.main([*command, "--resume", str(tmp_path / "run" / "checkpoint-5")]) == 2
    assert "checkpoint-5' does not exist; did you mean" in capfd.readouterr().err
    assert cli.main([*command, "--resume", str(tmp_path / "run" / "checkpoint-4")]) == 0
    assert cli.main([*command, "--resume"]) == 0
    assert exported == [6, 6]


def test_a_signal_after_the_last_step_is_not_lost(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path, tokenised(), callbacks=[Terminate(6)], **SETTINGS)
    with pytest.raises(Terminated, match="checkpoint-6"):
        trainer.train()
