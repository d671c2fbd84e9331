"""Steps that are not finite: not taken, counted, and after some in a row the end, with the micro-batches kept to look at.

The losses of a step's micro-batches stay on the device. Once per optimiser step, just before the optimiser, the host reads whether they and the norm of
the gradient are finite: the only time that it waits for the device. (A GPU then idles for as long as the optimiser's first kernel takes to launch, once
in all micro-batches.) A step that is not finite is dropped by forgetting the gradients: every optimiser passes over a parameter without one,
so weights and moments keep their bits. A zeroed gradient would not do: moments decay, and momentum and weight decay move the weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from red.errors import REDError
from red.files import atomic_write_json, atomic_write_safetensors

logger = logging.get_logger(__name__)


class StepGuard(TrainerCallback):
    """Judges every optimiser step of a trainer (`red.training.reliability.Reliable`), alike on all ranks, and sums the parts of the loss over the steps that are taken.

    Args:
        trainer: whose steps these are.
        limit: steps in a row that may be dropped; the last of them ends the run (`max_skipped_steps`).
        names: of the P parts of its loss.
    """

    def __init__(self, trainer, limit: int, names: tuple[str, ...]):
        self.trainer, self.limit, self.names = trainer, limit, names
        self.skipped = self.in_a_row = 0  # in this run, and since the last step that was taken
        self._seen: list[tuple[dict[str, Tensor], Tensor]] = []
        self._flags: Tensor | None = None
        self.forget_sums()

    def forget_sums(self) -> None:
        """After a log line."""
        self.sums, self.taken, self.dropped = torch.zeros(len(self.names)), 0, 0  # of the parts over the steps taken; and how many steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.skipped, self.in_a_row = max((entry.get("skipped_steps", 0) for entry in state.log_history), default=0), 0

    @property
    def parts(self) -> Tensor:
        """[P] of the present step: the sum over its micro-batches so far."""
        return torch.stack([parts[:-1] for _, parts in self._seen]).sum(0)

    def forget_step(self) -> None:
        """The micro-batches of the present step."""
        self._seen.clear()

    def on_step_begin(self, args, state, control, **kwargs):
        self.forget_step()
        self._loss_before = self.trainer._tr_loss.clone()

    def record(self, inputs: dict[str, Tensor], parts: Tensor) -> None:
        """A micro-batch and its `parts [P + 1]`, the last one being the loss itself, on the device."""
        self._seen.append((inputs, parts))

    def judge(self, grad_norm: Tensor) -> None:
        """What all ranks say of the step: not finite in the loss, not finite in the gradient, told to stop. Nothing is read yet."""
        finite = torch.stack([parts for _, parts in self._seen]).isfinite().all()
        told = torch.full_like(grad_norm, self.trainer.termination.requested, dtype=torch.float32)
        flags = torch.stack([(~finite).float(), (~grad_norm.isfinite()).float(), told])
        self._flags = self.trainer.accelerator.reduce(flags, "sum") if self.trainer.args.world_size > 1 else flags

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        bad_loss, bad_gradient, told = self._flags.tolist()
        self.trainer.termination.agreed = told > 0
        if bad_loss or bad_gradient:
            self._drop(args, state.global_step + 1, loss=bad_loss > 0)
            self.trainer._tr_loss, self.dropped = self._loss_before, self.dropped + 1
        else:
            self.sums, self.taken, self.in_a_row = self.sums.to(args.device) + self.parts, self.taken + 1, 0

    def on_train_end(self, args, state, control, **kwargs):
        if 0 < state.global_step <= self.skipped:
            raise REDError(f"All {state.global_step} steps were skipped: none had a finite loss and gradient, so the student is what it was at the start. Look at the rows and their number "
                           "(statistics over equal rows divide by zero), at the learning rate, and run `red doctor`.")

    def told(self, logs: dict[str, float]) -> dict[str, float]:
        """A log line with the parts, and without what is not finite; the next one begins here."""
        if self.taken:
            parts = self.trainer.accelerator.reduce(self.sums, "mean") if self.trainer.args.world_size > 1 else self.sums
            logs |= dict(zip(self.names, (parts / self.taken).tolist(), strict=True))
            logs["loss"] *= (self.taken + self.dropped) / self.taken  # Trainer divided by all steps
        if self.skipped:  # trackers stumble over NaN
            logs = {name: value for name, value in logs.items() if math.isfinite(value) and (name != "loss" or self.taken)}
            logs["skipped_steps"] = self.skipped
        self.forget_sums()
        return logs

    def _drop(self, args, step: int, *, loss: bool) -> None:
        """The step is dropped.

        Args:
            step: its number, the first being 1.
            loss: whether some rank's loss is not finite; else only the gradient is.

        Raises:
            REDError: it is the `limit`-th in a row. Every rank raises; the micro-batches of this one are written, if they can be the cause.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        culprits = [(inputs, parts) for inputs, parts in self._seen if not parts.isfinite().all()] if loss else self._seen
        broken = [name for index, name in enumerate(self.names) if any(not parts[index].isfinite() for _, parts in culprits)] or (["the loss"] if loss else [])
        what = f"Not finite in step {step}: {', '.join(broken) if broken else 'the gradient, though every loss is'}"
        if self.in_a_row < self.limit:
            if culprits:  # a rank whose own losses are finite says nothing
                logger.warning(f"{what}. The step is skipped ({self.in_a_row} in a row, {self.skipped} in all; max_skipped_steps={self.limit}).")
        else:
            written = self._write(culprits, args, step) if culprits else None
            where = f"Its {len(culprits)} micro-batch{'es' * (len(culprits) > 1)} on rank {args.process_index} are in {written}" if written else "Another rank wrote the micro-batches"
            raise REDError(f"{what}. {self.in_a_row} step{'s' * (self.in_a_row > 1)} in a row {'were' if self.in_a_row > 1 else 'was'} skipped (max_skipped_steps={self.limit}), "
                           f"and nothing was trained in them. {where}. Look for a broken row there. If the rows are sound, go on from the last checkpoint "
                           "with a lower max_grad_norm (resume), or start again with a lower learning_rate.")
        self.trainer.forget_gradients()

    def _write(self, culprits, args, step: int) -> Path:
        """The tensors of the micro-batches by `INDEX.NAME`, and beside them a JSON file that says what they are."""
        path = Path(args.output_dir) / f"nonfinite-batch-{step}{f'-rank{args.process_index}' if args.world_size > 1 else ''}.safetensors"
        atomic_write_safetensors(path, {f"{index}.{name}": value.contiguous().clone() for index, (inputs, _) in enumerate(culprits) for name, value in inputs.items()})
        values = [{name: value if math.isfinite(value) else str(value) for name, value in zip((*self.names, "loss"), parts.tolist(), strict=True)} for _, parts in culprits]
        bad = [name for name, grad in self.trainer.gradients().items() if not getattr(grad, "to_local", lambda grad=grad: grad)().isfinite().all()]
        atomic_write_json(path.with_suffix(".json"), {
            "what": "Micro-batches of a step whose loss or gradient was not finite. Read with safetensors.torch.load_file; INDEX.NAME is tensor NAME of micro-batch INDEX.",
            "step": step, "rank": args.process_index, "skipped_in_a_row": self.in_a_row, "micro_batches": values, "student_gradients_not_finite": bad})
        return path
