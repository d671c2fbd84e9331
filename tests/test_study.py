"""The study of starts: its rules, its finished runs, its partial results, its command."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import starts as trained_script
from benchmarks import untrained as untrained_script
from benchmarks.study import rows, schedule, tables, teachers, trained
from benchmarks.study.assembled import assembled, shipped, spread
from benchmarks.study.lines import Lines, write_result
from benchmarks.study.teachers import Teacher
from benchmarks.study.trained import Study, merit, ranked
from red.demo import known
from red.report import provenance
from red.demo.experiment import StudentRun, run_student
from red.demo.study_plot import write_untrained_figure, write_widths_figure
from tiny_example import save_tiny_teacher

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random teacher of width 32 with the example's tokenizer, in a folder."""
    return save_tiny_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


def history(scores, every=15):
    return [{"tokens": 10 * i, "step": every * i, "exact_match": score, "exact_match_by_steps": dict.fromkeys("2468", score)} for i, score in enumerate(scores)]


def result(scores, perplexity=6.0, every=15):
    return {"history": history(scores, every), "train_seconds": 1.0, "calibration_tokens": 7,
            "final": {"exact_match": scores[-1], "easy_accuracy": 0.41, "easy_perplexity": perplexity, "kl_easy": 0.1, "kl_reasoning": 0.2}}


class Made(Study):
    """A study whose teacher need not be there and solves all."""

    teacher_scores = {"exact_match": 1.0, "easy_accuracy": 0.42, "erank": [9.0, 10.0]}


@pytest.fixture()
def study(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 128}')
    return Made(Teacher("made", str(tmp_path), "hash"), 64, Lines(tmp_path / "runs.jsonl"), grid=(1e-3, 2e-3, 4e-3))


def add(study, row, steps, scores_by_rate, tests=None, rate=None):
    """Finished runs: the sweep, and by seed the tests at `rate`."""
    for value, scores in scores_by_rate.items():
        study.lines.add(study.key(study.run(row, value, rows.SWEEP_SEED, steps), "validation"), result(scores))
    for seed, scores in (tests or {}).items():
        study.lines.add(study.key(study.run(row, rate, seed, steps), "test"), result(scores))


# ---- rules ----


def test_rate_rule():
    # .98 and .97 are tied at the end: the faster one; then what is left by its end; two zeros by their easy text
    assert ranked({1: result([0, 0.1, 0.98]), 2: result([0, 0.9, 0.97]), 3: result([0, 0.95, 0.5])}) == [2, 1, 3]
    assert ranked({1: result([0, 0], 7.0), 2: result([0, 0], 6.5), 3: result([0, 0], None)}) == [2, 1, 3]
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "per_seed": [1.0, 3.0]}
    assert spread([1.0, None])["mean"] is None


def test_more_measurements_do_not_change_the_choice():
    coarse, fine = result([0, 0.5, 1.0]), result([0, 0.5, 1.0])
    fine["history"] += [{"step": 2, "exact_match": 0.9}, {"step": 20, "exact_match": 0.9}]
    fine["history"].sort(key=lambda entry: entry["step"])
    assert merit(coarse) == merit(fine) == (0.5, -6.0)
    assert rows.measured_at(150) == [0, 2, 5, 10, 15, 20, 30, *range(45, 150, 15)] and rows.measured_at(4) == [0, 2]


def test_where_a_run_got_there(study):
    assert study.reached(history([0, 0.2, 0.91, 0.85])) == 2 and study.reached(history([0.9])) == 0 and study.reached(history([0.89])) is None


def test_a_longer_horizon_comes_after_the_shorter_ones_tests(study):
    def needed(place, seeds=(0, 1)):
        return [(run.learning_rate, run.seed, split) for run, split in study.needed("pca", place, seeds)]

    assert [rate for rate, seed, _ in needed(0) if seed == rows.SWEEP_SEED] == [1e-3, 2e-3, 4e-3] and len(needed(0)) == 3 and not needed(1)
    add(study, "pca", 150, {1e-3: [0, 0.05], 2e-3: [0, 0.5], 4e-3: [0, 0.3]})
    assert needed(0)[3:] == [(2e-3, 0, "test"), (2e-3, 1, "test")] and not needed(1)
    assert len(list(study.needed("pca", 0, (0, 1), "sweep"))) == 3
    add(study, "pca", 150, {}, {0: [0, 0.95], 1: [0, 0.5]}, rate=2e-3)
    assert needed(1) == [(2e-3, 100, "validation"), (4e-3, 100, "validation")]  # the best two, because one had reached 10 %
    assert not needed(1, seeds=(0,)) and not needed(1, seeds=(0, 1, 2))  # all are there; one is still to come
    add(study, "random", 150, {1e-3: [0, 0.05], 2e-3: [0, 0.0], 4e-3: [0, 0.0]}, {0: [0, 0.0]}, rate=1e-3)
    assert study.rates("random", 1) == [1e-3, 2e-3, 4e-3]  # none had


# ---- finished runs ----


def test_the_finished_runs_of_the_repository_count():
    """Their keys are unchanged, whatever StudentRun has learned since; those that lack the early measurements are missing only where that is asked for."""
    study = Study(teachers.find("chains"), 64, Lines(RESULTS / "starts_runs.jsonl"))
    assert study.run("pca", 1e-3, 0, 150).hidden_size is None
    for row in ("pca", "activation", "random", "activation, plain taps"):
        assert None not in study.sweep(row, 0).values() and None not in study.tests(row, 0, (0, 1, 2)).values()
    assert study.chosen("pca", 0) == known.load()["rates"]["pca"] == 2e-3
    narrow = dataclasses.replace(study, width=48)
    assert narrow.run("pca", 1e-3, 0, 150).hidden_size == 48 and narrow.chosen("pca", 0) is None


def test_runs_of_another_text_say_so_in_their_key():
    study = Study(teachers.find("rich"), 60, Lines(Path("none")))
    run = study.run("pca", 1e-3, 0, 150)
    assert (run.corpus, run.length, run.hidden_size) == ("rich", 128, 60) and '"corpus": "rich"' in study.key(run, "test")


def test_a_new_field_stays_out_of_a_key_at_its_default(study, monkeypatch):
    run = study.run("pca", 1e-3, 0, 150)
    assert trained.KEYED | {"corpus"} == {part.name for part in dataclasses.fields(StudentRun)}
    key = study.key(run, "test")
    assert run.corpus == "chains" and run.length == 112 and "corpus" not in key
    monkeypatch.setattr(trained, "KEYED", trained.KEYED - {"easy_texts"})  # as if it had come later
    assert "easy_texts" not in study.key(run, "test") and "easy_texts" in key
    assert "easy_texts" in study.key(dataclasses.replace(run, easy_texts=7), "test")


def test_refine_asks_for_the_early_measurements(study):
    add(study, "pca", 150, {1e-3: [0], 2e-3: [0], 4e-3: [0, 1.0]}, {0: [0] * 11}, rate=4e-3)
    assert study.tests("pca", 0, [0])[0] is not None
    study.refine = True
    assert study.chosen("pca", 0) == 4e-3 and study.tests("pca", 0, [0]) == {0: None}  # the choice needs no early measurements
    fine = {**result([0]), "history": [{**history([0])[0], "step": step} for step in (*rows.measured_at(150), 150)]}
    study.lines.add(study.key(study.run("pca", 4e-3, 0, 150), "test"), fine)
    assert study.tests("pca", 0, [0])[0] is not None
    again = Lines(study.lines.file)  # the later of two lines with one key counts
    assert len(again.get(study.key(study.run("pca", 4e-3, 0, 150), "test"))["history"]) == len(fine["history"])


def test_lines_survive_a_cut_and_are_strict_json(tmp_path):
    lines = Lines(tmp_path / "new" / "runs.jsonl")
    lines.add("a", {"x": float("nan"), "y": 1 / 3})
    with open(lines.file, "a") as file:
        file.write('{"key": "cut sho')  # as a power cut leaves it
    again = Lines(lines.file)
    assert again.get("a") == {"x": None, "y": 0.3333333} and again.get("b") is None and again.commits == {provenance.commit()}
    again.add("b", {"z": [1.0]})
    assert set(Lines(lines.file).done) == {"a", "b"}
    write_result(tmp_path / "r.json", {"long": list(range(100)), "short": {"mean": 1 / 3, "per_seed": [1, None]}, "none": []})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text)["long"] == list(range(100)) and '"short": {"mean": 0.3333333, "per_seed": [1, null]},\n' in text


# ---- put together ----


def test_a_part_of_a_study_is_put_together_and_says_what_is_missing(study, capsys):
    add(study, "fitted", 150, dict.fromkeys(study.grid, [0.95, 1.0]), {0: [0.95, 1.0], 1: [0.85, 0.99]}, rate=1e-3)
    add(study, "random", 150, dict.fromkeys(study.grid, [0, 0.0]), {0: [0, 0.0], 1: [0, 0.0]}, rate=1e-3)
    add(study, "random", 450, dict.fromkeys(study.grid, [0, 0.5, 0.9]), {0: [0, 0.5, 0.95], 1: [0, 0.5, 0.6]}, rate=1e-3)
    add(study, "pca", 150, {1e-3: [0, 1.0]})
    found = assembled(study, (0, 1, 2))
    assert list(found["rows"]) == ["fitted", "random"] and list(found["rows"]["random"]["horizons"]) == ["150", "450"] and list(found["rows"]["fitted"]["horizons"]) == ["150"]
    fitted, random = (found["rows"][row]["tokens_to_90"] for row in ("fitted", "random"))
    assert fitted["per_seed"] == [0, 10] and fitted["with_calibration"]["per_seed"] == [7, 17] and fitted["resolution"] == [0, 10] and fitted["steps"] == 150
    assert random["per_seed"] == [20, None] and random["mean"] is None and random["steps"] == 450 and random["budget"] == 20
    said = found["missing"]
    assert "fitted, 150 steps: seed 2" in said and "random, 450 steps: seed 2" in said and "pca, 150 steps: 2 of 3 rates" in said
    assert "balanced, 150 steps: 3 of 3 rates" in said
    text = tables.markdown(found)
    assert "Not run yet: fitted, 150 steps: seed 2;" in text and "| fitted | 0.001 † | 2 | 99.5 ± 0.7 %" in text and "0.100, 0.200" in text
    rates = shipped(found)
    assert rates["rates"] == {"fitted": 1e-3, "random": 1e-3} and rates["best_other"] == "fitted" and set(rates["tokens_to_90"]) == {"fitted", "random"}
    assert set(known.load()) == set(rates)
    write_result(study.lines.file.with_name("x.json"), found)  # strict JSON
    empty = assembled(dataclasses.replace(study, lines=Lines(study.lines.file.with_name("none.jsonl"))), (0,))
    assert empty["rows"] == {} and "Not run yet" in tables.markdown(empty) and shipped(empty)["best_other"] is None


def test_the_studys_table_says_how_to_read_it(study):
    def seed(scores):
        return {"history": [{**entry, "tokens": 2000 * entry["tokens"]} for entry in history(scores)], "final": {"exact_match": scores[-1], "easy_accuracy": 0.41}}

    def row(rate, tokens, longer=None):
        horizons = {"150": {"learning_rate": rate, "exact_match": spread([1.0, 0.98]), "easy_accuracy": spread([0.41, 0.41]), "seeds": {"0": seed([0, 1.0]), "1": seed([0, 0.98])}}}
        return {"horizons": horizons, "tokens_to_90": {**spread(tokens), "budget": 610_000 if longer else 20_000, "steps": 450 if longer else 150,
                                                       "learning_rate": longer or rate, "spacing": 20_000.0, "resolution": [None if value is None else 20_000 for value in tokens],
                                                       "with_calibration": spread([None if value is None else value + 5_000 for value in tokens])}}

    found = {"rows": {"activation": row(2e-3, [81_000, 102_000]), "pca": row(5e-4, [20_000, 20_000]), "random": row(4e-3, [None, 500_000], 8e-3)},
             "grid": [5e-4, 2e-3, 8e-3], "seeds": [0, 1], "missing": [], "teacher": {"exact_match": 1.0, "easy_accuracy": 0.42, "erank": [9.0]},
             "settings": {"steps": 150, "problems": 50, "final_problems": 100, "measured_every": 15}}
    text = tables.markdown(found)
    assert "| RED (activation) | 0.002 | 2 | 99.0 ± 1.4 % | 41.0 ± 0.0 % | – |" in text and "92k (81k–102k) ± 20k | 96k (86k–107k) |" in text
    assert "| pca | 0.0005 † |" in text and "| 20k (every seed) ± 20k |" in text
    assert "| LRC (random) | 0.004; 0.008 † for 450 steps |" in text and "> 610k (1 of 2 seeds sooner)" in text
    for note in ("without padding", "20k to 20k tokens apart", "noisy: 4 × 50 problems a measurement, 4 × 100 at", "longer schedule of its own", "edge of the grid"):
        assert note in text, note
    assert tables.two_by_two(found) == ""
    for name in ("activation, T=40", "random, T=40"):
        found["rows"][name] = row(2e-3, [81_000, 102_000])
    assert tables.two_by_two(found).splitlines()[-1] == "| RED (activation) | 40 | 99.0 ± 1.4 % | 41.0 ± 0.0 % |"
    del found["rows"]["pca"], found["rows"]["random"]
    assert "†" not in tables.markdown(found)


def test_pictures_of_widths_and_of_untrained_students(study, tmp_path):
    add(study, "fitted", 150, dict.fromkeys(study.grid, [0.95, 1.0]), {0: [0.95, 0.96, 1.0], 1: [0.85, 0.99]}, rate=1e-3)
    found = assembled(study, (0, 1))
    light, dark = (path.read_text() for path in write_widths_figure([found, {**found, "width": 32}], tmp_path / "widths.svg"))
    assert light != dark and all(text in light for text in ("width 64 of 128", "width 32 of 128", "fitted")) and "var(" not in light + dark
    table = {"64": {"fitted": {"exact_match": spread([0.9, 1.0])}, "random": {"exact_match": spread([0.0, 0.0])}}, "32": {"fitted": {"exact_match": spread([0.5])}}}
    light, dark = (path.read_text() for path in write_untrained_figure(table, tmp_path / "untrained.svg"))
    assert light != dark and all(text in light for text in ("width 64", "width 32", "LRC (random)", "before any training"))


# ---- the command ----

MEASURED: dict[str, dict] = {}


def once(name: str, run, settings: dict) -> dict:
    """What a run gives, trained once for both tests of the command: a job's name says all that decides it."""
    if name not in MEASURED:
        MEASURED[name] = run_student(run, **settings)
    return copy.deepcopy(MEASURED[name])


def test_study_goes_on_where_it_was_interrupted(teacher, tmp_path, monkeypatch, capsys):
    done = []

    def in_this_process(next_job, *, on_result, **_):
        while (job := next_job()) is not None:
            name, *_ = job
            if len(done) == 3 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            done.append(name)
            on_result(name, once(*job))
        return {}

    monkeypatch.setattr(schedule, "run_queue", in_this_process)
    interrupted: list[bool] = []
    out = tmp_path / "results"
    words = ["--smoke", teacher, "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        trained_script.main(words)
    with open(out / "starts_tiny_16_runs.jsonl", "a") as file:
        file.write('{"key": "cut sho')
    trained_script.main([*words, "--no-run"])  # what there is by now: two rates and one test
    found = json.loads((out / "starts_tiny_16.json").read_text())
    assert list(found["rows"]) == ["activation"] and "random, 2 steps: seed 0" in found["missing"] and "pca, 2 steps: 1 of 1 rates" in found["missing"]
    trained_script.main(words)
    assert len(done) == len(set(done)) == 12  # nothing was run twice
    trained_script.main(words)
    assert len(done) == 12  # a third time: everything is there, also what was written after the cut line
    found = json.loads((out / "starts_tiny_16.json").read_text())
    assert set(found["rows"]) == {"activation", "random", "pca"}
    assert all(list(row["horizons"]) == ["2", "4"] for row in found["rows"].values())  # nobody got there: the longer horizon too
    assert found["rows"]["random"]["tokens_to_90"]["mean"] is None and found["commit"] == [provenance.commit()]
    entry = found["rows"]["pca"]["horizons"]["4"]["seeds"]["0"]["history"][-1]
    assert {"kl_easy", "kl_reasoning", "erank"} <= set(entry) and entry["kl_reasoning"] > 0
    rates = json.loads((out / "learning_rates.json").read_text())
    assert set(rates["rates"]) == {"activation", "random", "pca"} and rates["best_other"] == "pca"
    assert (out / "starts.svg").is_file() and (out / "widths-dark.svg").is_file()
    said = capsys.readouterr().out
    assert "| RED (activation) | 0.0005 †; 0.0005 † for 4 steps |" in said and "lies at the edge of the grid 0.0005" in said


def test_a_failing_run_ends_neither_the_others_nor_the_tables(teacher, tmp_path, monkeypatch):
    def half(next_job, *, on_result, **_):
        failures = {}
        while (job := next_job()) is not None:
            if "pca" in job[0]:
                failures[job[0]] = "Traceback: no pca today"
            else:
                on_result(job[0], once(*job))
        return failures

    monkeypatch.setattr(schedule, "run_queue", half)
    with pytest.raises(SystemExit, match="no pca today"):
        trained_script.main(["--smoke", teacher, "--out", str(tmp_path)])
    assert set(json.loads((tmp_path / "starts_tiny_16.json").read_text())["rows"]) == {"activation", "random"}


@pytest.mark.parametrize("script, words", [(trained_script, ["--seeds", "0", "1"]), (trained_script, ["--smoke", "x"]), (untrained_script, ["--smoke"]),
                                           (untrained_script, ["--seeds", "0"])])
def test_what_would_replace_the_results_needs_out(script, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 2 and "need" in capsys.readouterr().err
