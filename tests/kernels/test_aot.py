"""Every Triton kernel compiles for Ampere and Hopper, fits, and does not spill. In processes of their own: this one interprets.

Every launch for Hopper and the first of each op for Ampere, for time's sake; `python benchmarks/aot.py` does all.
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


@pytest.mark.parametrize("op", sorted(backend.TRITON_OPS))
def test_compiles_fits_and_does_not_spill(op, tmp_path):
    out = tmp_path / "aot.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "benchmarks/aot.py", "--ops", op, "--brief", "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["launch"] for row in rows if row["arch"] == 90} == {chosen.name for chosen in launch.LAUNCHES[op]} and {row["arch"] for row in rows} == {80, 90}
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= SHARED_BYTES[row["arch"]] and 8 <= row["registers"] <= 255, row


def test_every_kernel_has_cases_and_launches():
    sys.path.insert(0, str(ROOT))
    from benchmarks.aot_cases import CASES

    assert set(CASES) == backend.TRITON_OPS == set(launch.LAUNCHES)
    for launches in launch.LAUNCHES.values():
        assert len({chosen.name for chosen in launches}) == len(launches) <= 4
