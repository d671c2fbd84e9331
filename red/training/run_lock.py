"""One run at a time in an output_dir, from before anything is written there until the end.

    output_dir/_lock         locked by the operating system, so a killed run's lock is gone with its process
    output_dir/_lock.json    who holds it: pid, host, since (UTC); for the message alone

Both are removed at the end; an upload to the hub leaves out names that begin with _.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, SoftFileLock, Timeout

from red.errors import REDError

LOCK = "_lock"  # how the names of both files begin
GRACE = 6.0  # seconds: the processes that load a killed run's data notice within five that it is gone, and may hold the lock as long


@contextlib.contextmanager
def only_run(config, check: Callable[[], object]) -> Iterator[None]:
    """Hold `config.output_dir` while it is open: of several processes the first one does, for all.

    Args:
        config: a REDConfig or LoRiConfig.
        check: what has found that a run may begin or go on in this folder. It looks again, now that nobody else writes there: another run may have ended
            in between.

    Raises:
        REDError: on every process, where another run holds the folder, or nothing can be written into it; or what `check` raises.
    """
    with contextlib.ExitStack() as stack:
        found: list = [None]
        if config.process_index == 0:
            try:
                stack.enter_context(_held(Path(config.output_dir)))
                check()
            except REDError as error:  # the others wait for an answer
                found = [error]
        broadcast_object_list(found)
        if found[0] is not None:
            raise found[0]
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    new, lock, holder = not folder.exists(), FileLock(folder / LOCK), folder / f"{LOCK}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=GRACE, poll_interval=0.1)
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    except Timeout as error:
        raise REDError(f"output_dir={str(folder)!r} is in use: {_who(holder)}. Two runs in one folder would spoil each other's checkpoints. "
                       "Choose another output_dir, or wait for that run's end, or stop it, and go on with resume. "
                       f"Only if it is surely gone and a network folder still holds its lock, delete {str(folder / LOCK)!r}.") from error
    except OSError as error:
        lock.release()
        raise REDError(f"output_dir={str(folder)!r} cannot be written: {error}. Choose another folder.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
            if not isinstance(lock, SoftFileLock):  # which removes its own; here while it is held, so that nobody locks a name that is going
                (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if new:
            with contextlib.suppress(OSError):  # refused before it wrote anything
                folder.rmdir()


def _who(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(facts['pid'])} on {facts['host']} has been running in it since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has only just begun
        return "another process runs in it"
