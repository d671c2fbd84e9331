"""LoRi's embedded example and command: problems that are right, a teacher that solves them, results in the promised form, a spectrum with its control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_lori import PREFIX, number_tokenizer, table_rows

from benchmarks import lori_documents, lori_switches
from red.cli import main
from red.errors import REDError
from red.example import split_of
from red.lori import load
from red.lori.demo import main as demo
from red.lori.demo import run_demo, spectrum
from red.lori.demo.experiment import METHODS, MethodRun, run_method, teacher_path
from red.lori.demo.problems import HOPS, NUMBERS, problems
from red.lori.evaluate import accuracy


def test_the_problems_are_right():
    """Every step follows the table, the answer is the last step's, hops are even, and splits do not meet."""
    rows = problems("test", 50)
    for place, row in enumerate(rows):
        table, _, ask = row.question.partition(" , ")
        numbers, (start, hops, _) = [int(word) for word in table.split()], ask.split()
        follows = dict(zip(numbers[::2], numbers[1::2], strict=False))
        assert sorted(follows) == sorted(follows.values()) == list(range(NUMBERS)) and len(row.steps) == int(hops) == HOPS[place % len(HOPS)]
        here = int(start)
        for step in row.steps:
            assert step == f"{here} {follows[here]}"
            here = follows[here]
        assert row.answer == str(here) and split_of(row.question) == "test"
    assert rows == problems("test", 50) != problems("test", 50, seed=1)


def test_the_embedded_teacher_solves_them():
    model, tokenizer, facts = load(teacher_path())
    found = accuracy(model, tokenizer, problems("test", 100), facts, max_new_tokens=32)
    assert facts.target == "explicit" and found["accuracy"] > 0.95 and found["tokens"] == 3 * 2 + 3  # three hops of two words on average, then <eot>, = and the answer
    record = json.loads((Path(teacher_path()) / "training.json").read_text())
    assert record["scores"]["test"]["accuracy"] > 0.95


def test_the_spectrum_and_its_control():
    """Trajectories of rank 2 in the channels need 2 directions; shuffled, nearly all."""
    basis = torch.linalg.qr(torch.randn(24, 24))[0][:2]
    states = [torch.randn(3, 40, 2) @ basis for _ in range(10)]
    found = spectrum.spectra(states)
    assert found["trajectories"]["channels"]["rank_90"] == 2 and found["shuffled"]["channels"]["rank_90"] > 12 and found["shape"] == [3, 24]
    for name in ("trajectories", "shuffled"):
        assert sum(found[name]["channels"]["energy"]) == pytest.approx(1) == sum(found[name]["layers"]["energy"])


def outcome(run: MethodRun, **_) -> dict:
    return {"accuracy": 0.5 + 0.1 * run.seed, "accuracy_by_steps": {"1": 1.0, "2": 0.2 * run.seed},
            "latency_ms": 3.0, "tokens": 2.0, "latent_steps": 5,
            "train_seconds": 1.0, "settings": {"seed": run.seed, "learning_rate": run.learning_rate}}


def test_results_in_the_promised_form(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_method", outcome)
    lines = []
    run_demo(tmp_path / "demo", seeds=(0, 1), log=lines.append)
    found = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(found) >= {"methods", "versions", "commit", "low_rank"} and list(found["methods"]) == list(METHODS)
    lori = found["methods"]["lori"]
    assert set(lori) >= {"accuracy", "accuracy_by_steps", "latency_ms", "tokens", "seeds", "spread"}
    assert (lori["accuracy"], lori["spread"], lori["seeds"], lori["accuracy_by_steps"]["2"]) == (pytest.approx(0.55), pytest.approx(0.1), [0, 1], pytest.approx(0.1))
    assert "<svg" in (tmp_path / "demo" / "spectrum.svg").read_text() and not (tmp_path / "demo" / "cache").exists()
    assert any("LoRi without anchor" in line for line in lines)
    with pytest.raises(REDError, match="earlier demo"):
        run_demo(tmp_path / "demo", log=lines.append)
    with pytest.raises(REDError, match="method='lora' takes no part"):
        run_demo(tmp_path / "other", methods=["lora"])


@pytest.mark.parametrize("method", ["lori", "no_cot"])
def test_a_method_trains_from_the_teacher(method, tmp_path):
    found = run_method(MethodRun(method, 1e-3, steps=2, batch=4, train_problems=8, problems=5), trajectories=tmp_path)
    assert set(found["accuracy_by_steps"]) == {"1", "2", "3", "4", "5"} and found["latency_ms"] > 0 and found["latent_steps"] == (5 if method == "lori" else 0)
    assert (tmp_path / "0" / "trajectories.json").exists() == (method == "lori")


def test_the_page_is_current():
    """Tables and pictures are those of the results."""
    found, page = json.loads(lori_documents.RESULTS.read_text()), lori_documents.PAGE.read_text()
    assert page == lori_documents.filled(page, found), "run python -m benchmarks.lori_documents"
    assert all(path.is_file() and path.name in page for path in lori_documents.PICTURES)


def test_a_study_that_was_stopped_has_what_is_known():
    """With outcomes of seed 0 alone every row is of one seed; without any there is nothing, and the tables say so."""
    def known(run: MethodRun):
        return outcome(run) | {"validation_accuracy": run.learning_rate} if run.seed == 0 and run.steps == lori_switches.SHORT else None

    found = lori_switches.study(known)
    assert found["sees"]["without the embedding"]["each"] == [0.5] and found["sees"]["all layers"]["learning_rate"] == 6e-3
    assert found["sees_longer"] == {"all layers": None, "without the embedding": None, "the embedding alone": None}
    assert len(found["others"]) == sum(map(len, lori_switches.SWITCHES.values()))
    text = lori_documents.switches({"switches": found})
    assert "| `centred` | false | true | 50.0 | 50.0 | 100 0 |" in text and "| without the embedding | 500 | 50.0 |" in lori_documents.sees({"switches": found})
    nothing = {"switches": lori_switches.study(lambda run: None)}
    assert "Not measured" in lori_documents.switches(nothing) and "Not measured" in lori_documents.sees(nothing)


# ---- the command ----


@pytest.fixture()
def folder(tmp_path, tiny_teacher):
    """A teacher, its tokenizer and problems."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    number_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"question": row.question, "steps": list(row.steps), "answer": row.answer} for row in table_rows()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_command(folder, capsys):
    arguments = ["lori", "--teacher_model_name_or_path", folder / "teacher", "--train-file", folder / "rows.jsonl", "--output_dir", folder / "run",
                 "--answer_prefix", PREFIX, "--max_steps=2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "--eval_file", folder / "rows.jsonl", "--latent_steps", "2"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "eval_loss" in capsys.readouterr().out and load(folder / "run" / "student")[2].latent_steps == 2
    for changed, message in ((["--preset", "lora"], "preset='lora' is no method"), (["--train_file", "missing.jsonl"], "missing.jsonl"), ([], "not empty")):
        assert main([str(argument) for argument in [*arguments, *changed]]) == 2
        assert message in capsys.readouterr().err
    assert main(["demo", "--method", "lori", "--starts", "pca"]) == 2 and "--starts belongs to" in capsys.readouterr().err


def test_the_commands_help(capsys):
    assert main(["lori", "-h"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--rationale_weight", "α:", "--preset", "red lori --config run.yaml --resume"))
