"""`red lori --dry_run`: what a run will do, from the teacher's config, its tokenizer and the problems. No weight is read and nothing is written."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from red.distillation import _tokenizer_beside
from red.planning.dry_run import left, printable, steps_of
from red.data.sources import named_dataset
from red.errors import REDError
from red.lori.checkpoints import require_same_run, settings_of
from red.lori.config import PRESETS, LoRiConfig
from red.lori.data import encode_rows, load_rows
from red.lori.distillation import TRAJECTORIES, _check_steps, check_layers
from red.report.recording import leftovers
from red.training.checkpoint_folders import last_checkpoint, steps_done, students_place
from red.training.rehearsal import rehearse


def dry_run(config: LoRiConfig, *, resume: bool | str | Path = False, held_out: bool | None = None) -> str:
    """The plan of a `red.lori.distill` in words, and the first problem as it is read and learnt.

    Raises:
        REDError: what `red.lori.distill` would refuse before it reads a weight.
    """
    if config.teacher_model_name_or_path is None or not (config.train_file or config.dataset_name):
        raise REDError("A dry run needs an explicit teacher and problems. Give teacher_model_name_or_path and train_file (or dataset_name).")
    student = students_place(config.output_dir, resume, ignoring=(TRAJECTORIES, *leftovers(config.output_dir)))
    rehearse(config, held_out=held_out)
    checkpoint = last_checkpoint(config.output_dir) if resume is True else resume
    if checkpoint:
        require_same_run(checkpoint, settings_of(config))
    rows = load_rows(config.train_file or named_dataset(config.dataset_name, config.dataset_split), **{name: getattr(config, name) for name in ("question_column", "steps_column", "answer_column")})
    try:
        shape = AutoConfig.from_pretrained(config.teacher_model_name_or_path, trust_remote_code=False)
    except Exception as error:  # a damaged config comes as errors of a dozen kinds
        raise REDError(f"Cannot read the teacher {config.teacher_model_name_or_path!r}: {error}") from error
    check_layers(config, shape.num_hidden_layers + 1)
    tokenizer = _tokenizer_beside(config.teacher_model_name_or_path)
    encoded = encode_rows(rows, tokenizer, answer_prefix=config.answer_prefix, drop_last_step=config.drop_last_step, max_length=config.max_length)
    _check_steps(encoded, config)
    longest = max(len(one.question) + len(one.rationale()) + len(one.prefix) + len(one.answer) for one in encoded)
    own, steps = config.per_device_train_batch_size * config.gradient_accumulation_steps, steps_of(config, len(rows))
    first = encoded[0]
    between = {"latent": f"{config.latent_steps} latent steps", "explicit": tokenizer.decode(first.rationale()), "none": "nothing"}[config.target]
    learnt = tokenizer.decode([*first.prefix, *first.answer])
    said = [("teacher", f"{config.teacher_model_name_or_path}: {shape.model_type}, {shape.num_hidden_layers} layers of width {shape.hidden_size}"),
            ("student", f"starts from {config.model_name_or_path or 'the weights of the teacher'}, {f'LoRA of rank {config.lora_rank}' if config.lora_rank else 'all weights trained'}"),
            ("method", f"preset {config.preset}: " + ", ".join(f"{name}={getattr(config, name)}" for name in PRESETS[config.preset])),
            ("data", f"{config.train_file or config.dataset_name}: {len(rows):,} problems, the longest of {longest} tokens"),
            ("training", f"{steps:,} steps of {own * config.world_size} problems{left(steps, steps_done(checkpoint) if checkpoint else None)}"),
            *([("start", f"goes on from {checkpoint}")] if checkpoint else []),
            ("output", f"{student}{', and the trajectories of the teacher' * config.needs_trajectories}")]
    return printable("\n".join(["Dry run: nothing is trained, no weight is read, and nothing is written.", "", *(f"{name:<9} {text}" for name, text in said), "",
                                "First problem of the data", f"  question  {tokenizer.decode(first.question)}", f"  between   {between}", f"  answer    {learnt}"]))
