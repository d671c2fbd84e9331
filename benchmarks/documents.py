"""The tables of docs/kernels.md that are computed: `python benchmarks/documents.py` writes them between their markers.

The floors come from roofline.py, the compiler's resources from benchmarks/results/aot.json (`python benchmarks/aot.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import roofline
from benchmarks.roofline import Work

PAGE, AOT = ROOT / "docs/kernels.md", ROOT / "benchmarks/results/aot.json"
COPY, PRODUCT = 3.0e12, 798e12  # bytes and bf16 FLOPs per second of an H100: a large copy, read and written, and a large product
BF16 = 2
LLAMA_3B = dict(columns=[(3072, 3072), (1024, 3072), (1024, 3072), (8192, 3072), (8192, 3072)], rows=[(3072, 3072), (3072, 8192)])

FLOORS: list[tuple[str, str, str, Work]] = [
    ("K1", "`channel_stats`", "[8, 2048, 4096], an eighth padding", roofline.channel_stats(8 * 1792, 8 * 256, 4096, 16, BF16)),
    ("K2", "`rms_norm_stats`", "[8, 2048, 4096] with residual", roofline.rms_norm_stats(8 * 2048, 4096, 16, BF16, residual=True)),
    ("", "… RMSNorm alone", "the same", roofline.rms_norm(8 * 2048, 4096, BF16, residual=True)),
    ("K3", "`gather`", "activations [6144, 3072 → 1536]", roofline.gather(6144, 3072, 1536, BF16)),
    ("K3", "`gather`", "weight [8192, 3072 → 1536]", roofline.gather(8192, 3072, 1536, BF16)),
    ("K3", "`gather_many`", "all weights of 28 layers of 3072 → 1536", Work(28 * roofline.gather_many(**LLAMA_3B, kept=1536, size=BF16).bytes)),
    ("", "`selection_low_rank`", "[8192, 3072 → 1536], rank 128", roofline.selection_low_rank(8192, 3072, 1536, 128, BF16, BF16)),
    ("", "`covariance`", "[6144, 3072]", roofline.covariance(6144, 3072, BF16)),
    ("K4", "`linear_kd`", "6144 tokens, 128256 words, 3072 → 1536, with gradients", roofline.linear_kd(6144, 128256, 3072, 1536, BF16)),
    ("", "`tap_mse`", "[6144, 1536] of 3072, with gradient", roofline.tap_mse(6144, 1536, 3072, BF16)),
]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def floors() -> str:
    head = ("target", "op", "shape, bf16", "MB", "GFLOP", "floor on an H100", "bound by")
    return table(head, [
        (target, op, shape, f"{work.bytes / 1e6:.4g}", f"{work.flops / 1e9:.5g}" if work.flops else "", duration(work.seconds(COPY, PRODUCT)),
         "memory" if work.memory_bound(COPY, PRODUCT) else "products")
        for target, op, shape, work in FLOORS
    ])  # fmt: skip


def resources(found: dict | None) -> str:
    """One line a kernel: the extremes over its launches and cases."""
    if found is None:
        return "Not compiled yet: `python benchmarks/aot.py`, then `python benchmarks/documents.py`."
    rows = found["rows"]
    architectures = sorted({row["arch"] for row in rows})
    head = ["op", "kernel", "variants", *(f"sm_{arch} {what}" for arch in architectures for what in ("registers", "shared KiB")), "spilled bytes"]
    lines = []
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["kernel"]) == (op, kernel)]
        cells = []
        for arch in architectures:
            here = [row for row in mine if row["arch"] == arch]
            cells += [span(row["registers"] for row in here), span(round(row["shared_bytes"] / 1024, 1) for row in here)]
        variants = max(sum(row["arch"] == arch for row in mine) for arch in architectures)
        lines.append([f"`{op}`", f"`{kernel}`", variants, *cells, max(row["spilled_bytes"] for row in mine)])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{table(head, lines)}\n\n{len(rows)} compilations, {versions}."


def span(values: Iterable[float]) -> str:
    values = sorted(values)
    if not values:
        return ""
    low, high = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return low if low == high else f"{low} – {high}"


def between_markers(page: str, texts: dict[str, str]) -> str:
    """`page` with each text between its markers <!-- name --> and <!-- /name -->, of which there must be one pair."""
    for name, text in texts.items():
        page, times = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
        if times != 1:
            raise ValueError(f"the page has {times} places <!-- {name} --> … <!-- /{name} -->, expected one")
    return page


def filled(page: str) -> str:
    """`page` with both tables between their markers."""
    return between_markers(page, {"floors": floors(), "resources": resources(json.loads(AOT.read_text()) if AOT.exists() else None)})


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
