"""One run at a time in a folder: who comes second is refused before it reads or writes anything; a killed run's lock is gone with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tiny_lori import distil_tiny
from tiny_training import fork_two_processes, settings_of, tokenised

import red
from red.config import REDConfig
from red.errors import REDError
from red.training import run_lock
from red.training.run_lock import LOCK, only_run

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No patience; and the preflight's fresh process takes seconds, test_export.py has it."""
    monkeypatch.setattr(run_lock, "GRACE", 0.2)
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})


def distil(teacher, folder, tokenizer):
    return red.distill(teacher, tokenised(), tokenizer=tokenizer, **settings_of(folder, max_steps=1))


DOORS = {"distill": distil, "compress": lambda teacher, folder, tokenizer: red.compress(teacher, tokenised(), tokenizer=tokenizer, **settings_of(folder)),
         "lori": lambda teacher, folder, tokenizer: distil_tiny(teacher, folder, max_steps=1)}


def is_free(folder: Path) -> bool:
    """By the system itself."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def forked(run) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("door", DOORS)
def test_the_second_is_refused_and_the_first_leaves_nothing(door, tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    folder, run = tmp_path / "run", DOORS[door]
    folder.mkdir()
    with open(folder / LOCK, "w") as held:  # as another process holds it
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / f"{LOCK}.json").write_text(json.dumps({"pid": 4711, "host": "far-away", "since": "2026-01-01T00:00:00+00:00"}))
        before = {path: path.read_bytes() for path in folder.iterdir()}
        message = f"(?s)output_dir='{folder}' is in use: process 4711 on far-away has been running in it since 2026.*another output_dir.*go on with resume"
        with monkeypatch.context() as patched:
            patched.setattr("red.report.recording.Record.__init__", lambda *_, **__: pytest.fail("it went on"))
            with pytest.raises(REDError, match=message):
                run(tiny_teacher(), folder, tokenizer=tiny_tokenizer)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        (folder / f"{LOCK}.json").write_text("{")
        with pytest.raises(REDError, match="in use: another process runs in it"):
            run(tiny_teacher(), folder, tokenizer=tiny_tokenizer)
    seen, record = [], red.report.recording.Record.__init__  # before anything is written, and at the very end
    finish = red.report.recording.Record.finish
    monkeypatch.setattr("red.report.recording.Record.__init__", lambda self, *args, **kwargs: (seen.append(is_free(folder)), record(self, *args, **kwargs))[1])
    monkeypatch.setattr("red.report.recording.Record.finish", lambda self, *args, **kwargs: (finish(self, *args, **kwargs), seen.append(is_free(folder)))[0])
    run(tiny_teacher(), folder, tokenizer=tiny_tokenizer)  # both files lie there yet, and are nobody's
    assert seen == [False, False] and (folder / "student").is_dir()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(LOCK)]


def test_a_killed_run_leaves_no_lock(tiny_teacher, tiny_tokenizer, tmp_path):
    """SIGKILL before the first checkpoint, while a process that the run has forked lives on; then the same command again."""
    folder, config = tmp_path / "run", REDConfig(**settings_of(tmp_path / "run"))

    def run() -> None:
        with only_run(config, lambda: None):
            if os.fork() == 0:  # like a process that loads data
                time.sleep(1)
                os._exit(0)
            time.sleep(60)

    child, until = forked(run), time.monotonic() + 30
    while not (folder / f"{LOCK}.json").is_file():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(REDError, match=f"process {child} on {socket.gethostname()}"):
        distil(tiny_teacher(), folder, tokenizer=tiny_tokenizer)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run_lock.GRACE = 5.0
    assert distil(tiny_teacher(), folder, tokenizer=tiny_tokenizer).path.is_dir()


def test_a_run_that_ended_while_another_waited_is_seen(tmp_path):
    config, looked = REDConfig(**settings_of(tmp_path / "new" / "run")), []

    def check() -> None:
        looked.append(is_free(tmp_path / "new" / "run"))
        raise REDError("finished")

    with pytest.raises(REDError, match="finished"), only_run(config, check):
        pytest.fail("it went on")
    assert looked == [False] and not (tmp_path / "new" / "run").exists(), "a folder that nothing was written to goes again"
    with only_run(config, lambda: None):
        (tmp_path / "new" / "run" / "checkpoint-1").mkdir()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["checkpoint-1"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (folder := tmp_path / "run" / LOCK).mkdir(parents=True)
    with pytest.raises(REDError, match="run' cannot be written"), only_run(REDConfig(**settings_of(folder.parent)), lambda: None):
        pytest.fail("it went on")


def test_of_two_processes_the_first_holds_it_and_both_are_refused(tmp_path):
    def main(folder: Path) -> None:
        config, seen = REDConfig(**settings_of(folder / "run")), {}
        assert config.world_size == 2
        with only_run(config, lambda: None):
            seen["held"] = json.loads((folder / "run" / f"{LOCK}.json").read_text())["pid"]
            seen["free"] = is_free(folder / "run")
            torch.distributed.barrier()
        torch.distributed.barrier()
        seen["after"] = (folder / "run").exists()
        try:
            with only_run(REDConfig(**settings_of(folder / "taken")), lambda: None):
                seen["refused"] = "no"
        except REDError as error:
            seen["refused"] = str(error)
        (folder / f"seen-{config.process_index}.json").write_text(json.dumps({**seen, "pid": os.getpid()}))

    import torch

    (tmp_path / "taken").mkdir()
    with open(tmp_path / "taken" / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fork_two_processes(main, tmp_path)
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert first["held"] == second["held"] == first["pid"] != second["pid"]
    assert not first["free"] and not second["free"] and not first["after"] and not second["after"]
    assert first["refused"] == second["refused"] and "is in use" in first["refused"]
