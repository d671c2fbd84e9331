"""What the commands of `red` share: how their options are read, and how their help pages are written. Heavy imports happen inside."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence

import click

WIDEST = 140  # columns of a help page
INDENT = 33  # where the meaning of a setting begins

# How `red distill -h` groups red's settings; one that is in no group stays with the one declared before it.
GROUPS = {
    "teacher and data": ("teacher_model_name_or_path", "teacher_dtype", "train_file", "dataset_name", "dataset_split", "text_column", "max_length",
                         "packing", "assistant_only_loss", "streaming", "token_cache_dir", "output_dir"),
    "the student and its start": ("hidden_size", "start", "start_fit", "fit_sweeps", "fit_reader_ridge", "fit_writer_ridge", "start_std", "norm_scale", "calibration_samples", "calibration_tap"),
    "objective": ("temperature", "divergence", "jsd_beta", "ce_weight", "kl_weight", "tap_weight", "tap_target", "lrc_faithful", "erank_weight", "loss_chunk_size"),
    "speed and memory": ("student_dtype", "packed_attention", "checkpointing", "compile_layers", "teacher_fp8"),
    "watching: collapse, and reasoning": ("erank_steps", "erank_floor", "erank_patience", "erank_stop", "canary_steps", "canary_file", "canary_samples"),
    "training, where red's default is its own": ("learning_rate", "warmup_steps", "lr_scheduler_type", "logging_steps", "logging_nan_inf_filter", "remove_unused_columns"),
}
USEFUL = {  # of transformers' TrainingArguments, in red's words
    "max_steps": "Optimiser steps of the training; -1: num_train_epochs says it.",
    "num_train_epochs": "Passes over the training data, where max_steps is -1.",
    "per_device_train_batch_size": "Rows of a micro-batch on each device.",
    "gradient_accumulation_steps": "Micro-batches of a step.",
    "bf16": "Compute in bfloat16: for GPUs from Ampere on.",
    "fsdp": "Share everything over GPUs: full_shard. Start one process a GPU, with torchrun.",
    "save_steps": "Steps between checkpoints; below 1 a share of all steps.",
    "save_total_limit": "Checkpoints that are kept, the newest; all if not given.",
    "report_to": "Trackers: none, tensorboard, wandb, trackio, all, or several.",
    "run_name": "Name of the run in the trackers.",
    "seed": "Of the order of the training data and of whatever is drawn.",
    "max_grad_norm": "Norm that gradients are clipped to; 0: not clipped.",
    "weight_decay": "Weight decay.",
    "optim": "The optimiser.",
    "eval_strategy": "When held-out data (--eval_file) is evaluated during the training: no, steps or epoch.",
    "eval_steps": "Steps between evaluations; logging_steps if not given.",
    "dataloader_num_workers": "Processes that load, and with streaming tokenise, beside the training.",
    "use_cpu": "Use the CPU although there is a GPU.",
}


class Command(click.Command):
    """A command whose help is printed as it was written; one whose option may be repeated also takes several values at once (`--starts random pca`)."""

    def parse_args(self, ctx, args):
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, option, taken = [], None, 0
        for word in args:
            if word.startswith("-"):
                option, taken = f"--{word[2:].replace('-', '_')}", 0
            elif option in several and (taken := taken + 1) > 1:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)

    def invoke(self, ctx):
        ctx.obj["command"] = self.name  # what an interruption speaks of
        return super().invoke(ctx)

    def format_help_text(self, ctx, formatter):
        formatter.write(f"\n{inspect.cleandoc(self.help)}\n")


class SettingsCommand(Command):
    """A command that takes `--setting value` for any field of a config, beside its options."""

    def __init__(self, *args, settings: str = "", **given):
        super().__init__(*args, context_settings=dict(ignore_unknown_options=True, allow_extra_args=True),
                         options_metavar="[--config FILE] [--setting value ...]", **given)
        self.settings = settings  # "module:class" of the config whose fields the help lists

    def format_options(self, ctx, formatter):
        super().format_options(ctx, formatter)
        if self.settings:
            import importlib

            module, _, name = self.settings.partition(":")
            formatter.write(fields(getattr(importlib.import_module(module), name), GROUPS if name == "REDConfig" else {}, formatter.width))


def config_of(ctx, file: str | None, config_class=None, given: Mapping[str, object] | None = None):
    """The config that a SettingsCommand was asked for; what is in `given` wins over both file and command line."""
    from red.settings import build_config, gather

    settings = gather(file, ctx.args, given or {})
    ctx.obj["output_dir"] = settings.get("output_dir")
    config = build_config(settings, config_class, options=[option.name for option in ctx.command.params])
    ctx.obj["output_dir"] = config.output_dir
    return config


def meaning(field, short: bool = False) -> str:
    """What a config's field is for, on one line; `short` takes the first sentence of what is not red's."""
    text = USEFUL.get(field.name) or " ".join(field.metadata.get("help", "").replace("%%", "%").split())
    if field.name == "output_dir":
        return "Folder of the run: missing or empty."
    return re.split(r"(?<!e\.g)\.\s", text)[0] if short and field.name not in USEFUL else text


def fields(config_class, groups: Mapping[str, Sequence[str]], columns: int) -> str:
    """Every field of a config with meaning, type and default: its own first, by group, then those of transformers' TrainingArguments."""
    import dataclasses

    from red.settings import describe, field_types

    known, types_of = {field.name: field for field in dataclasses.fields(config_class) if field.init}, field_types(config_class)
    group_of = {name: title for title, names in groups.items() for name in names}
    found: dict[str, list[str]] = {title: [] for title in groups or ("settings",)}
    title = next(iter(found))
    for name in ["output_dir", *config_class.__annotations__]:
        title = group_of.get(name, title)
        found[title].append(name)
    own = {name for names in found.values() for name in names}
    found["of transformers' TrainingArguments, the most used"] = [name for name in USEFUL if name in known and name not in own]
    found["and every other, by name"] = sorted(known.keys() - own - {*USEFUL})
    lines = []
    for title, names in found.items():
        lines.append(f"\n{title}:")
        for name in sorted(names, key=lambda name: name == "output_dir"):
            text = meaning(known[name], short=name not in own)
            kind, default = describe(types_of[name], most=6).replace(" or none", ""), known[name].default
            default = str(default).lower() if isinstance(default, bool) else getattr(default, "value", default)
            shown = "" if default in (None, "", dataclasses.MISSING) or name == "hidden_size" else f" [{default}]"
            lines += textwrap.wrap(f"--{name:<28} {text.rstrip('.')} ({kind}).{shown}", columns, initial_indent="  ", subsequent_indent=" " * INDENT,
                                   break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"
