"""Every Triton kernel compiles for Ampere and Hopper, fits, and does not spill. In a process of its own: this one interprets.

Every case of an op's first launch and a third of the others for Hopper, a third of the first launch for Ampere, for time's sake; `python benchmarks/aot.py` does all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from red_kernels import backend
from red_kernels.triton import launch

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = {80: 166912, 90: 232448}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(the table's rows, what the script said): all ops in one process, whose imports take longer than most compilations."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "benchmarks/aot.py", "--brief", "--out", str(folder / "aot.json")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "aot.json").is_file(), done.stdout + done.stderr
    return json.loads((folder / "aot.json").read_text())["rows"], done


@pytest.mark.parametrize("op", sorted(backend.TRITON_OPS))
def test_compiles_fits_and_does_not_spill(compiled, op):
    rows = [row for row in compiled[0] if row["op"] == op]
    assert {row["launch"] for row in rows if row["arch"] == 90} == {chosen.name for chosen in launch.LAUNCHES[op]} and {row["arch"] for row in rows} == {80, 90}
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= SHARED_BYTES[row["arch"]] and 8 <= row["registers"] <= 255, row


def test_the_script_finds_no_fault(compiled):
    assert compiled[1].returncode == 0, compiled[1].stdout + compiled[1].stderr


def test_every_kernel_has_cases_and_launches():
    sys.path.insert(0, str(ROOT))
    from benchmarks.aot_cases import CASES

    assert set(CASES) == backend.TRITON_OPS == set(launch.LAUNCHES)
    for launches in launch.LAUNCHES.values():
        assert len({chosen.name for chosen in launches}) == len(launches) <= 4
