"""The command `red`: demo, doctor, distill, compress, plan, erank, lori, eval, export. Heavy imports happen inside the commands, so that `red -h` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from red.cli_help import COMPRESS, DESCRIPTION, DISTILL, EXAMPLES, PLAN, DistillHelp
from red.errors import REDError, Terminated
from red.files import HALF_LAYERS, START_FILE, require_existing
from red.lori import command as lori_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where red doctor finds something red, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = _parser().parse_known_args([_underscored(argument) for argument in arguments])
    try:
        if rest and options.run not in (distill, compress, doctor, lori_command.lori):
            raise REDError(f"red {options.command} does not know {rest[0]!r}. See red {options.command} -h.")
        options.rest = rest
        return options.run(options) or 0
    except REDError as error:
        print(f"red: {error}", file=sys.stderr)
        return 2
    except Terminated as stop:
        return stop.code  # the trainer said what it saved  # pyrefly: ignore[bad-return]
    except KeyboardInterrupt:
        print(f"\nred: interrupted. {_kept(options)}", file=sys.stderr)
        return 130


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


def doctor(options: argparse.Namespace) -> int:
    from red.doctor import run

    return run(options)


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


def plan(options: argparse.Namespace) -> None:
    from red.planning import plan as run

    given = {name: value for name, value in vars(options).items() if name in run.__kwdefaults__ and value is not None}  # the defaults are plan's own
    found = run(options.teacher, options.hidden_size, **given)
    if options.output:
        from red.files import atomic_write_json

        atomic_write_json(options.output, found.to_dict())
    print(found)
    if options.paper:
        from red.plan_report import aligned, paper_rows

        print("\nThe paper's runs on 8 H800 (arXiv 2605.29327), and the plan for them", *aligned(paper_rows()), sep="\n")


def erank(options: argparse.Namespace) -> None:
    from red.erank_report import report

    report(options.models, options.data, text_column=options.text_column, max_tokens=options.max_tokens, output=options.output, plot=options.plot)


def evaluate(options: argparse.Namespace) -> None:
    from red.judge.command import run

    run(options)


def export(options: argparse.Namespace) -> None:
    from red.files import require_empty_output

    folder = require_existing(options.checkpoint, "The checkpoint")
    if not (folder / "config.json").is_file():
        inside = sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()) if folder.is_dir() else []
        hint = f"It holds {', '.join(inside)}: name one of them." if inside else "Name a checkpoint-N folder of a training run."
        raise REDError(f"{options.checkpoint} is not a checkpoint: it has no config.json. {hint}")
    require_empty_output(options.out, what="--out")

    from red.checkpoints import teacher_of
    from red.distillation import _tokenizer_beside
    from red.export import export as run
    from red.prepare import load_teacher

    source = require_existing(options.tokenizer, "The tokenizer") if options.tokenizer else folder
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise REDError(f"{source} has no tokenizer. Name the teacher's folder: --tokenizer PATH")
    tokenizer = _tokenizer_beside(source)
    student = load_teacher(folder.absolute(), "float32")  # exact for bf16 weights; cast once, below
    if (teacher := options.teacher or teacher_of(folder)) is None:
        print("red: the teacher is not known, so its licence is not carried along. Name it: --teacher PATH", file=sys.stderr)
    print(run(student, tokenizer, options.out, dtype=options.dtype or _stored_dtype(folder), as_llama=options.as_llama, teacher=teacher))


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

    from red import doctor as examining  # its options; nothing heavy

    examining.add_options(command(doctor, "doctor", "before a distillation: is all well?", examining.DESCRIPTION, usage="red doctor --teacher TEACHER --data FILE [--setting value ...]"))

    added = command(distill, "distill", "teacher + text -> student", DISTILL, add_help=False, usage="red distill [--config FILE] [--setting value ...]")
    added.add_argument("-h", "--help", action=DistillHelp, nargs=0, help="show this and every setting")
    option(added, "config", metavar="FILE", help="YAML file of settings")
    option(added, "resume", nargs="?", const=True, default=False, metavar="CHECKPOINT", help="go on from the last checkpoint in output_dir, or from the one that is named")
    option(added, "eval_file", metavar="FILE", help="held-out text; its loss is reported")
    option(added, "calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the training text]")

    added = command(compress, "compress", "teacher + text -> narrower model, without training", COMPRESS, usage="red compress [--config FILE] [--setting value ...]")
    option(added, "config", metavar="FILE", help="YAML file of settings")
    option(added, "calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the text]")
    option(added, "dtype", metavar="DTYPE", help="of the weights: float32, bfloat16 or float16 [the loaded teacher's]")
    option(added, "dry_run", action="store_true", help="print the forecast of time and memory, and stop; no weight is read")

    added = command(plan, "plan", "what a distillation will need, before a GPU is rented", PLAN)
    added.add_argument("teacher", metavar="TEACHER", help="a well-known name (Llama-3.2-3B, Qwen3-8B, ...), a folder, a config.json, or a name on the hub")
    option(added, "hidden_size", type=int, required=True, metavar="WIDTH", help="the student's width")
    option(added, "gpu", metavar="GPU", help="H100, H200, H800, A100 or RTX4090 [H100]")
    option(added, "gpus", type=int, metavar="N", help="the table goes from 1 to N [1]")
    option(added, "per_device_train_batch_size", type=int, metavar="ROWS", help="of a micro-batch on one GPU [3]")
    option(added, "max_length", type=int, metavar="TOKENS", help="of a row [2048]")
    option(added, "gradient_accumulation_steps", type=int, metavar="N", help="micro-batches a step [nearest to 49152 tokens over all GPUs]")
    option(added, "tokens", type=float, metavar="N", help="to train on, such as 10e9 [10e9]")
    option(added, "sharding", metavar="HOW", help="full (FSDP2) or none (a copy on each: data parallel) [full]")
    option(added, "sync_each_batch", action="store_true", help="reduce sharded gradients after every micro-batch: less memory, more traffic")
    option(added, "checkpointing", metavar="HOW", help="none, cheap or full [none]")
    option(added, "student_dtype", metavar="DTYPE", help="bfloat16 or float32 [bfloat16]")
    option(added, "tap_target", metavar="HOW", help="gather (starts that select channels) or projected [projected]")
    option(added, "utilisation", type=float, metavar="SHARE", help="of the data sheet's products that a step reaches [0.4, assumed]")
    option(added, "paper", action="store_true", help="also the paper's three runs beside the plan for them")
    added.add_argument("--output", "--json", metavar="PATH", help="write the numbers here too, as JSON")

    lori_command.register(command)

    added = command(erank, "erank", "effective rank per layer", "Print the effective rank of the models' hidden states, layer by layer and side by side.\n\n"
                    "  red erank path/to/teacher run/student --data held_out.txt --plot erank.svg\n\nCompare only at equal text and --max-tokens: the rank grows with them.")
    added.add_argument("models", nargs="+", metavar="MODEL", help="folder or name on the hub")
    option(added, "data", required=True, metavar="FILE", help=".txt, .jsonl or a saved data set")
    option(added, "text_column", default="text", help="column that holds the text [text]")
    option(added, "max_tokens", type=int, default=4000, metavar="N", help="tokens whose states are counted [4000]")
    added.add_argument("--output", "--json", metavar="PATH", help="write the numbers here too, as JSON")
    option(added, "plot", metavar="PATH", help="draw them here, as SVG")

    from red.judge import command as judging  # its options; nothing heavy

    judging.add_options(command(evaluate, "eval", "student beside teacher", judging.DESCRIPTION))

    added = command(export, "export", "checkpoint -> plain model", "Write the student of a training checkpoint as a plain Hugging Face model; optimiser state and projections\n"
                    "stay behind. It is reloaded in a fresh process and its logits compared before it appears at PATH.\n\n"
                    "  red export run/checkpoint-500 --out student --dtype bfloat16")
    added.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint-N folder, or any model of a supported family")
    option(added, "out", required=True, metavar="PATH", help="a folder that does not exist yet, or is empty")
    option(added, "dtype", metavar="DTYPE", help="float32, bfloat16 or float16 [as stored]")
    option(added, "as_llama", action="store_true", help="write a Qwen2 student as a Llama, for engines that ignore Qwen2's head_dim")
    option(added, "tokenizer", metavar="PATH", help="folder of the tokenizer, where the checkpoint has none")
    option(added, "teacher", metavar="PATH", help="folder or name of the teacher, whose licence goes along [the one that the checkpoint names]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
