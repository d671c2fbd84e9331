"""The tables of docs/scale.md, from `red.plan` and `red.planning.costs`: `python benchmarks/scale.py` writes them between their markers."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.documents import between_markers, table
from red.planning import costs
from red.planning.costs import Sizes
from red.planning.gpus import GPUS
from red.planning.report import GIB, PARTS, duration, paper_rows, span
from red.planning.planner import UTILISATION, Placement, config_of, fits, plan

PAGE = ROOT / "docs/scale.md"
SMALL, LARGE = ("Llama-3.2-3B", 1536), ("Llama-3.1-70B", 4096)
LENGTH = 2048


def last(teacher: str, width: int, gpus: int, **options) -> Placement:
    """The plan for exactly `gpus` GPUs."""
    return plan(teacher, width, gpus=gpus, **options).placements[-1]


def paper() -> str:
    return table(*_split(paper_rows()))


def parts() -> str:
    """One micro-batch of 6144 tokens, by part."""
    columns = [("1 GPU", 1, {}), ("1, cheap", 1, {"checkpointing": "cheap"}), ("1, full", 1, {"checkpointing": "full"}), ("8, sharded", 8, {}),
               ("8, copies", 8, {"sharding": "none"}), ("1000, sharded", 1000, {})]
    found = [last(*SMALL, gpus, tap_target="gather", **options) for _, gpus, options in columns]
    rows = [[label, *(f"{getattr(one.memory, part) / GIB:.1f}" for one in found)] for part, label in PARTS.items()]
    return table(["GiB", *(label for label, *_ in columns)], [*rows, ["peak", *(f"{one.memory.peak / GIB:.1f}" for one in found)]])


def growth() -> str:
    """One micro-batch a step from 8 GPUs on."""
    cases = [(1, "full"), (8, "full"), (64, "full"), (1000, "full"), (8, "none"), (64, "none"), (1000, "none")]
    rows = []
    for gpus, sharding in cases:
        one = last(*SMALL, gpus, sharding=sharding, tap_target="gather")
        rows.append([gpus, "" if gpus == 1 else "sharded" if sharding == "full" else "copies", one.accumulation, f"{one.step_tokens:,}", f"{10e9 / one.step_tokens:,.0f}",
                     f"{one.traffic.bytes / 1e9:.1f}", f"{one.traffic.seconds:.3f}", f"{one.compute:.3f}", span(*one.efficiency, "{:.0%}".format),
                     f"{one.tokens_per_second:,.0f}", span(one.hours, one.hours_apart, duration)])
    head = ["GPUs", "", "micro-batches a step", "tokens a step", "steps for 10 B", "GB received a step", "s of that", "s of compute", "share that computes", "tokens/s a GPU",
            "hours for 10 B"]
    return table(head, rows)


def kinds() -> str:
    """What a GPU receives in a step of one micro-batch, by what it is for, sharded."""
    names = ("teacher", "student", "gradients", "projections")
    rows = []
    for teacher, width in (SMALL, LARGE):
        for gpus in (8, 1000):
            one = last(teacher, width, gpus, gradient_accumulation_steps=1, tap_target="gather")
            sizes = Sizes.of(config_of(teacher))
            rows.append([f"{teacher} → {width}", gpus, *(f"{getattr(one.traffic, name) / 1e9:.2f}" for name in names), f"{one.traffic.bytes / 1e9:.1f}",
                         f"{costs.BF16 * sizes.layer / gpus / 1e6:.3g}", f"{costs.BF16 * sizes.narrowed(width).layer / gpus / 1e6:.3g}"])
    return table(["run", "GPUs", *(f"{name}, GB" for name in names), "all", "MB a GPU sends of one teacher layer", "… of one student layer"], rows)


def break_even() -> str:
    """Tokens of a micro-batch on one GPU from which computing takes as long as receiving."""
    rows = []
    for name, gpu in GPUS.items():
        cells = []
        for teacher, width in (SMALL, LARGE):
            sizes = Sizes.of(config_of(teacher))
            for gpus in (8, 64):
                flops = costs.flops(sizes, width, context=LENGTH, sharing=gpus * LENGTH)
                moved = costs.traffic(sizes, width, gpu, shards=gpus, replicas=1, micro_steps=1)
                cells.append(f"{moved.seconds / ((flops.useful - flops.projections) / (gpu.flops * UTILISATION)):,.0f}")
        rows.append([name, *cells])
    return table(["GPU", *(f"{teacher} on {gpus}" for teacher, _ in (SMALL, LARGE) for gpus in (8, 64))], rows)


def nodes() -> str:
    """Sharded over everything, or within nodes of eight with a sum of gradients between them, 6144 and 2048 tokens a GPU."""
    rows = []
    for (teacher, width), card, rows_each in ((SMALL, "H100", 3), (LARGE, "H200", 1)):
        sizes, gpu = Sizes.of(config_of(teacher)), GPUS[card]
        for shards in (1000, 8):
            asked = dict(shards=shards, replicas=1000 // shards)
            held = costs.memory(sizes, width, rows_each * LENGTH, checkpointing="full", **asked)
            moved = costs.traffic(sizes, width, gpu, micro_steps=1, **asked)
            rows.append([f"{teacher} → {width}, {rows_each * LENGTH} tokens, {card}", "all 1000" if shards == 1000 else "8, 125 copies", f"{held.peak / GIB:.1f}",
                         "yes" if fits(held, gpu) else "no", f"{moved.bytes / 1e9:.0f}", f"{moved.seconds:.2f}"])
    return table(["run", "shared by", "peak, GiB", "fits", "GB received a step", "s of that"], rows)


def seventy() -> str:
    rows = []
    for card in ("H100", "H200"):
        for gpus in (8, 16, 64, 1000):
            found = {kind: last(*LARGE, gpus, gpu=card, per_device_train_batch_size=1, checkpointing=kind, tap_target="gather", sync_each_batch=True)
                     for kind in ("none", "cheap", "full")}
            sizes = [str(one.largest_batch * LENGTH) if one.largest_batch else "none" for one in found.values()]
            held = f"{(found['full'].memory.held + found['full'].memory.gathered) / GIB:.1f}"
            kind = next((kind for kind in found if found[kind].largest_batch), None)
            best = kind and last(*LARGE, gpus, gpu=card, per_device_train_batch_size=found[kind].largest_batch, checkpointing=kind, tap_target="gather", sync_each_batch=True)
            rows.append([f"{gpus} {card}", held, *sizes, *(["", "", "", ""] if best is None else [
                f"{best.step_tokens:,}", span(*best.efficiency, "{:.0%}".format), f"{best.tokens_per_second:,.0f}", span(best.hours, best.hours_apart, duration)])])
    return table(["GPUs", "GiB without any token", "largest micro-batch, tokens: none", "cheap", "full", "tokens a step", "share that computes", "tokens/s a GPU", "hours for 10 B"],
                 rows)


def _split(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return rows[0], rows[1:]


TABLES = {"paper": paper, "parts": parts, "growth": growth, "kinds": kinds, "break-even": break_even, "nodes": nodes, "seventy": seventy}


def filled(page: str) -> str:
    """`page` with every table between its markers."""
    return between_markers(page, {name: make() for name, make in TABLES.items()})


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
