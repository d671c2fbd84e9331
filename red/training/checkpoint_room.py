"""Will the checkpoints of a run fit on its disk? Asked before the first step."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from red.training import checkpoint_folders as folders
from red.files import in_gib

logger = logging.get_logger(__name__)


class RoomForCheckpoints(TrainerCallback):
    """Before the first step: a warning if the disk has no room for the checkpoints to come."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        coming = _checkpoints_to_come(args, state)
        if not (args.should_save and coming):
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if args.save_total_limit and args.save_total_limit > 0:  # one more than the limit stands there before the oldest is removed
            coming = min(coming, max(args.save_total_limit + 1 - len(folders.complete(args.output_dir)), 1))
        size, free = self.trainer.checkpoint_bytes(), shutil.disk_usage(args.output_dir).free
        if coming * size > free:
            logger.warning(f"{args.output_dir} has {in_gib(free)} free, and {coming} more checkpoint{'s' * (coming > 1)} of about {in_gib(size)} are going to "
                           f"take {in_gib(coming * size)} (save_total_limit={args.save_total_limit}, save_steps={state.save_steps}). The run will end when "
                           f"the disk is full: lower save_total_limit, or choose an output_dir with more room.")


def _checkpoints_to_come(args, state) -> int:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return max(math.ceil(args.num_train_epochs) - int(state.epoch or 0), 0)
    every = state.save_steps if strategy == "steps" else state.eval_steps  # "best" saves at an evaluation, at most
    return math.ceil((state.max_steps - state.global_step) / every) if every else 1
