"""The step benchmark: rungs, times from marks, what is said of failures, and a run of each kind at a tiny size."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from benchmarks import ladder, step, step_documents, watch
from benchmarks.lrc_step import LRCStep
from benchmarks.step_forecast import forecast, peer_flops
from red.planning import costs
from red.config import REDConfig


def test_rungs_stand_on_one_another():
    known = {one.name for one in dataclasses.fields(REDConfig)}
    on_gpu, on_cpu = ladder.setups(gpu=True), ladder.setups(gpu=False)
    assert [one.rung for one in on_gpu] == ladder.LADDER and len({rung.name for rung in ladder.LADDER}) == len(ladder.LADDER)
    settings: dict = {}
    for setup in on_gpu:
        assert setup.settings.keys() <= known and setup.settings.items() >= {name: value for name, value in setup.rung.settings.items() if name in known}.items()
        if setup.why_not is None and not setup.rung.peer:
            assert setup.settings.keys() >= settings.keys()
            settings = setup.settings
    assert {one.why_not for one in on_cpu if one.rung.gpu} == {"on a GPU only"} and not any(one.why_not for one in on_cpu if not one.rung.gpu)
    plain, fused = (next(one for one in on_gpu if one.rung.name == name) for name in ("red, plain", "+ fused losses"))
    assert plain.environment == {"RED_BACKEND": "torch"} and fused.environment == {"RED_BACKEND": "auto"} and fused.settings == plain.settings


def test_a_rung_without_its_option_is_left_out(monkeypatch):
    rungs = [ladder.Rung("a", "", dict(tap_target="gather")), ladder.Rung("b", "", dict(no_such_option=1)), ladder.Rung("c", "", dict(tap_target="projected"), apart=True),
             ladder.Rung("d", "")]  # fmt: skip
    monkeypatch.setattr(ladder, "LADDER", rungs)
    found = ladder.setups(gpu=False)
    assert [one.why_not for one in found] == [None, "REDConfig has no no_such_option", None, None]
    assert [one.settings.get("tap_target") for one in found] == ["gather", "gather", "projected", "gather"], "an apart rung carries nothing on"


@pytest.mark.parametrize("name", ladder.SIZES)
def test_rows_are_full_of_documents(name):
    size = ladder.SIZES[name]
    rows = step.packed_rows(size, 3)
    assert len(rows) == 3 and rows.fill == 1.0
    lengths = []
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        assert len(starts) == size.documents and int(row["position_ids"].max()) < size.length - 1
        lengths.append(tuple(starts))
    assert len(set(lengths)) == 3


def test_the_floor_is_the_stated_one():
    """16.1 GFLOP a token for the Llama-3.2-3B shape at half its width, 18 with attention and products."""
    flops = step.floor_flops(ladder.SIZES["llama-3.2-3b"])
    assert flops["floor"] == pytest.approx(16.1e9, rel=5e-3) and flops["useful"] == pytest.approx(18.05e9, rel=0.02)
    assert ladder.SIZES["llama-3.2-3b"].tokens == 49152


def test_times_from_marks(monkeypatch):
    """Two micro-steps of 2 s, an update of 3, 1 between; the first step is slower and does not count."""
    now = [0.0]
    monkeypatch.setattr(watch, "GPU", False)
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    seen = watch.Watch(warmup=1, steps=2)
    for number in range(seen.total):
        slow = 10 if number == 0 else 1
        for _ in range(2):
            seen.micro()
            now[0] += 2 * slow
        seen.update()
        now[0] += 3 * slow
        seen.ended()
        now[0] += 1
    times = seen.times(micro_steps=8)
    assert (times["micro_s"], times["update_s"], times["between_s"], times["step_s"]) == (2, 3, 1, 8 * 2 + 3 + 1)
    assert times["measured_steps_s"] == [8, 8] and times["measured_micro_steps"] == 2 and times["micro_spread"] == 0


def test_waits_are_found_at_their_line():
    waits = watch.Waits()
    monkey, watch.GPU = watch.GPU, False
    try:
        waits.start()
        x = torch.ones(3)
        x.sum().item()
        (x + 1).mul(2)
        waits.stop()
    finally:
        watch.GPU = monkey
    assert sum(waits.found.values()) == 1 and next(iter(waits.found)).startswith("test_step_benchmark.py:")


def test_a_gpus_waits_are_what_torch_warns_of(monkeypatch):
    """Not its warning of the debug mode itself, which speaks of synchronizing operations too."""
    monkeypatch.setattr(watch, "GPU", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: mode == "warn" and warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations", stacklevel=1))
    waits = watch.Waits().start()
    for _ in range(2):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
    waits.stop()
    assert list(waits.found.values()) == [2] and next(iter(waits.found)).startswith("test_step_benchmark.py:")


def test_the_profiled_step_begins_after_the_profiler(monkeypatch):
    """Which takes a minute to start here, and not a part of the busy share. What annotates kernels is none."""
    now, cuda = [0.0], torch.autograd.DeviceType.CUDA
    event = types.SimpleNamespace(device_type=cuda, is_user_annotation=False, name="kernel", time_range=types.SimpleNamespace(start=0.0, end=2e6))
    annotation = types.SimpleNamespace(**{**vars(event), "is_user_annotation": True, "name": "Optimizer.step", "time_range": types.SimpleNamespace(start=0.0, end=4e6)})

    class Profile:
        def __init__(self, activities): ...
        def start(self): now[0] += 60
        def stop(self): ...
        def events(self): return [event, annotation]

    class Event:
        def __init__(self, enable_timing): ...
        def record(self): self.at = now[0]
        def elapsed_time(self, end): return (end.at - self.at) * 1e3

    monkeypatch.setattr(watch, "GPU", True)
    monkeypatch.setattr(watch, "synchronise", lambda: None)
    monkeypatch.setattr(watch.Waits, "start", lambda self: self)
    monkeypatch.setattr(watch.Waits, "stop", lambda self: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    seen = watch.Watch(warmup=0, steps=1)
    for _ in range(seen.total):
        seen.micro()
        now[0] += 3
        seen.update()
        now[0] += 1
        seen.ended()
    found = seen.kernels()
    assert found["profiled_step_s"] == pytest.approx(4) and found["busy"] == pytest.approx(0.5) and [one["name"] for one in found["top"]] == ["kernel"]


def test_a_profiler_that_fails_costs_no_times(monkeypatch):
    class Profile:
        def __init__(self, activities): ...
        def start(self): raise RuntimeError("CUPTI: insufficient privileges")
        def stop(self): raise RuntimeError("not started")
        def key_averages(self): raise AssertionError("Profiler must be initialized before getting events")

    monkeypatch.setattr(watch, "GPU", False)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    seen = watch.Watch(warmup=1, steps=1)
    for _ in range(seen.total):
        seen.micro(), seen.update(), seen.ended()
    assert seen.kernels()["busy"] is None and "must be initialized" in seen.kernels()["fault"] and seen.times(1)["step_s"] > 0


def test_the_union_of_kernels():
    assert watch.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4 and watch.covered([]) == 0


@pytest.mark.parametrize("name", ["LRC", "red, plain", "+ gathered targets"])
def test_a_rung(name):
    row = step.one_rung(name, "tiny", micro_steps=1, steps=2, warmup=1, rows=None)
    assert row["status"] == "measured" and row["micro_steps"] == 2 and row["measured_micro_steps"] == 1 and 1 < row["loss"] < 20
    assert row["tokens_per_second"] == pytest.approx(128 / row["step_s"]) and row["step_s"] == pytest.approx(2 * row["micro_s"] + row["update_s"] + row["between_s"])
    assert len(row["kernels"]["top"]) == 10 and sum(row["waits"].values()) > 0
    json.dumps(row)


@pytest.mark.parametrize("name, owner", [("LRC", "run_peer"), ("red, plain", "WatchedTrainer.training_step")])
def test_a_rung_that_is_too_large(monkeypatch, name, owner):
    """Also where REDTrainer has made an explanation of torch's error."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"benchmarks.step.{owner}", full)
    assert step.one_rung(name, "tiny", micro_steps=1, steps=2, warmup=1, rows=None)["status"] == step.OUT_OF_MEMORY


def climbed(monkeypatch, answers, ceilings={"product_tflops": 800.0}, seconds=100.0, keep=lambda found: None):  # noqa: B006
    """A climb whose rungs answer from a table; the words of every call."""
    asked = []

    def answer(words, environment, seconds):
        asked.append(words)
        return ceilings if words == ["--ceilings"] else answers(words[1], words[-1])

    monkeypatch.setattr(step, "in_a_process", answer)
    monkeypatch.setattr(step, "GPU", True)
    return step.climb("llama-3.2-3b", [], 2, 3, 1, seconds, keep), asked


def measured(speed: float, peak: float) -> dict:
    return {"status": "measured", "tokens_per_second": speed, "micro_s": 0.2, "micro_spread": 0.0, "update_s": 0.1, "memory": {"device_gib": peak},
            "kernels": {"busy": 0.9}, "waits": {"a.py:1": 2}}  # fmt: skip


def test_a_climb_judges_the_goals(monkeypatch):
    """The peer is tried with fewer rows until it fits; a rung of ours that does not fit is said so."""
    def answers(name, rows):
        if name.startswith("LRC"):
            return measured(10_000, 75) if rows == 1 else {"status": step.OUT_OF_MEMORY}
        if name == "red, plain":
            return {"status": step.OUT_OF_MEMORY}
        return measured(26_000, 45) if name == "+ compiled layers" else measured(18_000, 39 if name == "least memory" else 47)

    found, asked = climbed(monkeypatch, answers)
    assert [words[-1] for words in asked if words[1:2] == ["LRC"]] == [3, 2, 1] and [words[-1] for words in asked if words[1:2] == ["red, plain"]] == [3]
    by_name = {row["rung"]: row for row in found["rows"]}
    assert list(by_name) == [rung.name for rung in ladder.LADDER] and by_name["red, plain"]["status"] == "out of memory"
    lines = "\n".join(step.lines(found))
    assert "red, plain: out of memory" in lines and "18000 tokens/s" in lines and "2 waits of the host, device busy 90 %" in lines
    if by_name["+ compiled layers"]["status"] == "measured":
        assert [goal["met"] for goal in found["goals"]] == [True, True, True, True] and "times the peer >= 1.7: met (2.6)" in lines
        assert by_name["+ compiled layers"]["mfu"] == pytest.approx(26_000 * found["flops_per_token"]["floor"] / 800e12)


def test_nothing_measured_meets_nothing(monkeypatch):
    found, _ = climbed(monkeypatch, lambda name, rows: {"status": "failed: no"})
    assert [goal["met"] for goal in found["goals"]] == [None] * 4 and "not measured" in step.lines(found)[0]


def test_each_rung_is_kept_before_the_next(monkeypatch):
    """Also where the ceilings' process failed: there is then no MFU."""
    kept = []
    found, _ = climbed(monkeypatch, lambda name, rows: measured(10_000, 40), ceilings={"status": "failed: no"}, keep=lambda found: kept.append(json.dumps(found)))
    assert [len(json.loads(text)["rows"]) for text in kept] == list(range(1, len(ladder.LADDER) + 1)) and json.loads(kept[-1]) == found
    assert [row["rung"] for row in json.loads(kept[0])["rows"]] == ["+ compiled layers"] and not any("mfu" in row for row in found["rows"])
    assert step_documents.ladder(found)


def test_a_rung_without_time_is_not_started(monkeypatch):
    found, asked = climbed(monkeypatch, lambda name, rows: measured(10_000, 40), seconds=5.0)
    assert asked == [["--ceilings"]] and {row["status"] for row in found["rows"]} == {"no time left"}


def test_a_process_that_fails_or_hangs_says_so(capfd):
    failed = step.in_a_process(["--rows", "many"], {}, 300)
    assert failed["status"].startswith("failed: ") and "invalid int value: 'many'" in failed["status"]
    assert "--rows many\n    usage: step.py" in capfd.readouterr().err, "what it wrote, for the log"
    assert step.in_a_process(["--ceilings"], {}, 1)["status"] == "out of time, after 1 s"


def test_the_rows_of_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_step.py", "--benchmark-only", "--shapes", "tiny"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # a worker's child would not be timed
    done = subprocess.run([*command, "--kernels-json", str(tmp_path / "rows.json")], cwd=step.ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["how"] == "wall, in turn" and row["notes"] == [] and row["ratios"]["eager LRC"] > 0.2 and row["flops"] == 128 * 2170880


def test_the_forecast():
    """Each rung is faster than the one it stands on, the parts add up, and the peer's FLOPs are those that torch counts in its step."""
    size = ladder.SIZES["llama-3.2-3b"]
    found = {setup.rung.name: forecast(setup, size) for setup in ladder.setups(gpu=True, complete=True)}
    climbing = [found[setup.rung.name] for setup in ladder.setups(gpu=True, complete=True) if not setup.rung.apart and not setup.rung.peer]
    speeds = [one.tokens_per_second for one in climbing]
    assert speeds == sorted(set(speeds)) and found["least memory"].peak_gib < 40
    top = found["+ compiled layers"]
    assert top.tokens_per_second == pytest.approx(49152 / (8 * top.micro + top.update)) and top.products == pytest.approx(16.06e9 * 6144 / (0.75 * 798e12), rel=0.01)


def test_the_peers_flops_are_those_of_its_step(tiny_teacher):
    from torch.utils.flop_counter import FlopCounterMode

    teacher = tiny_teacher(attn_implementation="eager")
    ids = torch.randint(3, 64, (2, 16))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16).repeat(2, 1)}
    peer = LRCStep(teacher, 16)
    with FlopCounterMode(display=False) as counter:
        peer.micro_step(batch)
    sizes = costs.Sizes.of(teacher.config)
    attention = 32 * 2 * 4 * sizes.query * 16 * (1 + 3)  # whole rows, forward of both and the student's backward, which costs twice its forward
    assert counter.get_total_flops() - attention == pytest.approx(32 * peer_flops(sizes, sizes.narrowed(16), 32), rel=2e-2)


def test_the_page_is_current():
    page = step_documents.PAGE.read_text()
    assert page == step_documents.filled(page), "run python benchmarks/step_documents.py"


def test_the_tables_take_measurements():
    row = {"rung": "+ compiled layers", "status": "measured", "tokens_per_second": 26_000.0, "mfu": 0.561, "memory": {"device_gib": 45.2}}
    text = step_documents.ladder({"rows": [row, {"rung": "red, plain", "status": "out of memory"}], "device": "a GPU", "versions": {"torch": "2"}, "commit": "abc"})
    line = next(line for line in text.splitlines() if line.startswith("| + compiled"))
    assert line.endswith("| 26000 | 56 % | 45.2 |") and "| out of memory |" in text and "Measured on a GPU, torch 2, commit abc." in text and "| not measured |" in text
