"""The tokens of a text, kept for the next run: packed rows in memory-mapped files, which all processes of a machine share.

A cache's name is a hash of everything that decides it: the tokenizer (its whole definition where it can be written out), the text (size and time of
its files, or the fingerprint of a data set) and the settings. One process writes it aside and renames it, others that need it wait; a broken one is
made again. What has no fingerprint, such as a list, is not kept, and neither is a text below 16 MiB, which takes seconds to tokenise.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from red.data.loading import tokenizer_hash
from red.files import atomic_write_json, sync
from red.data.packing import PackedDataset

FORMAT = 2  # of the files and of what is in them; raise it when packing or tokenising changes
SMALLEST = 2**24  # bytes of text
ARRAYS = ("tokens", "labels", "bounds", "rows")

logger = logging.get_logger(__name__)


def cached(build: Callable[[], PackedDataset], source, tokenizer, folder: str | Path | None, **settings) -> PackedDataset:
    """`build()`, or what it returned for the same text, tokenizer and settings before.

    Args:
        source: as in `red.data.loading.load_examples`.
        folder: where caches lie; "auto" is `red/tokens` beside the Hugging Face cache, None or "none" keeps nothing.
        settings: what else decides the rows; JSON.
    """
    text, size = fingerprint(source)
    if text is None or size < SMALLEST or folder is None or str(folder) == "none":
        return build()
    folder = Path(HF_HOME) / "red" / "tokens" if folder == "auto" else Path(folder)
    key = json.dumps([FORMAT, text, None if tokenizer is None else _definition(tokenizer), settings], sort_keys=True)
    place = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    if (rows := _read(place)) is not None:
        return rows
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:  # a read-only home: red works without
        logger.warning(f"Tokens are not kept, for {folder} cannot be written to ({error}). Set token_cache_dir to another folder, or to none.")
        return build()
    try:
        if (rows := _read(place)) is None:  # nobody has made it meanwhile
            rows = build()
            _write(place, rows)
            rows = _read(place) or rows
        return rows
    finally:
        lock.release()


def fingerprint(source) -> tuple[list | None, int]:
    """What changes when a text does, or None where that cannot be told; and the text's bytes."""
    if isinstance(source, (str, Path)) and Path(source).exists():
        path = Path(source).resolve()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        states = [(file, file.stat()) for file in files]
        return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states], sum(state.st_size for _, state in states)
    known, table = getattr(source, "_fingerprint", None), getattr(source, "data", None)  # a datasets.Dataset's
    return ([known], table.nbytes) if known and hasattr(table, "nbytes") else (None, 0)


def _definition(tokenizer) -> list[str]:
    """The hash that says what ids mean, and how text becomes ids: the Rust tokenizer's own file and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [tokenizer_hash(tokenizer), type(tokenizer).__name__, str(getattr(tokenizer, "chat_template", None)), backend.to_str() if backend is not None else ""]


def _read(place: Path) -> PackedDataset | None:
    """Rows of memory-mapped arrays; None where there are none, or they are not whole."""
    try:
        facts = json.loads((place / "facts.json").read_text())
        # copy on write: to torch the arrays are ordinary ones, and the files stay as they are
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ARRAYS}
        tokens, labels, bounds, rows = arrays.values()
        whole = len(tokens) == len(labels) == bounds[-1] == facts["tokens"] and rows[-1] == len(bounds) - 1 and bounds[0] == rows[0] == 0
        whole = whole and bool((np.diff(bounds) > 0).all() and (np.diff(rows) > 0).all())
        if whole:
            return PackedDataset(tokens, labels, bounds, rows, facts["length"], facts["pad_token_id"])
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        pass  # as broken as one that is not whole
    if place.exists():
        logger.warning(f"The tokens kept in {place} are broken; they are made again.")
    return None


def _write(place: Path, rows: PackedDataset) -> None:
    """All files aside, then one rename; a full disk keeps the run going without."""
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir()
        for name in ARRAYS:
            np.save(aside / f"{name}.npy", getattr(rows, name))
            sync(aside / f"{name}.npy")
        atomic_write_json(aside / "facts.json", {"tokens": rows.num_tokens, "length": rows.length, "pad_token_id": rows.pad_token_id})
        if place.exists():  # a broken one
            shutil.rmtree(place)
        aside.rename(place)
        sync(place.parent)
    except OSError as error:
        logger.warning(f"Tokens could not be kept in {place}: {error}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
