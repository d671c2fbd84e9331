"""The command `red`. A command's docstring is its help page; heavy imports happen inside the commands, so that `red -h` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

import red as package
from red.commands import WIDEST, Command, SettingsCommand, config_of
from red.doctor.examination import doctor
from red.errors import REDError, Terminated
from red.files import HALF_LAYERS, START_FILE, nearest, require_existing, require_place_for
from red.judge.command import evaluate
from red.lori import command as lori
from red.overview import Overview
from red.report.command import command as report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where red doctor finds something red, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    ran: dict = {}
    try:
        return red.main(None if arguments is None else list(arguments), prog_name="red", standalone_mode=False, obj=ran) or 0
    except click.NoSuchOption as error:
        like = nearest(error.option_name, [name for option in error.ctx.command.params for name in option.opts])
        return _refuse(f"{error.ctx.command_path} does not know {error.option_name!r}{f'; did you mean {like}?' if like else '.'} See {error.ctx.command_path} -h.")
    except click.UsageError as error:
        return _refuse(f"{error.format_message()} See {error.ctx.command_path if error.ctx else 'red'} -h.")
    except REDError as error:
        return _refuse(str(error))
    except Terminated as stop:
        return stop.code  # the trainer said what it saved  # pyrefly: ignore[bad-return]
    except click.Abort as stop:  # click's name for Ctrl-C, and for a file that ends too early
        if isinstance(stop.__cause__, EOFError):
            raise stop.__cause__ from None
        print(f"red: interrupted. {_kept(ran)}", file=sys.stderr)
        return 130


def _refuse(message: str) -> int:
    print(f"red: {message}", file=sys.stderr)
    return 2


def _kept(ran: dict) -> str:
    """What an interruption leaves behind."""
    if ran.get("command") == "demo":
        return "Nothing was put into the output folder."
    folder = ran.get("output_dir")
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime) if folder else []
    if checkpoints:
        return f"Kept: {checkpoints[-1]}. Go on with the same command and --resume."
    if folder and any((Path(folder) / name).exists() for name in (START_FILE, HALF_LAYERS)):
        return f"Kept: what was fitted so far, in {folder}. The same command goes on from there."
    return "No checkpoint had been written; nothing is kept."


@click.group(cls=Overview, no_args_is_help=False, context_settings=dict(help_option_names=["-h", "--help"], max_content_width=WIDEST,
                                                                      token_normalize_func=lambda name: name.replace("-", "_")))
@click.version_option(package.__version__)
def red() -> None:
    pass


@red.command("demo", cls=Command, short_help="the embedded example, end to end, on any laptop: watch a random start lose its reasoning and RED keep it")
@click.option("--method", type=click.Choice(["red", "lori"]), default="red", help="red: narrower students; lori: latent reasoning, into runs/demo-lori [red]")
@click.option("--output_dir", default="runs/demo", metavar="DIR", help="gets results.json, report.html and student/ [runs/demo]")
@click.option("--overwrite", is_flag=True, help="replace an earlier demo in DIR, once this one has succeeded")
@click.option("--steps", type=int, metavar="N", help="optimiser steps of every student")
@click.option("--starts", multiple=True, metavar="START ...", help="random (LRC), activation (RED), pca, ... [those two and the best other]")
@click.option("--learning_rate", multiple=True, metavar="START=RATE ...", help="for a start that was not swept, or another than the swept one")
@click.option("--seed", type=int, metavar="N", help="of the training text, its order and the starts")
@click.option("--processes", type=int, metavar="N", help="students that train at once [one per core]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[auto: a GPU if there is one]")
def demo(method, output_dir, overwrite, **given) -> None:
    """Distil the embedded teacher from several starts at equal tokens and compare them.

      red demo
      red demo --steps 30 --output_dir runs/quick

    Then open report.html in the output folder. --method lori compares ways of reasoning in latent steps instead.
    """
    given = {name: value if isinstance(value, (int, str)) else list(value) for name, value in given.items() if value not in (None, ())}  # the defaults are run_demo's own
    if method == "lori":
        return lori.demo(output_dir, overwrite, **given)
    from red.demo import run_demo

    if "learning_rate" in given:
        given["learning_rates"] = dict(map(_rate_of_start, given.pop("learning_rate")))
    run_demo(output_dir, overwrite=overwrite, **given)


def _rate_of_start(text: str) -> tuple[str, float]:
    start, _, rate = text.partition("=")
    try:
        return start, float(rate)
    except ValueError:
        raise REDError(f"--learning_rate {text}: expected START=RATE, such as pca=2e-3.") from None


@red.command("plan", cls=Command, short_help="what a distillation will need, before a GPU is rented: memory by part, FLOPs, hours, the micro-batch that fits")
@click.argument("teacher")
@click.option("--hidden_size", type=int, required=True, metavar="WIDTH", help="the student's width")
@click.option("--gpu", metavar="GPU", help="H100, H200, H800, A100 or RTX4090 [H100]")
@click.option("--gpus", type=int, metavar="N", help="the table goes from 1 to N [1]")
@click.option("--per_device_train_batch_size", type=int, metavar="ROWS", help="of a micro-batch on one GPU [3]")
@click.option("--max_length", type=int, metavar="TOKENS", help="of a row [2048]")
@click.option("--gradient_accumulation_steps", type=int, metavar="N", help="micro-batches a step [nearest to 49152 tokens over all GPUs]")
@click.option("--tokens", type=float, metavar="N", help="to train on, such as 10e9 [10e9]")
@click.option("--sharding", metavar="HOW", help="full (FSDP2) or none (a copy on each: data parallel) [full]")
@click.option("--sync_each_batch", is_flag=True, help="reduce sharded gradients after every micro-batch: less memory, more traffic")
@click.option("--checkpointing", metavar="HOW", help="none, cheap or full [none]")
@click.option("--student_dtype", metavar="DTYPE", help="bfloat16 or float32 [bfloat16]")
@click.option("--tap_target", metavar="HOW", help="gather (starts that select channels) or projected [projected]")
@click.option("--utilisation", type=float, metavar="SHARE", help="of the data sheet's products that a step reaches [0.4, assumed]")
@click.option("--paper", is_flag=True, help="also the paper's three runs beside the plan for them")
@click.option("--output", "--json", "output", metavar="PATH", help="write the numbers here too, as JSON")
def plan(teacher, hidden_size, paper, output, **given) -> None:
    """Print what a distillation will need: parameters, FLOPs a token, memory by part on each of 1 to N GPUs, communication, hours, and the largest
    micro-batch that fits. Arithmetic on the teacher's config: no weight is read, nothing is run, and the speed rests on an assumed utilisation.
    TEACHER is a well-known name (Llama-3.2-3B, Qwen3-8B, ...), a folder, a config.json, or a name on the hub.

      red plan Llama-3.2-3B --hidden_size 1536 --gpus 8
      red plan Llama-3.1-70B --hidden_size 4096 --gpu H200 --gpus 64 --per_device_train_batch_size 1 --checkpointing cheap
      red plan path/to/teacher --hidden_size 1536 --gpu A100 --tokens 2e9 --json plan.json
    """
    from red.planning.planner import plan as run

    if output:
        require_place_for(output, "--output")
    found = run(teacher, hidden_size, **{name: value for name, value in given.items() if value is not None})  # the defaults are run's own
    if output:
        from red.files import atomic_write_json

        atomic_write_json(output, found.to_dict())
    print(found)
    if paper:
        from red.planning.report import aligned, paper_rows

        print("\nThe paper's runs on 8 H800 (arXiv 2605.29327), and the plan for them", *aligned(paper_rows()), sep="\n")


red.add_command(doctor)


@red.command("distill", cls=SettingsCommand, settings="red.config:REDConfig", short_help="teacher + text -> a plain Hugging Face checkpoint of a smaller width")
@click.option("--config", metavar="FILE", help="YAML file of settings")
@click.option("--resume", is_flag=False, flag_value="last", metavar="[CHECKPOINT]", help="go on from the last checkpoint in output_dir, or from the one that is named")
@click.option("--eval_file", metavar="FILE", help="held-out text; its loss is reported")
@click.option("--calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the training text]")
@click.option("--dry_run", is_flag=True, help="print the plan, the first batch, and the forecast of memory and time, and stop: no weight is read, nothing written")
@click.pass_context
def distill(ctx, config, resume, eval_file, calibration, dry_run) -> None:
    """Distil a teacher into a student of width --hidden_size; the result is OUTPUT_DIR/student, a plain Hugging Face checkpoint.

      red distill --config run.yaml
      red distill --config run.yaml --dry_run                               shows what would happen, in seconds
      red distill --config run.yaml --learning_rate 2e-4 --start pca        the command line wins over the file
      red distill --teacher_model_name_or_path T --train_file corpus.txt --hidden_size 1536 --max_steps 1000 --output_dir run
      red distill --config run.yaml --resume                                goes on from the last checkpoint in output_dir

    run.yaml holds one `field: value` a line; configs/distill.yaml is one to copy. Every setting below works in the file and, as --setting value or
    --setting=value (hyphens or underscores; a bare --setting is true), on the command line. So does every other field of transformers'
    TrainingArguments. Behind each stand its type and [its default].
    """
    config = config_of(ctx, config)
    for path, what in ((config.train_file, "train_file"), (eval_file, "eval_file"), (calibration, "calibration")):
        if path is not None:
            require_existing(path, what)  # before the teacher is read
    resume = True if resume == "last" else resume or False
    if dry_run:
        from red.planning.dry_run import dry_run as preview

        plan = preview(config, calibration=calibration, resume=resume, held_out=eval_file is not None)
        return print(plan) if config.process_index == 0 else None
    from red.distillation import distill as run

    result = run(config=config, eval_data=eval_file, calibration=calibration, resume=resume)
    if config.process_index:
        return
    for name, value in result.metrics.items():
        print(f"{name:>28}  {value:.6g}" if isinstance(value, float) else f"{name:>28}  {value}")
    print(f"The student is in {result.path}")


red.add_command(evaluate)


@red.command("compress", cls=SettingsCommand, short_help="the same without training: the fitted start as a checkpoint, in minutes")
@click.option("--config", metavar="FILE", help="YAML file of settings")
@click.option("--calibration", metavar="FILE", help="channel statistics that red.calibrate(...).save wrote [taken on the text]")
@click.option("--dtype", metavar="DTYPE", help="of the weights: float32, bfloat16 or float16 [the loaded teacher's]")
@click.option("--dry_run", is_flag=True, help="print the forecast of time and memory, and stop; no weight is read")
@click.pass_context
def compress(ctx, config, calibration, dtype, dry_run) -> None:
    """Narrow a teacher to --hidden_size without training; the result is OUTPUT_DIR/student, a plain Hugging Face checkpoint.

      red compress --teacher_model_name_or_path T --train_file corpus.txt --hidden_size 1536 --output_dir small
      red compress ... --dry_run                        prints what it would cost in time and memory, from the shapes alone
      red distill ... --start small/start.safetensors   trains on from it

    It calibrates on the first --calibration_samples rows of --max_length tokens and takes the start `fitted`, unless --start names another. Settings as in
    `red distill` (see red distill -h), in a --config file or as --setting value. An interrupted fit goes on when the same command is given again.
    """
    config = config_of(ctx, config)
    if dry_run:
        from red.starting import forecast_of

        return print(forecast_of(config))
    if config.train_file is not None:
        require_existing(config.train_file, "train_file")  # before the teacher is read

    from red.compression import compress as run

    print(run(config=config, calibration=calibration, dtype=dtype).report)


@red.command("erank", cls=Command, short_help="the effective rank of models' hidden states, layer by layer: has one collapsed?")
@click.argument("models", nargs=-1, required=True, metavar="MODEL ...")
@click.option("--data", required=True, metavar="FILE", help=".txt, .jsonl or a saved data set")
@click.option("--text_column", default="text", metavar="NAME", help="column that holds the text [text]")
@click.option("--max_tokens", type=int, default=4000, metavar="N", help="tokens whose states are counted [4000]")
@click.option("--output", "--json", "output", metavar="PATH", help="write the numbers here too, as JSON")
@click.option("--plot", metavar="PATH", help="draw them here, as SVG")
def erank(models, **given) -> None:
    """Print the effective rank of the models' hidden states, layer by layer and side by side. MODEL is a folder or a name on the hub.

      red erank path/to/teacher run/student --data held_out.txt --plot erank.svg

    Compare only at equal text and --max_tokens: the rank grows with them.
    """
    from red.erank_report import report

    report(models, **given)


@red.command("export", cls=Command, short_help="a training checkpoint -> a plain Hugging Face checkpoint, reloaded and compared")
@click.argument("checkpoint")
@click.option("--out", required=True, metavar="PATH", help="a folder that does not exist yet, or is empty")
@click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 [as stored]")
@click.option("--as_llama", is_flag=True, help="write a Qwen2 student as a Llama, for engines that ignore Qwen2's head_dim")
@click.option("--tokenizer", metavar="PATH", help="folder of the tokenizer, where the checkpoint has none")
@click.option("--teacher", metavar="PATH", help="folder or name of the teacher, whose licence goes along [the one that the checkpoint names]")
def export(checkpoint, **given) -> None:
    """Write the student of a training checkpoint as a plain Hugging Face model; optimiser state and projections stay behind. It is reloaded in a
    fresh process and its logits compared before it appears at PATH. CHECKPOINT is a checkpoint-N folder, or any model of a supported family.

      red export run/checkpoint-500 --out student --dtype bfloat16
    """
    from red.sharing.checkpoint_export import export as run

    print(run(checkpoint, **given))


red.add_command(lori.lori)
red.add_command(report)

if __name__ == "__main__":
    sys.exit(main())
