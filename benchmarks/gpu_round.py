"""Everything a borrowed GPU can tell, in one call under 8 minutes: `python benchmarks/gpu_round.py --out DIR`.

    extension   csrc/ built for this machine's torch
    sanitizer   its kernels under compute-sanitizer, where that is installed: memory and races
    aot         registers, spills and shared memory of every kernel with that machine's Triton
    tests       tests/kernels and tests/test_gpu*.py on the GPU, the trainer's tests with that machine's versions; a process a file, these three side by side
    benchmarks  every row of benchmarks/test_*.py at the shapes of the targets, as JSON
    step        a whole training step of the Llama-3.2-3B shape, optimisation by optimisation, beside the eager LRC step
    launches    every launch of red_kernels/triton/launch.py
    erank       the rows of the effective rank, whose rivals take tens of seconds
    ncu         a profile of the kernel furthest from its ceiling, where ncu runs
    demo        the embedded example on the GPU

Each part has a limit, and all share the time: a late part gets what is left. With `--only` the limits grow to fill the time, so that several calls measure more than one:

    --only extension sanitizer aot tests
    --only extension benchmarks launches erank ncu
    --only extension step demo

A part that fails does not stop the others, and what a part has measured is in its file before it is stopped. The exit code is the number that failed, extension,
sanitizer, aot, ncu and the demo aside. DIR gets at most 8 files; the summary is printed last, failures first, then every goal. Without a GPU it refuses, unless `--cpu` asks
for a rehearsal: a few tests, tiny shapes, Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from benchmarks import report

SECONDS = 470  # for everything
GRACE = 8  # between asking a process to stop and stopping it: pytest then still writes its rows
LOG_BYTES = 1 << 20  # of one command that are kept
MARGIN = 10  # between the time that a part believes to have and its limit
CHECKED = """
import torch
from red_kernels import erank, extension
assert extension.has("cuda"), extension.why_not() or "built without its CUDA part"
for shape in (3, 50, 20), (2, 128, 129), (1, 300, 90):
    for x in torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda", dtype=torch.float64):
        for precision in "float64", "float32":
            erank(x, torch.arange(shape[1], device="cuda").lt(shape[1] - 1).expand(shape[:2]), precision=precision)
torch.cuda.synchronize()
"""  # the extension's kernels, small
NOT_ON_A_GPU = {"test_aot.py"}  # compiles in processes of its own: the part aot does that
MANY_KERNELS = {"test_triton_linear_kd.py", "test_triton_gather.py"}  # over a hundred variants each, half a second and more to compile
SECONDS_HERE = "SECONDS"  # in a command's words: its limit, less MARGIN


class Command(NamedTuple):
    name: str
    limit: float  # seconds, from the start of its group
    words: Sequence[str | Path]
    optional: bool = False


def first_parts(out: Path, cpu: bool) -> list[list[Command]]:
    """Groups of commands; those of a group run side by side."""
    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    shapes = ["--shapes", "tiny"] if cpu else []
    step = ["--size", "tiny"] if cpu else ["--micro_steps", "2", "--seconds", SECONDS_HERE]  # of eight: a rung's start takes longer than its steps
    rows = [*pytest, "--benchmark-only", *shapes, "--kernels-json"]
    side_by_side = ["-n", "3"] if importlib.util.find_spec("xdist") else []
    eranks = ["benchmarks/test_erank.py", "benchmarks/test_erank_estimate.py"]
    tools = ["memcheck", "racecheck"] if shutil.which("compute-sanitizer") and not cpu else []
    aot = ["--ops", "tap_mse"] if cpu else ["--arch", "90"]  # one of its two architectures: compiling for both takes longer than the tests
    return [
        *([] if cpu else [[Command("extension", 60, [python, "csrc/build.py"], optional=True)]]),
        [
            Command("aot", 110, [python, "benchmarks/aot.py", "--out", out / "aot.json", *aot], optional=True),
            *[Command(f"sanitizer {tool}", 110, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", python, "-c", CHECKED], optional=True) for tool in tools],
            *[Command(f"tests {path}", 110, [*pytest, *(side_by_side if path.name in MANY_KERNELS else ()), path]) for path in test_files(cpu)],
        ],
        [Command("benchmarks", 115, [*rows, out, "benchmarks", *(f"--ignore={path}" for path in eranks)])],
        [Command("step", 150, [python, "benchmarks/step.py", "--out", out, "--steps", "3", "--warmup", "1", *step])],
        [Command("launches", 60, [python, "benchmarks/launches.py", "--out", out / "launches.json", *shapes, *(["--seconds", "0"] if cpu else [])])],
        [Command("erank", 90, [*rows, out / "kernels_erank.json", *reversed(eranks)])],
    ]


def last_parts(out: Path, scratch: Path, cpu: bool) -> list[list[Command]]:
    """Those that depend on the first."""
    parts, op = [], furthest(kernel_rows(out))
    if shutil.which("ncu") and op and not cpu:
        once = [sys.executable, "benchmarks/launches.py", "--once", op]
        profile = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-name", f"regex:^{op}", "--launch-count", "8"]
        parts.append([Command(f"ncu {op}", 40, [*profile, *once], optional=True)])
    demo = [sys.executable, "-m", "red.cli", "demo", "--output_dir", scratch / "demo", "--steps", "4" if cpu else "150"]
    return [*parts, [Command("demo", 150, demo + ["--starts", "activation"] * cpu, optional=not cpu)]]


def test_files(cpu: bool) -> list[Path]:
    """What only a GPU can say first, the most compilations foremost."""
    if cpu:
        return [Path("tests/kernels/test_op_backend.py"), Path("tests/kernels/test_triton_tap_mse.py"), Path("tests/test_gpu.py")]
    kernels = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/kernels").glob("test_*.py") if path.name not in NOT_ON_A_GPU)
    kernels.sort(key=lambda path: ("linear_kd" not in path.name, "test_op" in path.name))
    return [Path("tests/test_gpu_step.py"), Path("tests/test_gpu.py"), *kernels, Path("tests/test_trainer.py"), Path("tests/test_projections.py")]


def run(command: Command, deadline: float, scratch: Path) -> dict:
    """How it ended; its output is in `log`. Past its limit it is interrupted, then killed with everything it started."""
    began = time.monotonic()
    limit = min(command.limit, deadline - began)
    log = scratch / f"{command.name.replace('/', '_').replace(' ', '_')}.log"
    ended: dict = {"name": command.name, "optional": command.optional, "command": [str(word) for word in command.words], "log": log}
    if limit < 5:
        log.write_text("not started: no time left\n")
        return {**ended, "exit": None, "seconds": 0.0}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # packages may have been brought along
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as file:
        words = [str(word).replace(SECONDS_HERE, f"{max(limit - MARGIN, 1):.0f}") for word in command.words]
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        code = None
        for seconds, stop in ((limit, signal.SIGINT), (GRACE, signal.SIGKILL), (GRACE, None)):
            try:
                code = process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                if stop:
                    os.killpg(process.pid, stop)
    seconds = time.monotonic() - began
    return {**ended, "exit": None if seconds > limit else code, "seconds": seconds}


def kernel_rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("kernels_*.json")) for row in json.loads(path.read_text())["rows"]]


def gpu_state() -> str | None:
    """Clocks, temperature and power as they are now, in words; None without nvidia-smi."""
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{names}: {done.stdout.strip()}" if done.returncode == 0 else None


def furthest(rows: list[dict]) -> str | None:
    """The op whose row of a target is furthest from its ceiling."""
    rows = [row for row in rows if row["target"] and row["op"] != "erank"]  # a library's eigenvalues
    return min(rows, key=lambda row: row["percent_of_ceiling"])["op"] if rows else None


def summary(ended: list[dict], out: Path, seconds: float) -> list[str]:
    """What failed, the goals, the rows, the launches: in that order."""
    failed = [part for part in ended if part["exit"] != 0]
    lines = [f"{len(ended) - len(failed)} of {len(ended)} commands ended well, {seconds:.0f} s, {report.timing.device_name()}, commit {report.commit()}"]
    for part in failed:
        lines.append(f"FAILED {part['name']}: {how(part)} after {part['seconds']:.0f} s{' (optional)' * part['optional']}")
        said = part["log"].read_text(errors="replace").splitlines()
        lines += [f"    {line[:240]}" for line in ([line for line in said if line.startswith(("FAILED", "ERROR"))] or said[-4:])[:12]]
    lines += [f"extension: {part['log'].read_text(errors='replace').strip()[-240:]}" for part in ended if part["name"] == "extension"]  # with its CUDA part, or why not
    rows = kernel_rows(out)
    lines += [*report.goal_lines(rows), *map(report.line, rows)]
    for place in [*out.glob("step_*.json"), *out.glob("launches.json")]:
        try:
            lines += _lines_of(place)
        except Exception as error:  # the rest is not lost for it
            lines.append(f"{place.name} cannot be told: {type(error).__name__}: {error}")
    return lines


def _lines_of(place: Path) -> list[str]:
    found = json.loads(place.read_text())
    if place.name == "launches.json":
        from benchmarks.launches import lines

        return lines(found["rows"])
    from benchmarks.step import lines

    return lines(found)


def keep(part: dict, out: Path) -> None:
    """Its output, or the end of it, in DIR/log.txt; a profile in a file of its own."""
    said = part["log"].read_bytes()[-LOG_BYTES:].decode(errors="replace")
    with open(out / ("ncu.txt" if part["name"].startswith("ncu") else "log.txt"), "a") as file:
        file.write(f"==== {part['name']}: {how(part)} after {part['seconds']:.0f} s\n{said}\n")
    print(f"== {part['name']}: {how(part)} after {part['seconds']:.0f} s", flush=True)


def how(part: dict) -> str:
    return "out of time" if part["exit"] is None else f"exit {part['exit']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and the log; made if missing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only commands whose name begins with one of these")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS})")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.cpu:
        parser.error("no GPU is visible; --cpu rehearses without one")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's `&` leaves it so, and a child would inherit the deaf ear; only the main thread may
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = {"device": report.timing.device_name(), "versions": report.versions(), "commit": report.commit(), "state_before": gpu_state()}
    (out / "log.txt").write_text(json.dumps(about) + "\n")
    print((out / "log.txt").read_text(), flush=True)
    ended, lock = [], threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 if options.cpu else max(2, (os.cpu_count() or 2) * 3 // 4)) as pool:
        scratch = Path(folder)

        def wanted(groups: list[list[Command]]) -> list[list[Command]]:
            return [[one for one in group if not options.only or one.name.startswith(tuple(options.only))] for group in groups]

        def one_part(command: Command, deadline: float) -> None:
            part = run(command, deadline, scratch)
            with lock:
                keep(part, out)
                ended.append(part)

        def go(groups: list[list[Command]], stretch: float) -> None:
            for group in wanted(groups):
                group = [one._replace(limit=one.limit * stretch) for one in group]
                together = time.monotonic() + max((one.limit for one in group), default=0)
                deadline = min(together, began + options.seconds)
                list(pool.map(lambda one, deadline=deadline: one_part(one, deadline), group))

        first = first_parts(out, options.cpu)
        planned = sum(max((one.limit for one in group), default=0) for group in wanted([*first, *last_parts(out, scratch, options.cpu)]))
        stretch = max(options.seconds / planned, 1) if options.only and planned else 1
        go(first, stretch)
        go(last_parts(out, scratch, options.cpu), stretch)
        demo = scratch / "demo/results.json"
        about |= {"state_after": gpu_state(), "demo": json.loads(demo.read_text()) if demo.exists() else None}
        lines = summary(ended, out, time.monotonic() - began)
    parts = [{name: value for name, value in part.items() if name != "log"} for part in ended]
    (out / "round.json").write_text(json.dumps({**about, "parts": parts, "summary": lines}, indent=1) + "\n")
    print("\n" + "\n".join(lines))
    return sum(part["exit"] != 0 and not part["optional"] for part in ended)


if __name__ == "__main__":
    sys.exit(main())
