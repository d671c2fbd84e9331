"""A REDTrainer's checkpoints: `red.training.reliability` makes them whole, here is what they hold, projections beside the student."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from red.errors import REDError
from red.families import TAPS
from red.files import atomic_write_safetensors
from red.map_files import check_maps
from red.training.reliability import ADAM_MOMENTS, Reliable

PROJECTIONS_FILE = "projections.safetensors"
TAP_WEIGHTS = "tap_mean_square"  # in that file's metadata


class Checkpoints(Reliable):
    """What a REDTrainer does with files."""

    def checkpoint_bytes(self) -> int:
        """The student, the masters, and Adam's two moments of each."""
        masters = sum(master.numel() * master.element_size() for master in self.projections.parameters())
        return sum(weight.numel() * weight.element_size() for weight in self.student.parameters()) + (1 + ADAM_MOMENTS) * masters

    def save_model(self, output_dir=None, _internal_call=False):
        """The plain student, and beside it the projections that rebuild it from the teacher."""
        super().save_model(output_dir, _internal_call)
        masters = self.projections.state_dict(keep=self.args.should_save)  # gathered where they are sharded: every rank comes here
        if self.args.should_save:
            facts = {"teacher_hash": self.teacher_hash, "teacher": self.teacher.name_or_path}
            if self.taps and self.taps.mean_square is not None:  # a resumed run may calibrate on other rows; the objective must not change
                facts[TAP_WEIGHTS] = json.dumps(self.taps.mean_square.tolist())
            atomic_write_safetensors(Path(output_dir or self.args.output_dir) / PROJECTIONS_FILE, masters, metadata=facts)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.load_stream(resume_from_checkpoint)
        self._load_projections(resume_from_checkpoint)  # the student follows from these and the teacher; its own file is not read

    def _load_best_model(self):
        super()._load_best_model()
        self._load_projections(self.state.best_model_checkpoint)

    def _load_projections(self, folder) -> None:
        path = Path(folder) / PROJECTIONS_FILE
        if not path.is_file():
            raise REDError(f"{folder} has no {PROJECTIONS_FILE}: it is not a checkpoint of a REDTrainer. "
                           "Resume from a checkpoint-N folder that red wrote.")
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise REDError(f"{path} cannot be read: {error}. Resume from an older checkpoint.") from error
        made_with = facts.get("teacher_hash")
        if made_with not in (None, self.teacher_hash):
            raise REDError(f"{folder} was made with another teacher (hash {made_with[:12]}, this one's is {self.teacher_hash[:12]}). "
                           "Resume with the same teacher, loaded in the same teacher_dtype.")
        then, now = ("channels" in state, self.projections.channels is not None)
        if then != now:  # the taps were made for the start of this run
            raise REDError(f"{folder} began with a start that selects {'channels' if then else 'no channels'}, and start={self.args.start!r} selects {'some' if now else 'none'}: "
                           "the objective would be another. Resume with the start that the run began with.")
        check_maps(state, self.teacher.config, self.args.hidden_size, str(path))
        if self.taps and TAP_WEIGHTS in facts:
            self.taps.mean_square = _tap_weights(facts[TAP_WEIGHTS], self.teacher.config.num_hidden_layers, path)
        self.projections.load_state_dict(state)


def teacher_of(folder: str | Path) -> str | None:
    """The teacher's name or folder, as a checkpoint remembers it; None where it does not."""
    try:
        with safe_open(Path(folder) / PROJECTIONS_FILE, "pt") as file:
            return (file.metadata() or {}).get("teacher") or None
    except (OSError, SafetensorError):
        return None


def _tap_weights(text: str, layers: int, path: Path) -> torch.Tensor:
    try:
        found = torch.tensor(json.loads(text), dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise REDError(f"{path}: {TAP_WEIGHTS} in its metadata is not a table of numbers ({error}). Resume from another checkpoint.") from error
    if tuple(found.shape) != (layers, len(TAPS)) or not (found.isfinite() & (found > 0)).all():
        raise REDError(f"{path}: {TAP_WEIGHTS} in its metadata must be {layers} x {len(TAPS)} positive numbers. Resume from another checkpoint.")
    return found
