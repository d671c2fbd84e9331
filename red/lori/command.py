"""`red lori`: latent reasoning from a shell, and `red demo --method lori`. Heavy imports happen inside, so that `red -h` answers at once."""

from __future__ import annotations

import click

from red.commands import SettingsCommand, config_of
from red.files import require_existing


@click.command("lori", cls=SettingsCommand, settings="red.lori.config:LoRiConfig", short_help="reasoning in latent steps instead of a written chain of thought")
@click.option("--config", metavar="FILE", help="YAML file of settings")
@click.option("--resume", is_flag=False, flag_value="last", metavar="[CHECKPOINT]", help="go on from the last checkpoint in output_dir, or from the one that is named")
@click.option("--eval_file", metavar="FILE", help="held-out problems; their loss is reported")
@click.option("--dry_run", is_flag=True, help="print the plan and the first problem, and stop: no weight is read, nothing written")
@click.pass_context
def lori(ctx, config, resume, eval_file, dry_run) -> None:
    """Train a student that reasons in a few latent steps instead of writing its chain of thought; the result is OUTPUT_DIR/student, which red.lori.load reads.

      red lori --teacher_model_name_or_path T --train_file gsm8k_aug.jsonl --output_dir run
      red lori --config run.yaml --preset codi --learning_rate 2e-4         the command line wins over the file
      red lori --preset explicit_cot ... --output_dir teacher               fine-tunes the explicit teacher that the others learn from
      red lori --config run.yaml --resume                                   goes on from the last checkpoint in output_dir

    A row of the data is {"question": ..., "steps": ["<<3*4=12>>", ...], "answer": "12"}. Every setting below works in the file and,
    as --setting value, on the command line. So does every other field of transformers' TrainingArguments. docs/lori.md says which parts are the paper's.
    """
    from red.lori.config import LoRiConfig

    config = config_of(ctx, config, LoRiConfig)
    for path, what in ((config.train_file, "train_file"), (eval_file, "eval_file")):
        if path is not None:
            require_existing(path, what)  # before the teacher is read
    resume = True if resume == "last" else resume or False
    if dry_run:
        from red.lori.dry_run import dry_run as preview

        plan = preview(config, resume=resume, held_out=eval_file is not None)
        return print(plan) if config.process_index == 0 else None

    from red.lori.distillation import distill as run

    result = run(config=config, eval_data=eval_file, resume=resume)
    if config.process_index:
        return
    for name, value in result.metrics.items():
        print(f"{name:>28}  {value:.6g}" if isinstance(value, float) else f"{name:>28}  {value}")
    print(f"The student is in {result.path}")


def demo(output_dir: str, overwrite: bool, **given) -> None:
    """`red demo --method lori`."""
    from red.errors import REDError
    from red.lori.demo import run_demo

    for name in ("starts", "learning_rate", "processes", "device"):
        if given.pop(name, "auto") != "auto":
            raise REDError(f"--{name} belongs to `red demo` without --method lori. Leave it out.")
    if "seed" in given:
        given["seeds"] = (given.pop("seed"),)
    run_demo("runs/demo-lori" if output_dir == "runs/demo" else output_dir, overwrite=overwrite, **given)
