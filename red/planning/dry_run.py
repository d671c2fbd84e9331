"""`red distill --dry_run`: what a run will do, before it does anything.

The teacher's config, its tokenizer and the text are read; no weight is, and nothing is written.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

from accelerate.data_loader import SeedableRandomSampler
from transformers import PreTrainedTokenizerBase

from red.calibration import Calibration
from red.planning import costs
from red.doctor import checks as doctor_checks
from red.training.canary import canary_problems
from red.training.checkpoint_folders import checkpoints, complete, steps_done
from red.config import REDConfig
from red.planning.costs import Sizes
from red.distillation import _tokenizer_beside, check_run, training_source
from red.doctor.examination import free_memory
from red.families import teacher_config
from red.files import START_FILE
from red.fitting.forecast import duration
from red.data.packing import IGNORE
from red.planning.report import aligned
from red.planning.pace import step_seconds
from red.prepare import training_rows
from red.starting import fit_of, forecast_of
from red.data.streaming import PackedStream
from red.data.token_cache import SMALLEST, fingerprint

DOCUMENTS, HEAD, TAIL = 6, 500, 150  # of the first row that are shown, and characters of each


def dry_run(config: REDConfig, *, calibration: str | Path | None = None, resume: bool | str | Path = False, held_out: bool | None = None) -> str:
    """The plan of a `red.distill` in words: both architectures, what is trained, start, text, steps, memory, time, output, and the first row of the first batch.

    Args:
        config, calibration, resume: as in `red.distill`; teacher and text are named in the config.
        held_out: whether there is text to evaluate on; None: not known.

    Raises:
        REDError: what `red.distill` would refuse before it reads a weight, and text that it would refuse.
    """
    teacher, student = check_run(None, None, config, resume, held_out=held_out)
    if resume is True:  # the one that was saved last, which is another than the highest where a run went back; an unsealed one is refused later
        resume = (complete(config.output_dir) or checkpoints(config.output_dir))[-1]
    if calibration:
        Calibration.load(calibration)  # what is no such file is refused
    if config.canary_steps:
        canary_problems(config.canary_file, config.canary_samples)  # a broken file is refused
    shape, tokenizer = teacher_config(teacher), _tokenizer_beside(teacher)
    sizes = Sizes.of(shape)
    rows, batch, told = _text(config, tokenizer, shape)
    lines = ["Dry run: nothing is trained, no weight is read, and nothing is written.", "", *_shapes(teacher, sizes, shape, config), ""]
    done, steps = steps_done(resume) if resume else None, steps_of(config, None if rows is None else len(rows))
    said = [("trained", f"{costs.trainable(sizes, config.hidden_size):,} parameters: the projections and the norms' gains; the teacher's weights stay frozen"),
            *_start(config, calibration, resume, rows), ("text", told), *_training(config, rows, shape, steps, done), *_output(config, student, sizes, steps, done or 0)]
    lines += [f"{name:<9} {text}" for name, text in said]
    return "\n".join([*lines, "", *_shown(batch, tokenizer)])


def _shapes(teacher, sizes: Sizes, shape, config: REDConfig) -> list[str]:
    student = sizes.narrowed(config.hidden_size)
    auto = "float32" if config.device.type == "cpu" else "bfloat16"
    narrow = config.student_dtype if config.student_dtype != "auto" else "bfloat16" if config.bf16 and config.device.type != "cpu" and config.world_size == 1 else "float32"
    rows = [["", "teacher", "student"], ["architecture", shape.model_type, shape.model_type], ["hidden size", f"{sizes.width:,}", f"{student.width:,}"],
            *([name, value, value] for name, value in (("layers", str(sizes.layers)), ("heads × head width", f"{sizes.heads} × {sizes.head_dim}"),
              ("key/value heads", str(sizes.key // sizes.head_dim)), ("FFN width", f"{sizes.ffn:,}"), ("vocabulary", f"{sizes.vocabulary:,}{', tied' * sizes.tied}"))),
            ["parameters", f"{sizes.parameters:,}", f"{student.parameters:,} ({student.parameters / sizes.parameters:.0%})"],
            ["dtype while training", config.teacher_dtype if config.teacher_dtype != "auto" else auto, narrow]]
    return [str(teacher), *aligned(rows)]


def _start(config: REDConfig, calibration, resume, rows) -> list[tuple[str, str]]:
    if resume:
        return [("start", f"goes on from {resume}")]
    count, length = (config.calibration_samples, config.max_length) if rows is None else (min(config.calibration_samples, len(rows)), rows.length)
    on = f"statistics from {calibration}" if calibration else f"calibrated on the first {count} rows of {length} tokens of the text"
    return [("start", f"{config.start}, start_fit={fit_of(config)}, {on}"), ("", forecast_of(config, count * length).partition("\n")[2])]


def _text(config: REDConfig, tokenizer: PreTrainedTokenizerBase, shape) -> tuple:
    """(the rows, or None where they are not counted; those of the first batch; what they are, in words)."""
    name, size = config.train_file or f"data set {config.dataset_name}", config.per_device_train_batch_size
    whole = not config.streaming and config.train_file is not None and fingerprint(config.train_file)[1] < SMALLEST
    reading = copy.copy(config)
    if not whole:  # reads as little as it can
        reading.streaming = reading.packing = True
    rows = training_rows(training_source(None, reading), tokenizer, SimpleNamespace(config=shape), reading)  # it needs no more of the teacher
    if isinstance(rows, PackedStream):
        rows.num_workers = 0
        batch = list(itertools.islice(rows, size))
        why = "read while training" if config.streaming else "not counted here, for it is not small; the first rows are shown, and the training shuffles them all"
        return None, batch, f"{name}: {why}"
    order: range | list[int] = range(len(rows))
    random = getattr(config, "train_sampling_strategy", "random") == "random" and config.accelerator_config.use_seedable_sampler
    if random:
        order = list(SeedableRandomSampler(rows, data_seed=config.seed if config.data_seed is None else config.data_seed))
    documents = len(rows.bounds) - 1
    return rows, [rows[place] for place in order[:size]], (f"{name}: {documents:,} documents (pieces of long ones counted), {rows.num_tokens:,} tokens in {len(rows):,} rows "
                                                           f"of {rows.length}, {rows.fill:.0%} filled")


def steps_of(config: REDConfig, rows: int | None) -> int | None:
    """Optimiser steps of a training on `rows` packed rows, as Trainer counts them; None where neither rows nor max_steps say it."""
    if config.max_steps > 0:
        return config.max_steps
    if rows is None:
        return None
    each = config.per_device_train_batch_size * config.world_size
    batches = rows // each if config.dataloader_drop_last else -(-rows // each)
    return -int(-config.num_train_epochs * max(-(-batches // config.gradient_accumulation_steps), 1) // 1)


def left(steps: int, done: int | None) -> str:
    """What of `steps` a run that goes on still has to do, in words."""
    return "" if done is None else f"; {done:,} are done, {max(steps - done, 0):,} remain"


def _training(config: REDConfig, rows, shape, steps: int | None, done: int | None) -> list[tuple[str, str]]:
    own = config.per_device_train_batch_size * config.gradient_accumulation_steps  # rows of a step on one process
    length = rows.length if rows is not None else config.max_length
    step = f"{own * config.world_size * length:,} tokens a step: "
    step += f"{_count(config.per_device_train_batch_size, 'row')} × {_count(config.gradient_accumulation_steps, 'micro-batch')} × {_count(config.world_size, 'process')}"
    total = "" if steps is None else f"{steps:,} steps, {steps * own * config.world_size * length:,} tokens"
    passes = "" if rows is None or steps is None else f" ({steps * own * config.world_size / len(rows):.2g} passes over the text)"
    pace = step_seconds(shape, config, length)
    word = "at least" if pace.floor else "about"
    memory = doctor_checks.memory(Sizes.of(shape), config, free_memory(config.device), None if rows is None else length)
    whole = "" if steps is None else f"{word} {duration(pace.seconds * steps)}"
    if steps is not None:
        whole += ": " if done is None else f", {duration(pace.seconds * max(steps - done, 0))} of it for the steps that remain: "
    return [("training", f"{total}{passes}{left(steps, done)}; {step}" if steps is not None else f"{config.num_train_epochs:g} epochs; {step}"),
            ("time", f"{whole}{pace.seconds:.3g} s a step, {pace.how}{', communication not counted (red plan counts it)' * (config.world_size > 1)}"),
            ("memory", memory.found), *([("", f"-> {memory.remedy}")] if memory.remedy else [])]


def _output(config: REDConfig, student: Path, sizes: Sizes, steps: int | None, done: int) -> list[tuple[str, str]]:
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    every = f"{config.save_steps:g} {'steps' if config.save_steps >= 1 else 'of the steps'}"
    saved = {"no": "no checkpoints", "steps": f"checkpoint-N every {every}"}.get(strategy, f"checkpoint-N at each {strategy}")
    trackers = ", ".join(name for name in config.report_to if name != "none")
    disk = doctor_checks.disk(sizes, config, steps, done)
    fitted = f", {START_FILE}" * (fit_of(config) != "none")
    return [("output", f"{config.output_dir}: {saved}{fitted}, and the result in {student}{f'; logs to {trackers}' if trackers else ''}"),
            ("disk", disk.found), *([("", f"-> {disk.remedy}")] if disk.remedy else [])]


def _shown(batch: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first row of the batch, document by document, as text."""
    row = {key: value.tolist() for key, value in batch[0].items()}
    used = sum(row["token_mask"])
    begins = [place for place in range(used) if row["position_ids"][place] == 0]
    counted = sum(label != IGNORE for label in row["labels"])
    lines = [f"First batch: {_count(len(batch), 'row')}. The first has {_count(len(begins), 'document')} of {used:,} tokens and "
             f"{len(row['token_mask']) - used:,} of padding; {counted:,} tokens count in the loss.", "⟦ ⟧ encloses what is read and not learnt."]
    for number, (begin, end) in enumerate(list(zip(begins, [*begins[1:], used], strict=True))[:DOCUMENTS], 1):
        labels = row["labels"][begin:end]
        lines.append(f"document {number}: {end - begin:,} tokens, {sum(label != IGNORE for label in labels):,} count")
        lines += [f"  │ {line}" for line in _marked(row["input_ids"][begin:end], labels, tokenizer).split("\n")]
    return lines + [f"… and {len(begins) - DOCUMENTS} more documents"] * (len(begins) > DOCUMENTS)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith(('s', 'ch')) else 's'}"


def _marked(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A document's text with what has no label in brackets; the middle of a long one left out."""
    pieces, done = [], ""
    for counts, run in itertools.groupby(range(len(ids)), lambda place: labels[place] != IGNORE):
        text = tokenizer.decode(ids[:list(run)[-1] + 1], skip_special_tokens=False)
        piece, done = text[len(done):] if text.startswith(done) else text, text  # by difference: decoding a part alone would lose its first space
        pieces.append(piece if counts else f"⟦{piece}⟧")
    text = "".join(pieces)
    return printable(text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} … {text[-TAIL:]}")


def printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode() for letter in text)
