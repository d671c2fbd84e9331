"""SIGKILL in the middle of a save, at every point of it, a file that cannot be written, and (RED_KILL_TESTS=1: minutes) at random moments: what is on the disk is whole, and the
finished run has the bits of one that nobody disturbed.

A worker process imports everything once and forks a child for each run that is going to be killed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).parent
WHERE = {  # function, how often it has been called, whether before or after that call; and the step of the checkpoint that must be left: saves are at 2, 4, 6
    "a file half-written": ("checkpoints.atomic_write_safetensors", 2, "within", 2),
    "no optimiser state yet": ("trainer.REDTrainer._save_optimizer_and_scheduler", 2, "before", 2),
    "all written, nothing synced": ("folders.seal", 2, "before", 2),
    "no manifest yet": ("folders.atomic_write_json", 2, "before", 2),
    "manifest, no rename yet": ("folders.publish", 2, "before", 2),
    "renamed, nothing removed yet": ("folders.rotate", 2, "before", 4),
    "the older one moved aside": ("folders._move_aside", 1, "after", 4),
    "the older one half-removed": ("folders.shutil.rmtree", 2, "within", 4),
}
RANDOM_KILLS, STEPS, EVERY = 24, 120, 3


def train(folder: Path, callbacks=None, **changes):
    from tiny_models import build_tiny_model
    from tiny_training import make_trainer

    from red.training.checkpoint_folders import checkpoints
    from red.training.trainer import REDTrainer

    settings = {**dict(save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=6, weight_decay=0.01), **changes}
    trainer = make_trainer(build_tiny_model(), folder, trainer_class=REDTrainer, callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    moments = {f"{index}.{name}": value for index, state in trainer.optimizer.state_dict()["state"].items() for name, value in state.items()}
    save_file({**{f"master.{factor.name}": factor.master.detach() for factor in trainer.projections}, **moments}, folder.with_suffix(".final"))


def forked(run) -> int:
    """`run()` in a child; its process id. The child never returns here."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def ended(child: int) -> int:
    """0 if the child finished, minus the signal that killed it, else its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def last(folder: Path) -> int:
    from red.training.checkpoint_folders import last_checkpoint

    found = last_checkpoint(folder)  # reads every file and compares it with its hash
    return int(found.name.rpartition("-")[2]) if found else 0


def die_at(where: str, calls: int, when: str) -> None:
    """Patch one function of this (child) process so that its `calls`-th call kills the process."""
    from red.training import checkpoint_folders
    from red.training import checkpoints
    from red.training import trainer
    from red.lori import checkpoints as lori
    from red.lori import files

    *path, name = where.split(".")
    owner = {"checkpoints": checkpoints, "trainer": trainer, "folders": checkpoint_folders, "lori": lori, "files": files}[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    real, count = getattr(owner, name), 0

    def patched(*args, **kwargs):
        nonlocal count
        count += 1
        if count < calls:
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        elif when == "within" and name == "rmtree":
            next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
        elif when == "within":
            Path(args[0]).parent.mkdir(parents=True, exist_ok=True)
            Path(args[0]).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, patched)


def fill(run: Path, limit: int) -> None:
    """A run whose second save cannot write a file beyond `limit` bytes; it says what it raised."""
    import resource

    from transformers import TrainerCallback

    from red.errors import REDError

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    class Limit(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        train(run, [Limit()])
    except REDError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        run.with_suffix(".error").write_text(str(error))


def fill_at_every_file(folder: Path) -> dict:
    """The limit is just below the size of each file in turn, so that the first one of that size fails half-written."""
    found = {}
    for name in ("model.safetensors", "projections.safetensors", "optimizer.pt"):
        run = folder / f"full-{name}"
        size = (folder / "whole" / "checkpoint-6" / name).stat().st_size
        ended(forked(lambda run=run, size=size: fill(run, size - 1000)))
        found[name] = {"error": run.with_suffix(".error").read_text(), "step": last(run), "folders": sorted(path.name for path in run.iterdir())}
    return found


def kill_at_every_point(folder: Path) -> dict:
    assert ended(forked(lambda: train(folder / "whole"))) == 0
    found = {"full": fill_at_every_file(folder)}
    for index, (point, (where, calls, when, _)) in enumerate(WHERE.items()):
        run = folder / f"run{index}"

        def doomed(where=where, calls=calls, when=when, run=run):
            die_at(where, calls, when)
            train(run)

        code = ended(forked(doomed))
        left = {"exit": code, "step": last(run), "folders": sorted(path.name for path in run.iterdir())}
        left["resumed"] = ended(forked(lambda run=run: train(run)))
        found[point] = {**left, "end": sorted(path.name for path in run.iterdir())}
    return found


class Told:
    """The trainer's callback that tells the parent what has been saved."""

    def __new__(cls, pipe):
        from transformers import TrainerCallback

        class Telling(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                os.write(pipe, f"step {state.global_step}\n".encode())

            def on_save(self, args, state, control, **kwargs):
                os.write(pipe, f"saved {state.global_step}\n".encode())

        return Telling()


def kill_at_random(folder: Path, kills: int, seed: int) -> dict:
    draw, settings = random.Random(seed), dict(max_steps=STEPS, save_steps=EVERY, save_total_limit=2)
    assert ended(forked(lambda: train(folder / "whole", **settings))) == 0
    run, done, within, lost, started = folder / "run", 0, 0, [], time.monotonic()
    while done < kills:
        reading, writing = os.pipe()
        child = forked(lambda writing=writing: train(run, [Told(writing)], **settings))
        os.close(writing)
        said = b""
        while not said:  # until the first step is done, so that every kill meets a training run
            said = os.read(reading, 4096)
            assert said, f"a run after {done} kills ended by itself: {ended(child)}"
        ready = time.monotonic() + draw.uniform(0, 0.6)
        while (left := ready - time.monotonic()) > 0:
            if select.select([reading], [], [], left)[0]:
                said += (more := os.read(reading, 4096))
                if not more:
                    break
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        while more := os.read(reading, 4096):
            said += more
        os.close(reading)
        if code == 0:
            raise AssertionError(f"the run finished after {done} kills: more steps, or shorter waits")
        words = [line.split() for line in said.decode().splitlines()]
        step = max(int(number) for _, number in words)
        saved = max((int(number) for what, number in words if what == "saved"), default=0)
        remains = last(run)
        assert remains >= saved and remains % EVERY == 0, f"checkpoint-{saved} was reported, checkpoint-{remains} is left"
        within += step % EVERY == 0 and step > saved
        lost.append(step - remains)
        done += 1
    assert ended(forked(lambda: train(run, **settings))) == 0
    return {"kills": done, "within a save": within, "steps lost": lost, "seconds": round(time.monotonic() - started)}


def worker(tmp_path: Path, *arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path), *arguments], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "found.json").read_text())


def assert_same_bits(first: Path, second: Path) -> None:
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, worker(folder, "points")


@pytest.mark.parametrize("index", range(len(WHERE)), ids=list(WHERE))
def test_a_kill_at_every_point_of_a_save(killed, index):
    folder, found = killed
    point, (_, _, _, step) = list(WHERE.items())[index]
    left = found[point]
    assert left["exit"] == -signal.SIGKILL and left["resumed"] == 0
    assert left["step"] == step, left["folders"]
    assert "_saving" in left["folders"] or (point == "renamed, nothing removed yet" and "checkpoint-2" in left["folders"])
    assert left["end"] == ["checkpoint-6"], "what the kill left behind is cleared by the next save"
    assert_same_bits(folder / f"run{index}.final", folder / "whole.final")


def test_files_that_the_system_refuses_to_write(killed):
    """A limit on file sizes, which fails in the writers of safetensors and of torch as a full disk does."""
    for name, left in killed[1]["full"].items():
        assert "checkpoint of step 4 could not be written" in left["error"] and "checkpoint-2 is whole" in left["error"], name
        assert left["step"] == 2 and left["folders"] == ["checkpoint-2"], name


@pytest.mark.skipif(os.environ.get("RED_KILL_TESTS") != "1", reason="minutes; RED_KILL_TESTS=1 runs it")
def test_kills_at_random_moments(tmp_path):
    found = worker(tmp_path, "random", str(RANDOM_KILLS), os.environ.get("RED_KILL_SEED", "0"))
    print(found)
    assert found["kills"] >= 20 and found["within a save"] >= 3, found
    assert max(found["steps lost"]) <= EVERY, "the steps since the last checkpoint: all of them only where its successor was being saved"
    assert_same_bits(tmp_path / "run.final", tmp_path / "whole.final")


if __name__ == "__main__":
    place, mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    import threading

    from tiny_models import build_tiny_model
    from tiny_training import make_trainer
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is shared by all children, and one that is killed while it holds it would stop the others
    make_trainer(build_tiny_model(), Path(place) / "warm").save_model()  # what is imported and compiled lazily, once for all children
    gc.freeze()  # no child has to look through it all
    result = kill_at_every_point(Path(place)) if mode == "points" else kill_at_random(Path(place), int(rest[0]), int(rest[1]))
    (Path(place) / "found.json").write_text(json.dumps(result))
