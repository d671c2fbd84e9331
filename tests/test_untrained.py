"""What the study measures: its teachers, its measurements, the tables of untrained students, the linear auto-encoder."""

import dataclasses
import functools
import json
import statistics
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import untrained as untrained_script
from benchmarks.study import autoencoder, grids, pool, teachers
from benchmarks.study.cells import Cell, measure
from benchmarks.study.lines import Lines
from red.demo import suite as measured
from red.demo.experiment import StudentRun, calibration_rows, calibration_tokens, run_config, run_student, teacher_and_tokenizer, training_text
from red.demo.suite import CORPORA, Suite, by_kind, corpus_of
from red.erank import _watching
from red.errors import REDError
from red.evaluate import _by_steps
from red.example import documents, rich_corpus, tokenized
from red.prepare import ready_calibration
from tiny_example import save_tiny_rich_teacher, save_tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


@pytest.fixture(scope="module")
def rich_teacher(tmp_path_factory):
    return save_tiny_rich_teacher(tmp_path_factory.mktemp("teachers") / "tiny rich")


def test_rotated_teachers_are_the_same_function_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers.tempfile, "tempdir", str(tmp_path))
    source, tokenizer = teacher_and_tokenizer(teachers.find("chains").folder, "cpu")
    ids = tokenizer("e = 4 ; e + 7 = s ; ? s : e 4 + 7 = s 1", return_tensors="pt")["input_ids"]
    for name in ("principal", "random basis"):
        found = teachers.find(name)
        rotated, _ = teacher_and_tokenizer(found.folder, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(rotated(ids).logits, source(ids).logits, atol=2e-3, rtol=1e-4)
        assert found.key.startswith(teachers.find("chains").key) and name in found.key and found.width == 128
        made = Path(found.folder, "model.safetensors").stat().st_mtime_ns
        assert teachers.find(name) == found and Path(found.folder, "model.safetensors").stat().st_mtime_ns == made


def test_divergence_is_the_mean_kl_in_nats(teacher):
    model, tokenizer = teacher_and_tokenizer(teacher, "cpu")
    run = StudentRun("pca", 1e-3, final_problems=2, easy_texts=3, erank_tokens=100)
    suite = Suite(tokenizer, run, "test", model)
    assert suite.divergence(model) == {"kl_easy": 0.0, "kl_reasoning": 0.0} and Suite(tokenizer, run, "test").divergence(model) == {}
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    expected = []
    for text in tokenized(documents(1, "test", reasoning_share=1.0), tokenizer, 300)[:3]:
        ids = torch.tensor([text["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (model, other))
        expected += ((p.exp() * (p - q)).sum(-1))[torch.tensor(text["labels"][1:]) != -100].tolist()
    assert suite.divergence(other)["kl_reasoning"] == pytest.approx(statistics.mean(expected), rel=1e-5)


def test_calibration_tokens_are_those_that_the_trainer_reads(teacher):
    model, tokenizer = teacher_and_tokenizer(teacher, "cpu")
    run = StudentRun("activation", 1e-3, steps=3, rows=2, calibration_samples=5)
    calibration = ready_calibration(model, run_config(run, model, "unused", "cpu"), rows=calibration_rows(run, tokenizer))
    assert calibration_tokens(run, tokenizer) == calibration.tokens > 300
    assert calibration_tokens(dataclasses.replace(run, start="random"), tokenizer) == calibration.tokens  # the taps' scale
    assert calibration_tokens(dataclasses.replace(run, start="random", options={"lrc_faithful": True}), tokenizer) == 0
    assert calibration_tokens(dataclasses.replace(run, options={"lrc_faithful": True}), tokenizer) == calibration.tokens


@pytest.mark.parametrize("name, text", [("teacher", {}), ("rich_teacher", {"corpus": "rich", "length": 128})])
def test_an_untrained_cell_is_where_a_run_begins(name, text, request):
    teacher = request.getfixturevalue(name)
    sizes = dict(easy_texts=4, erank_tokens=150, calibration_samples=4)
    cell = measure(Cell("activation", 16, 3, options={"start_fit": "readers"}, problems=3, **sizes), teacher)
    run = StudentRun("activation", 1e-3, 3, steps=1, rows=2, problems=2, final_problems=3, options={"start_fit": "readers"}, **sizes, **text)
    start = run_student(run, teacher_path=teacher, device="cpu")["history"][0]
    for key in ("exact_match", "easy_accuracy", "easy_perplexity", "kl_easy", "kl_reasoning"):
        assert cell[key] == pytest.approx(start[key], rel=1e-6), key
    assert cell["erank"] == pytest.approx(start["erank"], rel=1e-6) and cell["calibration_tokens"] > 200


def test_a_cells_key_stays():
    expected = {"start": "pca", "width": 64, "seed": 3, "split": "test", "options": {}, "calibration_samples": 64, "reasoning_share": 0.5, "problems": 250,
                "easy_texts": 100, "erank_tokens": 4000}
    assert Cell("pca", 64, 3).key(teachers.Teacher("any", "nowhere", "hash")) == json.dumps([expected, "hash"], sort_keys=True)


# ---- the text of a teacher ----


def test_a_teachers_text_is_known_by_its_folder(rich_teacher, tmp_path):
    assert {name: teachers.find(name).corpus for name in ("chains", "massive", "rich", rich_teacher)} == {
        "chains": "chains", "massive": "chains", "rich": "rich", rich_teacher: "rich"}
    (tmp_path / "training.json").write_text('{"level": "full"}')
    with pytest.raises(REDError, match="level='full', for which there is no suite"):
        corpus_of(str(tmp_path))


def test_the_rich_text_of_a_run(rich_teacher):
    _, tokenizer = teacher_and_tokenizer(rich_teacher, "cpu")
    run = StudentRun("pca", 1e-3, steps=10, rows=4, corpus="rich", length=128)
    text = training_text(run, tokenizer)
    assert max(len(row["input_ids"]) for row in text) <= CORPORA["rich"].length
    asking = sum(len(row["input_ids"]) for row in text if row["labels"][1] == -100)
    assert asking / sum(len(row["input_ids"]) for row in text) == pytest.approx(0.5, abs=0.05)
    words = {word for row in text for word in tokenizer.decode(row["input_ids"]).split()}
    assert {"max", "ann", "10", "lamp", "garden"} <= words and "22" not in words
    everything = tokenized(CORPORA["rich"].documents(0, "test", 1.0), tokenizer, 3000)
    assert all(row["labels"][1] == -100 for row in everything) and everything[:3] != text[:3]
    for kind, steps in CORPORA["rich"].steps.items():
        fewest, most = rich_corpus.LEVELS["small"].steps[kind]
        assert fewest == min(steps) and most == max(steps)
    assert set(CORPORA["rich"].steps) == set(rich_corpus.KINDS)


def test_exact_match_of_several_kinds_is_their_mean(rich_teacher, monkeypatch):
    model, tokenizer = teacher_and_tokenizer(rich_teacher, "cpu")
    suite = Suite(tokenizer, StudentRun("pca", 1e-3, problems=2, final_problems=3, easy_texts=3, erank_tokens=100, corpus="rich", length=128), "test")
    seen = []

    def two_steps_at_most(model, tokenizer, problems):
        seen.extend(problems)
        return _by_steps(problems, [problem.steps <= 2 for problem in problems])

    monkeypatch.setattr(measured, "forced_exact_match", two_steps_at_most)
    found = suite.light(model)
    shares = {"chain": 1 / 3, "shuffled": 1 / 3, "lookup": 1 / 2, "facts": 1 / 2, "copy": 0.0}
    assert by_kind(found["exact_match_by_steps"]) == pytest.approx(shares) and found["exact_match"] == pytest.approx(sum(shares.values()) / 5)
    assert list(found["exact_match_by_steps"]) == [f"{kind} {n}" for kind, steps in CORPORA["rich"].steps.items() for n in steps]
    assert len(seen) == 2 * 12 and {problem.kind for problem in seen} == set(shares) and {rich_corpus.split_of(problem.question) for problem in seen} == {"test"}
    assert by_kind({"2": 0.5, "8": 0.25}) == {"2": 0.5, "8": 0.25}


# ---- untrained ----


def test_untrained_tables(teacher, tmp_path, monkeypatch, capsys):
    for name, value in (("SIZES", (1, 3)), ("READER_RIDGES", (1e-3, 1e-1)), ("WRITER_RIDGES", (1e-2,)), ("RIDGE_SEEDS", (100,))):
        monkeypatch.setattr(grids, name, value)
    monkeypatch.setattr(autoencoder, "NAMES", ("activation", "pca"))
    monkeypatch.setattr(autoencoder.measure, "__defaults__", ((0, 3), 200))
    words = ["--smoke", "--out", str(tmp_path), "--teachers", teacher, "--widths", "16", "--seeds", "0", "1", "--rows", "activation", "random", "--jobs", "1"]
    untrained_script.main(words)
    found = json.loads((tmp_path / "untrained.json").read_text())
    assert set(found["main"]["tiny"]["widths"]["16"]) == {"activation", "random", "fitted"}  # fitted from the other tables: its cells are the same
    entry = found["main"]["tiny"]["widths"]["16"]["activation"]
    assert entry["seeds"] == 2 and len(entry["erank"]) == 3 and entry["parameters"] > 1000 and entry["kl_reasoning"]["mean"] > 0
    assert list(found["size"]["16"]) == ["1", "3"] and found["size"]["16"]["1"]["calibration_tokens"]["mean"] < found["size"]["16"]["3"]["calibration_tokens"]["mean"] < 400
    assert set(found["domain"]["16"]) == {"reasoning", "mixed", "easy text"} and set(found["ridge"]["16"]["options"]) == {"fit_reader_ridge", "fit_writer_ridge"}
    assert found["ridge"]["16"]["chosen"]["seeds"] == 2 and found["autoencoder"]["tiny"]["16"]["pca"]["steps"] == [0, 3]
    lines = (tmp_path / "untrained_runs.jsonl").read_text()
    said = capsys.readouterr().out
    assert "| LRC (random) | 2 |" in said and "by the kind of its calibration text" in said and "Not measured yet" in said and "reader ridge ↓" in said
    untrained_script.main([*words, "--no-run"])
    assert (tmp_path / "untrained_runs.jsonl").read_text() == lines and capsys.readouterr().out.strip().endswith(said.strip()[-200:])
    assert (tmp_path / "untrained.svg").is_file()


def test_untrained_table_of_several_kinds(rich_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoencoder, "NAMES", ("pca",))
    monkeypatch.setattr(autoencoder.measure, "__defaults__", ((0, 3), 200))
    untrained_script.main(["--smoke", "--out", str(tmp_path), "--teachers", rich_teacher, "--widths", "16", "--seeds", "0", "--rows", "pca", "--jobs", "1",
                           "--tables", "main", "autoencoder"])
    found = json.loads((tmp_path / "untrained.json").read_text())
    assert len(found["main"]["tiny rich"]["widths"]["16"]["pca"]["exact_match_by_steps"]) == 12 and "16" in found["autoencoder"]["tiny rich"]
    assert "| by kind (chain, shuffled, lookup, facts, copy) |" in capsys.readouterr().out


def test_a_failing_cell_does_not_end_the_others(tmp_path):
    lines = Lines(tmp_path / "cells.jsonl")
    failures = pool.execute({"bad": lambda: 1 / 0, "good": lambda: {"x": 1}}, lines, jobs=1)
    assert list(failures) == ["bad"] and "ZeroDivisionError" in failures["bad"] and lines.get("good") == {"x": 1}


def test_workers_give_what_this_process_gives(teacher, tmp_path):
    cell = Cell("pca", 16, 0, problems=2, easy_texts=3, erank_tokens=100, calibration_samples=2)
    lines = Lines(tmp_path / "cells.jsonl")
    tasks = {str(seed): functools.partial(measure, dataclasses.replace(cell, seed=seed), teacher) for seed in (0, 1)}
    assert not pool.execute(tasks, lines, jobs=2)
    own = measure(cell, teacher)
    assert lines.get("0")["easy_perplexity"] == pytest.approx(own["easy_perplexity"], rel=1e-5) and lines.get("0") != lines.get("1")


# ---- the linear auto-encoder ----


def test_the_auto_encoder_loses_what_pca_leaves():
    torch.manual_seed(0)
    x = torch.randn(200, 12) * torch.linspace(0.2, 2, 12)
    values, vectors = torch.linalg.eigh(x.T @ x)
    q = vectors[:, -4:]
    [start] = autoencoder.train(x, q, q.T, steps=(0,))
    assert start["loss"] == pytest.approx(float(values[:-4].sum() / values.sum()), rel=1e-4)
    worse = torch.linalg.qr(torch.randn(12, 4)).Q
    losses = [entry["loss"] for entry in autoencoder.train(x, worse, worse.T, steps=(0, 50, 2000), learning_rate=1e-2)]
    assert losses[0] > losses[1] > losses[2] and losses[2] == pytest.approx(start["loss"], rel=0.02)


def test_the_auto_encoders_states_and_starts(teacher):
    model, tokenizer = teacher_and_tokenizer(teacher, "cpu")
    layers = autoencoder.states(model, tokenizer, 300)
    assert [tuple(state.shape) for state in layers] == [(300, 32)] * 3 and all(float(state.square().mean()) == pytest.approx(1, rel=1e-5) for state in layers)
    ids = tokenized(documents(2, "test"), tokenizer, 300)
    first = min((row["input_ids"] for row in ids), key=len)
    with _watching(model) as seen, torch.no_grad():
        model.model(input_ids=torch.tensor([first]))
    scale = layers[1][0].norm() / seen[1][0, 0].norm()
    torch.testing.assert_close(layers[1][: len(first)], seen[1][0] * scale, atol=1e-4, rtol=1e-3)
    q, o = autoencoder.pair("activation", 8, 0, model, tokenizer)
    assert torch.equal(o, q.T) and set(q.unique().tolist()) == {0.0, 1.0}
    q, o = autoencoder.pair("random", 8, 0, model, tokenizer)
    assert abs(float(q.std()) - 0.02) < 0.005 and not torch.allclose(o, q.T)
    q, o = autoencoder.pair("explained", 8, 0, model, tokenizer)
    torch.testing.assert_close(o @ q, torch.eye(8), atol=1e-4, rtol=0)  # the estimate keeps what it is given
