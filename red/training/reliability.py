"""What every trainer of red does so that a long run loses nothing, as a part of transformers' Trainer: whole checkpoints (`red.training.checkpoint_folders`), an orderly end at
SIGTERM (`red.training.termination`), and steps that are not finite left out (`red.training.guard`). docs/long_runs.md."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import traceback
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from red.training import checkpoint_folders as folders
from red.training.checkpoint_room import RoomForCheckpoints
from red.errors import REDError, Terminated
from red.files import in_gib
from red.training.guard import StepGuard
from red.training.termination import Termination

ADAM_MOMENTS = 2  # of every trained tensor, in a checkpoint

logger = logging.get_logger(__name__)


class Reliable:
    """Stands before Trainer among the bases; the trainer calls `_watch_over` at the end of its `__init__` and `self.guard.record` with every training
    micro-batch.

    Trainer writes `checkpoint-N` in place and removes older ones inside its save; here it writes aside. With several nodes, output_dir is shared between them, or
    `save_on_each_node` is set: rank 0 (of each node) seals and renames what all ranks wrote.
    """

    resume_command = "red distill --resume"
    _saving = False  # whether Trainer is inside its save, and writes to the side folder

    # ---- of the trainer that has this part ----

    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes on the disk, from the shapes."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """Those of the present step by name, to look at where one is not finite."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        """So that the optimiser passes over every parameter."""
        raise NotImplementedError

    # ---- watching ----

    def _watch_over(self, parts: tuple[str, ...]) -> None:
        """Add the guard, whose micro-batches have these parts of the loss, the signal and the look at the disk."""
        self.guard, self.termination = StepGuard(self, self.args.max_skipped_steps, parts), Termination()
        for callback in (self.guard, self.termination, RoomForCheckpoints(self)):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trainer's. `resume_from_checkpoint=True` takes the last checkpoint of output_dir that is whole, a path that one.

        Raises:
            REDError: nothing to resume from; too many steps in a row that are not finite; the disk is full.
            Terminated: on SIGTERM, once the step is finished and its checkpoint saved; exits with 143 unless caught.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        with self.termination.listening():
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.termination.agreed:
            message = f"SIGTERM: saved {self.args.output_dir}/checkpoint-{self.state.global_step}. Go on with resume ({self.resume_command})."
            logger.warning(message)
            raise Terminated(message)
        return result

    def log(self, logs, start_time=None):
        """Adds the parts of the loss: means over the steps since the last log that were taken; and, once there are any, those dropped since the start."""
        super().log(self.guard.told(logs) if "loss" in logs else logs, start_time)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.judge(grad_norm)
        return grad_norm

    # ---- saving ----

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, folders.SAVING) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        """Trainer's, written aside; then sealed, renamed, and only then older ones removed and the hub told."""
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        staged = run / folders.SAVING / folders.name_of(step)
        try:
            if self.args.should_save:
                folders.clear(run)
            self.accelerator.wait_for_everyone()  # no rank may write before that
            self._saving = True
            super()._save_checkpoint(model, trial)
            self._saving = False
            self._name_the_best(run)
            self.accelerator.wait_for_everyone()  # every rank has written
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again: with the place of the best checkpoint
                folders.seal(staged, step=step, save=folders.next_save(run))
                folders.publish(staged, run)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _came_from(error, "torch.serialization"):  # torch.save has no error of its own for a failed write
                raise
            raise self._could_not_save(error, run) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folders.rotate(run, self.args.save_total_limit, keep=(run / staged.name, self.state.best_model_checkpoint))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / staged.name))

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._saving:  # an upload runs on beside the training, and that folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial, *args, **kwargs):
        """Trainer's; but with save_total_limit=1 it would remove all checkpoints but the best, in place, also others' and what a SIGTERM has just saved."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            result = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best and self.args.should_save and not self.termination.agreed:
            folders.rotate(Path(self._get_output_dir(trial)), limit, keep=(best,))
        return result

    def _name_the_best(self, run: Path) -> None:
        """Trainer looked for the best checkpoint in the side folder; say where it is, or is going to be."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / folders.name_of(best)).is_dir()):
            self.state.best_model_checkpoint = str(run / folders.name_of(best))

    def _could_not_save(self, error: Exception, run: Path) -> REDError:
        if self.args.should_save:
            shutil.rmtree(run / folders.SAVING, ignore_errors=True)
        kept = folders.complete(run)
        return REDError(f"The checkpoint of step {self.state.global_step} could not be written to {str(run)!r}: {error}. It takes about "
                        f"{in_gib(self.checkpoint_bytes())}, and {in_gib(shutil.disk_usage(run).free)} are free there. "
                        f"{f'{kept[-1].name} is whole' if kept else 'No earlier one was written'}. Make room (save_total_limit keeps fewer), "
                        f"then {'go on with resume' if kept else 'start again'}.")

    # ---- resuming ----

    def _checkpoint_to_resume(self, given: str | Path | bool | None) -> str | None:
        """The folder to go on from, the same on every rank: the last that is whole for True, or the one that is named, checked if it has a manifest."""
        if not given:
            return None
        found = [None]
        if self.args.process_index == 0:
            try:
                found = [self._named(Path(given)) if given is not True else folders.last_checkpoint(self.args.output_dir)]
            except REDError as error:  # the others wait for an answer
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], REDError):
            raise found[0]
        if found[0] is None:
            raise REDError(f"output_dir={self.args.output_dir!r} has no checkpoint-N folder to resume from. Leave resume out, or name the run's own folder.")
        return str(found[0])

    @staticmethod
    def _named(folder: Path) -> Path:
        if not (folder / folders.MANIFEST).is_file():
            logger.warning(f"{folder} has no {folders.MANIFEST} (an older version wrote it, or it is half-written): its files are not checked.")
            try:
                TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise REDError(f"{folder} is no checkpoint to resume from: {TRAINER_STATE_NAME} cannot be read ({error}). Name another one.") from error
        elif what := folders.fault(folder):
            raise REDError(f"{folder} is damaged: {what}. Resume from another checkpoint; resume=True (--resume) takes the last that is whole.")
        return folder

    def _run_epoch(self, *args, **kwargs):
        """Trainer looks whether it is done after a step only: a run that was killed between its last checkpoint and its end would train one step too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


def _came_from(error: BaseException, module: str) -> bool:
    """Whether the innermost Python frame of an error is in `module`."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == module


@contextlib.contextmanager
def _readable(checkpoint):
    """torch's files of a checkpoint: data alone, never code. What is anything else is refused, and nothing of it is run."""
    try:
        yield
    except (REDError, torch.OutOfMemoryError):
        raise
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise REDError(f"The optimizer, schedule or random state in {checkpoint} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}. "
                       "Resume from another checkpoint.") from error
