"""A LoRiTrainer's checkpoints: `red.training.reliability` makes them whole, here is what they hold: every trained tensor, and what run it is of.

A run is known by the settings that decide its objective, the hash of its training rows and the key of its trajectories: resuming with others would go on with another
training, so it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from red.errors import REDError
from red.files import atomic_write_safetensors
from red.lori.config import LoRiConfig
from red.training.reliability import ADAM_MOMENTS, Reliable

STATE = "lori_state.safetensors"  # of a checkpoint: every trained tensor, and the run in its metadata
SETTINGS = ("target", "latent_steps", "projection", "projection_dropout", "curriculum", "rationale_weight", "second_order_weight", "centred", "anchor_weight",
            "anchor_distance", "anchor_layers", "anchor_teacher", "cot_weight", "lora_rank", "lora_alpha", "lora_target_modules")
ROWS, TRAJECTORIES = "training rows", "trajectories"


def settings_of(config: LoRiConfig) -> dict:
    """What of a run is known before anything is read."""
    return {name: getattr(config, name) for name in SETTINGS}


def require_same_run(checkpoint: str | Path, run: dict) -> None:
    """Compare what is known of this run with what the checkpoint says of its own.

    Raises:
        REDError: no checkpoint of a LoRiTrainer, or one of another run; the message names what differs.
    """
    path = Path(checkpoint) / STATE
    if not path.is_file():
        raise REDError(f"{checkpoint} has no {STATE}: it is not a checkpoint of a LoRiTrainer. Resume from a checkpoint-N folder that red lori wrote.")
    try:
        with safe_open(path, "pt") as file:
            before = json.loads((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise REDError(f"{path} cannot be read: {error}. Resume from an older checkpoint.") from error
    different = [name for name in run if name in before and before[name] != run[name]]
    if ROWS in different:
        raise REDError(f"{checkpoint} was made with other training rows (or another answer_prefix, drop_last_step or tokenizer): their hash was {str(before[ROWS])[:12]}, "
                       f"these have {run[ROWS][:12]}. Resume with the rows of the first run.")
    if different and different != [TRAJECTORIES]:
        changes = ", ".join(f"{name}={before[name]!r} (now {run[name]!r})" for name in different if name != TRAJECTORIES)
        raise REDError(f"{checkpoint} was made with {changes}. Resume with the settings of the first run.")
    if different:
        raise REDError(f"{checkpoint} was aligned with other trajectories: those of another teacher, or of another energy, rank_layers, rank_channels, normalize_layers or "
                       "rationale_layers. Resume with the teacher and the settings of the first run.")


class LoRiCheckpoints(Reliable):
    """What a LoRiTrainer does with files."""

    resume_command = "red lori --resume"

    @property
    def run_facts(self) -> dict:
        """What a checkpoint says of its run."""
        return {**settings_of(self.args), ROWS: self.rows_hash, TRAJECTORIES: self.trajectories.key if self.trajectories is not None else None}

    def trained(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.latent_model.named_parameters() if value.requires_grad}

    def checkpoint_bytes(self) -> int:
        return (1 + ADAM_MOMENTS) * sum(value.numel() * value.element_size() for value in self.trained().values())

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.trained().items() if value.grad is not None}

    def forget_gradients(self) -> None:
        for value in self.trained().values():
            value.grad = None

    def _save(self, output_dir=None, state_dict=None):
        """Everything trained, bit for bit; the folder that other tools read comes from `export`."""
        if self.args.should_save:
            tensors = {name: value.detach().cpu().clone() for name, value in self.trained().items()}
            atomic_write_safetensors(Path(output_dir or self.args.output_dir) / STATE, tensors, {"run": json.dumps(self.run_facts)})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        require_same_run(resume_from_checkpoint, self.run_facts)
        path = Path(resume_from_checkpoint) / STATE
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise REDError(f"{path} cannot be read: {error}. Resume from an older checkpoint.") from error
        trained = self.trained()
        if different := sorted(name for name in trained.keys() | state.keys()
                               if name not in trained or name not in state or trained[name].shape != state[name].shape):
            more = f", and {len(different) - 1} more" if different[1:] else ""
            raise REDError(f"{path} is of another model or another preset: {different[0]} differs{more}. "
                           "Resume with the settings of the first run.")
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(state[name])

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
