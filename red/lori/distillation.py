"""red.lori.distill, which `red.distill(method="lori")` calls: from an explicit teacher and problems to a model that reasons in latent steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from red.training.checkpoint_folders import last_checkpoint, students_place
from red.data.loading import pad_id
from red.data.sources import named_dataset
from red.errors import REDError
from red.lori.adapters import with_adapters
from red.lori.checkpoints import ROWS, require_same_run, settings_of
from red.lori.checkpoints import TRAJECTORIES as COLLECTED
from red.lori.config import LoRiConfig
from red.lori.data import encode_rows, load_rows, rows_hash
from red.lori.model import LatentModel, add_special_tokens, special_ids
from red.lori.trainer import LoRiTrainer
from red.lori.trajectories import SubspaceSettings, cache_key, collect, kept
from red.report.recording import Record, leftovers
from red.settings import build_config
from red.training.rehearsal import rehearse
from red.training.run_lock import only_run

logger = logging.get_logger(__name__)

TRAJECTORIES = "trajectories"  # in output_dir


@dataclass
class LoRiResult:
    """What `distill` returns."""

    model: LatentModel  # trained, in memory
    path: Path  # its folder, which `red.lori.load` reads
    metrics: dict[str, float]  # of the training run, and of eval_data where it was given
    trainer: LoRiTrainer


def distill(teacher: str | Path | PreTrainedModel | None = None, train_data=None, *, student: str | Path | PreTrainedModel | None = None,
            tokenizer: PreTrainedTokenizerBase | None = None, eval_data=None, config: LoRiConfig | None = None, callbacks=None,
            resume: bool | str | Path = False, **settings) -> LoRiResult:
    """Train a student that answers after a few latent steps, and write it to `output_dir/student`.

    Args:
        teacher: the explicit teacher, which writes its chain of thought: a name on the hub, a folder, or a model; None takes `teacher_model_name_or_path`.
        train_data: problems, see `red.lori.data.load_rows`; None takes `train_file` or `dataset_name`.
        student: what the student starts from, with the teacher's tokenizer and width; None takes `model_name_or_path`, else the teacher's weights.
        tokenizer: the teacher's; loaded beside it if None.
        eval_data: problems whose task loss is reported.
        config: a LoRiConfig; or give its fields as keyword `settings`, never both. `preset` chooses the method or a baseline.
        resume: True goes on from the last checkpoint in `output_dir` that is whole; a path from that checkpoint. Other settings of the objective, other rows and
            another teacher are refused.

    Raises:
        REDError: bad input, before any training and before anything is written; or a training that cannot go on, see `red.training.reliability.Reliable.train`.
        Terminated: SIGTERM during the training; the checkpoint is saved and nothing exported. It is a SystemExit with code 143.

    Example:
        red.lori.distill("teacher", "gsm8k_aug.jsonl", output_dir="run", latent_steps=5, num_train_epochs=3)
    """
    if config is not None and settings:
        raise REDError(f"Give config or settings, not both; settings were {sorted(settings)}. Put them into the LoRiConfig.")
    config = config or build_config(settings, LoRiConfig)  # pyrefly: ignore[bad-assignment] - of the class that is asked for
    if not isinstance(config, LoRiConfig):
        raise REDError(f"config is a {type(config).__name__}; method='lori' takes a red.lori.LoRiConfig.")
    teacher = teacher if teacher is not None else config.teacher_model_name_or_path
    source = train_data if train_data is not None else config.train_file or named_dataset(config.dataset_name, config.dataset_split)
    if teacher is None or source is None:
        raise REDError("lori needs an explicit teacher and problems. Give teacher (or teacher_model_name_or_path) "
                       "and train_data (or train_file, or dataset_name).")

    def place() -> Path:
        return students_place(config.output_dir, resume, ignoring=(TRAJECTORIES, *leftovers(config.output_dir)))

    path = place()
    rehearse(config, held_out=eval_data is not None)
    with only_run(config, place):
        return _distill(teacher, source, student, tokenizer, eval_data, config, callbacks, resume, path)


def _distill(teacher, source, student, tokenizer, eval_data, config: LoRiConfig, callbacks, resume: bool | str | Path, path: Path) -> LoRiResult:
    checkpoint = (last_checkpoint(config.output_dir) if resume is True else resume) or None
    if checkpoint:  # before the teacher is read
        require_same_run(checkpoint, settings_of(config))
    columns = {name: getattr(config, name) for name in ("question_column", "steps_column", "answer_column")}
    rows = load_rows(source, **columns)
    held_out = None if eval_data is None else load_rows(eval_data, **columns)
    record = Record(config, "lori", resumed=bool(resume))
    teacher, tokenizer = _teacher(teacher, tokenizer, config)
    record.teacher(teacher)
    check_layers(config, teacher.config.num_hidden_layers + 1)
    encoding = dict(answer_prefix=config.answer_prefix, drop_last_step=config.drop_last_step, max_length=config.max_length)
    if len(tokenizer) > teacher.config.vocab_size:
        raise REDError(f"The tokenizer has {len(tokenizer)} entries but the teacher's embedding has {teacher.config.vocab_size}: it is not this teacher's. "
                       "Use the tokenizer that was saved with the teacher.")
    encoded = encode_rows(rows, tokenizer, **encoding)
    _check_steps(encoded, config)
    if checkpoint:
        require_same_run(checkpoint, {ROWS: rows_hash(encoded)})
    trajectories = None
    if config.needs_trajectories:
        trajectories = _collect(teacher, encoded, config, tokenizer, checkpoint)
    set_seed(config.seed)  # the projection and the new tokens are drawn
    name = teacher.name_or_path
    plain = _student(student if student is not None else config.model_name_or_path, teacher, config)
    if name and plain.name_or_path not in (name, ""):
        logger.warning(f"The student starts from {plain.name_or_path}, and its folder is going to have the licence of its teacher, {name}: see that the terms of both are kept.")
    teacher = None  # its states are on the disk; its memory is free, unless the caller holds it
    tokenizer = copy.deepcopy(tokenizer)
    bot, eot = add_special_tokens(plain, tokenizer) if config.target != "none" else (None, None)
    model = LatentModel(plain, latent_steps=config.latent_steps, projection=config.projection, dropout=config.projection_dropout)
    model.model = with_adapters(model.model, config)
    trainer = LoRiTrainer(model, config, encoded, None if held_out is None else encode_rows(held_out, tokenizer, **encoding), processing_class=tokenizer,
                          trajectories=trajectories, pad=pad_id(tokenizer), bot=bot, eot=eot, callbacks=callbacks)
    record.latent(trainer, source)
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if held_out is not None:
        metrics |= trainer.evaluate()
    if trainer.is_world_process_zero():
        trainer.export(path, teacher=name)
        record.finish(metrics=metrics, exported=path)
    trainer.accelerator.wait_for_everyone()
    return LoRiResult(model, path, metrics, trainer)


def _teacher(teacher, tokenizer, config: LoRiConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(teacher, PreTrainedModel):
        if tokenizer is None:
            raise REDError("A teacher given as a module needs its tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(...).")
        return teacher.eval(), tokenizer
    from red.distillation import _tokenizer_beside

    return _loaded(teacher, config).eval(), tokenizer or _tokenizer_beside(teacher)


def _loaded(name_or_path, config: LoRiConfig) -> PreTrainedModel:
    """Any causal language model, without remote code."""
    dtype = config.teacher_dtype if config.teacher_dtype != "auto" else "float32" if config.device.type == "cpu" else "bfloat16"
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise REDError(f"The model {str(name_or_path)!r} cannot be loaded: {error}. Give a folder or a name of a causal language model.") from error


def _student(given, teacher: PreTrainedModel, config: LoRiConfig) -> PreTrainedModel:
    """The student's weights in float32, which the optimiser steps on; a model of the caller's is trained itself."""
    if given is None:
        return copy.deepcopy(teacher).float().requires_grad_(True)
    plain = given if isinstance(given, PreTrainedModel) else _loaded(given, config).float()
    sizes = [(one.config.num_hidden_layers, one.config.hidden_size) for one in (plain, teacher)]
    if config.needs_trajectories and sizes[0] != sizes[1]:
        raise REDError(f"The student has {sizes[0][0]} layers of width {sizes[0][1]}, the teacher {sizes[1][0]} of {sizes[1][1]}: their states "
                       "cannot be compared. "
                       "Take the same base model for both; to make it narrower use red.compress or red.distill first, on the teacher.")
    return plain


def _check_steps(encoded, config: LoRiConfig) -> None:
    """REDError on a row without steps where the objective reads them."""
    if config.needs_trajectories or config.cot_weight or config.target == "explicit":
        for place, row in enumerate(encoded):
            if not row.steps:
                raise REDError(f"Row {place} has no steps, and preset={config.preset!r} learns from them. "
                               "Give rows with steps, or use preset=no_cot or coconut.")


def check_layers(config: LoRiConfig, depth: int) -> None:
    """Refuse layers that a teacher of `depth` = L + 1 states has not, before it reads its first row."""
    for name in ("rationale_layers", "anchor_layers"):
        config.layers_of(name, depth)


def _collect(teacher: PreTrainedModel, encoded, config: LoRiConfig, tokenizer, checkpoint: str | Path | None = None):
    """The trajectories, computed by the first process, while the others wait, and read by all.

    Raises:
        REDError: the checkpoint to resume from was aligned with others, and those are left alone; or another process does not find them: the first one failed, or has a disk
            of its own.
    """
    layers = config.layers_of("rationale_layers", teacher.config.num_hidden_layers + 1)
    settings = SubspaceSettings(config.energy, config.rank_layers, config.rank_channels, config.normalize_layers, tuple(layers))
    folder = Path(config.trajectories_dir or Path(config.output_dir) / TRAJECTORIES)
    bot, eot = special_ids(tokenizer)  # of a teacher that knows them: its chain of thought stands between them
    key = cache_key(teacher, encoded, settings, (bot, eot))
    if checkpoint:  # before another teacher's take the place of the run's own
        require_same_run(checkpoint, {COLLECTED: key})
    with config.main_process_first(local=False, desc="teacher trajectories"):
        if config.process_index == 0:
            return collect(teacher.to(config.device), encoded, folder, settings, batch_size=config.per_device_eval_batch_size,
                           pad=pad_id(tokenizer), bot=bot, eot=eot)
        found = kept(folder, key)
    if found is None:
        raise REDError(f"Process {config.process_index} does not find the teacher's trajectories in {str(folder)!r}: the first process could not write them (see what it says), or "
                       "they are on a disk of its own. Give trajectories_dir a folder that all processes share.")
    return found
