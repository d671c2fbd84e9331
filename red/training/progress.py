"""The progress bar of a training: transformers' own, with the parts of the loss, tokens a second, and a remaining time that a resumed run can trust."""

from __future__ import annotations

import time

from transformers import ProgressCallback

PARTS = {"loss": "loss", "ce": "ce", "kl": "kl", "tap_mse": "tap"}


class RateAndLosses(ProgressCallback):
    """Takes the place of transformers' ProgressCallback in a REDTrainer.

    Tokens are those that are not padding, over all ranks. The count stays on the device and is read with the losses, every `logging_steps`, so it costs
    no synchronisation of its own; the seconds are those since the last log line, checks and checkpoints included.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.tokens, self.since = trainer, 0, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step, self.tokens, self.since = state.global_step, 0, time.perf_counter()
        if self.training_bar is not None:  # the steps before a resume took no time of this run
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.refresh()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.tokens = self.tokens + self.trainer._counts.tokens * args.world_size

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            now = time.perf_counter()
            shown = {name: f"{logs[key]:.4g}" for key, name in PARTS.items() if key in logs}
            self.training_bar.set_postfix({**shown, "tokens/s": f"{float(self.tokens) / max(now - self.since, 1e-9):,.0f}"}, refresh=False)
            self.tokens, self.since = 0, now
        super().on_log(args, state, control, logs=logs, **kwargs)
