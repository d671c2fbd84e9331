"""Saving and resuming, as a part of REDTrainer: whole checkpoints (`red.checkpoint_folders`) that hold projections beside the student."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import traceback
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from red import checkpoint_folders as folders
from red.errors import REDError
from red.families import TAPS
from red.files import atomic_write_safetensors
from red.map_files import check_maps

PROJECTIONS_FILE = "projections.safetensors"
TAP_WEIGHTS = "tap_mean_square"  # in that file's metadata
ADAM_MOMENTS = 2

logger = logging.get_logger(__name__)


class Checkpoints:
    """What a REDTrainer does with files. Trainer writes `checkpoint-N` in place and removes older ones inside its save; here it writes aside.

    With several nodes, output_dir is shared between them, or `save_on_each_node` is set: rank 0 (of each node) seals and renames what all ranks wrote.
    """

    _saving = False  # whether Trainer is inside its save, and writes to the side folder

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
                        f"{in_gib(checkpoint_bytes(self.projections))}, and {in_gib(shutil.disk_usage(run).free)} are free there. "
                        f"{f'{kept[-1].name} is whole' if kept else 'No earlier one was written'}. Make room (save_total_limit keeps fewer), "
                        f"then {'go on with resume' if kept else 'start again'}.")

    def save_model(self, output_dir=None, _internal_call=False):
        """The plain student, and beside it the projections that rebuild it from the teacher."""
        super().save_model(output_dir, _internal_call)
        masters = self.projections.state_dict(keep=self.args.should_save)  # gathered where they are sharded: every rank comes here
        if self.args.should_save:
            facts = {"teacher_hash": self.teacher_hash, "teacher": self.teacher.name_or_path}
            if self.taps and self.taps.mean_square is not None:  # a resumed run may calibrate on other rows; the objective must not change
                facts[TAP_WEIGHTS] = json.dumps(self.taps.mean_square.tolist())
            atomic_write_safetensors(Path(output_dir or self.args.output_dir) / PROJECTIONS_FILE, masters, metadata=facts)

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

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.load_stream(resume_from_checkpoint)
        self._load_projections(resume_from_checkpoint)  # the student follows from these and the teacher; its own file is not read

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

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


class RoomForCheckpoints(TrainerCallback):
    """Before the first step: a warning if the disk has no room for the checkpoints to come."""

    def __init__(self, projections):
        self.projections = projections

    def on_train_begin(self, args, state, control, **kwargs):
        coming = _checkpoints_to_come(args, state)
        if not (args.should_save and coming):
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if args.save_total_limit and args.save_total_limit > 0:  # one more than the limit stands there before the oldest is removed
            coming = min(coming, max(args.save_total_limit + 1 - len(folders.complete(args.output_dir)), 1))
        size, free = checkpoint_bytes(self.projections), shutil.disk_usage(args.output_dir).free
        if coming * size > free:
            logger.warning(f"{args.output_dir} has {in_gib(free)} free, and {coming} more checkpoint{'s' * (coming > 1)} of about {in_gib(size)} are going to "
                           f"take {in_gib(coming * size)} (save_total_limit={args.save_total_limit}, save_steps={state.save_steps}). The run will end when "
                           f"the disk is full: lower save_total_limit, or choose an output_dir with more room.")


def _came_from(error: BaseException, module: str) -> bool:
    """Whether the innermost Python frame of an error is in `module`."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == module


def _checkpoints_to_come(args, state) -> int:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return max(math.ceil(args.num_train_epochs) - int(state.epoch or 0), 0)
    every = state.save_steps if strategy == "steps" else state.eval_steps  # "best" saves at an evaluation, at most
    return math.ceil((state.max_steps - state.global_step) / every) if every else 1


def checkpoint_bytes(projections) -> int:
    """About what one checkpoint takes on the disk: the student, the masters, and Adam's two moments of each; from the shapes."""
    masters = sum(master.numel() * master.element_size() for master in projections.parameters())
    return sum(weight.numel() * weight.element_size() for weight in projections.student.parameters()) + (1 + ADAM_MOMENTS) * masters


def in_gib(count: float) -> str:
    """Bytes for people: `1.2 GiB`, or MiB below a tenth of one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
