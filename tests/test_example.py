"""The embedded example: disjoint splits, right arithmetic, honest labels, and a teacher that really reasons."""

import hashlib
import itertools
import json
import os
import random

import pytest
import torch

from red.evaluate import exact_match, text_quality
from red.example import (
    SPLITS,
    Document,
    documents,
    easy_documents,
    easy_perplexity_limit,
    problems,
    split_of,
    teacher_path,
    tokenized,
)
from red.example.corpus import VOCABULARY
from red.example.tokenizer import build_tokenizer
from red.example.train_teacher import ROW, STAGES, build_model, document_mask, packed_rows, train


@pytest.fixture(scope="module")
def teacher():
    """The shipped bf16 file, computed with in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_path())


def solve(question: str) -> str:
    """The answer to a question, worked out from its words alone: an evaluator that shares no code with the generator."""
    body, asked = question.removesuffix(" :").split(" ? ")
    (first, given), *operations = [statement.split(" = ") for statement in body.removesuffix(" ;").split(" ; ")]
    value = {first: int(given)}
    answer = [first, given]
    for expression, name in operations:
        source, sign, operand = expression.split()
        value[name] = (value[source] + {"+": 1, "-": -1}[sign] * int(operand)) % 10
        answer += [sign, operand, "=", name, str(value[name])]
    assert asked == name, "the question asks for the chain's last variable"
    return " ".join([*answer, ";"])


# --- corpus -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split):
    for steps in range(2, 9):
        for problem in problems(split, steps, 200, seed=3):
            assert problem.answer == solve(problem.question)
            assert problem.question.count(";") == problem.steps == steps
    for document in itertools.islice(documents(5, split, reasoning_share=1.0), 500):
        words = document.text.split()
        question = " ".join(words[: document.prompt_words])
        assert f"{question} {solve(question)}" == document.text


def test_splits_are_disjoint():
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        some = 12_000 if split == "train" else 1_500  # a held-out document costs 20 draws
        for document in itertools.islice(documents(1, split, max_steps=4, copy_share=0.1), some):
            words = document.text.split()
            key = " ".join(words[: document.prompt_words]) if document.kind == "reasoning" else document.text
            assert split_of(key) == split
            seen[split].add(key)
        seen[split].update(problem.question for steps in (2, 3, 8) for problem in problems(split, steps, 500))
        assert len(seen[split]) > 2_500
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_the_training_text_holds_no_test_question():
    """Word for word in what the teacher is trained on, not only by the split's name."""
    held_out = {p.question for split in ("test", "validation") for n in range(2, 9) for p in problems(split, n, 200)}
    tokenizer = build_tokenizer()
    questions = 0
    for row in packed_rows(7, 60_000, tokenizer)[0].tolist():
        for text in " ".join(tokenizer.convert_ids_to_tokens(row)).split("<bos> ")[1:]:
            questions += " ? " in text
            assert text.split(" :")[0] + " :" not in held_out
    assert questions > 300


def test_same_arguments_same_text():
    stream = lambda *a, **k: list(itertools.islice(documents(*a, **k), 300))  # noqa: E731
    assert stream(4, copy_share=0.1) == stream(4, copy_share=0.1)
    assert stream(4) != stream(5)
    assert problems("test", 4, 50) == problems("test", 4, 80)[:50], "a larger count keeps the smaller one's problems"
    assert problems("test", 4, 50) != problems("test", 4, 50, seed=1)
    assert easy_documents("test", 20) == easy_documents("test", 30)[:20]
    random.seed(0)
    before = random.getstate()
    stream(0)
    assert random.getstate() == before, "the caller's generator must not move"


def test_text_of_this_version_is_pinned():
    """Figures are only comparable on the same text: a changed generator must be a decision."""
    assert problems("test", 3, 1)[0].question == "o = 4 ; o - 6 = a ; a - 4 = h ; ? h :"
    assert next(documents(0)).text == "x = 8 ; x + 6 = b ; ? b : x 8 + 6 = b 4 ;"


@pytest.mark.parametrize("shares", [(0.5, 0.0), (0.7, 0.2), (0.0, 0.0), (1.0, 0.0)])
def test_shares_count_words(shares):
    words = dict.fromkeys(("reasoning", "easy", "copy"), 0)
    for document in itertools.islice(documents(2, reasoning_share=shares[0], copy_share=shares[1]), 3_000):
        words[document.kind] += len(document.text.split())
    total = sum(words.values())
    assert words["reasoning"] / total == pytest.approx(shares[0], abs=2e-3)
    assert words["copy"] / total == pytest.approx(shares[1], abs=2e-3)


def test_vocabulary_covers_the_text():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 94
    used = {w for d in itertools.islice(documents(0, copy_share=0.1), 4_000) for w in d.text.split()}
    assert used == set(VOCABULARY)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: problems("dev", 3, 1), "split='dev'"),
        (lambda: next(documents(0, min_steps=5, max_steps=4)), "from 5 to 4"),
        (lambda: problems("test", 27, 1), "27"),
        (lambda: problems("test", 2, 10_000), "count=10000"),
        (lambda: next(documents(0, reasoning_share=0.8, copy_share=0.3)), "copy_share=0.3"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- tokenizer and labels ---------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(tmp_path):
    from transformers import AutoTokenizer

    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    text = " ".join(VOCABULARY)
    for tok in (built, AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(teacher_path())):
        ids = tok(text)["input_ids"]
        assert ids[0] == tok.bos_token_id and len(ids) == 95 and tok.unk_token_id not in ids
        assert tok.decode(ids, skip_special_tokens=True) == text
        assert tok.get_vocab() == built.get_vocab() and len(tok) == 98 and tok.padding_side == "left"
        assert (tok.pad_token, tok.bos_token, tok.eos_token) == ("<pad>", "<bos>", "<eos>")
        batch = tok(["e = 4 ;", "e"], padding=True)
        assert batch["input_ids"][1] == [0, 0, 0, 1, ids[5]] and batch["attention_mask"][1] == [0, 0, 0, 1, 1]
        assert set(batch) == {"input_ids", "attention_mask"}


def test_labels_are_the_solution_and_easy_text():
    tokenizer = build_tokenizer()
    stream = list(itertools.islice(documents(0, copy_share=0.1), 200))
    rows = tokenized(stream, tokenizer, 10**9)
    assert len(rows) == len(stream)
    for document, row in zip(stream, rows, strict=True):
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == document.text
        learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
        words = document.text.split()[document.prompt_words :]
        assert tokenizer.convert_ids_to_tokens(learned) == words + ["<eos>"] * (document.kind != "easy")
        assert row["labels"][0] == -100 and row["input_ids"][0] == tokenizer.bos_token_id


def test_tokenized_stops_after_the_asked_tokens():
    rows = tokenized(documents(0), build_tokenizer(), 5_000)
    total = sum(len(row["input_ids"]) for row in rows)
    assert total >= 5_000 > total - len(rows[-1]["input_ids"])
    assert len(tokenized([Document("a", "easy", 0)], build_tokenizer(), 100)) == 1, "a finite stream may end earlier"


# --- training ---------------------------------------------------------------------------------------------------------------


def test_packed_documents_do_not_see_each_other():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0).eval()
    input_ids, positions, weights = (part[:2] for part in packed_rows(0, 3_000, tokenizer))
    assert input_ids.shape == positions.shape == weights.shape == (2, ROW)
    with torch.no_grad():
        mask = document_mask(positions)
        packed = model(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        start, end = (positions[0] == 0).nonzero().flatten()[1:3].tolist()
        alone = model(input_ids=input_ids[:1, start:end]).logits
    torch.testing.assert_close(packed[:1, start:end], alone, rtol=1e-4, atol=1e-5)
    assert (weights[input_ids == tokenizer.bos_token_id] == 0).all() and (weights[input_ids == tokenizer.pad_token_id] == 0).all()
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)


def test_training_is_reproducible_to_the_bit(tmp_path):
    from safetensors.torch import load_file

    for run in ("one", "two"):
        record = train(tmp_path / run, seed=3, tokens=12_000, problems_measured=0)
        assert record["model_sha256"] == sha256(tmp_path / run) and "1 thread" in record["device"] and record["commit"]
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def sha256(folder) -> str:
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# --- the shipped teacher ----------------------------------------------------------------------------------------------------


def test_teacher_is_small_and_says_how_it_was_made(teacher):
    size = sum(os.path.getsize(os.path.join(teacher_path(), name)) for name in os.listdir(teacher_path()))
    assert size <= 4 * 2**20
    assert sum(p.numel() for p in teacher.parameters()) == 812_672
    assert teacher.generation_config.eos_token_id == 2 and not teacher.config.tie_word_embeddings
    with open(os.path.join(teacher_path(), "training.json")) as file:
        made = json.load(file)
    assert {"command", "seed", "tokens", "seconds", "versions", "commit", "exact_match", "easy"} <= made.keys()
    assert made["model_sha256"] == sha256(teacher_path())


@pytest.mark.parametrize("steps", [2, 4, 6, 8])
def test_teacher_solves_unseen_problems(teacher, tokenizer, steps):
    assert exact_match(teacher, tokenizer, problems("test", steps, 50, seed=11))["exact_match"] >= 0.9


def test_teacher_averages_95_percent(teacher, tokenizer):
    asked = [problem for steps in (2, 4, 6, 8) for problem in problems("test", steps, 50, seed=12)]
    assert exact_match(teacher, tokenizer, asked)["exact_match"] >= 0.95


def test_exact_match_notices_a_broken_model(teacher, tokenizer):
    """A mutation: with one layer's attention silenced the figure must fall to nothing."""
    import copy

    broken = copy.deepcopy(teacher)
    broken.model.layers[1].self_attn.o_proj.weight.data.zero_()
    assert exact_match(broken, tokenizer, problems("test", 4, 50))["exact_match"] < 0.1


def test_teacher_predicts_easy_text_near_the_limit(teacher, tokenizer):
    quality = text_quality(teacher, tokenizer, easy_documents("test", 200))
    assert quality["easy_accuracy"] > 0.40
    assert easy_perplexity_limit() * 0.97 < quality["easy_perplexity"] < easy_perplexity_limit() * 1.05
