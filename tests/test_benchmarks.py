"""The benchmarks of the ops: what is counted, what a row says, that every rival agrees, and that docs/kernels.md has what was computed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import cases, documents, launches, report, roofline, timing
from benchmarks.cases import Case, Goal, Rival
from red_kernels import backend
from red_kernels.triton import launch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("test_*.py"))
ROW = {"target", "op", "variant", "shape", "dtype", "median_ms", "spread", "percent_of_ceiling", "ratios", "peak_mib", "goals", "met", "bytes", "flops"}


@pytest.mark.parametrize(
    "work, bytes_, flops",
    [
        # 6 tokens of 10 channels, 2 bytes; 8 ids; 3 segments of 10 sums and a count
        (roofline.channel_stats(6, 2, 10, 3, 2), 6 * 10 * 2 + 8 * 8 + 3 * 10 * 4 + 3 * 8, 0),
        (roofline.channel_stats(6, 2, 10, 3, 2, sums=3), 6 * 10 * 2 + 8 * 8 + 3 * 3 * 10 * 4 + 3 * 8, 0),
        (roofline.rms_norm(6, 10, 2, residual=True), 4 * 120 + 20, 0),
        (roofline.rms_norm(6, 10, 2, residual=False), 2 * 120 + 20, 0),
        # the norm; id and mean square of 6 tokens; 3 segments; two moments
        (roofline.rms_norm_stats(6, 10, 3, 2, residual=True), 500 + 6 * 12 + 3 * 48 + 80, 0),
        (roofline.gather(6, 10, 5, 2), 6 * 15 * 2 + 40, 0),
        (roofline.gather_rows(5, 6, 2), 2 * 5 * 6 * 2 + 40, 0),
        (roofline.gather_many([(6, 10)], [(10, 6)], 5, 2), 220 + 160, 0),
        (roofline.selection_low_rank(6, 10, 5, 3, 2, 4), 6 * 15 * 2 + 40 + 3 * 15 * 4, 2 * 6 * 10 * 3 + 2 * 6 * 3 * 5),
        (roofline.covariance(6, 10, 2), 120 + 2 * 400, 2 * 6 * 55),  # 55 entries on and below the diagonal
        (roofline.linear_kd(6, 7, 10, 5, 2), (6 + 7) * 20 * 2 + 48, 2 * 6 * 7 * 15 + 4 * 6 * 7 * 5),
        (roofline.tap_mse(6, 5, 10, 2), 6 * 20 * 2 + 6, 0),
        (roofline.erank(2, 6, 10, 2), 2 * 6 * 10 * 2, 2 * (6 * 7 * 10 + 288)),
    ],
)
def test_what_an_op_needs(work, bytes_, flops):
    assert (work.bytes, work.flops) == (bytes_, flops)


def test_the_targets_are_counted_as_stated():
    """2NV(d + d') + 4NVd' is 12.1 TFLOP, 15.2 ms at 798 TFLOP/s; (d + d') · rows · 2 bytes of a gather."""
    kd = roofline.linear_kd(6144, 128256, 3072, 1536, 2)
    assert abs(kd.flops / 12.1e12 - 1) < 0.01 and abs(kd.seconds(3.0e12, 798e12) / 15.2e-3 - 1) < 0.01 and not kd.memory_bound(3.0e12, 798e12)
    assert abs(roofline.gather(6144, 3072, 1536, 2).bytes / ((3072 + 1536) * 6144 * 2) - 1) < 1e-3


@pytest.mark.parametrize("name", FILES)
def test_rivals_agree(name):
    for case in importlib.import_module(f"benchmarks.{name}").cases("tiny"):
        notes = cases.check(case)
        assert not [note for note in notes if "skipped" not in note], notes


def test_every_op_with_launches_has_cases():
    assert {f"test_{op}" for op in backend.TRITON_OPS} <= set(FILES)
    for op in launch.LAUNCHES:
        assert launches.cases_of(op, "tiny") and {str(case) for case in launches.cases_of(op, "tiny")}


def a_case(**changes) -> Case:
    settings = dict(op="double", variant="v", shape={"n": 4}, work=roofline.Work(32), draw=lambda: (torch.ones(4),), run=lambda x: x * 2, seconds=0.0)
    return Case(**{**settings, **changes})


CEILINGS = {"copy_gbps": 10.0, "product_tflops": 0.1, "product_dtype": "torch.float32"}


def test_a_row():
    rivals = {
        "eager": Rival(lambda x: x + x),
        "other dtype": Rival(lambda x: x + x, lambda x: (x.double(),), like=lambda ours: ours.double()),
        "wrong": Rival(lambda x: x * 0),
        "broken": Rival(lambda x: x.nothing),
        "absent": Rival(None, why_not="not installed"),
    }
    row = cases.row_of(a_case(rivals=rivals, target="K9", goals=(cases.percent_of_ceiling(90), cases.faster_than("eager", 1))), CEILINGS, [])
    assert ROW <= row.keys() and row["gbps"] == pytest.approx(32 / row["median_ms"] / 1e6) and row["percent_of_ceiling"] == pytest.approx(10 * row["gbps"])
    assert row["ratios"].keys() == {"eager", "other dtype"} and row["ratios"]["eager"] == pytest.approx(row["rivals"]["eager"]["median_ms"] / row["median_ms"])
    assert [note.split(" ")[0].rstrip(":") for note in row["notes"]] == ["wrong", "broken", "absent"]
    if not timing.GPU:
        assert row["met"] is None and [goal["met"] for goal in row["goals"]] == [None, None] and row["peak_mib"] is None
    json.dumps(row)


def test_a_rival_that_gets_a_share_of_the_work_is_charged_for_all():
    rivals = {"whole": Rival(lambda x: x + x), "share": Rival(lambda x: x + x, lambda x: (x[:1],), like=lambda ours: ours[:1], times=1000)}
    row = cases.row_of(a_case(rivals=rivals), CEILINGS, [])
    assert row["ratios"]["share"] > 50 * row["ratios"]["whole"] and "one of 1000" in row["rivals"]["share"]["how"]


def test_eager_must_agree():
    for wrong in (lambda x: x * 0, lambda x: x.nothing, lambda x: x * float("nan"), lambda x: x[:2] * 2, lambda x: (x * 2, x)):
        with pytest.raises((AssertionError, AttributeError)):
            cases.check(a_case(rivals={"eager": Rival(wrong)}))


def test_a_result_of_zeros_agrees_with_nothing():
    assert cases.disagreement(torch.zeros(3), torch.zeros(3))


def test_goals(monkeypatch):
    monkeypatch.setattr(cases, "GPU", True)
    row = {"percent_of_ceiling": 91.0, "ratios": {"Liger a": 1.6, "Liger b": 1.4, "eager": 3.0}}
    judged = [goal.judge(row) for goal in (cases.percent_of_ceiling(90), cases.faster_than("Liger", 1.5), cases.faster_than("one-hot", 2))]
    assert [(goal["value"], goal["met"]) for goal in judged] == [(91.0, True), (1.4, False), (None, None)]
    assert judged[0]["name"] == "percent of ceiling" and judged[0]["goal"] == ">= 90"
    assert Goal("time", "<=", 1.1, lambda row: 1.2).judge(row)["met"] is False and Goal("time", "<=", 1.1, lambda row: 1.1).judge(row)["met"] is True
    assert [cases.verdict(met) for met in ([], [True], [True, None], [None, False])] == [None, True, None, False]


def test_a_timing():
    found = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0], "wall")
    assert found.median == 3.0 and found.repeats == 5 and found.spread == pytest.approx((52.0 - 1.5) / 3.0)
    x = torch.ones(8)
    assert sum(timing.storages([x, {"view": x[2:]}, 3, (torch.ones(2),)]).values()) == 40


def test_the_json_of_a_run(tmp_path):
    """Rows are on the disk before the next one begins, which may be the last that the process does."""
    spy = "import pathlib\nseen = []\ndef pytest_runtest_setup(item):\n    seen.append([path.read_text() for path in pathlib.Path('OUT').iterdir()])\n" \
          "def pytest_sessionfinish():\n    pathlib.Path('OUT.seen').write_text(str([len(one) for one in seen]))\n"
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "spy.py").write_text(spy.replace("OUT", str(out)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "spy", "benchmarks/test_tap_mse.py", "--benchmark-only", "--shapes", "tiny"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # a worker's child would not be timed
    alone["PYTHONPATH"] = os.pathsep.join([str(tmp_path), alone.get("PYTHONPATH", "")])
    done = subprocess.run([*command, "--kernels-json", str(out)], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out.seen").read_text() == "[0, 1]"
    (place,) = out.iterdir()
    found = json.loads(place.read_text())
    assert place.name == report.file_name(found["device"]) and found.keys() == {"device", "ceilings", "versions", "commit", "rows"}
    assert len(found["rows"]) == 2 and all(ROW <= row.keys() and ("gbps" in row) != ("tflops" in row) for row in found["rows"])
    assert "tap_mse same width [tokens=24 d=20 kept=20]" in done.stdout


def test_the_lines_of_a_sweep():
    timed = (("first", 2.0, None), ("second", 1.0, None), ("third", None, "broke"))
    rows = [dict(op="gather", variant="a", launch=name, median_ms=ms, fault=fault) for name, ms, fault in timed]
    assert launches.lines(rows) == ["gather, a: 1 ms; second 1.00x, first* 2.00x", "    third: broke"]


def test_a_sweep_is_on_the_disk_row_by_row(tmp_path, monkeypatch):
    kept = []

    def sweep(*_):
        for name in ("first", "second"):
            yield dict(op="gather", variant="a", launch=name, median_ms=1.0, fault=None)
            kept.append(len(json.loads((tmp_path / "launches.json").read_text())["rows"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(launches, "sweep", sweep)
    monkeypatch.setenv("RED_BACKEND", "triton")  # main sets both
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["launches.py", "--shapes", "tiny", "--out", str(tmp_path / "launches.json")])
    with pytest.raises(KeyboardInterrupt):
        launches.main()
    assert kept == [1, 2]


def test_the_tables_of_the_docs_are_current():
    page = documents.PAGE.read_text()
    assert page == documents.filled(page), "run python benchmarks/documents.py"


def test_the_table_of_resources():
    place = dict(op="a", kernel="a_kernel", warps=4, spilled_bytes=0)
    rows = [{**place, "arch": arch, "registers": registers, "shared_bytes": 2048} for arch, registers in ((80, 40), (80, 64), (90, 50))]
    lines = documents.resources({"versions": {"triton": "3"}, "rows": rows}).splitlines()
    assert lines[0] == "| op | kernel | variants | sm_80 registers | sm_80 shared KiB | sm_90 registers | sm_90 shared KiB | spilled bytes |"
    assert lines[2] == "| `a` | `a_kernel` | 2 | 40 – 64 | 2 | 50 | 2 | 0 |" and lines[-1] == "3 compilations, triton 3."


class FakeGPU:
    """What timing.py uses of torch.cuda, on a CPU: a clock that a call of `run` advances, and graphs that call again."""

    def __init__(self, monkeypatch, seconds: float = 1e-3, capturable: bool = True):
        self.now, self.seconds, self.calls, self.capturing, self.capturable = 0.0, seconds, [], None, capturable
        fake = self

        class Event:
            def __init__(self, enable_timing): ...
            def record(self): self.at = fake.now
            def synchronize(self): ...
            def elapsed_time(self, end): return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                fake.now += fake.seconds * len(self.calls)

        class Capture:
            def __init__(self, graph): graph.calls = fake.capturing = []
            def __enter__(self): ...
            def __exit__(self, *_): fake.capturing = None

        class Stream:
            def __init__(self, *_): ...
            def wait_stream(self, other): ...
            def __enter__(self): ...
            def __exit__(self, *_): ...

        memory = dict(memory_allocated=lambda: 100 << 20, max_memory_allocated=lambda: 110 << 20, reset_peak_memory_stats=lambda: None)
        device = dict(get_device_properties=lambda _: type("Properties", (), {"L2_cache_size": 1000}), synchronize=lambda: None)
        streams = dict(Stream=Stream, stream=lambda s: s, current_stream=Stream, set_stream=lambda s: None)
        for name, value in (memory | device | streams | dict(Event=Event, CUDAGraph=Graph, graph=Capture)).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "GPU", True)

    def run(self, x):
        if self.capturing is None:
            self.now += self.seconds
        elif self.capturable:
            self.capturing.append(x)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.empty(1 << 18)


def test_a_call_of_seconds_is_timed_once(monkeypatch):
    gpu = FakeGPU(monkeypatch, seconds=2.0)
    found = timing.measure(gpu.run, [(torch.ones(100),)], seconds=0.0, repeats=1, capture=False)
    assert (found.median, found.repeats, gpu.now) == (2.0, 1, 2.0)


def test_targets_come_first_and_effective_rank_last():
    from benchmarks import conftest

    def item(file, target):
        return types.SimpleNamespace(path=Path(f"{file}.py"), callspec=types.SimpleNamespace(params={"case": types.SimpleNamespace(target=target)}), name=(file, target))

    items = [item("test_covariance", None), item("test_erank", None), item("test_erank_estimate", "K5"), item("test_gather", "K3"), item("test_linear_kd", None), item("test_linear_kd", "K4"),
             types.SimpleNamespace(path=Path("test_step.py"), name="a skip")]  # fmt: skip
    conftest.pytest_collection_modifyitems(items)
    assert [one.name for one in items] == [("test_gather", "K3"), ("test_linear_kd", "K4"), ("test_covariance", None), ("test_linear_kd", None), "a skip", ("test_erank_estimate", "K5"),
                                           ("test_erank", None)]  # fmt: skip


@pytest.mark.parametrize("capturable", [True, False], ids=["graph", "events"])
def test_a_gpu_is_timed_through_graphs_or_says_so(monkeypatch, capturable):
    gpu = FakeGPU(monkeypatch, capturable=capturable)
    copies = timing.rotation(lambda: (torch.ones(100),))
    assert len(copies) == 10  # 400 bytes each, against four times a cache of 1000
    found = timing.measure(gpu.run, copies, seconds=0.0, repeats=5)
    assert found.how == ("graph" if capturable else "events") and found.median == pytest.approx(1e-3) and found.repeats == 5
    assert timing.peak_mib(gpu.run, copies[0]) == pytest.approx(9.0)  # ten, less the one that is returned
