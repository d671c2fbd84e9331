"""Compile every Triton kernel for Ampere and Hopper on a machine without a GPU, and say what each needs of the hardware.

    python benchmarks/aot.py                                writes benchmarks/results/aot.json, prints the table
    python benchmarks/aot.py --ops tap_mse --arch 90 --out FILE

The ops are called as a user would, at the shapes of aot_cases.py, under every launch that is named in red_kernels/triton/launch.py; instead
of running, each kernel is compiled for the very specialisation that the call would have launched. Registers and spills are ptxas's,
shared memory Triton's. Exit code 1 if a kernel spills, or needs more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.aot_cases import CASES

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # that a block may have, from the CUDA programming guide
BRIEF = 3  # a brief run compiles every third case of what is not the first launch for the last architecture
COLUMNS = ("op", "launch", "case", "kernel", "arch", "registers", "spilled_bytes", "shared_bytes", "warps")


class StubDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # one cache per architecture

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


@contextmanager
def compiling(arch: int, seen: Callable[[str, object, int], None]):
    """Inside, ops take their Triton kernels, and a launch compiles for `arch` and calls `seen(kernel's name, compiled, warps)`."""
    import triton

    from red_kernels import backend

    run, select = triton.JITFunction.run, backend.select

    def compile_only(self, *args, grid, warmup, **kwargs):
        seen(self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs), kwargs.get("num_warps", 4))

    triton.runtime.driver.set_active(StubDriver(arch))
    triton.JITFunction.run = compile_only
    backend.select = lambda op, *tensors: "triton" if op in backend.TRITON_OPS else "torch"
    try:
        yield
    finally:
        triton.JITFunction.run, backend.select = run, select


def resources(compiled, arch: int) -> dict[str, int]:
    """Registers per thread and spilled bytes of the PTX by the ptxas that Triton brings; shared memory per block."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, log)[1])

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return {"registers": number(r"Used (\d+) registers"), "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}


def skipped(launch: int, case: int, last: bool) -> bool:
    """What a brief run leaves out, by the numbers of launch and case and whether it is the last architecture."""
    return (launch + case) % BRIEF > 0 if last and launch else not last and (launch > 0 or case % BRIEF > 0)


def table(ops: list[str], architectures: list[int], brief: bool = False) -> list[dict]:
    from red_kernels.triton import launch

    rows, known = [], set()
    for arch in architectures:
        for op in ops:
            for number, name in enumerate(chosen.name for chosen in launch.LAUNCHES[op]):
                for position, (case, call) in enumerate(CASES[op].items()):
                    if brief and skipped(number, position, arch == architectures[-1]):
                        continue

                    def seen(kernel, compiled, warps, op=op, name=name, case=case, arch=arch):
                        if (compiled.hash, arch) not in known:  # a launch need not change every kernel of its op
                            known.add((compiled.hash, arch))
                            place = dict(op=op, launch=name, case=case, kernel=kernel, arch=arch)
                            rows.append({**place, **resources(compiled, arch), "warps": warps})

                    with compiling(arch, seen), launch.forcing(op, name):
                        call()
    return rows


def faults(rows: list[dict]) -> list[str]:
    found = [f"{row} spills" for row in rows if row["spilled_bytes"]]
    return found + [f"{row} needs more shared memory than {SHARED_BYTES[row['arch']]}" for row in rows if row["shared_bytes"] > SHARED_BYTES[row["arch"]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES), metavar="OP", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, choices=list(SHARED_BYTES), default=[80, 90], help="compute capabilities (default: 80 90)")
    parser.add_argument("--brief", action="store_true", help="all cases of the first launch and a third of the others for the last architecture, a third of the first launch for earlier ones")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/aot.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")
    import torch
    import triton

    rows = table(options.ops, options.arch, options.brief)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    options.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print(" | ".join(COLUMNS))
    for row in rows:
        print(" | ".join(str(row[column]) for column in COLUMNS))
    print("\n".join(faults(rows)))
    return bool(faults(rows))


if __name__ == "__main__":
    sys.exit(main())
