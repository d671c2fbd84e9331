"""What `red -h` and `red COMMAND -h` say at length."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Distil a Llama- or Qwen-like language model (the teacher) into a narrower one (the student) that keeps its multi-step reasoning.

  red demo       the embedded example, end to end, on any laptop: watch a random start lose its reasoning and RED keep it
  red distill    teacher + text -> a plain Hugging Face checkpoint of a smaller width
  red doctor     before that: labels, packing, loss, weights, disk and memory, looked at on your own teacher and text
  red compress   the same without training: the fitted start as a checkpoint, in minutes
  red plan       what that will need: memory by part, FLOPs, hours, the micro-batch that fits; arithmetic alone
  red erank      the effective rank of a model's hidden states, layer by layer: has it collapsed?
  red lori       reasoning in latent steps instead of a written chain of thought
  red eval       a student beside its teacher: tasks, divergence, speed and memory
  red export     a training checkpoint -> a plain Hugging Face checkpoint, reloaded and compared
"""

EXAMPLES = """\
examples:
  red demo
  red distill --teacher_model_name_or_path path/to/teacher --train_file corpus.txt --hidden_size 1536 --output_dir run
  red erank path/to/teacher run/student --data held_out.txt
  red eval run/student --against path/to/teacher --data held_out.txt
  red export run/checkpoint-500 --out student --dtype bfloat16

`red COMMAND -h` explains one command. Bad input ends with one message and exit code 2, and nothing overwritten.
"""

DISTILL = """\
Distil a teacher into a student of width --hidden_size; the result is OUTPUT_DIR/student, a plain Hugging Face checkpoint.

  red distill --config run.yaml
  red distill --config run.yaml --learning_rate 2e-4 --start pca        the command line wins over the file
  red distill --teacher_model_name_or_path T --train_file corpus.txt --hidden_size 1536 --max_steps 1000 --output_dir run
  red distill --config run.yaml --resume                                goes on from the last checkpoint in output_dir

run.yaml holds one `field: value` a line. Every setting below works in the file and, as --setting value or --setting=value (hyphens or
underscores; a bare --setting is true), on the command line. So does every other field of transformers' TrainingArguments
(per_device_train_batch_size, gradient_accumulation_steps, max_steps, bf16, save_steps, report_to, ...).
"""

COMPRESS = """\
Narrow a teacher to --hidden_size without training; the result is OUTPUT_DIR/student, a plain Hugging Face checkpoint.

  red compress --teacher_model_name_or_path T --train_file corpus.txt --hidden_size 1536 --output_dir small
  red compress ... --dry_run                        prints what it would cost in time and memory, from the shapes alone
  red distill ... --start small/start.safetensors   trains on from it

It calibrates on the first --calibration_samples rows of --max_length tokens and takes the start `fitted`, unless --start names another. Settings as in
`red distill` (see red distill -h), in a --config file or as --setting value. An interrupted fit goes on when the same command is given again.
"""

PLAN = """\
Print what a distillation will need: parameters, FLOPs a token, memory by part on each of 1 to N GPUs, communication, hours, and the largest micro-batch
that fits. Arithmetic on the teacher's config: no weight is read, nothing is run, and the speed rests on an assumed utilisation.

  red plan Llama-3.2-3B --hidden_size 1536 --gpus 8
  red plan Llama-3.1-70B --hidden_size 4096 --gpu H200 --gpus 64 --per_device_train_batch_size 1 --checkpointing cheap
  red plan path/to/teacher --hidden_size 1536 --gpu A100 --tokens 2e9 --json plan.json
"""

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


class DistillHelp(argparse.Action):
    """`red distill -h`: red's own settings with their defaults, read from REDConfig when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        import dataclasses

        from red.config import REDConfig

        parser.print_help()
        fields = {field.name: field for field in dataclasses.fields(REDConfig)}
        group_of = {name: title for title, names in GROUPS.items() for name in names}
        lines, title = {title: [] for title in GROUPS}, next(iter(GROUPS))
        for name in ["output_dir", *REDConfig.__annotations__]:
            title = group_of.get(name, title)
            text = "Folder of the run: missing or empty." if name == "output_dir" else fields[name].metadata.get("help", "")
            default = "" if fields[name].default is None or name in ("output_dir", "hidden_size") else f" [{fields[name].default}]"
            lines[title].append(f"  --{name:<28} {text}{default}")
        for title, group in lines.items():
            print(f"\n{title}:", *sorted(group, key=lambda line: "--output_dir" in line), sep="\n")
        parser.exit()
