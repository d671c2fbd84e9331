"""The demo end to end at a tiny size, its processes and its folder."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from red.demo import known, main, parallel
from red.demo.experiment import StudentRun, run_student
from red.demo.folder import MARKER, OutputFolder
from red.demo.parallel import run_parallel
from red.errors import REDError
from red.report import provenance
from tiny_example import save_tiny_teacher

run_demo = main.run_demo

TINY = dict(steps=3, rows=2, length=112, problems=2, final_problems=3, easy_texts=4, erank_tokens=150, calibration_samples=2, warmup_steps=1)
OF_A_MODEL = {"exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "erank"}
SCORES = OF_A_MODEL | {"kl_easy", "kl_reasoning"}  # of a student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random teacher with the example's tokenizer, in a folder."""
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


def test_demo_end_to_end(teacher, tmp_path):
    said = []
    out = tmp_path / "runs" / "demo"
    returned = run_demo(out, teacher_path=teacher, processes=2, device="cpu", log=said.append, **TINY)
    results = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert returned == results
    assert set(results) == {"seconds", "teacher", "starts", "versions", "commit"}
    assert set(results["teacher"]) == OF_A_MODEL - {"exact_match_by_steps"} and len(results["teacher"]["erank"]) == 3
    assert list(results["starts"]) == ["random", "activation", known.load()["best_other"]]
    for start, outcome in results["starts"].items():
        assert set(outcome) == {"learning_rate", "history", "final"} and set(outcome["final"]) == SCORES
        assert outcome["learning_rate"] == known.load()["rates"][start]
        assert list(outcome["final"]["exact_match_by_steps"]) == ["2", "4", "6", "8"]
        assert [entry["step"] for entry in outcome["history"]] == [0, 1, 2, 3]
        assert [entry["tokens"] for entry in outcome["history"]] == sorted({entry["tokens"] for entry in outcome["history"]})
        assert 2 * 2 * 112 < outcome["history"][-1]["tokens"] <= 3 * 2 * 112
        assert [len(entry["erank"]) for entry in outcome["history"] if "erank" in entry] == [3, 3, 3]
        assert outcome["history"][0]["easy_perplexity"] != outcome["history"][-1]["easy_perplexity"]  # it was trained
    equal = [[entry["tokens"] for entry in outcome["history"]] for outcome in results["starts"].values()]
    assert equal[0] == equal[1] == equal[2]

    student = AutoModelForCausalLM.from_pretrained(out / "student")
    assert student.config.hidden_size == 16 and type(student) is LlamaForCausalLM
    page = (out / "report.html").read_text()
    assert "http" not in page and "RED (activation)" in page
    text = "\n".join(said)
    assert "LRC (random)" in text and "right answer" in text and str(out / "report.html") in text
    assert "LRC's start under our objective" in text and "LRC&#x27;s start under our objective" in page
    assert "Note:" not in text and "note" not in json.loads((out / "details.json").read_text())  # the export answers as the student did
    assert os.listdir(out.parent) == ["demo"]  # nothing is left beside it

    # a second time: refused as it stands, replaced if asked to; never with somebody's file in it
    before = (out / "results.json").read_bytes()
    with pytest.raises(REDError, match="earlier demo.*--overwrite"):
        run_demo(out, teacher_path=teacher, **TINY)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(REDError, match="mine.txt"):
        run_demo(out, teacher_path=teacher, overwrite=True, **TINY)
    assert (out / "results.json").read_bytes() == before and (out / "mine.txt").read_text() == "mine"


def test_a_failing_run_is_shown_and_the_others_are_kept(teacher):
    runs = {"good": StudentRun("activation", 1e-3, **TINY), "bad": StudentRun("no_such_start", 1e-3, **TINY)}
    said, seen = [], []
    results, failures = run_parallel(runs, {name: {"teacher_path": teacher, "device": "cpu"} for name in runs}, processes=2,
                                     on_result=lambda name, result: seen.append(name), log=said.append)
    assert list(results) == seen == ["good"] and list(failures) == ["bad"]
    assert "no_such_start" in failures["bad"] and "Traceback" in failures["bad"]
    assert any("bad: failed" in line and "no_such_start" in line for line in said)
    assert any("good" in line and "step    3/3" in line for line in said)


def test_a_queue_takes_what_its_results_bring_forth(monkeypatch):
    """Two threads and one run to begin with: its result brings two more, and the end comes only when they are done; one of them fails."""
    monkeypatch.setattr(parallel, "_run_one", lambda name, *_: (None, "Traceback") if name == "bad" else ({"name": name}, ""))
    run = StudentRun("activation", 1e-3, **TINY)
    waiting, finished, said = [("first", run, {})], [], []

    def keep(name, result):
        finished.append(result["name"])
        if name == "first":
            waiting.extend((name, run, {}) for name in ("bad", "last"))

    failures = parallel.run_queue(lambda: waiting.pop(0) if waiting else None, on_result=keep, processes=2, log=said.append)
    assert failures == {"bad": "Traceback"} and finished == ["first", "last"] and "bad: failed" in said[0]


def test_a_result_that_cannot_be_kept_ends_the_queue(monkeypatch):
    monkeypatch.setattr(parallel, "_run_one", lambda *_: ({}, ""))
    jobs = iter([(name, StudentRun("activation", 1e-3, **TINY), {}) for name in ("one", "two", "three")])

    def full(name, result):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        parallel.run_queue(lambda: next(jobs, None), on_result=full, processes=1, log=lambda text: None)
    assert next(jobs)[0] == "two"  # nothing more was begun


def test_equal_settings_equal_numbers_and_starts_share_their_batches(teacher):
    def run(start, rate=1e-3, seed=0, **options):
        result = run_student(StudentRun(start, rate, seed, options=options, **TINY), teacher_path=teacher, evaluate_at=[1], device="cpu")
        return result, [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]

    first, history = run("activation")
    again, same = run("activation")
    assert history == same and first["data_digest"] == again["data_digest"] and first["answers"] == again["answers"]
    other, different = run("random", rate=2e-3, lrc_faithful=True)
    assert other["data_digest"] == first["data_digest"] and different != history
    assert run("activation", seed=1)[0]["data_digest"] != first["data_digest"]
    assert json.loads(json.dumps(asdict(StudentRun("activation", 1e-3, options={"norm_scale": False}))))["options"] == {"norm_scale": False}


def test_measuring_does_not_change_the_training(teacher):
    """A run that is measured after every step ends where one does that is measured as little as possible."""
    ends = [run_student(StudentRun("pca", 1e-3, **TINY), teacher_path=teacher, evaluate_at=at, device="cpu")["final"] for at in ([], [1, 2, 3])]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("settings, message", [
    ({"starts": ("activation", "nonsense")}, "start='nonsense' is unknown"), ({"starts": ("random", "pca")}, "'pca' has no swept learning rate.*--learning_rate pca="),
    ({"steps": 0}, "steps=0"), ({"steps": -3}, "steps=-3"), ({"processes": 0}, "processes=0"),
    ({"starts": ["random"], "learning_rates": {"activation": 1e-3}}, "'activation', which does not take part"),
    ({"learning_rates": {"activation": 0.0}}, "must be above 0"), ({"learning_rates": {"activation": float("nan")}}, "must be above 0"),
])
def test_bad_settings_are_refused_before_any_work(teacher, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(known, "load", lambda: {"rates": {"activation": 1e-3, "random": 1e-3}, "best_other": "random"})
    with pytest.raises(REDError, match=message):
        run_demo(tmp_path / "demo", teacher_path=teacher, **settings)
    assert not os.listdir(tmp_path)


def test_a_given_rate_wins_and_an_export_that_answers_otherwise_is_only_noted(teacher, tmp_path, monkeypatch):
    """One finished run, put together twice: in the second time the reloaded export says something else."""
    finished, threads = [], torch.get_num_threads()

    def once(runs, jobs, **_):
        if not finished:
            for start, run in runs.items():
                finished.append((start, provenance.finite(run_student(run, **jobs[start]))))
        return dict(finished), {}

    found = known.load()
    monkeypatch.setattr(known, "load", lambda: {**found, "rates": {}})
    monkeypatch.setattr(main, "run_parallel", once)
    answers = main._answers_of_export
    said = []

    def otherwise(path, tokenizer, suite, device):
        (path.parent / "student").mkdir(exist_ok=True)
        first, *rest = suite.problems[4][:3]
        return {first.question: "something else", **{problem.question: finished[0][1]["answers"][problem.question] for problem in rest}}

    for turn, export in enumerate((answers, otherwise)):
        monkeypatch.setattr(main, "_answers_of_export", export)
        out = tmp_path / str(turn)
        results = run_demo(out, teacher_path=teacher, device="cpu", starts=["activation"], learning_rates={"activation": 5e-3}, log=said.append, **TINY)
        assert results["starts"]["activation"]["learning_rate"] == 5e-3 and torch.get_num_threads() == threads
        details = json.loads((out / "details.json").read_text())
        assert details["given_rates"] == {"activation": 5e-3} and "given by hand: RED (activation) 0.005" in (out / "report.html").read_text()
        assert ("note" in details) == bool(turn)
    assert "answers 1 of 3 problems otherwise" in details["note"] and "1 of 3 problems" in (out / "report.html").read_text()
    assert f"Note: {details['note']}" in said


def test_numbers_are_kept_when_the_report_fails(teacher, tmp_path, monkeypatch):
    outcome = {"learning_rate": 1e-3, "history": [], "final": {}}
    monkeypatch.setattr(main, "_measure", lambda *args: ({"starts": {"activation": outcome}}, {}))
    monkeypatch.setattr(main.report, "write_report", lambda *args: 1 / 0)
    said = []
    with pytest.raises(ZeroDivisionError):
        run_demo(tmp_path / "demo", teacher_path=teacher, log=said.append)
    [aside] = tmp_path.iterdir()
    assert json.loads((aside / "results.json").read_text())["starts"] == {"activation": outcome} and str(aside) in said[-1]


def test_one_thread_is_taken_and_given_back():
    torch.set_num_threads(2)
    try:
        with main._one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_failed_student_leaves_the_place_as_it_was(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("red.demo.main.run_parallel", lambda *args, **kwargs: ({"activation": {"kept": 1}}, {"random": "Traceback"}))
    with pytest.raises(REDError, match="random failed") as error:
        run_demo(tmp_path / "demo", teacher_path=teacher, device="cpu", **TINY)
    [aside] = tmp_path.iterdir()
    assert json.loads((aside / "finished.json").read_text()) == {"activation": {"kept": 1}} and str(aside) in str(error.value)


def test_folder_refuses_what_it_did_not_write(tmp_path):
    place = tmp_path / "demo"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(REDError, match="thesis.txt"):
            OutputFolder(place, overwrite=overwrite)
    with pytest.raises(REDError, match="not a folder"):
        OutputFolder(place / "thesis.txt", overwrite=True)
    assert (place / "thesis.txt").read_text() == "years of work" and os.listdir(tmp_path) == ["demo"]


def test_folder_replaces_an_earlier_demo_only_after_success(tmp_path):
    place = tmp_path / "demo"
    for turn in ("first", "second"):
        folder = OutputFolder(place, overwrite=True)
        (folder.staging / "student").mkdir()
        (folder.staging / "student" / "weights").write_text(turn)
        folder.publish()
    broken = OutputFolder(place, overwrite=True)
    (broken.staging / "results.json").write_text("half")
    broken.discard()
    assert (place / "student" / "weights").read_text() == "second" and os.listdir(tmp_path) == ["demo"]
    assert json.loads((place / MARKER).read_text())["files"] == ["student/weights"]


def test_the_finders_files_are_no_reason_to_refuse(tmp_path):
    place = tmp_path / "demo"
    (place / "empty").mkdir(parents=True)
    for folder in (place, place / "empty"):
        (folder / ".DS_Store").write_text("where the icons are")
    with pytest.raises(REDError, match="it holds empty"):
        OutputFolder(place)
    (place / "empty" / ".DS_Store").unlink()
    (place / "empty").rmdir()
    for _ in range(2):
        folder = OutputFolder(place, overwrite=True)
        (folder.staging / "results.json").write_text("x")
        folder.publish()
        (place / ".DS_Store").write_text("where the icons are")
    assert sorted(os.listdir(place)) == [".DS_Store", MARKER, "results.json"] and os.listdir(tmp_path) == ["demo"]


def test_learning_rates_come_from_the_study():
    assert known.load()["written_by"] == "benchmarks/starts.py"
