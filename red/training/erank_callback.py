"""Watching for collapse while training: effective rank per layer of student and teacher, every few steps, on the same few rows.

A collapsed student's tokens are nearly indistinguishable, and fine-tuning does not bring them apart again (RED, arXiv 2605.29327): better to know after
a hundred steps than at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

import torch
from accelerate.utils import broadcast
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from red.data.loading import collate, for_attention
from red.erank import stream_eranks
from red.errors import REDError

logger = logging.get_logger(__name__)


class ERankCallback(TrainerCallback):
    """Logs eRank per layer of a REDTrainer's student, warns when it has collapsed, and can stop the run.

    `REDConfig(erank_steps=N)` adds one. At the start and after every N steps it logs `erank/share` (student / teacher at the layer where that is least: a
    collapse begins in the middle, and the mean over the layers shows it late), `erank/mean`, `erank/embedding`, `erank/layer_1` … of the student; at the
    start also `erank_teacher/…`. `patience` checks in a row with a share below `floor` are a collapse: one warning, and with `stop` the end of the
    training. Other ranks than the first do nothing but wait, and with `stop` are told.

    Args:
        trainer: whose student and teacher are watched, and through whose `log` the numbers go to all trackers.
        rows: packed rows that are not trained on; the first ones that hold `tokens` tokens are read.
        steps: between checks.
        floor: the share of the teacher's eRank below which a check counts. In the first 40 steps of the embedded example LRC's start has shares of
            .04 to .12, RED's .42 to .70 and the fitted one .8 and more. A narrow student of a teacher that uses its whole width needs a lower one.
        patience: checks in a row.
        stop: end the training at a collapse.
        tokens: whose states are counted, at most.
    """

    def __init__(self, trainer, rows: Iterable[dict], *, steps: int, floor: float = 0.25, patience: int = 3, stop: bool = False, tokens: int = 1024):
        self.trainer, self.steps, self.floor, self.patience, self.stop = trainer, steps, floor, patience, stop
        self.batch, self.tokens = first_rows(rows, tokens), tokens
        self.teacher: list[float] = []
        self.warned = False  # of the collapse that goes on

    def _below(self, state) -> int:
        """Checks in a row below the floor, up to the last one. Counted in the history, which a resumed run has from its checkpoint."""
        shares = {entry["step"]: entry["erank/share"] for entry in state.log_history if "erank/share" in entry}  # a resumed run checks its first step again
        return sum(1 for _ in takewhile(lambda step: shares[step] < self.floor, sorted(shares, reverse=True)))

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            self.teacher = self._measure(self.trainer.teacher)
            log_beside(self.trainer, control, _named("erank_teacher", self.teacher))
        self._check(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self._check(args, state, control)

    def _check(self, args, state, control) -> None:
        if args.process_index == 0:
            values = self._measure(self.trainer.student)
            share = lowest_share(values, self.teacher)
            log_beside(self.trainer, control, {"erank/share": share, **_named("erank", values)})
            below = self._below(state)
            if below >= self.patience and not self.warned:
                logger.warning(f"The student has collapsed: for {self.patience} checks its effective rank has been below {self.floor:.0%} of the teacher's "
                               f"(erank_floor), now {share:.1%} after {state.global_step} steps. Training on rarely brings it back: take another start, "
                               "such as start=fitted, or a lower learning rate.")
            self.warned = below >= self.patience
        if self.stop:
            over = args.process_index == 0 and self._below(state) >= self.patience
            if args.world_size > 1:  # the others must stop at the same step
                over = bool(broadcast(torch.tensor(int(over), device=args.device)))
            control.should_training_stop |= over

    def _measure(self, model: PreTrainedModel) -> list[float]:
        batch = {key: value.to(self.trainer.args.device) for key, value in for_attention(self.batch, model.config).items()}
        with self.trainer.accelerator.autocast():
            return stream_eranks(model, batch, max_tokens=self.tokens)


def log_beside(trainer, control, numbers: dict[str, float]) -> None:
    """Numbers to all trackers, from inside a callback. The loss may be due at this step too, and Trainer takes any log for that."""
    due = control.should_log
    trainer.log(numbers)
    control.should_log = due


def lowest_share(student: Sequence[float], teacher: Sequence[float]) -> float:
    """The smallest student / teacher over embedding and layers; a NaN of the student's counts as 1, the least rank, and layers without a teacher's do not count."""
    shares = [(1.0 if math.isnan(mine) else mine) / theirs for mine, theirs in zip(student, teacher, strict=True) if not math.isnan(theirs)]
    return min(shares, default=math.nan)


def _named(prefix: str, values: Sequence[float]) -> dict[str, float]:
    """Names of the trackers: the mean, the embedding, the layers. What has no spectrum is left out: trackers stumble over NaN."""
    names = ["embedding", *(f"layer_{layer}" for layer in range(1, len(values)))]
    found = {f"{prefix}/{name}": value for name, value in zip(names, values, strict=True) if not math.isnan(value)}
    return {f"{prefix}/mean": sum(found.values()) / len(found), **found} if found else {}


def first_rows(rows: Iterable[dict], tokens: int) -> dict[str, torch.Tensor]:
    """The first rows that together hold `tokens` tokens, as a batch."""
    chosen, found = [], 0
    for row in islice(rows, tokens):
        chosen.append(row)
        found += int(row["token_mask"].sum())
        if found >= tokens:
            break
    if found < 2:
        raise REDError(f"erank_steps needs rows to watch, and there are {found} tokens. Give eval_dataset (eval_data), or set erank_steps=0.")
    return collate(chosen)
