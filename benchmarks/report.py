"""Rows of measurements as JSON (one file a device, benchmarks/results/kernels_<device>.json) and as lines to read."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str | None]:
    """Of what decides a time; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit measured, with + where files differ from it; None outside a checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" * bool(changed)


def document(rows: Sequence[dict], ceilings: dict) -> dict:
    return {"device": timing.device_name(), "ceilings": ceilings, "versions": versions(), "commit": commit(), "rows": list(rows)}


def file_name(device: str) -> str:
    return f"kernels_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def lines(rows: Sequence[dict], ceilings: dict) -> Iterator[str]:
    yield f"{timing.device_name()}: copy {ceilings['copy_gbps']:.0f} GB/s, product {ceilings['product_tflops']:.3g} TFLOP/s ({ceilings['product_dtype']})"
    yield from map(line, rows)
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        about = [f"{row['op']} {row['variant']}" for row in rows if note in row["notes"]]
        yield f"note: {note} [{about[0]}{f' and {len(about) - 1} more' * (len(about) > 1)}]"
    yield from goal_lines(rows)


def line(row: dict) -> str:
    rate = f"{row['gbps']:.4g} GB/s" if "gbps" in row else f"{row['tflops']:.3g} TFLOP/s"
    peak = "" if row["peak_mib"] is None else f", peak {row['peak_mib']:.0f} MiB"
    against = "".join(f", {ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    time = f"{row['median_ms']:.4g} ms ± {100 * row['spread']:.0f} % ({row['how']})"
    name = f"{row['target'] or '--'} {row['op']} {row['variant']} [{shape}] {row['dtype']}"
    return f"{name}: {time}, {rate}, {row['percent_of_ceiling']:.3g} % of the ceiling{peak}{against}"


def goal_lines(rows: Sequence[dict]) -> Iterator[str]:
    """One line a goal: whether it is met, what was wanted, what was found."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    for row in rows:
        for goal in row["goals"]:
            value = "" if goal["value"] is None else f" ({goal['value']:.3g})"
            yield f"{row['target']} {row['op']} {row['variant']}: {goal['name']} {goal['goal']}: {words[goal['met']]}{value}"
