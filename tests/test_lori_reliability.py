"""LoRi's trainer loses nothing: SIGKILL inside a save or the export, SIGTERM, steps that are not finite. What its checkpoints refuse is in test_lori_trainer."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kill import assert_same_bits, die_at, ended, forked, last
from tiny_lori import number_tokenizer, settings_of, table_rows
from tiny_models import build_tiny_model
from transformers import TrainerCallback

import red
from red.training.checkpoint_folders import fault, last_checkpoint
from red.errors import REDError, Terminated
from red.lori import trainer as module

WHERE = {  # saves are at 2, 4 and 6, one is kept: what dies, in which call, and which step must be left
    "a file half-written": ("lori.atomic_write_safetensors", 2, "within", 2),
    "manifest, no rename yet": ("folders.publish", 2, "before", 2),
    "the older one moved aside": ("folders._move_aside", 1, "after", 4),
    "the student half-written": ("files.atomic_write_json", 1, "before", 6),
}
SETTINGS = dict(save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=6, lr_scheduler_type="linear", projection_dropout=0.1)


def train(folder: Path, callbacks=None, resume: bool = False, **changes):
    return red.distill(build_tiny_model(), table_rows(), tokenizer=number_tokenizer(), method="lori", callbacks=callbacks, resume=resume,
                       **settings_of(folder, **{**SETTINGS, **changes}))


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    moments = {f"{index}.{name}": torch.as_tensor(value).clone() for index, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}
    return {**{name: value.detach().clone() for name, value in model.named_parameters()}, **moments}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ---- SIGKILL inside a save ----


def kill_at_every_point(folder: Path) -> dict:
    """In a process that has imported everything, with a child for each run."""
    def run(place: Path, resume: bool = False) -> None:
        trainer = train(place, resume=resume).trainer
        save_file(everything(trainer.model, trainer.optimizer), place.with_suffix(".final"))

    assert ended(forked(lambda: run(folder / "whole"))) == 0
    found = {}
    for point, (where, calls, when, _) in WHERE.items():
        place = folder / point.replace(" ", "-").replace(",", "")
        code = ended(forked(lambda where=where, calls=calls, when=when, place=place: (die_at(where, calls, when), run(place))))
        left = last(place)
        found[point] = {"exit": code, "step": left, "final": str(place.with_suffix(".final")), "resumed": ended(forked(lambda place=place: run(place, resume=True))),
                        "end": sorted(path.name for path in place.iterdir() if path.name.startswith(("checkpoint", "student", "_saving")))}
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("point", WHERE)
def test_a_kill_inside_a_save(killed, point):
    folder, found = killed
    left = found[point]
    assert left["exit"] == -signal.SIGKILL and left["resumed"] == 0
    assert left["step"] == WHERE[point][3] and left["end"] == ["checkpoint-6", "student"]
    assert_same_bits(Path(left["final"]), folder / "whole.final")


# ---- SIGTERM ----


class Terminate(TrainerCallback):
    """Sends this process SIGTERM in step `at`."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_stops_and_goes_on(tmp_path):
    """Also where nothing would be saved; nothing is exported; the resumed run ends with the bits of one that nobody disturbed."""
    settings = dict(save_strategy="no", gradient_accumulation_steps=2)
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(SystemExit, match="SIGTERM: saved .*run/checkpoint-3.*red lori --resume") as end:
        train(tmp_path / "run", [Terminate(3)], **settings)
    assert isinstance(end.value, Terminated) and end.value.code == 143
    assert fault(tmp_path / "run" / "checkpoint-3") is None and not (tmp_path / "run" / "student").exists()
    resumed = train(tmp_path / "run", resume=True, **settings)
    assert same(*(everything(run.trainer.model, run.trainer.optimizer) for run in (resumed, whole)))


# ---- steps that are not finite ----


class States(TrainerCallback):
    """Weights and moments after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append(everything(model, optimizer))


@pytest.fixture()
def poisoned(monkeypatch):
    """poisoned(folder, steps, **settings) trains with losses of NaN in these steps; returns the result and the state after every step."""
    def run(folder, steps, **settings):
        states, plain = States(), module._cross_entropy
        monkeypatch.setattr(module, "_cross_entropy", lambda *given: plain(*given) * (math.nan if len(states.after) + 1 in steps else 1.0))
        return train(folder, [states], **settings), states.after

    return run


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_skipped_step_keeps_every_bit(poisoned, tmp_path, caplog, clip):
    with caplog.at_level(logging.WARNING):
        result, after = poisoned(tmp_path, (2, 3), weight_decay=0.1, max_steps=5, max_grad_norm=clip)
    assert same(after[0], after[1]) and same(after[1], after[2])
    assert not same(after[2], after[3]) and not same(after[3], after[4]) and all(value.isfinite().all() for value in after[4].values())
    lines = {entry["step"]: entry for entry in result.trainer.state.log_history if "learning_rate" in entry}
    assert "task" not in lines[2] and lines[3]["skipped_steps"] == 2 and math.isfinite(lines[4]["loss"]) and lines[4]["rationale"] > 0
    assert "Not finite in step 2: task. The step is skipped (1 in a row, 1 in all; max_skipped_steps=10)." in caplog.text


def test_too_many_in_a_row_end_the_run(poisoned, tmp_path):
    with pytest.raises(REDError, match="Not finite in step 4: task. 2 steps in a row were skipped.*nonfinite-batch-4.safetensors"):
        poisoned(tmp_path, (3, 4), max_skipped_steps=2)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    batch, facts = load_file(tmp_path / "nonfinite-batch-4.safetensors"), json.loads((tmp_path / "nonfinite-batch-4.json").read_text())
    assert {"0.prompt_ids", "0.labels", "0.teacher_g"} <= set(batch) and facts["micro_batches"][0]["task"] == "nan" and facts["micro_batches"][0]["anchor"] > 0
    assert "projection.1.weight" in facts["student_gradients_not_finite"]


if __name__ == "__main__":
    import gc
    import threading

    from tqdm import tqdm

    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by all children, and one that is killed while it holds it would stop the others
    train(place / "warm", max_steps=1)  # what is imported and compiled lazily, once for all children
    gc.freeze()
    (place / "found.json").write_text(json.dumps(kill_at_every_point(place)))
