"""Time every launch that red_kernels/triton/launch.py names, at the shapes of the benchmarks: `python benchmarks/launches.py --out FILE`.

A table of medians, the default marked, and JSON, so that defaults are chosen from evidence in one call. Without a GPU, `--shapes tiny` rehearses in
Triton's interpreter, whose times mean nothing.

    python benchmarks/launches.py --ops gather gather_many
    python benchmarks/launches.py --once linear_kd         its first case, run twice under the default launch: something to profile
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
from torch.utils._pytree import tree_map

from benchmarks import cases, report, timing
from benchmarks.cases import Case
from red.files import atomic_write_text
from red_kernels.triton import launch


def cases_of(op: str, size: str) -> list[Case]:
    """Those of the benchmark whose name begins the op's: gather_rows is timed by benchmarks/test_gather.py."""
    files = [path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")]
    owner = max((name for name in files if op == name or op.startswith(name + "_")), key=len)
    return importlib.import_module(f"benchmarks.test_{owner}").cases(size)


def sweep(ops: list[str], size: str, seconds: float) -> Iterator[dict]:
    """Rows of every op, case and launch; one that fails, or gives another result than the default, says so."""
    for op in ops:
        for case in cases_of(op, size):
            sample, copies = case.draw(), timing.rotation(case.draw)
            usual = None
            for chosen in launch.LAUNCHES[op]:
                row = {"op": op, "variant": case.variant, "launch": chosen.name, "shape": case.shape, "options": chosen.options, "median_ms": None}
                with launch.forcing(op, chosen.name):
                    try:
                        found = case.run(*tree_map(fresh, sample))
                        usual = found if usual is None else usual
                        row["fault"] = cases.disagreement(found, usual)
                        time = timing.measure(case.run, copies, seconds, repeats=3 if seconds else 1)
                        row |= {"median_ms": time.median * 1e3, "spread": time.spread, "how": time.how}
                    except Exception as error:
                        row["fault"] = f"{type(error).__name__}: {str(error)[:200]}"
                yield row
            timing.forget()


def fresh(x: torch.Tensor) -> torch.Tensor:
    """A copy, for an op that adds to what it is given."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def lines(rows: list[dict]) -> list[str]:
    """Per case its launches, fastest first, as multiples of the fastest; * marks the first of the list, the default unless a heuristic says otherwise."""
    found = []
    for op, variant in dict.fromkeys((row["op"], row["variant"]) for row in rows):
        group = [row for row in rows if (row["op"], row["variant"]) == (op, variant)]
        timed = sorted((row for row in group if row["median_ms"] is not None), key=lambda row: row["median_ms"])
        names = [f"{row['launch']}{'*' * (row is group[0])} {row['median_ms'] / timed[0]['median_ms']:.2f}x" for row in timed]
        found.append(f"{op}, {variant}: " + (f"{timed[0]['median_ms']:.4g} ms; {', '.join(names)}" if timed else "no launch ran"))
        found += [f"    {row['launch']}: {row['fault']}" for row in group if row["fault"]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(launch.LAUNCHES), default=list(launch.LAUNCHES), metavar="OP", help="default: all")
    parser.add_argument("--shapes", choices=("gpu", "tiny"), default="gpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="spent on each launch at least; 0 = timed once (default: 0.1)")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--once", choices=list(launch.LAUNCHES), metavar="OP", help="run one op twice, untimed")
    options = parser.parse_args()
    if not timing.GPU and options.shapes == "gpu":
        parser.error("no GPU is visible; --shapes tiny rehearses in Triton's interpreter")
    os.environ["RED_BACKEND"] = "triton"
    if not timing.GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the first kernel
    if options.once:
        case = cases_of(options.once, options.shapes)[0]
        inputs = case.draw()
        for _ in range(2):
            case.run(*inputs)
        timing.synchronise()
        return 0
    rows: list[dict] = []
    about = {"device": timing.device_name(), "versions": report.versions(), "commit": report.commit()}
    try:
        for row in sweep(options.ops, options.shapes, options.seconds):
            rows.append(row)
            if options.out:  # out of time, or a launch that left the device unusable: what was measured before is kept
                atomic_write_text(options.out, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    finally:
        print("\n".join(lines(rows)), flush=True)
    return sum(row["fault"] is not None for row in rows) > 0


if __name__ == "__main__":
    sys.exit(main())
