"""red.judge without lm-evaluation-harness: the error of a difference, files of problems, divergence, speed, and the command."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from red.cli import main
from red.errors import REDError
from red.judge import harness, judge, kl_to_teacher, load_problems, paired_difference
from red.judge.problems import is_right
from red.judge.speed import measure_speed
from red.judge.statistics import ratio_error, unpaired_difference

ROOT = Path(__file__).resolve().parents[1]


def test_transcripts_of_clients_name_their_versions_and_no_machine():
    texts = {path.stem: path.read_text() for path in (ROOT / "docs" / "clients").glob("*.txt")}
    assert set(texts) == {"gguf", "lm_eval", "pipeline", "red_eval", "vllm"}
    for name, text in texts.items():
        assert text.startswith("$ python -m benchmarks.clients.students runs/clients\n$ "), name
        assert not any(part in text for part in ("/tmp", "/root", "/home", "/work")), name


# ---- statistics ----


def test_paired_error_is_that_of_the_items_differences():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=500)  # an item's difficulty, common to both models
    teacher, student = hard + 0.1 * rng.normal(size=500), hard - 0.2 + 0.1 * rng.normal(size=500)
    found = paired_difference(teacher, student)
    truth = (student - teacher).std(ddof=1) / math.sqrt(500)
    assert found.paired and found.value == pytest.approx((student - teacher).mean(), abs=1e-12)
    assert found.stderr == pytest.approx(truth, rel=0.05)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * truth, found.value + 1.96 * truth), abs=0.15 * truth)
    apart = unpaired_difference(teacher.mean(), student.mean(), tuple(side.std(ddof=1) / math.sqrt(500) for side in (teacher, student)))
    assert apart.stderr > 5 * found.stderr and not apart.paired
    assert paired_difference(teacher, student) == found, "the draws are seeded"
    assert paired_difference(student, teacher).value == -found.value


def test_paired_error_of_a_perplexity():
    """Against the delta method: d exp(-Σa/Σw) = -ppl · (a - mean·w) / Σw for each item, and items add."""
    rng = np.random.default_rng(1)
    words = rng.integers(5, 50, size=400).astype(float)
    logs = [words * -(1 + 0.2 * rng.normal(size=400)), words * -(1.3 + 0.2 * rng.normal(size=400))]
    pairs = [np.stack([values, words], 1) for values in logs]
    found = paired_difference(*pairs, lambda mean: np.exp(-mean))
    perplexities = [math.exp(-values.sum() / words.sum()) for values in logs]
    assert found.value == pytest.approx(perplexities[1] - perplexities[0], rel=1e-12)
    shares = [-perplexity * (values - values.sum() / words.sum() * words) / words.sum() for values, perplexity in zip(logs, perplexities, strict=True)]
    assert found.stderr == pytest.approx(math.sqrt(((shares[1] - shares[0]) ** 2).sum()), rel=0.06)


def test_what_has_no_error():
    assert paired_difference([1, 0, 1], [1, 0, 1]).stderr == 0
    assert paired_difference([1.0], [0.0]).stderr is None and paired_difference([1.0], [0.0]).value == -1
    assert unpaired_difference(1.0, 0.5, (None, 0.1)).stderr is None
    assert ratio_error(np.array([3.0]), np.array([2.0])) is None
    with pytest.raises(REDError, match="the same items"):
        paired_difference([1, 2], [1])


def test_ratio_error_counts_documents():
    """A document said twice over is no more evidence: tokens within it are not independent. Equal weights: the error of a mean."""
    values = np.array([1.0, 4.0, 2.0, 7.0, 3.0])
    expected = values.std(ddof=1) / math.sqrt(5)
    assert ratio_error(values, np.ones(5)) == pytest.approx(expected)
    assert ratio_error(100 * values, np.full(5, 100.0)) == pytest.approx(expected)


# ---- problems ----

def test_problems_are_read(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": " 2 + 3? ", "answer": 5, "steps": 2}\n\n{"question": "é", "answer": "so #### 1,000", "source": "x"}\n')
    assert [vars(problem) for problem in load_problems(file)] == [{"question": "2 + 3?", "answer": "5", "steps": 2},
                                                                  {"question": "é", "answer": "so #### 1,000", "steps": 1}]


@pytest.mark.parametrize("line, message", [
    ("{", "line 2 is not JSON"), ("[1]", "line 2 holds a list"), ('{"question": "a"}', "line 2 has no 'answer'; it has 'question'"),
    ('{"question": "", "answer": "b"}', "line 2 has question=''"), ('{"question": "a", "answer": true}', "answer='True'; expected text"),
    ('{"question": "a", "answer": NaN}', "answer='nan'"), ('{"question": "a", "answer": "b", "steps": "2"}', "steps='2'; expected a whole number"),
    ('{"question": "a", "answer": "b ####  "}', "names no result"), ("[" * 100_000, "line 2 is not JSON"), ("9" * 5000, "line 2"),
])
def test_a_broken_line_is_named(line, message, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(REDError, match="q.jsonl, ") as raised:
        load_problems(file)
    assert message in str(raised.value)


def test_files_without_problems(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(REDError, match="holds no problem"):
        load_problems(tmp_path / "empty.jsonl")
    with pytest.raises(REDError, match="line 1 is not JSON.*in UTF-8"):
        load_problems(tmp_path / "binary.jsonl")
    with pytest.raises(REDError, match="did you mean .*empty.jsonl"):
        load_problems(tmp_path / "emty.jsonl")


@pytest.mark.parametrize("reply, answer, right", [
    ("a  b\nc", "a b c", True), ("a b c d", "a b c", False), ("The answer is 5", "a 5", False),
    ("She has 4 * 3 = 12 eggs.\n#### 12", "4 * 3 = 12 #### 12", True), ("the answer is $1,000.", "#### 1000", True), ("12.0", "12", True),
    ("12 apples and 3 pears", "#### 12", False), ("#### 12\nand 3", "#### 12", False), ("", "#### 12", False), ("-7", "#### 7", False),
    ("x #### blue", "#### blue", True), ("so blue", "#### blue", False), ("it is 0.5", "0.50", True), ("no number", "7", False),
])
def test_what_is_right(reply, answer, right):
    assert is_right(reply, answer) is right


# ---- divergence ----

def documents(count=9, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(4, 64, size=int(length)) for length in rng.integers(3, 20, size=count)]
    return [{"input_ids": row, "number": place} for place, row in enumerate(rows)]


def test_divergence_against_float64_one_document_at_a_time(tiny_model):
    teacher, student = tiny_model(), tiny_model(hidden_size=24, seed=1)
    examples = documents()
    examples[3]["labels"] = np.where(np.arange(len(examples[3]["input_ids"])) < 2, -100, examples[3]["input_ids"])
    found = kl_to_teacher(teacher, student, examples, batch_size=4)
    sums, counts = [], []
    for example in examples:
        ids = torch.tensor(example["input_ids"]).unsqueeze(0)
        with torch.no_grad():
            p, q = (model.double()(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        keep = torch.tensor(example.get("labels", example["input_ids"])[1:] != -100)
        own = [-(side.gather(1, ids[0, 1:, None])[:, 0])[keep].sum().item() for side in (p, q)]
        sums.append([(p.exp() * (p - q)).sum(-1)[keep].sum().item(), *own, (p.argmax(-1) == q.argmax(-1))[keep].sum().item()])
        counts.append(int(keep.sum()))
    sums, counts = np.array(sums), np.array(counts)
    assert found["tokens"] == counts.sum() and found["documents"] == len(examples)
    for name, column in zip(("kl", "teacher_loss", "student_loss", "agreement"), sums.T, strict=True):
        mean = column.sum() / counts.sum()
        assert found[name]["mean"] == pytest.approx(mean, rel=1e-5), name
        assert found[name]["stderr"] == pytest.approx(math.sqrt(9 / 8 * ((column - mean * counts) ** 2).sum()) / counts.sum(), rel=1e-4), name
    assert found["kl"]["mean"] > 0.1, "two random models differ"


def test_divergence_from_itself_is_nothing_and_pieces_are_one_document(tiny_model):
    model, examples = tiny_model().train(), documents(4)
    found = kl_to_teacher(model, model, examples, batch_size=2)
    assert found["kl"] == {"mean": 0.0, "stderr": 0.0} and found["agreement"]["mean"] == 1.0
    assert found["teacher_loss"] == found["student_loss"] and model.training
    assert kl_to_teacher(model, model, [{**example, "number": example["number"] // 2} for example in examples])["documents"] == 2
    assert kl_to_teacher(model, model, examples[:1])["kl"]["stderr"] is None


def test_divergence_refuses_what_has_none(tiny_model):
    with pytest.raises(REDError, match="teacher's vocabulary has 64 entries and the student's 65"):
        kl_to_teacher(tiny_model(), tiny_model(vocab_size=65), documents())
    with pytest.raises(REDError, match="no token to predict"):
        kl_to_teacher(tiny_model(), tiny_model(), [{"input_ids": [5, 6], "labels": [5, -100]}])


# ---- speed ----

def test_speed_is_the_inverse_of_time_and_answers_have_one_length(tiny_model):
    model = tiny_model(max_position_embeddings=12)
    model.generation_config.eos_token_id = list(range(60))  # nearly any token would end it
    found = measure_speed(model.train(), 0)
    assert (found["prompt_tokens"], found["answer_tokens"]) == (6, 6) and model.training
    for batch, one in found["batches"].items():
        assert one["tokens_per_second"] * one["ms_per_answer"] / 1000 == pytest.approx(6 * int(batch))
        assert len(one["ms_of_each_repeat"]) == 5 and min(one["ms_of_each_repeat"]) == one["ms_per_answer"]
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 200_000_000  # Python and torch alone
    assert measure_speed(model)["peak_memory_bytes"] is None


# ---- judge, and the command ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    from tiny_models import build_tiny_tokenizer

    folder = tmp_path_factory.mktemp("judge")
    for name, settings in (("teacher", {}), ("student", {"hidden_size": 24, "seed": 1})):
        tiny_model(**settings).save_pretrained(folder / name)
        build_tiny_tokenizer().save_pretrained(folder / name)
    (folder / "held_out.txt").write_text("\n".join(" ".join(f"w{number}" for number in example["input_ids"]) for example in documents(12)))
    return folder


def test_a_model_beside_itself(folder):
    found = judge(folder / "teacher", folder / "teacher", tasks=[], data=folder / "held_out.txt", limit=5, speed=False)
    assert found.divergence["kl"]["mean"] == 0 and found.divergence["documents"] == 5 and found.rows == [] and found.notes == []
    assert found.student == found.teacher and found.student["parameters"] - found.student["non_embedding_parameters"] == 2 * 64 * 32


def test_the_command_prints_and_writes(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("red.judge.speed.ANSWER", 3)
    output = tmp_path / "out.json"
    arguments = ["eval", str(folder / "student"), "--against", str(folder / "teacher"), "--tasks", "none", "--data", str(folder / "held_out.txt"), "--device", "cpu"]
    assert main([*arguments, "--output", str(output)]) == 0
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    assert f"{written['student']['parameters']:,}" in printed and "KL(teacher‖student)" in printed and "tokens/s, batch 8" in printed
    assert written["versions"]["torch"] == torch.__version__ and written["settings"]["dtype"] == "float32"
    assert written["divergence"]["kl"]["mean"] > 0 and written["student"]["generation"]["batches"]["8"]["tokens_per_second"] > 0
    assert main([*arguments, "--output", str(output)]) == 2 and "exists and nothing is overwritten" in capsys.readouterr().err
    assert main([*arguments, "--chat"]) == 2 and "has no chat template" in capsys.readouterr().err
    assert main([*arguments, "--limit", "0"]) == 2 and "limit=0 is not a positive number" in capsys.readouterr().err
    assert main([*arguments, "--device", "gpu"]) == 2 and "device='gpu' is no device" in capsys.readouterr().err
    assert main([*arguments, "--dtype", "int8"]) == 2 and "dtype='int8'" in capsys.readouterr().err
    assert main(["eval", str(folder / "studnt"), "--against", str(folder / "teacher"), "--tasks", "none"]) == 2


def test_other_tokenizers_have_no_divergence(folder, tmp_path, tiny_model, tiny_tokenizer):
    tiny_model().save_pretrained(tmp_path / "other")
    tiny_tokenizer.eos_token = "w9"
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(REDError, match="different tokenizers"):
        judge(tmp_path / "other", folder / "teacher", tasks=[], data=folder / "held_out.txt")


def test_without_the_harness_everything_else_works(folder, monkeypatch):
    """And whoever asks for a task by name learns how to get it."""
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    found = judge(folder / "student", folder / "teacher", data=folder / "held_out.txt", speed=False)
    assert found.rows == [] and found.divergence and 'pip install "red-distill[eval]"' in str(found)
    with pytest.raises(REDError, match=r'not installed.*pip install "red-distill\[eval\]".*--tasks none'):
        judge(folder / "student", folder / "teacher", tasks=["red_chains"])


def run_of(task, metric, scores, reported, *, error=0.1, key="none"):
    """What the harness returns, for one task."""
    samples = [{"doc_id": place, "doc": {"steps": 2 + place % 2}, "doc_hash": f"h{place}", "filter": key, metric: score} for place, score in enumerate(scores)]
    return {"results": {task: {"alias": task, f"{metric},{key}": reported, f"{metric}_stderr,{key}": error}}, "samples": {task: samples[::-1]},
            "n-samples": {task: {"effective": len(scores)}}, "higher_is_better": {task: {metric: True}}}


def test_rows_are_paired_only_where_the_items_give_the_reported_score():
    teacher, student = [1, 1, 0, 1], [1, 0, 0, 1]
    answered_in_another_order = run_of("t", "acc", student, 0.5)
    answered_in_another_order["samples"]["t"].reverse()
    (row,) = harness.compare(run_of("t", "acc", teacher, 0.75), answered_in_another_order)
    assert row.difference.paired and row.difference.value == -0.25 and row.n == 4 and row.by_steps == {"2": (0.5, 0.5), "3": (1.0, 0.5)}
    (row,) = harness.compare(run_of("t", "f1", teacher, 0.9, key="strict"), run_of("t", "f1", student, 0.6, key="strict"))
    assert not row.difference.paired and row.difference.stderr == pytest.approx(math.hypot(0.1, 0.1)) and row.metric == "f1 (strict)"
    pairs = [[(-2.0, 2), (-6.0, 4)], [(-4.0, 2), (-8.0, 4)]]
    reported = [math.exp(8 / 6), math.exp(12 / 6)]
    (row,) = harness.compare(run_of("t", "word_perplexity", pairs[0], reported[0], error="N/A"), run_of("t", "word_perplexity", pairs[1], reported[1], error="N/A"))
    assert row.difference.paired and row.difference.value == pytest.approx(reported[1] - reported[0]) and row.teacher_stderr is None and row.by_steps is None
    other = run_of("t", "acc", student, 0.5)
    other["samples"]["t"][0]["doc_hash"] = "another problem"
    (row,) = harness.compare(run_of("t", "acc", teacher, 0.75), other)
    assert not row.difference.paired


def test_sides_are_not_swapped_in_the_table():
    from red.judge import Judgement

    side = {"model_type": "llama", "hidden_size": 8, "parameters": 100, "non_embedding_parameters": 50, "dtype": "float32", "generation": None}
    rows = harness.compare(run_of("t", "acc", [1, 1, 0, 1], 0.75), run_of("t", "acc", [1, 0, 0, 1], 0.5))
    found = Judgement({"name": "T", **side}, {"name": "S", **side, "parameters": 25}, rows, None, {}, {})
    line = next(line.split() for line in str(found).splitlines() if line.startswith("t "))
    assert line[:6] == ["t", "acc", "↑", "4", "0.7500", "0.5000"] and line[6] == "−0.2500"
    assert "every item was scored alike" not in str(found)
    assert "0.250" in str(found) and found.as_json()["rows"][0]["difference"]["value"] == -0.25
    assert types.SimpleNamespace(**found.as_json()).student["name"] == "S"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(REDError, match="The student's folder .*nowhere' does not exist"):
        judge(str(tmp_path / "nowhere"), str(tmp_path), tasks=(), speed=False)
