"""Everything a borrowed GPU can tell, in one call under 8 minutes: `python benchmarks/gpu_round.py --out DIR`.

    gpu       tests/test_gpu.py: ops, calibration, one step and whole runs on the GPU against the CPU
    versions  tests/kernels and the trainer's tests with that machine's versions of torch and transformers, on its CPU
    timings   benchmarks/test_ops.py at GPU shapes, as JSON
    demo      the embedded example on the GPU

Each part has its own time limit and log; one that fails does not stop the others. DIR/round.json says how each ended; the exit code is the
number of parts that did not end well. Without a GPU it refuses, unless `--cpu` asks for a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def parts(out: Path) -> dict[str, tuple[int, list[str]]]:
    """Name -> (limit in seconds, command)."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {
        "gpu": (120, [*pytest, "tests/test_gpu.py"]),
        "versions": (120, [*pytest, "tests/kernels", "tests/test_trainer.py", "tests/test_projections.py"]),
        "timings": (90, [*pytest, "benchmarks", "--benchmark-only", f"--benchmark-json={out / 'timings.json'}"]),
        "demo": (150, [sys.executable, "-m", "red.cli", "demo", "--output_dir", str(out / "demo"), "--steps", "150"]),
    }


def run(name: str, limit: int, command: list[str], out: Path) -> dict:
    """One part: its output goes to DIR/name.log; the last lines are printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    began = time.perf_counter()
    with open(out / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.perf_counter() - began
    print(f"== {name}: {'out of time' if code is None else f'exit {code}'} after {seconds:.0f} s", flush=True)
    print("\n".join((out / f"{name}.log").read_text().splitlines()[-12:]), flush=True)
    return {"exit": code, "seconds": seconds, "limit": limit, "command": command}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON; made if missing")
    parser.add_argument("--only", nargs="+", default=None, help="some of the parts")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.cpu:
        parser.error("no GPU is visible; --cpu rehearses without one")
    options.out.mkdir(parents=True, exist_ok=True)
    out, known = options.out.resolve(), parts(options.out.resolve())
    unknown = set(options.only or ()) - known.keys()
    if unknown:
        parser.error(f"unknown part {sorted(unknown)}; known are {', '.join(known)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {name: run(name, *known[name], out) for name in options.only or known}
    summary = {"device": device, "torch": torch.__version__, "parts": found}
    (out / "round.json").write_text(json.dumps(summary, indent=2) + "\n")
    return sum(part["exit"] != 0 for part in found.values())


if __name__ == "__main__":
    sys.exit(main())
