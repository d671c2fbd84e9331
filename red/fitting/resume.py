"""The start of a run in files: finished half layers while it is being fitted, the whole start afterwards. An interrupted fit goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from red.errors import REDError
from red.files import HALF_LAYERS, START_FILE, atomic_write_safetensors


MARK = "mark"  # in the file of a half layer: of the map that it was fitted to
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
            return load_file(path) if same else None
        except (SafetensorError, FileNotFoundError):  # cut short by something else than red, or finished by the first process: it is fitted again
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor], **facts: str) -> None:
        if self.folder is None or not self.writes:
            return
        own: dict[str, Tensor] = {}
        for name, tensor in tensors.items():  # writers that are left as they were may be one tensor, which safetensors refuses
            tensor = tensor.contiguous()
            own[name] = tensor.clone() if any(tensor.data_ptr() == other.data_ptr() for other in own.values()) else tensor
        try:
            atomic_write_safetensors(path, own, metadata={"key": self.key, **facts})
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
    return load_file(path)
