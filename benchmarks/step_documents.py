"""The tables of docs/step.md that are computed or measured: `python benchmarks/step_documents.py` writes them between their markers.

Predictions come from step_forecast.py; measurements from benchmarks/results/step_*.json (`benchmarks/step.py`, a GPU) and benchmarks/results/step_cpu.json
(`pytest benchmarks/test_step.py --benchmark-only --kernels-json`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.documents import between_markers, table
from benchmarks.ladder import SIZES, setups
from benchmarks.step_forecast import forecast

PAGE, RESULTS = ROOT / "docs/step.md", ROOT / "benchmarks/results"
SIZE = "llama-3.2-3b"
PARTS = ("products", "attention", "loss", "taps", "layers", "weights")


def ladder(found: dict | None) -> str:
    """A row a rung: the prediction by part, and beside it what was measured."""
    rows = {row["rung"]: row for row in found["rows"]} if found else {}
    head = ["rung", *(f"{part}, ms" for part in PARTS), "update, ms", "predicted tokens/s", "predicted GiB", "measured tokens/s", "MFU", "measured GiB"]
    lines = []
    for setup in setups(gpu=True, complete=True):
        expected, row = forecast(setup, SIZES[SIZE]), rows.get(setup.rung.name, {"status": "not measured"})
        told = [row["status"], "", ""]
        if row["status"] == "measured":
            told = [f"{row['tokens_per_second']:.0f}", f"{100 * row['mfu']:.0f} %" if "mfu" in row else "", f"{row['memory']['device_gib']:.1f}"]
        parts = [f"{1e3 * getattr(expected, part):.0f}" for part in (*PARTS, "update")]
        peak = "" if expected.peak_gib is None else f"{expected.peak_gib:.1f}"
        lines.append([setup.rung.name, *parts, f"{round(expected.tokens_per_second, -2):.0f}", peak, *told])
    where = "Not measured on a GPU yet." if found is None else f"Measured on {found['device']}, torch {found['versions']['torch']}, commit {found['commit']}."
    return f"{table(head, lines)}\n\n{where}"


def changes() -> str:
    return "\n".join(f"* **{setup.rung.name}**: {setup.rung.why}." for setup in setups(gpu=True, complete=True))


def on_a_cpu(found: dict | None) -> str:
    if found is None:
        return "Not measured."
    rows = [row for row in found["rows"] if row["op"] == "step"]
    lines = [[row["variant"], f"{row['shape']['d']} → {row['shape']['kept']}, {row['shape']['layers']} layers, {row['shape']['V']} words, {row['shape']['rows']} × {row['shape']['length']} tokens",
              f"{row['rivals']['eager LRC']['median_ms']:.0f} ± {100 * row['rivals']['eager LRC']['spread']:.0f} %", f"{row['median_ms']:.0f} ± {100 * row['spread']:.0f} %",
              f"{row['ratios']['eager LRC']:.2f}"] for row in rows]  # fmt: skip
    return f"{table(('case', 'shape', 'eager LRC, ms', 'red, ms', 'times faster'), lines)}\n\n{found['device']}, torch {found['versions']['torch']}, commit {found['commit']}."


def filled(page: str) -> str:
    """`page` with every table between its markers."""
    gpu = next((found for path in sorted(RESULTS.glob("step_*.json")) if (found := json.loads(path.read_text())).get("size") == SIZE), None)
    cpu = RESULTS / "step_cpu.json"
    return between_markers(page, {"changes": changes(), "ladder": ladder(gpu), "cpu": on_a_cpu(json.loads(cpu.read_text()) if cpu.exists() else None)})


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
