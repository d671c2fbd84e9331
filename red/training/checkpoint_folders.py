"""Folders of checkpoints that are whole or absent, whenever the process is killed.

    output_dir/_saving/checkpoint-N                 all files are written here, by every rank, and synced
    output_dir/_saving/checkpoint-N/manifest.json   last: the size and SHA-256 of every other file
    output_dir/checkpoint-N                         renamed to this, and the rename synced
    older ones                                      renamed into _saving, then removed

So a folder `checkpoint-N` with a manifest was finished, and what a kill left half-written or half-removed is in `_saving`, which nobody reads and the
next save clears. A `checkpoint-N` without a manifest is another program's or an older version's: it is never removed, and only read when it is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from red.errors import REDError
from red.files import atomic_write_json, require_empty_output, require_existing, sync
from red.training.run_lock import LOCK

MANIFEST = "manifest.json"
SAVING = "_saving"  # an upload to the hub leaves out names that begin with _
BLOCK = 1 << 22  # bytes read at a time

logger = logging.get_logger(__name__)


def students_place(output_dir: str | Path, resume: bool | str | Path, *, ignoring: Iterable[str] = ()) -> Path:
    """`output_dir/student`, of a run that begins in a folder that is missing or empty, or that goes on (`resume`) and has not ended.

    Args:
        ignoring: what may lie in the folder of a run that begins; what a first save left that was cut short may too.

    Raises:
        REDError: the folder is not empty, there is no checkpoint, or the run is finished.
    """
    place = Path(output_dir) / "student"
    if not resume:
        require_empty_output(output_dir, ignoring=(*ignoring, SAVING, LOCK))
    elif resume is True and not checkpoints(output_dir):
        raise REDError(f"output_dir={str(output_dir)!r} has no checkpoint-N folder to resume from. Leave resume out, or name the run's own folder.")
    else:
        require_empty_output(place, what="The exported student", remedy="This run is finished.")
        if resume is not True:
            state = require_existing(resume, "The checkpoint") / TRAINER_STATE_NAME
            if not state.is_file():
                raise REDError(f"{str(resume)!r} is no checkpoint to resume from: it has no {TRAINER_STATE_NAME}. Name a checkpoint-N folder of a run.")
    return place


def name_of(step: int) -> str:
    return f"checkpoint-{step}"


def clear(output_dir: Path) -> None:
    """Remove what an interrupted save left."""
    if (output_dir / SAVING).exists():
        shutil.rmtree(output_dir / SAVING)


def seal(folder: Path, *, step: int, save: int) -> None:
    """Sync every file of a written folder, then write its manifest.

    Args:
        step: the optimiser step it is of.
        save: counts the saves of a run: the order of its checkpoints, also where a run went back to an earlier step or its files were copied.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # a few big files: hashing and syncing release the interpreter's lock
        facts = list(pool.map(_synced, files))
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    names = [path.relative_to(folder).as_posix() for path in files]
    atomic_write_json(folder / MANIFEST, {"step": step, "save": save, "files": dict(zip(names, facts, strict=True))})


def publish(folder: Path, output_dir: Path) -> Path:
    """Give a sealed folder its place and name. One that has it already (the run went back to an earlier step) makes way at the last moment."""
    place = output_dir / folder.name
    if place.exists():
        _move_aside(place)
    os.rename(folder, place)
    sync(output_dir)
    return place


def rotate(output_dir: Path, limit: int | None, keep: Iterable[str | Path | None]) -> None:
    """Remove the oldest complete checkpoints until `limit` are left, never those in `keep`; None, 0 or less removes none."""
    found, kept = complete(output_dir), {Path(path).absolute() for path in keep if path}
    surplus = len(found) - max(limit, len(kept)) if limit and limit > 0 else 0
    for folder in [folder for folder in found if folder.absolute() not in kept][: max(surplus, 0)]:
        _move_aside(folder)
    clear(output_dir)


def _move_aside(folder: Path) -> None:
    """One rename: a folder that is being removed is never seen half there."""
    (folder.parent / SAVING).mkdir(exist_ok=True)
    os.rename(folder, folder.parent / SAVING / f"{folder.name}.old")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Every folder `checkpoint-N`, by N."""
    output_dir = Path(output_dir)
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()] if output_dir.is_dir() else []
    return sorted(found, key=_step)


def complete(output_dir: str | Path) -> list[Path]:
    """The folders that have a manifest, by the order they were saved in."""
    return sorted((folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()), key=lambda folder: (_save(folder), _step(folder)))


def next_save(output_dir: str | Path) -> int:
    """The number of the coming save: one more than any before."""
    return 1 + max(map(_save, complete(output_dir)), default=0)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint that was saved last and whose files are all as they were written; None where there is no folder `checkpoint-N`.

    Every file is read and compared with its SHA-256. A damaged checkpoint is named in a warning and the one before it is taken.

    Raises:
        REDError: there are checkpoints, and none is whole.
    """
    found = checkpoints(output_dir)
    whole, broken = complete(output_dir), []
    while whole:
        what = fault(whole[-1])
        if what is None:
            break
        broken.append(f"{whole[-1].name}: {what}")
        whole.pop()
    unsealed = [folder.name for folder in found if not (folder / MANIFEST).is_file()]
    if found and not whole:
        raise REDError(f"No checkpoint in {str(output_dir)!r} is whole: {'; '.join([*broken, *(f'{name} has no {MANIFEST}' for name in unsealed)])}. "
                       f"Name the one to go on from, with its path, if it is sound: one that an older version of red wrote has no {MANIFEST} (resume=PATH, --resume PATH).")
    if broken:
        logger.warning(f"Damaged: {'; '.join(broken)}. Going on from {whole[-1].name}, the last that is whole.")
    if unsealed:
        logger.warning(f"Left alone, for want of a {MANIFEST}: {', '.join(unsealed)} in {output_dir}.")
    return whole[-1] if whole else None


def steps_done(folder: str | Path) -> int | None:
    """Optimiser steps that a checkpoint was trained for; None where it does not say."""
    try:
        return int(json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    if not isinstance(files, dict) or not all(_is_entry(name, facts) for name, facts in files.items()):
        return f"{MANIFEST} is not one that red wrote"
    for name, facts in files.items():  # sizes first, they cost nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != facts["bytes"]:
            return f"{name} has {size:,} bytes, {facts['bytes']:,} were written"
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(files, pool.map(lambda name: _sha256(folder / name), files), strict=True))
    changed = [name for name, value in hashes.items() if value != files[name]["sha256"]]
    return f"{changed[0]} has changed since it was written" if changed else None


def _is_entry(name: str, facts) -> bool:
    """Of a manifest: a path inside its folder, and what is known of that file."""
    inside = name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    return bool(inside) and isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)


def _synced(path: Path) -> dict[str, int | str]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _save(folder: Path) -> int:
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["save"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0  # `fault` says what is wrong with it
