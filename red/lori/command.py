"""`red lori`: latent reasoning from a shell, and `red demo --method lori`. Heavy imports happen inside, so that `red -h` answers at once."""

from __future__ import annotations

import argparse

from red.files import require_existing

LORI = """\
Train a student that reasons in a few latent steps instead of writing its chain of thought; the result is OUTPUT_DIR/student, which red.lori.load reads.

  red lori --teacher_model_name_or_path T --train_file gsm8k_aug.jsonl --output_dir run
  red lori --config run.yaml --preset codi --learning_rate 2e-4         the command line wins over the file
  red lori --preset explicit_cot ... --output_dir teacher               fine-tunes the explicit teacher that the others learn from
  red lori --config run.yaml --resume                                   goes on from the last checkpoint in output_dir

A row of the data is {"question": ..., "steps": ["<<3*4=12>>", ...], "answer": "12"}. Every setting below works in the file and,
as --setting value, on the command line. So does every other field of transformers' TrainingArguments. docs/lori.md says which parts are the paper's.
"""


def lori(options: argparse.Namespace) -> None:
    from red.lori.config import LoRiConfig
    from red.settings import build_config, parse_command_line, read_yaml

    given = {**(read_yaml(options.config) if options.config else {}), **parse_command_line(options.rest)}
    options.output_dir = given.get("output_dir")
    config = build_config(given, LoRiConfig)
    options.output_dir = config.output_dir
    for path, what in ((config.train_file, "train_file"), (options.eval_file, "eval_file")):
        if path is not None:
            require_existing(path, what)  # before the teacher is read

    from red.lori.distillation import distill as run

    result = run(config=config, eval_data=options.eval_file, resume=options.resume)
    for name, value in result.metrics.items():
        print(f"{name:>28}  {value:.6g}" if isinstance(value, float) else f"{name:>28}  {value}")
    print(f"The student is in {result.path}")


def demo(options: argparse.Namespace) -> None:
    """`red demo --method lori`."""
    from red.errors import REDError
    from red.lori.demo import run_demo

    for name in ("starts", "learning_rate", "processes", "device"):
        if getattr(options, name) not in (None, "auto"):
            raise REDError(f"--{name} belongs to `red demo` without --method lori. Leave it out.")
    given = {} if options.seed is None else {"seeds": (options.seed,)}
    output_dir = "runs/demo-lori" if options.output_dir == "runs/demo" else options.output_dir
    run_demo(output_dir, steps=options.steps, overwrite=options.overwrite, **given)


class _Help(argparse.Action):
    """`red lori -h`: the settings with their defaults, read from LoRiConfig when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        import dataclasses

        from red.lori.config import LoRiConfig

        parser.print_help()
        fields = {field.name: field for field in dataclasses.fields(LoRiConfig)}
        print("\nsettings:", f"  --{'output_dir':<28} Folder of the run: missing or empty.", sep="\n")
        for name in LoRiConfig.__annotations__:
            default = "" if fields[name].default is None else f" [{fields[name].default}]"
            print(f"  --{name:<28} {fields[name].metadata.get('help', '')}{default}")
        parser.exit()


def register(command) -> None:
    """Add `red lori` by the function that adds a command to red's parser."""
    added = command(lori, "lori", "explicit teacher + problems -> latent reasoning", LORI, add_help=False,
                    usage="red lori [--config FILE] [--setting value ...]")
    added.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and every setting")
    added.add_argument("--config", metavar="FILE", help="YAML file of settings")
    added.add_argument("--resume", nargs="?", const=True, default=False, metavar="CHECKPOINT", help="go on from the last checkpoint in output_dir, or from the one that is named")
    added.add_argument("--eval_file", metavar="FILE", help="held-out problems; their loss is reported")
