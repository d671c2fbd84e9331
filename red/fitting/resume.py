"""The start of a run in files: finished half layers while it is being fitted, the whole start afterwards. An interrupted fit goes on.

Modules that read at one point have one map. A file of format 2 has it once, and the metadata says under `same` which names mean it: `{name: name in the
file}`. Files of before, without a format, have it under each name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from red.errors import REDError
from red.files import HALF_LAYERS, START_FILE, atomic_write_safetensors


MARK = "mark"  # in the file of a half layer: of the map that it was fitted to
FORMAT = 2
SAME = 1e-6  # relative difference of two marks: rounding


class StartFolder:
    """Where one fit keeps what it has done.

    Args:
        folder: of the run; None keeps nothing.
        key: everything that decides the result, in one string: files of another key are not used.
        writes: False only reads, as every process but the first does.
    """

    def __init__(self, folder: str | Path | None, key: str, writes: bool = True):
        self.folder, self.key, self.writes = None if folder is None else Path(folder), key, writes
        self.mark: Tensor | None = None
        self.sweep = 0

    def of_sweep(self, sweep: int) -> StartFolder:
        """The same folder for a sweep's half layers, beside those of the sweeps before."""
        self.sweep = sweep
        return self

    def begin(self, down: Tensor) -> None:
        """The map `Q [d, d']` that half layers are fitted to. Another machine or number of threads may find another basis from the same key, in
        which a half layer that was fitted before means nothing."""
        self.mark = torch.linspace(-1, 1, len(down), dtype=torch.float64) @ down.double().cpu()

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if self.folder is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                same = (file.metadata() or {}).get("key") == self.key
            return _load(path) if same else None
        except (SafetensorError, FileNotFoundError, ValueError):  # cut short by something else than red, or finished by the first process: it is fitted again
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor], **facts: str) -> None:
        if self.folder is None or not self.writes:
            return
        own: dict[str, Tensor] = {}
        names: dict[tuple, str] = {}  # of what is there already, by its place in memory
        same: dict[str, str] = {}
        for name, tensor in tensors.items():
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if names.setdefault(place, name) != name:
                same[name] = names[place]
            else:
                own[name] = tensor.contiguous()
        try:
            atomic_write_safetensors(path, own, metadata={"key": self.key, "format": str(FORMAT), "same": json.dumps(same), **facts})
        except (OSError, SafetensorError) as error:
            raise REDError(f"{path} cannot be written: {error}. Make room or choose another output_dir; what was fitted before is kept, and the same "
                           "command goes on from there.") from error

    def _half_layer(self, point: int) -> Path:
        return (self.folder or Path()) / HALF_LAYERS / f"{self.sweep}_{point:03d}.safetensors"

    def half_layer(self, point: int) -> dict[str, Tensor] | None:
        """The maps of that half layer, or None where it was not finished."""
        found = self._read(self._half_layer(point))
        mark = None if found is None else found.pop(MARK, None)
        if mark is None or self.mark is None or mark.shape != self.mark.shape or (mark - self.mark).abs().max() > SAME * self.mark.abs().max():
            return None
        return found

    def keep_half_layer(self, point: int, maps: dict[str, Tensor]) -> None:
        if self.mark is not None:
            self._write(self._half_layer(point), {**maps, MARK: self.mark})

    def whole(self) -> dict[str, Tensor] | None:
        """All maps (and `channels`), or None where the start was not finished."""
        return self._read((self.folder or Path()) / START_FILE)

    def keep_whole(self, maps: dict[str, Tensor], teacher_hash: str) -> None:
        """Keep the finished start; its half layers are needed no more. One of another key is moved beside it, to `start.KEY.safetensors`."""
        if self.folder is not None and self.writes:
            self._move_aside(self.folder / START_FILE)
        self._write((self.folder or Path()) / START_FILE, maps, teacher_hash=teacher_hash)
        if self.folder is not None and self.writes:
            shutil.rmtree(self.folder / HALF_LAYERS, ignore_errors=True)

    def _move_aside(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                key = (file.metadata() or {}).get("key", "")
        except (SafetensorError, FileNotFoundError):
            return
        if key != self.key:
            path.replace(path.with_name(f"start.{key[:12]}.safetensors"))


def read_start(path: str | Path, teacher_hash: str) -> dict[str, Tensor]:
    """The maps of a start file, for the teacher it was made of; REDError if it is no such file."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise REDError(f"start={str(path)!r} cannot be read as a start: {error}. Give the {START_FILE} that red.compress or red.distill wrote.") from error
    if "teacher_hash" not in facts:
        raise REDError(f"start={str(path)!r} is a safetensors file but not a start. Give the {START_FILE} that red.compress or red.distill wrote.")
    if facts["teacher_hash"] != teacher_hash:
        raise REDError(f"start={str(path)!r} was fitted for another teacher (hash {facts['teacher_hash'][:12]}, this one's is {teacher_hash[:12]}). "
                       "Give that teacher, loaded in the same teacher_dtype, or compress this one.")
    try:
        return _load(path)
    except ValueError as error:
        raise REDError(f"start={str(path)!r} cannot be read as a start: {error}. Give one that this version of red.compress or red.distill wrote.") from error


def _load(path: str | Path) -> dict[str, Tensor]:
    """Every map by its name; ValueError for a later format, or a list of names that cannot be."""
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
    if facts.get("format", "1") not in ("1", str(FORMAT)):
        raise ValueError(f"it has format {facts['format']!r}, and this red reads up to {FORMAT}")
    found = load_file(path)
    try:
        same = json.loads(facts.get("same", "{}"))
    except RecursionError as error:
        raise ValueError("its list of shared maps is damaged") from error
    if not isinstance(same, dict) or any(name in found or not isinstance(source, str) or source not in found for name, source in same.items()):
        raise ValueError("its list of shared maps is damaged")
    return {**found, **{name: found[source] for name, source in same.items()}}
