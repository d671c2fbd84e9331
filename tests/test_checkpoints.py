"""Whole checkpoints or none: manifests, damaged files, removal of older ones, going back, a full disk. (Kills: test_kill.py; contents: test_trainer_files.py.)"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import make_trainer, masters, tokenised
from transformers import Trainer, TrainerCallback

import red
from red.training import checkpoint_folders as folders
from red.training import checkpoints
from red.training.checkpoint_folders import MANIFEST, SAVING, last_checkpoint
from red.training.checkpoint_room import RoomForCheckpoints
from red.errors import REDError
from red.files import in_gib

EVERY_2 = dict(save_strategy="steps", save_steps=2, max_steps=6)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """A run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(tiny_teacher(), folder, **EVERY_2)
    trainer.train()
    return folder, trainer


@pytest.fixture()
def run(finished, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_the_manifest_knows_every_file(finished):
    for step in (2, 4, 6):
        folder = finished[0] / f"checkpoint-{step}"
        manifest = json.loads((folder / MANIFEST).read_text())
        content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
        assert {"projections.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= content.keys()
        assert manifest["files"] == {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
        assert manifest["step"] == step and manifest["save"] == step // 2
    assert names(finished[0]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "optimizer.pt has changed since it was written": lambda folder: flip(folder / "optimizer.pt"),
    "model.safetensors has .* bytes, .* were written": lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / MANIFEST).write_text('{"step": 6'),
    "manifest.json cannot": lambda folder: (folder / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(run, caplog, message):
    DAMAGE[message](run / "checkpoint-6")
    if "manifest" in message:  # its place in the order is lost with it: the damage is found when no other is left, or when it is named
        assert last_checkpoint(run).name == "checkpoint-4"
    else:
        with caplog.at_level(logging.WARNING):
            assert last_checkpoint(run).name == "checkpoint-4"
        assert re.search(f"checkpoint-6: {message}.*Going on from checkpoint-4", caplog.text)
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(REDError, match=f"No checkpoint in .* is whole: checkpoint-6: {message}"):
        last_checkpoint(run)


def test_resume_takes_the_last_that_is_whole(run, tiny_teacher, finished):
    """Two of three are damaged: the run goes on from the first, and saves over the others, to the same bits."""
    flip(run / "checkpoint-6" / "projections.safetensors")
    flip(run / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(REDError, match="checkpoint-6 is damaged: projections.safetensors has changed.*--resume"):
        make_trainer(tiny_teacher(), run, **EVERY_2).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    resumed = make_trainer(tiny_teacher(), run, **EVERY_2)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 4
    for name, value in masters(finished[1]).items():
        assert torch.equal(masters(resumed)[name], value), name
    assert last_checkpoint(run).name == "checkpoint-6" and all(folders.fault(run / f"checkpoint-{step}") is None for step in (2, 4, 6))
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_everything_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    """Files and inner folders are synced before the manifest is, the run's folder after the rename."""
    place, seen = tmp_path / folders.SAVING / "checkpoint-2", []
    (place / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (place / name).write_text(name)
    monkeypatch.setattr(folders, "sync", lambda path: seen.append(path.relative_to(tmp_path).as_posix() + "!" * (tmp_path / "checkpoint-2").exists()))
    monkeypatch.setattr(folders, "atomic_write_json", lambda path, value, own=folders.atomic_write_json: (seen.append(path.name), own(path, value)))
    folders.seal(place, step=2, save=1)
    inside = "_saving/checkpoint-2"
    assert sorted(seen[:2]) == [f"{inside}/a", f"{inside}/inner/b"] and seen[2:] == [f"{inside}/inner", MANIFEST]
    assert folders.publish(place, tmp_path) == tmp_path / "checkpoint-2" and seen[4:] == [".!"]
    assert folders.fault(tmp_path / "checkpoint-2") is None


def test_without_a_manifest_only_by_name(run, tiny_teacher, caplog):
    """Half-written by another program, or whole and of an older version: nobody can know, so the user decides."""
    (run / "checkpoint-6" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(run).name == "checkpoint-4"
    assert "Left alone, for want of a manifest.json: checkpoint-6" in caplog.text
    for step in (2, 4):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
    with pytest.raises(REDError, match="checkpoint-6 has no manifest.json.*older version.*resume=PATH"):
        make_trainer(tiny_teacher(), run, **EVERY_2).train(resume_from_checkpoint=True)
    named = make_trainer(tiny_teacher(), run, **{**EVERY_2, "max_steps": 8, "save_total_limit": 1})
    named.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert "checkpoint-6 has no manifest.json" in caplog.text and named.state.global_step == 8 and len(named.seen) == 2
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"], "what it cannot vouch for it does not remove either"


def test_going_back_to_an_earlier_checkpoint(run, tiny_teacher):
    """Resumed from step 2 with another clipping: what is saved then is the last checkpoint, though others have higher numbers."""
    before = {step: (run / f"checkpoint-{step}" / "projections.safetensors").read_bytes() for step in (2, 4, 6)}
    again = make_trainer(tiny_teacher(), run, **{**EVERY_2, "max_steps": 4, "max_grad_norm": 0.1})
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert last_checkpoint(run).name == "checkpoint-4" and names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    after = {step: (run / f"checkpoint-{step}" / "projections.safetensors").read_bytes() for step in (2, 4, 6)}
    assert after[2] == before[2] and after[4] != before[4] and after[6] == before[6]
    for everything in (None, 0, -1):
        folders.rotate(run, everything, keep=())
        assert len(names(run)) == 3
    folders.rotate(run, 1, keep=())
    assert names(run) == ["checkpoint-4"], "the order is that of the saves"


def test_a_finished_run_trains_no_further(run, tiny_teacher, finished):
    """Killed after its last checkpoint and before its export: Trainer alone would take a seventh step."""
    resumed = make_trainer(tiny_teacher(), run, **EVERY_2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and resumed.seen == []
    assert all(torch.equal(value, masters(resumed)[name]) for name, value in masters(finished[1]).items())


class Saved(TrainerCallback):
    """What stands in the folder at every on_save."""

    def __init__(self):
        self.found = []

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        assert folders.fault(folder / f"checkpoint-{state.global_step}") is None
        self.found.append(names(folder))


def test_rotation_keeps_the_best_and_names_its_place(tiny_teacher, tmp_path):
    """save_total_limit=2, the best at step 2: each trainer_state.json names a folder that stands."""
    saved = Saved()
    trainer = make_trainer(tiny_teacher(), tmp_path, eval_data=tokenised(5, seed=3), eval_strategy="steps", eval_steps=2, callbacks=[saved], load_best_model_at_end=True,
                           metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=2, **EVERY_2)
    trainer.train()
    assert saved.found == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-2", "checkpoint-6"]]
    for step in (2, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2") and state["global_step"] == step


def test_the_hub_gets_the_final_folder(tiny_teacher, tmp_path, monkeypatch):
    """An upload runs on beside the training: it must not start from the folder that is about to be renamed."""
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, folders.fault(Path(folder)))))
    trainer = make_trainer(tiny_teacher(), tmp_path, **{**EVERY_2, "max_steps": 2})
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-2"), None)]


def test_models_only(tiny_teacher, tmp_path):
    make_trainer(tiny_teacher(), tmp_path, save_only_model=True, **{**EVERY_2, "max_steps": 2}).train()
    assert folders.fault(tmp_path / "checkpoint-2") is None and not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


def test_a_first_save_that_was_cut_short_is_no_full_folder(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(red.REDTrainer, "export", lambda *_: None)  # it takes a fresh process, and is not what this is about
    (tmp_path / "run" / SAVING / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / SAVING / "checkpoint-2" / "half").write_text("half")
    settings = dict(tokenizer=tiny_tokenizer, hidden_size=16, output_dir=str(tmp_path / "run"), max_length=16, max_steps=2, save_steps=2, report_to="none", use_cpu=True, start="activation")
    with pytest.raises(REDError, match="no checkpoint-N folder to resume from"):
        red.distill(tiny_teacher(), tokenised(), resume=True, **settings)
    with pytest.raises(REDError, match="The checkpoint .*checkpoint-9' does not exist"):
        red.distill(tiny_teacher(), tokenised(), resume=str(tmp_path / "run" / "checkpoint-9"), **settings)
    red.distill(tiny_teacher(), tokenised(), **settings)
    assert "checkpoint-2" in names(tmp_path / "run") and SAVING not in names(tmp_path / "run")


FULL = {
    "the student": (Trainer, "save_model", OSError(errno.ENOSPC, "No space left on device")),
    "the projections": (checkpoints, "atomic_write_safetensors", SafetensorError("I/O error: No space left on device (os error 28)")),
    "the manifest": (folders, "atomic_write_json", OSError(errno.EDQUOT, "Disk quota exceeded")),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_teacher, tmp_path, monkeypatch, what):
    """Full in the second save: the first stands, the side folder is gone, the message has the numbers, and with room again the run goes on.
    (A real one, and torch.save's own errors: test_kill.py.)"""
    owner, name, error = FULL[what]
    real, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    settings = {**EVERY_2, "max_steps": 4, "save_total_limit": 1}
    trainer = make_trainer(tiny_teacher(), tmp_path, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
        size = in_gib(trainer.checkpoint_bytes())
        with pytest.raises(REDError, match=rf"checkpoint of step 4 could not be written.*It takes about {size}, and 3.00 MiB are free.*checkpoint-2 is whole.*save_total_limit.*resume"):
            trainer.train()
    assert names(tmp_path) == ["checkpoint-2"] and last_checkpoint(tmp_path).name == "checkpoint-2"
    resumed = make_trainer(tiny_teacher(), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-4"] and len(resumed.seen) == 2


def test_another_error_in_a_save_is_not_called_a_full_disk(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_trainer(tiny_teacher(), tmp_path, **EVERY_2).train()


def test_what_a_checkpoint_is_said_to_take(finished):
    """Of its files the student, the projections and the moments are counted; the rest is small at real sizes, not at this one."""
    folder, trainer = finished
    written = sum((folder / "checkpoint-6" / name).stat().st_size for name in ("model.safetensors", "projections.safetensors", "optimizer.pt"))
    assert 0.75 * written < trainer.checkpoint_bytes() < written


@pytest.mark.parametrize(("limit", "coming"), [(None, 3), (2, 3), (1, 2), (5, 3), (-1, 3)])
def test_a_warning_before_the_first_step_where_the_disk_is_too_small(tiny_teacher, tmp_path, monkeypatch, caplog, limit, coming):
    """Three saves are to come; with a limit one more than it stands there for a moment."""
    trainer = make_trainer(tiny_teacher(), tmp_path, save_total_limit=limit, **EVERY_2)
    size = trainer.checkpoint_bytes()
    callback = next(found for found in trainer.callback_handler.callbacks if isinstance(found, RoomForCheckpoints))
    state = SimpleNamespace(max_steps=6, global_step=0, save_steps=2, epoch=0)
    for free, warned in ((coming * size, False), (coming * size - 1, True)):
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with caplog.at_level(logging.WARNING):
            callback.on_train_begin(trainer.args, state, None)
        assert (f"{coming} more checkpoint" in caplog.text) == warned
