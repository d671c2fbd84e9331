"""A plan in words and tables, and the paper's three runs beside what is planned for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from red.planning.planner import SPARE, UTILISATION, Plan, fits, plan

GIB = 2**30
PARTS = {"teacher": "teacher, bf16", "student": "student", "projections": "projections, fp32", "adam": "Adam's moments", "gradients": "student's gradients, fp32",
         "buckets": "data parallel's buckets", "gathered": "gathered weights", "taps": "taps", "activations": "activations", "loss": "loss", "context": "context"}


def report(it: Plan) -> str:
    """Lines for a terminal."""
    settings, first = it.settings, it.placements[0]
    flops, gpu = first.flops, it.gpu
    row, length = settings["per_device_train_batch_size"], settings["max_length"]
    pieces = [("teacher", flops.teacher), ("student", flops.student), ("attention", flops.attention), ("projections", flops.projections),
              ("targets", flops.targets), ("recomputed", flops.recomputed)]
    lines = [
        f"{it.name}: hidden_size {it.teacher.width} -> {it.student.width}, {it.teacher.layers} layers, micro-batches of {row} × {length} tokens on each {gpu.name}",
        f"parameters   teacher {billions(it.teacher.parameters)}, student {billions(it.student.parameters)}, trained {billions(it.trainable)}",
        f"GFLOP/token  {' + '.join(f'{name} {value / 1e9:.2f}' for name, value in pieces if value)} = {flops.total / 1e9:.2f}; "
        f"floor (2 teacher + 6 student) {flops.floor / 1e9:.2f}",
        "", f"GiB on each GPU, sharding={settings['sharding']}, checkpointing={settings['checkpointing']}, student in {settings['student_dtype']}"
        f"{' on one GPU, in float32 on several' if len(it.placements) > 1 and settings['student_dtype'] != 'float32' else ''}",
        *aligned(memory_rows(it)),
        "", f"Speed at {settings['utilisation']:.0%} of the {gpu.flops / 1e12:.0f} TFLOP/s of the data sheet: "
            f"{'assumed, not measured' if settings['utilisation'] == UTILISATION else 'as given'}",
        *aligned(speed_rows(it)),
        "", "The range of hours, and of the share of the time that computes: all communication hidden behind compute, or none of it. "
            f"What fits leaves {SPARE:.0%} of the memory free.",
    ]
    if not fits(it.placements[-1].memory, gpu):
        lines.append(f"This micro-batch does not fit into {gpu.memory / GIB:.1f} GiB: use fewer rows, checkpointing, sharding over more GPUs, or a larger GPU.")
    if it.placements[-1].shards > 1 and it.start_bytes > (1 - SPARE) * gpu.memory:
        lines.append(f"It could not start: before it shards, each GPU holds whole weights, {it.start_bytes / GIB:.0f} GiB. Take a GPU that holds them.")
    return "\n".join(lines)


def memory_rows(it: Plan) -> list[list[str]]:
    rows = [["GPUs", *(str(one.gpus) for one in it.placements)]]
    for part, label in PARTS.items():
        held = [getattr(one.memory, part) for one in it.placements]
        if any(held):
            rows.append([label, *(f"{value / GIB:.1f}" for value in held)])
    rows.append(["peak", *(f"{one.memory.peak / GIB:.1f}" for one in it.placements)])
    rows.append([f"fits {it.gpu.memory / GIB:.1f}", *("yes" if fits(one.memory, it.gpu) else "no" for one in it.placements)])
    rows.append(["largest micro-batch, rows", *(str(one.largest_batch) if one.largest_batch else "none" for one in it.placements)])
    return rows


def speed_rows(it: Plan) -> list[list[str]]:
    def cells(label, value):
        return [label, *(value(one) for one in it.placements)]

    return [
        cells("GPUs", lambda one: str(one.gpus)),
        cells("micro-batches a step", lambda one: str(one.accumulation)),
        cells("tokens a step", lambda one: f"{one.step_tokens:,}"),
        cells("GB received a step", lambda one: f"{one.traffic.bytes / 1e9:.1f}"),
        cells("seconds of that", lambda one: f"{one.traffic.seconds:.3f}"),
        cells("seconds of compute", lambda one: f"{one.compute:.3f}"),
        cells("share that computes", lambda one: span(one.efficiency[0], one.efficiency[1], "{:.0%}".format)),
        cells("tokens/s a GPU", lambda one: f"{one.tokens_per_second:,.0f}"),
        cells(f"hours for {billions(it.settings['tokens'])} tokens", lambda one: span(one.hours, one.hours_apart, duration)),
    ]


@dataclass(frozen=True)
class PaperRun:
    """A run of the paper (arXiv 2605.29327), on 8 H800."""

    student: str
    teacher: str
    width: int
    width_note: str  # where the width is not published
    tokens: float
    step_tokens: int
    hours: float
    peak: float | None  # GB a GPU


PAPER = (
    PaperRun("RED-1.5B", "Llama-3.2-3B", 1536, "", 10e9, 49152, 30, 56.0),
    PaperRun("RED-1.7B", "Qwen2.5-3B", 1200, "about", 20e9, 32768, 79, None),
    PaperRun("RED-4B", "Qwen2.5-7B", 1876, "inferred from 4 B", 18e9, 32768, 140, None),
)


def paper_rows() -> list[list[str]]:
    """Each run as published, what it implies, and the plan for its GPUs, tokens and step, with a start that selects channels, sharded.

    The last columns are the peak of that plan, and of one with a copy of everything on each GPU: how the published runs were sharded is not stated.
    """
    rows = [["student", "teacher", "width", "tokens", "hours, published", "= tokens/s a GPU", "= of the peak, on the floor", "hours, planned", "peak GB, published",
             "planned, sharded", "planned, copies"]]
    for run in PAPER:
        length = 2048
        asked = dict(gpu="H800", gpus=8, max_length=length, per_device_train_batch_size=run.step_tokens // 8 // length, tokens=run.tokens,
                     gradient_accumulation_steps=1, tap_target="gather")
        found = plan(run.teacher, run.width, **asked)
        there, copies = found.placements[-1], plan(run.teacher, run.width, **asked, sharding="none").placements[-1]
        speed = run.tokens / (run.hours * 3600) / 8
        width = f"{run.width} ({run.width_note})" if run.width_note else str(run.width)
        rows.append([run.student, run.teacher, width, billions(run.tokens), f"{run.hours:g}", f"{speed:,.0f}", f"{speed * there.flops.floor / found.gpu.flops:.0%}",
                     span(there.hours, there.hours_apart, duration), "not stated" if run.peak is None else f"{run.peak:g}", f"{there.memory.peak / 1e9:.0f}",
                     f"{copies.memory.peak / 1e9:.0f}"])
    return rows


def billions(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 or number == 0 else f"{number / 1e6:.3g} M"


def duration(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def span(low: float, high: float, form: Callable[[float], str]) -> str:
    least, most = form(low), form(high)
    return least if least == most else f"{least}–{most}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]) for row in rows]
