"""`red -h`: one page that says what everything is for."""

from __future__ import annotations

import click

from red.errors import REDError
from red.files import nearest

WHAT_FOR = """\
Distil a Llama- or Qwen-like language model (the teacher) into a narrower one (the student) that keeps its multi-step reasoning.
Every student weight is a frozen teacher weight times a trained projection; what comes out is a plain Hugging Face checkpoint.
"""
MANUAL = """
A run is a YAML file of `field: value` lines (configs/distill.yaml explains every one), say run.yaml:

  teacher_model_name_or_path: path/to/teacher     # a folder, or a name on the hub
  train_file: corpus.txt                          # or .jsonl, or a saved data set; or dataset_name: of the hub
  hidden_size: 1536                               # the student's width, below the teacher's
  output_dir: run
  max_steps: 2000
  per_device_train_batch_size: 8
  learning_rate: 1e-4
  bf16: true                                      # on a GPU

  red doctor  --config run.yaml                   # are teacher, text and machine fit?
  red distill --config run.yaml --dry_run         # the plan, the first batch, memory and time; nothing is written
  red distill --config run.yaml                   # again with --resume where it was interrupted
  red eval    run/student --against path/to/teacher --data held_out.txt

Files: everything goes into output_dir: checkpoint-N (to resume from), start.safetensors (a fitted start), student (the result),
report.html (how it went), what trackers log.
Nothing is overwritten: a folder that is not empty is refused. Tokens of texts above 16 MiB are kept beside the Hugging Face cache (token_cache_dir).

Exit codes: 0 done · 1 red doctor found something red · 2 bad input, with one message that says what to do · 130 after Ctrl-C · 143 after SIGTERM

`red COMMAND -h` explains one command. Hyphens and underscores are one in names: --max-tokens is --max_tokens.
Completion in bash: eval "$(_RED_COMPLETE=bash_source red)"; zsh and fish: zsh_source, fish_source.
"""
FIRST = ("demo", "plan", "doctor", "distill", "eval")


class Overview(click.Group):
    """`red -h`, and the nearest command for one that is not there."""

    def resolve_command(self, ctx, args):
        if args[0] not in self.commands and not args[0].startswith("-"):
            like = nearest(args[0], self.commands)
            raise REDError(f"There is no command {args[0]!r}; {f'did you mean red {like}?' if like else 'see red -h.'}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx, formatter):
        self.format_usage(ctx, formatter)
        formatter.write(f"\n{WHAT_FOR}")
        for title, names in (("In the order in which a project needs them", FIRST), ("And", [name for name in self.commands if name not in FIRST])):
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].short_help) for name in names])
        formatter.write(MANUAL)
