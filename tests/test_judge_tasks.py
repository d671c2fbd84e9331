"""red.judge's tasks in lm-evaluation-harness, offline; skipped where it is not installed (`pip install "red-distill[eval]"`)."""

from __future__ import annotations

import json
import socket

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from red.errors import REDError
from red.evaluate import exact_match, text_quality
from red.example import easy_documents, problems, teacher_path
from red.judge import judge
from red.judge.harness import LOCAL, Harness

LIMIT = 8  # two problems of each step count


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """The embedded teacher with noise on its weights: it answers some problems, and the errors are not all of one kind."""
    folder = tmp_path_factory.mktemp("worse")
    model = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter += 0.6 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(worse, tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "mine.jsonl"
    asked = problems("test", 2, 8, seed=5)
    file.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in asked))
    return judge(worse, teacher_path(), tasks=[*LOCAL, str(file)], limit=LIMIT, speed=False, device="cpu")


def row(found, task):
    (one,) = [row for row in found.rows if row.task == task]
    return one


def test_figures_are_those_of_red_evaluate(found, worse):
    """Another implementation of generating, padding, stopping and counting, on the same problems and texts."""
    asked = [problem for group in zip(*(problems("test", steps, 100) for steps in (2, 4, 6, 8)), strict=True) for problem in group][:LIMIT]
    texts = easy_documents("test", 100)[:LIMIT]
    chains, easy = row(found, "red_chains"), row(found, "red_easy_text")
    assert chains.n == easy.n == LIMIT
    for folder, side, place in ((teacher_path(), "teacher", 0), (worse, "student", 1)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        truth = exact_match(model, tokenizer, asked)
        assert getattr(chains, side) == pytest.approx(truth["exact_match"])
        assert {steps: values[place] for steps, values in chains.by_steps.items()} == pytest.approx(truth["exact_match_by_steps"])
        assert getattr(easy, side) == pytest.approx(text_quality(model, tokenizer, texts)["easy_perplexity"], rel=1e-4)
    assert chains.teacher == 1.0 and 0 < chains.student < 1, "a test in which everything is right, or nothing, sees little"


def test_differences_are_paired_and_of_the_right_sign(found):
    for task in (*LOCAL, "mine"):
        one = row(found, task)
        assert one.difference.paired and one.difference.value == pytest.approx(one.student - one.teacher), task
        assert one.higher_is_better is (task != "red_easy_text")
    assert row(found, "red_chains").difference.value < 0
    assert row(found, "mine").n == 8 and row(found, "mine").teacher == 1.0 and row(found, "red_easy_cloze").teacher == 1.0
    assert "red_chains" in str(found) and "8 steps" in str(found) and json.loads(json.dumps(found.as_json(), allow_nan=False))["versions"]["lm_eval"]


def test_a_model_beside_itself_differs_in_nothing():
    found = judge(teacher_path(), teacher_path(), limit=4, speed=False, device="cpu")
    assert {row.task for row in found.rows} == set(LOCAL)
    for one in found.rows:
        assert (one.difference.value, one.difference.stderr, one.difference.low, one.difference.high) == (0, 0, 0, 0)


def test_unknown_and_doubled_tasks_and_broken_files_are_refused_before_a_model_is_read(tmp_path, monkeypatch):
    """The harness's own thousands of tasks are left out: reading their index takes a quarter of a minute."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, include_defaults: TaskManager(include_path=include_path, include_defaults=False))
    file = tmp_path / "red_chains.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(REDError, match="line 2 has no 'answer'"):
        judge("nowhere/student", "nowhere/teacher", tasks=[str(file)])
    file.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(REDError, match="'red_chains' is named twice"):
        Harness([str(file), "red_chains"])
    with pytest.raises(REDError, match="no task 'red_chain'; did you mean 'red_chains'"):
        Harness(["red_chain"])
