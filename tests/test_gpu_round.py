"""The GPU round's frame: what it runs in which order, limits, what it says last. Its rehearsal is `python benchmarks/gpu_round.py --cpu --out DIR`."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu_round
from benchmarks.gpu_round import Command


def test_its_parts(tmp_path):
    names = [[command.name.split(" ")[0] for command in group] for group in gpu_round.first_parts(tmp_path, cpu=False)]
    assert names == [["extension"], ["aot", *["tests"] * (len(names[1]) - 1)], ["benchmarks"], ["step"], ["launches"]]
    assert [group[-1].name for group in gpu_round.last_parts(tmp_path, tmp_path, cpu=False)] == ["demo"]  # no rows, so nothing to profile
    tests = [str(path) for path in gpu_round.test_files(cpu=False)]
    assert "tests/test_gpu.py" in tests and "tests/kernels/test_triton_tap_mse.py" in tests and "tests/kernels/test_aot.py" not in tests
    assert all((gpu_round.ROOT / path).exists() for path in tests) and gpu_round.SECONDS < 480


def test_the_profile_is_of_the_row_furthest_from_its_ceiling(tmp_path, monkeypatch):
    rows = [dict(target=target, op=op, percent_of_ceiling=percent) for target, op, percent in (("K1", "near", 91), ("K4", "far", 60), (None, "other", 5))]
    (tmp_path / "kernels_x.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(gpu_round.shutil, "which", lambda name: name)
    profile, demo = gpu_round.last_parts(tmp_path, tmp_path, cpu=False)
    assert profile[0].name == "ncu far" and profile[0].optional and profile[0].words[-1] == "far" and demo[0].name == "demo"


def test_a_command_past_its_limit_is_interrupted_and_can_still_write(tmp_path):
    script = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('written')"
    part = gpu_round.run(Command("slow", 5.5, [sys.executable, "-I", "-S", "-c", script]), time.monotonic() + 60, tmp_path)
    assert part["exit"] is None and 5 < part["seconds"] < 30 and part["log"].read_text() == "written\n"


def test_without_time_left_nothing_starts(tmp_path):
    part = gpu_round.run(Command("late", 100, [sys.executable, "-c", "raise SystemExit(3)"]), time.monotonic() + 1, tmp_path)
    assert part["exit"] is None and "no time left" in part["log"].read_text()


def test_the_summary_begins_with_what_failed(tmp_path):
    parts = [gpu_round.run(Command(name, 30, [sys.executable, "-I", "-S", "-c", script]), time.monotonic() + 60, tmp_path)
             for name, script in (("good", "print(1)"), ("bad", "print('FAILED tests/x.py::y - no'); raise SystemExit(2)"))]  # fmt: skip
    goal = {"name": "percent of ceiling", "goal": ">= 90", "value": 80.0, "met": False}
    row = dict(target="K1", op="op", variant="v", shape={"n": 1}, dtype="bfloat16", median_ms=1.0, spread=0.0, how="graph", gbps=5.0, percent_of_ceiling=80.0,
               peak_mib=None, ratios={"eager": 4.0}, goals=[goal])  # fmt: skip
    (tmp_path / "kernels_x.json").write_text(json.dumps({"rows": [row]}))
    lines = gpu_round.summary(parts, tmp_path, 10.0)
    assert lines[0].startswith("1 of 2 commands ended well, 10 s")
    assert lines[1].startswith("FAILED bad: exit 2") and lines[2] == "    FAILED tests/x.py::y - no"
    assert lines[3] == "K1 op v: percent of ceiling >= 90: NOT MET (80)" and lines[4].endswith("80 % of the ceiling, 4.00x eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_round.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu_round.main()
    assert "no GPU is visible" in capsys.readouterr().err and not (tmp_path / "out").exists()
