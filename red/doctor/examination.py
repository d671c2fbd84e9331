"""`red doctor`: will this distillation train on what is meant, with a loss that is right, on this machine? Looked at before hours are spent.

It runs the teacher on the first rows of the text; nothing is trained and nothing written but the report that is asked for. The time is that of reading
the teacher and some dozen forward passes over a row.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from red.commands import SettingsCommand, config_of

DOCUMENTS, ROWS = 1000, 2  # of the text that are looked at, and rows that the teacher reads
COLOURS = {True: "\033[32m", False: "\033[31m", None: "\033[33m"}
WORDS = {True: "ok", False: "RED", None: "--"}


@click.command("doctor", cls=SettingsCommand, short_help="before that: labels, packing, loss, weights, disk and memory, looked at on your own teacher and text")
@click.option("--teacher", metavar="TEACHER", help="folder or name on the hub")
@click.option("--data", metavar="FILE", help="the training text: .txt, .jsonl or a saved data set")
@click.option("--config", metavar="FILE", help="YAML file of settings, as for red distill")
@click.option("--output", "--json", "output", metavar="PATH", help="write the findings here too, as JSON")
@click.pass_context
def doctor(ctx, teacher, data, config, output) -> int:
    """Look at a teacher, a text and this machine before a distillation: a list of what is well and what is not, each with its remedy.

      red doctor --teacher path/to/teacher --data corpus.txt
      red doctor --config run.yaml --json doctor.json           the settings of a red distill
      red doctor --teacher T --data corpus.txt --hidden_size 1536 --per_device_train_batch_size 8 --bf16

      vocabulary   the tokenizer's ids, the config's end token, unknown words
      labels       every label at its own token, none at padding; already shifted ones are found
      shift        red's cross entropy of a packed row against transformers' own, document by document; against guessing
      packing      a document alone against the same one among others in its row
      loss         the fused loss and its gradients against the plain formulas in float64
      weights      NaN and infinite values, states likewise, after every layer on the first rows
      disk         room for the checkpoints to come, memory likewise, from the shapes

    Settings as in `red distill` (see red distill -h). Exit code 0 where nothing is red, 1 where something is, 2 for bad input.
    """
    from red.files import atomic_write_json, require_existing, require_place_for

    if output:
        require_place_for(output, "--output")  # a traceback's exit code is 1 too
    config = config_of(ctx, config, given={**({"teacher_model_name_or_path": teacher} if teacher else {}), **({"train_file": data, "dataset_name": None} if data else {})})
    if config.train_file is not None:
        require_existing(config.train_file, "The data path")  # before the teacher is read
    findings = examine(config)
    print(report(findings, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if output:
        atomic_write_json(output, [asdict(finding) for finding in findings])
    return int(any(finding.ok is False for finding in findings))


def examine(config, teacher=None, source=None, tokenizer=None) -> list:
    """All findings, in order.

    Args:
        config: a REDConfig; hidden_size=0 stands for half the teacher's.
        teacher, tokenizer: as in `red.distill`; None takes what the config names.
        source: the training text; None takes what the config names. Its first documents are read.

    Raises:
        REDError: no teacher, or no text that can be read.
    """
    import torch
    from transformers import PreTrainedModel

    from red.data import loading as data
    from red.doctor import checks
    from red.planning.costs import Sizes
    from red.distillation import training_source, with_tokenizer
    from red.errors import REDError
    from red.sharing.export import check_width
    from red.families import teacher_config

    teacher, source = teacher if teacher is not None else config.teacher_model_name_or_path, training_source(source, config)
    if teacher is None or source is None:
        raise REDError("doctor needs a teacher and the training text. Give --teacher and --data (teacher_model_name_or_path and train_file, or dataset_name).")
    shape = teacher.config if isinstance(teacher, PreTrainedModel) else teacher_config(teacher)
    heads = shape.num_attention_heads
    config.hidden_size = config.hidden_size or max(shape.hidden_size // 2 // heads, 1) * heads
    check_width(shape, config.hidden_size)
    free = free_memory(config.device)
    teacher, tokenizer = with_tokenizer(teacher, tokenizer, config)
    teacher = teacher.eval().to(config.device)
    documents = _first(source, tokenizer, config)

    findings: list = []

    def check(name: str, function: Callable, *arguments, needs: Iterable[str] = ()) -> None:
        failed = [finding.name for finding in findings if finding.name in needs and finding.ok is False]
        if failed:
            findings.append(checks.Finding(name, None, f"not looked at before {' and '.join(failed)} is well"))
            return
        try:
            findings.append(function(*arguments))
        except torch.OutOfMemoryError as error:
            findings.append(checks.Finding(name, False, f"out of memory: {str(error).splitlines()[0]}", "Lower max_length, or use a device with more memory."))

    check("weights", checks.weights, teacher)
    check("vocabulary", checks.vocabulary, teacher, tokenizer, documents)
    if findings[-1].ok:
        packed = data.pack(documents, config.max_length, pad_token_id=data.pad_id(tokenizer, teacher.config), packing=config.packing)
        batch = {key: value.to(config.device) for key, value in data.collate([packed[index] for index in range(min(ROWS, len(packed)))]).items()}
        check("labels", checks.labels, batch)
        for name, function, more in (("states", checks.states, ()), ("shift", checks.shift, ()), ("packing", checks.packing, ()), ("loss", checks.loss, (config.hidden_size, config))):
            check(name, function, teacher, batch, *more, needs=("weights", "labels" if name == "shift" else "", "states" if name != "states" else ""))
    sizes = Sizes.of(teacher.config)
    check("disk", checks.disk, sizes, config)
    check("memory", checks.memory, sizes, config, free)
    return findings


def report(findings, *, colour: bool = False) -> str:
    """One line a finding, its remedy below it where it is red."""
    lines, width = [], max(len(finding.name) for finding in findings)
    for finding in findings:
        sign = WORDS[finding.ok].ljust(3)
        lines.append(f"{COLOURS[finding.ok]}{sign}\033[0m" if colour else sign)
        lines[-1] += f"  {finding.name.ljust(width)}  {finding.found}"
        if finding.remedy:
            lines.append(f"     {'':{width}}  -> {finding.remedy}")
    red, unseen = (sum(finding.ok is state for finding in findings) for state in (False, None))
    lines.append(f"\n{len(findings)} checks: {red or 'none'} red{f', {unseen} not looked at' if unseen else ''}.")
    return "\n".join(lines)


def _first(source, tokenizer, config) -> list[dict]:
    from red.data import loading as data

    if isinstance(source, (str, Path)):
        source = data.open_path(Path(source), tokenizer)
    data.check_source(source, tokenizer)
    return data.load_examples(list(islice(source, DOCUMENTS)), tokenizer, text_column=config.text_column, assistant_only_loss=config.assistant_only_loss)


def free_memory(device) -> int:
    """Bytes: of the GPU, or of this machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available
