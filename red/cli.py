"""The command `red`: demo, distill, compress, erank, export. Heavy imports happen inside the commands, so that `red -h` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from red.errors import REDError
from red.files import HALF_LAYERS, START_FILE, require_existing
from red.lori import command as lori_command

DESCRIPTION = """\
Distil a Llama- or Qwen-like language model (the teacher) into a narrower one (the student) that keeps its multi-step reasoning.

  red demo       the embedded example, end to end, on any laptop: watch a random start lose its reasoning and RED keep it
  red distill    teacher + text -> a plain Hugging Face checkpoint of a smaller width
  red compress   the same without training: the fitted start as a checkpoint, in minutes
  red erank      the effective rank of a model's hidden states, layer by layer: has it collapsed?
  red lori       reasoning in latent steps instead of a written chain of thought
  red export     a training checkpoint -> a plain Hugging Face checkpoint, reloaded and compared
"""

EXAMPLES = """\
examples:
  red demo
  red distill --teacher_model_name_or_path path/to/teacher --train_file corpus.txt --hidden_size 1536 --output_dir run
  red erank path/to/teacher run/student --data held_out.txt
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

# How `red distill -h` groups red's settings; one that is in no group stays with the one declared before it.
GROUPS = {
    "teacher and data": ("teacher_model_name_or_path", "teacher_dtype", "train_file", "dataset_name", "dataset_split", "text_column", "max_length",
                         "packing", "output_dir"),
    "the student and its start": ("hidden_size", "start", "start_fit", "fit_reader_ridge", "fit_writer_ridge", "start_std", "norm_scale", "calibration_samples", "calibration_tap"),
    "objective": ("temperature", "divergence", "jsd_beta", "ce_weight", "kl_weight", "tap_weight", "tap_target", "lrc_faithful", "erank_weight", "loss_chunk_size"),
    "watching for collapse": ("erank_steps", "erank_floor", "erank_patience", "erank_stop"),
    "training, where red's default is its own": ("learning_rate", "warmup_steps", "lr_scheduler_type", "logging_steps", "remove_unused_columns"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = _parser().parse_known_args([_underscored(argument) for argument in arguments])
    try:
        if rest and options.run not in (distill, compress, lori_command.lori):
            raise REDError(f"red {options.command} does not know {rest[0]!r}. See red {options.command} -h.")
        options.rest = rest
        options.run(options)
    except REDError as error:
        print(f"red: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nred: interrupted. {_kept(options)}", file=sys.stderr)
        return 130
    return 0


def demo(options: argparse.Namespace) -> None:
    if options.method == "lori":
        return lori_command.demo(options)
    from red.demo import run_demo

    # only what was said: the defaults are run_demo's own
    given = {name: value for name in ("steps", "starts", "seed", "processes", "device") if (value := getattr(options, name)) is not None}
    if options.learning_rate:
        given["learning_rates"] = dict(_rate_of_start(text) for text in options.learning_rate)
    run_demo(options.output_dir, overwrite=options.overwrite, **given)


def _rate_of_start(text: str) -> tuple[str, float]:
    start, _, rate = text.partition("=")
    try:
        return start, float(rate)
    except ValueError:
        raise REDError(f"--learning_rate {text}: expected START=RATE, such as pca=2e-3.") from None


def distill(options: argparse.Namespace) -> None:
    from red.settings import build_config, parse_command_line, read_yaml

    given = {**(read_yaml(options.config) if options.config else {}), **parse_command_line(options.rest)}
    options.output_dir = given.get("output_dir")
    config = build_config(given)
    options.output_dir = config.output_dir

    for path, what in ((config.train_file, "train_file"), (options.eval_file, "eval_file"), (options.calibration, "calibration")):
        if path is not None:
            require_existing(path, what)  # before the teacher is read

    from red.distillation import distill as run

    result = run(config=config, eval_data=options.eval_file, calibration=options.calibration, resume=options.resume)
    for name, value in result.metrics.items():
        print(f"{name:>28}  {value:.6g}" if isinstance(value, float) else f"{name:>28}  {value}")
    print(f"The student is in {result.path}")


def compress(options: argparse.Namespace) -> None:
    from red.settings import build_config, parse_command_line, read_yaml

    given = {**(read_yaml(options.config) if options.config else {}), **parse_command_line(options.rest)}
    config = build_config(given)
    options.output_dir = config.output_dir
    if options.dry_run:
        from red.starting import forecast_of

        print(forecast_of(config))
        return
    if config.train_file is not None:
        require_existing(config.train_file, "train_file")  # before the teacher is read

    from red.compression import compress as run

    result = run(config=config, calibration=options.calibration, dtype=options.dtype)
    print(result.report)


def erank(options: argparse.Namespace) -> None:
    from red.erank_report import report

    report(options.models, options.data, text_column=options.text_column, max_tokens=options.max_tokens, output=options.output, plot=options.plot)


def export(options: argparse.Namespace) -> None:
    from red.files import require_empty_output

    folder = require_existing(options.checkpoint, "The checkpoint")
    if not (folder / "config.json").is_file():
        inside = sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()) if folder.is_dir() else []
        hint = f"It holds {', '.join(inside)}: name one of them." if inside else "Name a checkpoint-N folder of a training run."
        raise REDError(f"{options.checkpoint} is not a checkpoint: it has no config.json. {hint}")
    require_empty_output(options.out, what="--out")

    from red.distillation import _tokenizer_beside
    from red.export import export as run
    from red.prepare import load_teacher

    source = require_existing(options.tokenizer, "The tokenizer") if options.tokenizer else folder
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise REDError(f"{source} has no tokenizer. Name the teacher's folder: --tokenizer PATH")
    tokenizer = _tokenizer_beside(source)
    student = load_teacher(folder.absolute(), "float32")  # exact for bf16 weights; cast once, below
    print(run(student, tokenizer, options.out, dtype=options.dtype or _stored_dtype(folder), as_llama=options.as_llama))


def _stored_dtype(folder: Path) -> str | None:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype")


def _underscored(argument: str) -> str:
    """`--max-tokens=5` is `--max_tokens=5`: both spellings work everywhere."""
    key, equals, value = argument.partition("=")
    return f"--{key[2:].replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument


def _kept(options: argparse.Namespace) -> str:
    """What an interruption leaves behind."""
    if options.run is demo:
        return "Nothing was put into the output folder."
    folder = getattr(options, "output_dir", None)
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime) if folder else []
    if checkpoints:
        return f"Kept: {checkpoints[-1]}. Go on with the same command and --resume."
    if folder and any((Path(folder) / name).exists() for name in (START_FILE, HALF_LAYERS)):
        return f"Kept: what was fitted so far, in {folder}. The same command goes on from there."
    return "No checkpoint had been written; nothing is kept."


class _DistillHelp(argparse.Action):
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


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("red", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands", prog="red")

    def command(run, name: str, help: str, description: str, **settings) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=description, formatter_class=formatter, allow_abbrev=False, **settings)
        added.set_defaults(run=run)
        return added

    def option(added: argparse.ArgumentParser, name: str, **settings) -> None:
        added.add_argument(f"--{name}", **settings)

    added = command(demo, "demo", "the embedded example", "Distil the embedded teacher from several starts at equal tokens and compare them.\n\n"
                    "  red demo\n  red demo --steps 30 --output_dir runs/quick")
    option(added, "method", choices=("red", "lori"), default="red", help="red: narrower students; lori: latent reasoning, into runs/demo-lori [red]")
    option(added, "output_dir", default="runs/demo", metavar="DIR", help="gets results.json, report.html and student/ [runs/demo]")
    option(added, "overwrite", action="store_true", help="replace an earlier demo in DIR, once this one has succeeded")
    option(added, "steps", type=int, help="optimiser steps of every student")
    option(added, "starts", nargs="+", metavar="START", help="random (LRC), activation (RED), pca, ... [those two and the best other]")
    option(added, "learning_rate", nargs="+", metavar="START=RATE", help="for a start that was not swept, or another than the swept one")
    option(added, "seed", type=int, help="of the training text, its order and the starts")
    option(added, "processes", type=int, metavar="N", help="students that train at once [one per core]")
    option(added, "device", choices=("auto", "cpu", "cuda"), help="[auto: a GPU if there is one]")

    added = command(distill, "distill", "teacher + text -> student", DISTILL, add_help=False, usage="red distill [--config FILE] [--setting value ...]")
    added.add_argument("-h", "--help", action=_DistillHelp, nargs=0, help="show this and every setting")
    option(added, "config", metavar="FILE", help="YAML file of settings")
    option(added, "resume", action="store_true", help="go on from the last checkpoint in output_dir")
    option(added, "eval_file", metavar="FILE", help="held-out text; its loss is reported")
    option(added, "calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the training text]")

    added = command(compress, "compress", "teacher + text -> narrower model, without training", COMPRESS, usage="red compress [--config FILE] [--setting value ...]")
    option(added, "config", metavar="FILE", help="YAML file of settings")
    option(added, "calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the text]")
    option(added, "dtype", metavar="DTYPE", help="of the weights: float32, bfloat16 or float16 [the loaded teacher's]")
    option(added, "dry_run", action="store_true", help="print the forecast of time and memory, and stop; no weight is read")

    lori_command.register(command)

    added = command(erank, "erank", "effective rank per layer", "Print the effective rank of the models' hidden states, layer by layer and side by side.\n\n"
                    "  red erank path/to/teacher run/student --data held_out.txt --plot erank.svg\n\nCompare only at equal text and --max-tokens: the rank grows with them.")
    added.add_argument("models", nargs="+", metavar="MODEL", help="folder or name on the hub")
    option(added, "data", required=True, metavar="FILE", help=".txt, .jsonl or a saved data set")
    option(added, "text_column", default="text", help="column that holds the text [text]")
    option(added, "max_tokens", type=int, default=4000, metavar="N", help="tokens whose states are counted [4000]")
    added.add_argument("--output", "--json", metavar="PATH", help="write the numbers here too, as JSON")
    option(added, "plot", metavar="PATH", help="draw them here, as SVG")

    added = command(export, "export", "checkpoint -> plain model", "Write the student of a training checkpoint as a plain Hugging Face model; optimiser state and projections\n"
                    "stay behind. It is reloaded in a fresh process and its logits compared before it appears at PATH.\n\n"
                    "  red export run/checkpoint-500 --out student --dtype bfloat16")
    added.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint-N folder, or any Llama, Qwen2 or Qwen3 model")
    option(added, "out", required=True, metavar="PATH", help="a folder that does not exist yet, or is empty")
    option(added, "dtype", metavar="DTYPE", help="float32, bfloat16 or float16 [as stored]")
    option(added, "as_llama", action="store_true", help="write a Qwen2 student as a Llama, for engines that ignore Qwen2's head_dim")
    option(added, "tokenizer", metavar="PATH", help="folder of the tokenizer, where the checkpoint has none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
