"""The GPU round's frame: what it runs in which order, limits, what it says last. Its rehearsal is `python benchmarks/gpu_round.py --cpu --out DIR`."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest
import torch

from benchmarks import gpu_round
from benchmarks.gpu_round import Command


def test_its_parts(tmp_path):
    names = [[command.name.split(" ")[0] for command in group] for group in gpu_round.first_parts(tmp_path, cpu=False)]
    assert names == [["extension"], ["aot", *["tests"] * (len(names[1]) - 1)], ["benchmarks"], ["step"], ["launches"], ["erank"]]
    assert [group[-1].name for group in gpu_round.last_parts(tmp_path, tmp_path, cpu=False)] == ["demo"]  # no rows, so nothing to profile
    benchmarks, erank = (next(group[0].words for group in gpu_round.first_parts(tmp_path, cpu=False) if group[0].name == name) for name in ("benchmarks", "erank"))
    ignored, rest = ({str(word).removeprefix("--ignore=") for word in words if "test_erank" in str(word)} for words in (benchmarks, erank))
    assert ignored == rest == {str(path.relative_to(gpu_round.ROOT)) for path in (gpu_round.ROOT / "benchmarks").glob("test_erank*.py")}, "each row in one part, in a file of its own"
    tests = [str(path) for path in gpu_round.test_files(cpu=False)]
    assert "tests/test_gpu.py" in tests and "tests/kernels/test_triton_tap_mse.py" in tests and "tests/kernels/test_aot.py" not in tests
    assert all((gpu_round.ROOT / path).exists() for path in tests) and gpu_round.SECONDS < 480


def test_the_profile_is_of_the_row_furthest_from_its_ceiling(tmp_path, monkeypatch):
    rows = [dict(target=target, op=op, percent_of_ceiling=percent) for target, op, percent in (("K1", "near", 91), ("K4", "far", 60), (None, "other", 5))]
    (tmp_path / "kernels_x.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(gpu_round.shutil, "which", lambda name: name)
    profile, demo = gpu_round.last_parts(tmp_path, tmp_path, cpu=False)
    assert profile[0].name == "ncu far" and profile[0].optional and profile[0].words[-1] == "far" and demo[0].name == "demo"


@pytest.mark.parametrize("xdist", [None, "there"])
def test_what_compiles_longest_runs_in_several_processes(tmp_path, monkeypatch, xdist):
    monkeypatch.setattr(gpu_round.importlib.util, "find_spec", lambda name: xdist)
    words = {command.words[-1].name: command.words for group in gpu_round.first_parts(tmp_path, cpu=False) for command in group if command.name.startswith("tests")}
    assert gpu_round.MANY_KERNELS <= words.keys() and {name for name in words if "-n" in words[name]} == (gpu_round.MANY_KERNELS if xdist else set())


def test_the_extension_is_checked_for_memory_and_races(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round.shutil, "which", lambda name: name)
    tools = [command.words[2] for group in gpu_round.first_parts(tmp_path, cpu=False) for command in group if command.name.startswith("sanitizer")]
    assert tools == ["memcheck", "racecheck"]
    on_a_cpu = gpu_round.CHECKED.replace('device="cuda"', 'device="cpu"').replace("torch.cuda.synchronize()", "").replace('assert extension.has("cuda"), ', "assert True, ")
    exec(compile(on_a_cpu, "CHECKED", "exec"), {})  # noqa: S102


@pytest.fixture
def interrupts():
    """Those of a process in the foreground: a shell's `&` has them ignored. The value sets them anew."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_command_past_its_limit_is_interrupted_and_can_still_write(tmp_path, interrupts):
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


def test_a_round_that_a_shell_made_deaf_to_interrupts(tmp_path, monkeypatch, interrupts):
    interrupts(signal.SIG_IGN)
    last = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert round_of(monkeypatch, tmp_path, last=last)[0] == 0 and "True" in (tmp_path / "log.txt").read_text()


def test_a_command_finds_the_repository_and_what_was_brought_along(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/brought")
    part = gpu_round.run(Command("path", 30, [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"]), time.monotonic() + 60, tmp_path)
    assert part["log"].read_text().strip() == f"{gpu_round.ROOT}:/brought"


def test_a_command_learns_how_long_it_has(tmp_path):
    part = gpu_round.run(Command("step", 100, [sys.executable, "-c", "import sys; print(sys.argv[1])", gpu_round.SECONDS_HERE]), time.monotonic() + 31, tmp_path)
    assert 19 <= int(part["log"].read_text()) <= 21, "the deadline, less a margin"


def round_of(monkeypatch, out, *words, last="print('second')"):
    """A round of two commands, one after the other."""
    def first_parts(*_):
        return [[Command("one", 20, [sys.executable, "-I", "-S", "-c", "print('first')"])], [Command("two", 20, [sys.executable, "-I", "-S", "-c", last])]]

    limits = []
    run = gpu_round.run
    monkeypatch.setattr(gpu_round, "first_parts", first_parts)
    monkeypatch.setattr(gpu_round, "last_parts", lambda *_: [])
    monkeypatch.setattr(gpu_round, "run", lambda command, *rest: (limits.append(command.limit), run(command, *rest))[1])
    monkeypatch.setattr(sys, "argv", ["gpu_round.py", "--cpu", "--out", str(out), *words])
    return gpu_round.main(), limits


def test_a_round(tmp_path, monkeypatch):
    code, limits = round_of(monkeypatch, tmp_path, last="raise SystemExit(3)")
    said = json.loads((tmp_path / "round.json").read_text())
    assert code == 1 and limits == [20, 20] and [part["exit"] for part in said["parts"]] == [0, 3] and said["versions"]["transformers"]
    assert "==== one: exit 0" in (tmp_path / "log.txt").read_text() and "FAILED two: exit 3" in "\n".join(said["summary"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "round.json"]


def test_parts_that_are_asked_for_share_the_time(tmp_path, monkeypatch):
    assert round_of(monkeypatch, tmp_path, "--only", "two", "--seconds", "100") == (0, [100])
    assert round_of(monkeypatch, tmp_path, "--only", "one", "two", "--seconds", "100") == (0, [50, 50])


def test_a_file_that_cannot_be_read_costs_its_own_lines_alone(tmp_path):
    (tmp_path / "step_x.json").write_text("{")
    (tmp_path / "launches.json").write_text(json.dumps({"rows": [dict(op="a", variant="v", launch="l", median_ms=1.0, fault=None)]}))
    lines = gpu_round.summary([], tmp_path, 1.0)
    assert lines[1].startswith("step_x.json cannot be told: JSONDecodeError") and lines[2] == "a, v: 1 ms; l* 1.00x"


def test_at_most_eight_files_are_written(tmp_path, monkeypatch):
    """All that a round can write into DIR: what its commands name, its own two, and a profile."""
    monkeypatch.setattr(gpu_round.shutil, "which", lambda name: name)
    words = {word for group in gpu_round.first_parts(tmp_path, cpu=False) for command in group for word in command.words if isinstance(word, type(tmp_path)) and tmp_path in (word, *word.parents)}
    named = {path for path in words if path != tmp_path}
    in_the_folder = sum(tmp_path in command.words for group in gpu_round.first_parts(tmp_path, cpu=False) for command in group)
    assert named == {tmp_path / "aot.json", tmp_path / "launches.json", tmp_path / "kernels_erank.json"} and len(named) + in_the_folder + len(("log.txt", "ncu.txt", "round.json")) == 8
