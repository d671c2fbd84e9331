"""LoRi's files: resuming bit for bit and what it refuses, the best checkpoint, the licence. Kills, SIGTERM and broken steps are in test_lori_reliability."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lori import distil_tiny, logged, table_rows, weights
from tiny_training import Interrupt

from red.errors import REDError
from red.sharing.licences import front_matter


@pytest.fixture()
def train(tiny_teacher, tmp_path):
    """train(folder, rows=None, **settings): red.distill(method="lori") of a tiny teacher."""
    return lambda folder="run", rows=None, *, teacher=None, **settings: distil_tiny(teacher or tiny_teacher(), tmp_path / folder, rows, **settings)


@pytest.mark.parametrize("preset", ["lori", "codi_joint"])
def test_resumed_equals_uninterrupted(train, preset):
    """Interrupted in step 5, after the checkpoint of step 3; resumed by a new trainer: weights, moments and log lines bit for bit."""
    settings = dict(preset=preset, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, lr_scheduler_type="linear", projection_dropout=0.1,
                    max_grad_norm=0.5)
    whole = train("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train("broken", callbacks=[Interrupt(5)], **settings)
    torch.manual_seed(99)
    resumed = train("broken", resume=True, **settings)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    first, second = whole.trainer.optimizer.state_dict()["state"], resumed.trainer.optimizer.state_dict()["state"]
    assert first.keys() == second.keys() and all(torch.equal(first[index][key], second[index][key]) for index in first for key in first[index])
    keys = ("step", "loss", "task", "rationale", "anchor", "cot", "grad_norm", "learning_rate")
    assert logged(resumed, *keys) == logged(whole, *keys) and len(logged(whole, "loss")) == 6


def test_a_finished_run_and_a_foreign_checkpoint_are_refused(train, tiny_teacher, tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=2)
    train(**settings)
    with pytest.raises(REDError, match="not empty"):
        train(**settings)
    with pytest.raises(REDError, match="This run is finished"):
        train(resume=True, **settings)
    with pytest.raises(KeyboardInterrupt):
        train("other", callbacks=[Interrupt(2)], max_steps=2, save_strategy="steps", save_steps=1)
    first = tmp_path / "other" / "checkpoint-1"
    with pytest.raises(REDError, match="checkpoint-7"):
        train("other", resume=tmp_path / "other" / "checkpoint-7", max_steps=2)
    with pytest.raises(REDError, match="no checkpoint-N folder to resume from"):
        train("third", resume=True, max_steps=2)
    with pytest.raises(REDError, match=r"checkpoint-1 was made with projection=True \(now False\), curriculum=0.0 \(now 0.5\).*settings of the first run"):
        train("other", resume=True, preset="coconut", max_steps=2, teacher="no/teacher")  # before one is read
    stamp = (tmp_path / "other" / "trajectories" / "trajectories.json").stat().st_mtime_ns
    with pytest.raises(REDError, match="training rows.*their hash was"):
        train("other", resume=True, rows=table_rows(seed=3), max_steps=2)
    for changes in (dict(teacher=tiny_teacher(seed=1)), dict(rank_channels=3)):
        with pytest.raises(REDError, match="other trajectories: those of another teacher"):
            train("other", resume=True, max_steps=2, **changes)
    assert (tmp_path / "other" / "trajectories" / "trajectories.json").stat().st_mtime_ns == stamp, "the run's trajectories were overwritten"
    (first / "trainer_state.json").rename(tmp_path / "trainer_state.json")
    with pytest.raises(REDError, match="checkpoint-1: trainer_state.json is missing"):
        train("other", resume=True, max_steps=2)
    (tmp_path / "trainer_state.json").rename(first / "trainer_state.json")
    assert train("other", resume=first, max_steps=2).trainer.state.global_step == 2
    plain = load_file(first / "lori_state.safetensors")
    save_file({name: value for name, value in plain.items() if "embed" not in name}, first / "lori_state.safetensors")
    (first / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "other" / "student")
    with pytest.raises(REDError, match="another model or another preset: model.model.embed_tokens.weight differs"):
        train("other", resume=first, max_steps=2)


def test_the_best_checkpoint_comes_back(train, tmp_path):
    """The first checkpoint is made the best one; afterwards the model and its export are those of that step."""
    result = train(eval_data=table_rows(3, seed=5), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=4, load_best_model_at_end=True,
                   metric_for_best_model="eval_loss", greater_is_better=True)
    best = load_file(result.trainer.state.best_model_checkpoint + "/lori_state.safetensors")
    other = ({"checkpoint-2", "checkpoint-4"} - {result.trainer.state.best_model_checkpoint.rpartition("/")[2]}).pop()
    assert all(torch.equal(value, best[name]) for name, value in result.model.named_parameters() if name in best)
    different = load_file(tmp_path / "run" / other / "lori_state.safetensors")
    assert any(not torch.equal(value, best[name]) for name, value in different.items())


def test_the_licence_comes_along(train, tiny_teacher, tmp_path, caplog):
    """The teacher's files, and its name in README.md; a student that starts from another model is pointed out."""
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path / "Teacher-1B")
    (tmp_path / "Teacher-1B" / "LICENSE").write_text("Terms.")
    (tmp_path / "Teacher-1B" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    path = train(teacher=tmp_path / "Teacher-1B", max_steps=1).path
    front = front_matter(path / "README.md")
    assert (path / "LICENSE").read_text() == "Terms." and front["license"] == "apache-2.0" and "base_model: Teacher-1B" in (path / "README.md").read_text()
    assert "terms of both" not in caplog.text
    tiny_teacher().save_pretrained(tmp_path / "Other")
    train("other", teacher=tmp_path / "Teacher-1B", student=tmp_path / "Other", max_steps=1)
    assert f"starts from {tmp_path / 'Other'}" in caplog.text
    assert not list(train("unnamed", max_steps=1).path.glob("LICENSE*"))
