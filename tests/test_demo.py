"""The demo end to end at a tiny size, its processes, its folder, and the study's rules."""

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from red.demo import known, main, record
from red.demo.experiment import StudentRun, run_student
from red.demo.folder import MARKER, OutputFolder
from red.demo.parallel import run_parallel
from red.errors import REDError
from red.example.tokenizer import build_tokenizer

run_demo = main.run_demo

TINY = dict(steps=3, rows=2, length=112, problems=2, final_problems=3, easy_texts=4, erank_tokens=150, calibration_samples=2, warmup_steps=1)
SCORES = {"exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "erank"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random teacher with the example's tokenizer, in a folder."""
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_demo_end_to_end(teacher, tmp_path):
    said = []
    out = tmp_path / "runs" / "demo"
    returned = run_demo(out, teacher_path=teacher, processes=2, device="cpu", log=said.append, **TINY)
    results = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert returned == results
    assert set(results) == {"seconds", "teacher", "starts", "versions", "commit"}
    assert set(results["teacher"]) == SCORES - {"exact_match_by_steps"} and len(results["teacher"]["erank"]) == 3
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
                finished.append((start, record.finite(run_student(run, **jobs[start]))))
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


@pytest.fixture(scope="module")
def study_script():
    path = Path(__file__).parents[1] / "benchmarks" / "starts.py"
    spec = importlib.util.spec_from_file_location("starts_study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rate_rule_and_tokens_to_90(study_script):
    def result(scores, perplexity=6.0):
        return {"history": [{"tokens": 10 * i, "exact_match": score} for i, score in enumerate(scores)],
                "final": {"exact_match": scores[-1], "easy_perplexity": perplexity}}

    # .98 and .97 are tied at the end: the faster one; then what is left by its end; two zeros by their easy text
    assert study_script.ranked({1: result([0, 0.1, 0.98]), 2: result([0, 0.9, 0.97]), 3: result([0, 0.95, 0.5])}) == [2, 1, 3]
    assert study_script.ranked({1: result([0, 0], 7.0), 2: result([0, 0], 6.5), 3: result([0, 0], None)}) == [2, 1, 3]
    history = result([0, 0.2, 0.91, 0.85, 0.95])["history"]
    assert study_script.tokens_to(0.9, history) == 20 and study_script.tokens_to(0.96, history) is None
    assert study_script.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "per_seed": [1.0, 3.0]}
    assert study_script.spread([1.0, None])["mean"] is None


def test_study_goes_on_where_it_was_interrupted(study_script, teacher, tmp_path, monkeypatch, capsys):
    trained = []

    def in_this_process(runs, settings, *, on_result, **_):
        for name, run in runs.items():
            if len(trained) == 3 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            trained.append(run)
            on_result(name, record.finite(run_student(run, **settings[name])))
        return {}, {}

    monkeypatch.setattr(study_script, "run_parallel", in_this_process)
    interrupted: list[bool] = []
    words = ["--smoke", teacher, "--out", str(tmp_path / "results")]
    with pytest.raises(KeyboardInterrupt):
        study_script.main(words)
    with open(tmp_path / "results" / "starts_runs.jsonl", "a") as file:
        file.write('{"key": "cut sho')  # as a power cut leaves it
    study_script.main(words)
    assert len(trained) == len({json.dumps(asdict(run)) for run in trained})  # nothing was run twice
    found = json.loads((tmp_path / "results" / "starts.json").read_text())
    assert set(found["rows"]) == {"activation", "random", "pca"}
    assert all(list(row["horizons"]) == ["2", "4"] for row in found["rows"].values())  # nobody got there: the longer horizon too
    assert found["rows"]["random"]["tokens_to_90"]["mean"] is None
    study_script.main(words)
    assert len(trained) == 12  # a third time: everything is there, also what was written after the cut line
    shipped = json.loads((tmp_path / "results" / "learning_rates.json").read_text())
    assert shipped["best_other"] == "pca" and set(shipped["rates"]) == {"activation", "random", "pca"}
    assert {"rates", "rates_rule", "best_other", "best_other_rule", "tokens_to_90"} <= set(known.load()) & set(shipped)
    assert found["commit"] == shipped["commit"] == [record.commit()] and "best two rates" in found["rates_rule"]
    assert (tmp_path / "results" / "starts.svg").is_file()
    out = capsys.readouterr().out
    assert "| RED (activation) | 0.0005 †; 0.0005 † for 4 steps |" in out and "lies at the edge of the grid 0.0005" in out

    # a sweep alone keeps the tokens that the study found; what is missing is not run where that is not wanted
    study_script.main([*words, "--stage", "sweep"])
    assert json.loads((tmp_path / "results" / "learning_rates.json").read_text()) == shipped
    with pytest.raises(SystemExit, match="3 runs are not in"):
        study_script.main(["--smoke", teacher, "--out", str(tmp_path / "other"), "--no-run"])


@pytest.mark.parametrize("words", [["--rows", "activation"], ["--seeds", "0", "1"], ["--seeds", "3", "4", "5", "--stage", "sweep"]])
def test_a_part_of_the_study_does_not_replace_it(study_script, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        study_script.main(words)
    assert stopped.value.code == 2 and "need --out" in capsys.readouterr().err


def test_the_studys_table_says_how_to_read_it(study_script):
    def seed(scores):
        history = [{"tokens": 20_000 * i, "exact_match": score, "exact_match_by_steps": dict.fromkeys("2468", score)} for i, score in enumerate(scores)]
        return {"history": history, "final": {"exact_match": scores[-1], "easy_accuracy": 0.41}}

    def row(rate, tokens, longer=None):
        horizons = {"150": {"learning_rate": rate, "exact_match": study_script.spread([1.0, 0.98]), "easy_accuracy": study_script.spread([0.41, 0.41]),
                            "seeds": {"0": seed([0, 1.0]), "1": seed([0, 0.98])}}}
        return {"horizons": horizons, "tokens_to_90": {**study_script.spread(tokens), "budget": 610_000 if longer else 20_000, "steps": 450 if longer else 150,
                                                       "learning_rate": longer or rate, "spacing": 20_000.0}}

    found = {"rows": {"activation": row(2e-3, [81_000, 102_000]), "pca": row(5e-4, [20_000, 20_000]), "random": row(4e-3, [None, 500_000], 8e-3)},
             "grid": [5e-4, 2e-3, 8e-3], "seeds": [0, 1], "teacher": {"exact_match": 1.0, "easy_accuracy": 0.42},
             "settings": {"steps": 150, "problems": 50, "final_problems": 100, "measured_every": 15}}
    text = study_script.markdown(found)
    assert "| RED (activation) | 0.002 | 99.0 ± 1.4 % | 41.0 ± 0.0 % | 92k (81k–102k) |" in text
    assert "| pca | 0.0005 † |" in text and "| 20k (every seed) |" in text and "± 0k" not in text
    assert "| LRC (random) | 0.004; 0.008 † for 450 steps |" in text and "> 610k (1 of 2 seeds sooner)" in text
    for note in ("without padding", "every 15 steps, 20k to 20k tokens apart", "noisy: 4 × 50 problems a measurement, 4 × 100 at", "longer schedule of its own", "edge of the grid"):
        assert note in text, note
    del found["rows"]["pca"], found["rows"]["random"]
    assert "†" not in study_script.markdown(found)
