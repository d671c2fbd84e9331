"""A run's folder, read again: run.json, the log of its last checkpoint, its channels, and what `red eval` wrote beside them.

Whatever lies there may be damaged, of another program, or written to harm: nothing but numbers and text is taken, and what cannot be read is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from red.training.checkpoint_folders import checkpoints
from red.errors import REDError
from red.files import CHANNELS_FILE, RUN_FILE, START_FILE, require_existing

STATE = "trainer_state.json"
LARGEST = 2**27  # bytes of a JSON file that is read
WIDEST = 2**20  # channels


@dataclass
class Run:
    """What is known of a run; a part that is not known is empty."""

    folder: Path
    facts: dict = field(default_factory=dict)  # run.json
    history: list[dict] = field(default_factory=list)
    channels: dict[str, np.ndarray] = field(default_factory=dict)  # kept [d], scores [d], mean_square [2L+1, d]
    judgements: list[tuple[str, dict]] = field(default_factory=list)  # file name, what red eval found
    notes: list[str] = field(default_factory=list)  # what could not be read, and why

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read the folder of a run.

        Raises:
            REDError: it is missing, or holds nothing that a run leaves behind.
        """
        folder = require_existing(folder, "The run")
        run = cls(folder)
        run.facts = run._json(folder / RUN_FILE, dict) or {}
        states = [place / STATE for place in checkpoints(folder) if (place / STATE).is_file()] if folder.is_dir() else []
        log = run.facts.get("history")
        if log is None and states:
            state = run._json(states[-1], dict) or {}
            log = state.get("log_history")
            run.facts.setdefault("steps", {"done": state.get("global_step"), "planned": state.get("max_steps")})
            run.notes.append(f"{RUN_FILE} is not there: the curves are those of {states[-1].parent.name}, and settings and forecasts are not known.")
        run.history = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
        run._read_channels()
        if not (run.facts or run.history or run.channels):
            raise REDError(
                f"{folder} is no run of red: it has no {RUN_FILE}, no checkpoint-N and no {START_FILE}. "
                "Name the output_dir of red distill, red compress or red lori."
                + "".join(f" {note}" for note in run.notes)
            )
        for path in sorted(folder.glob("*.json")):
            if path.name != RUN_FILE and _is_judgement(found := run._json(path, dict, quiet=True)):
                run.judgements.append((path.name, found))
        return run

    def _json(self, path: Path, kind: type, quiet: bool = False):
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError(f"it has {path.stat().st_size:,} bytes")
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, kind):
                raise ValueError(f"it holds a {type(found).__name__}")
            return found
        except (OSError, ValueError, RecursionError) as error:
            if not quiet:
                self.notes.append(f"{path.name} cannot be read: {error}.")
            return None

    def _read_channels(self) -> None:
        """channels.safetensors; without it, at least what a start file says."""
        path, names = self.folder / CHANNELS_FILE, ("kept", "scores", "mean_square")
        if not path.is_file():
            path, names = self.folder / START_FILE, ("channels", "model.embed_tokens.weight")
        if not path.is_file():
            return
        try:
            with safe_open(path, "np") as file:
                found = {name: file.get_tensor(name) for name in names if name in file.keys()}
            if "model.embed_tokens.weight" in found:
                embedding = found.pop("model.embed_tokens.weight").astype(np.float64)
                chosen = found.pop("channels", None)
                found["kept"] = (
                    np.isin(np.arange(len(embedding)), chosen).astype(float) if chosen is not None else np.square(np.linalg.qr(embedding)[0]).sum(1)
                )
            width = len(found["kept"]) if "kept" in found else found["scores"].shape[0]
            shapes = {"kept": (width,), "scores": (width,), "mean_square": (*found.get("mean_square", np.zeros((1, width))).shape[:1], width)}
            if not 1 <= width <= WIDEST or any(
                value.shape != shapes[name] or not np.isfinite(value.astype(np.float64)).all() for name, value in found.items()
            ):
                raise ValueError("its tensors are not the channels of one model")
            self.channels = {name: value.astype(np.float64) for name, value in found.items()}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, np.linalg.LinAlgError) as error:
            self.notes.append(f"{path.name} cannot be read: {error}.")

    # ---- what others ask ----

    def get(self, *path: str):
        """The fact at this place of run.json; None where there is none."""
        place = self.facts
        for name in path:
            place = place.get(name) if isinstance(place, dict) else None
        return place

    def number(self, *path: str) -> float | None:
        return finite_number(self.get(*path))

    def text(self, *path: str) -> str | None:
        value = self.get(*path)
        return value if isinstance(value, str) and value else None

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one thing that was logged; of several at one step (a resumed run checks its first step again) the last."""
        found = {}
        for entry in self.history:
            step, value = finite_number(entry.get("step")), finite_number(entry.get(name))
            if step is not None and value is not None:
                found[step] = value
        return sorted(found.items())

    def last(self, name: str) -> float | None:
        found = self.series(name)
        return found[-1][1] if found else None

    def ranks(self, which: str) -> list[float | None]:
        """eRank at the embedding and after each layer: "teacher", "start" or "end"; from what was measured, or from the log."""
        values = self.get("erank", which)
        if isinstance(values, list) and values:
            return [finite_number(value) for value in values]
        prefix = "erank_teacher" if which == "teacher" else "erank"
        entries = [entry for entry in self.history if f"{prefix}/mean" in entry]
        if not entries:
            return []
        entry = entries[-1 if which == "end" else 0]
        layers = sum(1 for key in entry if key.startswith(f"{prefix}/layer_"))
        return [finite_number(entry.get(f"{prefix}/{name}")) for name in ["embedding", *(f"layer_{layer}" for layer in range(1, layers + 1))]]

    @property
    def method(self) -> str:
        return self.text("method") or "red"

    @property
    def finished(self) -> bool:
        return self.get("state") == "finished"


def finite_number(value) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value) else None


def thinned(points: Sequence, most: int = 500) -> list:
    """Every k-th point, so that a figure has at most about `most`, and the last."""
    stride = -(-len(points) // most) or 1
    return [*points[:-1:stride], points[-1]] if points else []


def _is_judgement(found) -> bool:
    """What `red eval --output` writes."""
    return (
        isinstance(found, dict) and isinstance(found.get("rows"), list) and all(isinstance(found.get(side), dict) for side in ("teacher", "student"))
    )
