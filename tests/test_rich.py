"""The rich corpus: right answers, disjoint splits, a closed vocabulary; its trainer; and the teacher that came of it."""

import hashlib
import itertools
import json
import random
from importlib.resources import files

import pytest
import torch

from red.example import corpus, rich_corpus, train_rich
from red.example.rich_corpus import KINDS, LEVELS, SHARES, SPLITS, VOCABULARY, documents, problems, split_of
from red.example.train_rich import CHUNK_STEPS, SIZES, STAGES, Chunks, build_model, build_rich_tokenizer, stage_at, steps_of, train
from red.example.train_teacher import QUESTION_WEIGHT, ROW, document_mask

SHIPPED = files("red.example") / "rich"
ALL = [(level, kind, steps) for level in LEVELS for kind, (low, high) in LEVELS[level].steps.items() for steps in sorted({low, (low + high) // 2, high})]


def solve(question: str, modulus: int) -> str:
    """The answer worked out from the question's words alone, by an evaluator that shares no code with the generator."""
    body = question.removesuffix(" :")
    assert body != question
    if "?" not in question.split():
        return body + " ;"
    given, asked = body.split(" ? ")
    statements = [statement.split() for statement in given.removesuffix(" ;").split(" ; ")]
    asked = asked.split()
    if len(asked) > 1:
        (who, *path), said = asked, []
        for relation in path:
            (found,) = [statement for statement in statements if statement[:2] == [who, relation]]
            said.append(" ".join(found))
            who = found[2]
        return " ; ".join(said) + " ;"
    (start,) = [statement for statement in statements if statement[1] == "="]
    name, value = start[0], int(start[2])
    said, left = [" ".join(start)], [statement for statement in statements if statement is not start]
    while left:
        (step,) = [statement for statement in left if statement[0] == name]
        left.remove(step)
        _, operator, operand, equals, name = step
        assert equals == "=" and 1 <= int(operand) < modulus and 0 <= value < modulus
        numbers = [value, int(operand)]
        if operator == "+":
            value = sum(numbers)
        elif operator == "-":
            value = numbers[0] + modulus - numbers[1]
        elif operator == "*":
            value = sum([numbers[0]] * numbers[1])
        else:
            value = sorted(numbers)[{"min": 0, "max": 1}[operator]]
        value -= value // modulus * modulus
        said.append(f"{' '.join(step)} {value}")
    assert asked == [name], "the question asks for the chain's last variable"
    return " ; ".join(said) + " ;"


# --- corpus -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "kind", "steps"), ALL)
def test_every_answer_is_right(level, kind, steps):
    for split in SPLITS:
        found = problems(split, kind, steps, 60, seed=3, level=level)
        assert len({problem.question for problem in found}) == 60
        for problem in found:
            assert problem.answer == solve(problem.question, LEVELS[level].modulus)
            assert (problem.kind, problem.steps, split_of(problem.question)) == (kind, steps, split)
            steps_said = len(problem.answer.split()) - 1 if kind == "copy" else problem.answer.count(";")
            assert steps_said == steps


@pytest.mark.parametrize("level", LEVELS)
def test_documents_are_questions_with_their_answers(level):
    """Also: the vocabulary is closed and used up, and every document fits a row with `<bos>` and `<eos>`."""
    tokenizer, used, kinds = build_rich_tokenizer(), set(), set()
    for document in itertools.islice(documents(5, level=level), 4000):
        words = document.text.split()
        used.update(words)
        kinds.add(document.kind)
        assert len(words) + 2 <= ROW
        if document.kind != "easy":
            question = " ".join(words[: document.prompt_words])
            assert f"{question} {solve(question, LEVELS[level].modulus)}" == document.text
    assert kinds == {*KINDS, "easy"}
    level = LEVELS[level]
    unused = {str(n) for n in range(level.modulus, 23)} | set(rich_corpus.OPERATIONS) - set(level.operators)
    assert used == set(VOCABULARY) - unused
    assert tokenizer.unk_token_id not in tokenizer(" ".join(VOCABULARY))["input_ids"]


def test_an_order_of_statements_is_no_other_problem():
    """The same chain in another order is in the same split: shuffling cannot carry a held-out problem into the training text."""
    for split in SPLITS:
        for problem in [*problems(split, "chain", 5, 20), *problems(split, "lookup", 3, 20)]:
            *statements, asked = problem.question.split(" ; ")
            for _ in range(5):
                random.shuffle(statements)
                assert split_of(" ; ".join([*statements, asked])) == split
    texts = [document.text for document in itertools.islice(documents(0, shares={"easy": 1}), 50)]
    assert [split_of(text) for text in texts] == [corpus.split_of(text) for text in texts] == ["train"] * 50


def test_shuffled_statements_are_shuffled_and_chains_are_not():
    def ordered(problem):
        statements = problem.question.split(" ; ")[:-1]
        return all(one.split()[-1 if index else 0] == other.split()[0] for index, (one, other) in enumerate(itertools.pairwise(statements)))

    assert all(map(ordered, problems("test", "chain", 6, 100)))
    assert sum(map(ordered, problems("test", "shuffled", 6, 100))) <= 3


def test_lookups_have_one_answer_and_facts_that_lead_elsewhere():
    for problem in problems("train", "lookup", 3, 200):
        facts = [fact.split() for fact in problem.question.split(" ; ")[:-1]]
        assert len({(who, relation) for who, relation, _ in facts}) == len(facts) >= 5
        assert all((end in rich_corpus.THINGS) == (relation in rich_corpus.HOLDINGS) and who != end for who, relation, end in facts)


def test_splits_are_disjoint():
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for document in itertools.islice(documents(1, split), 6000 if split == "train" else 600):
            text = document.text
            key = " ".join(text.split()[: document.prompt_words]) if document.prompt_words else text
            assert split_of(key) == split
            seen[split].add(key)
        assert len(seen[split]) > 400
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_the_training_text_holds_no_held_out_question():
    """Word for word in what a teacher is trained on, in every stage."""
    held_out = {
        problem.question
        for split in ("validation", "test")
        for kind in KINDS
        for steps in LEVELS["small"].steps[kind]
        for problem in problems(split, kind, steps, 200)
    }
    chunks = Chunks("tiny", 7, 40 * CHUNK_STEPS)
    questions = 0
    for number in (0, 8, 30):
        for row in chunks[number][0].tolist():
            for text in " ".join(chunks.tokenizer.convert_ids_to_tokens(row)).split("<bos> ")[1:]:
                questions += " : " in text
                assert text.split(" :")[0] + " :" not in held_out
    assert questions > 500


def test_same_arguments_same_text():
    def stream(*a, **k):
        return list(itertools.islice(documents(*a, **k), 300))

    random.seed(0)
    before = random.getstate()
    assert stream(4) == stream(4) != stream(5)
    assert stream(4, level="full") != stream(4) != stream(4, "test")
    for kind, (_, most) in LEVELS["small"].steps.items():
        assert problems("test", kind, most, 20) == problems("test", kind, most, 30)[:20], "a larger count keeps the smaller one's problems"
        assert problems("test", kind, most, 20) != problems("test", kind, most, 20, seed=1)
    assert random.getstate() == before, "the caller's generator must not move"


def test_text_of_this_version_is_pinned():
    """Figures are only comparable on the same text: a changed generator must be a decision."""
    text = "\n".join(document.text for level in LEVELS for document in itertools.islice(documents(0, level=level), 500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "83f934933166ebe9"


@pytest.mark.parametrize("shares", [SHARES, {"lookup": 0.5, "copy": 0.5}, {"easy": 1.0}])
def test_shares_count_words_and_longest_limits_steps(shares):
    words = dict.fromkeys(shares, 0)
    for document in itertools.islice(documents(2, shares=shares, longest={"chain": 3, "copy": 5}), 2000):
        words[document.kind] += len(document.text.split())
        assert document.kind != "chain" or document.text.split(" : ")[1].count(";") <= 3
        assert document.kind != "copy" or len(document.text.split()) <= 12
    for kind, share in shares.items():
        assert words[kind] / sum(words.values()) == pytest.approx(share, abs=3e-3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: problems("dev", "chain", 3, 1), "split='dev'"),
        (lambda: problems("test", "chains", 3, 1), "kind='chains'"),
        (lambda: problems("test", "chain", 7, 1), "chain has 2 to 6"),
        (lambda: problems("test", "chain", 3, 1, level="hard"), "level='hard'"),
        (lambda: problems("test", "lookup", 2, 9999), "count=9999"),
        (lambda: next(documents(0, shares={"chain": 0.5})), "sum must be 1"),
        (lambda: next(documents(0, shares={"chian": 1.0})), "chian"),
        (lambda: next(documents(0, longest={"chain": 1})), "steps=1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- training ---------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_extends_the_small_one(tmp_path):
    from transformers import AutoTokenizer

    build_rich_tokenizer().save_pretrained(tmp_path)
    built, small = build_rich_tokenizer(), train_rich.build_tokenizer()
    text = " ".join(corpus.VOCABULARY)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(VOCABULARY) + 4 == 142 and tokenizer.padding_side == "left"
        assert tokenizer(text)["input_ids"] == small(text)["input_ids"]
        assert tokenizer.decode(tokenizer("ann likes 22 ;")["input_ids"]) == "<bos> ann likes 22 ;"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_qwen3_with_real_models_habits(size):
    with torch.device("meta" if size == "full" else "cpu"):
        model = build_model(size, build_rich_tokenizer(), 0)
    config = model.config
    assert config.model_type == "qwen3" and config.tie_word_embeddings and config.num_attention_heads == 2 * config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = sum(p.numel() for p in model.parameters())
    assert {"tiny": parameters < 50_000, "small": 1_500_000 < parameters < 3_000_000, "full": parameters >= 25_000_000}[size]
    optimized = [p for optimizer, _ in train_rich.optimizers(model, size) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    for share in (0.5, 0.375, 0.25):
        assert config.hidden_size * share % config.num_attention_heads == 0, "the study's student widths"


def test_chunks_hold_whole_documents_that_do_not_see_each_other():
    chunks = Chunks("tiny", 0, 100)
    ids, positions, weights = chunks[0]
    tokenizer = chunks.tokenizer
    assert ids.shape == positions.shape == weights.shape == (CHUNK_STEPS * SIZES["tiny"].rows, ROW)
    assert (ids != tokenizer.pad_token_id).float().mean() > 0.9
    assert (weights[ids == tokenizer.bos_token_id] == 0).all() and (weights[ids == tokenizer.pad_token_id] == 0).all()
    assert ((positions == 0) == (ids == tokenizer.bos_token_id))[ids != tokenizer.pad_token_id].all()
    for row, weight in zip(ids[:8].tolist(), weights[:8]):
        words = tokenizer.convert_ids_to_tokens(row)
        for place, word in enumerate(words):
            if word == ":":
                assert weight[place] == pytest.approx(QUESTION_WEIGHT) and weight[place + 1] == 1
    model = build_model("tiny", tokenizer, 0).eval()
    with torch.no_grad():
        packed = model(input_ids=ids[:1], position_ids=positions[:1], attention_mask=document_mask(positions[:1]), use_cache=False).logits
        start, end = (positions[0] == 0).nonzero().flatten()[1:3].tolist()
        alone = model(input_ids=ids[:1, start:end]).logits
    torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)


def test_chunks_depend_on_their_number_alone():
    whole, later = Chunks("tiny", 3, 10 * CHUNK_STEPS), Chunks("tiny", 3, 10 * CHUNK_STEPS, first=4)
    assert len(whole) == 10 and len(later) == 6 and len(Chunks("tiny", 3, 10 * CHUNK_STEPS + 1)) == 11
    assert all(torch.equal(one, other) for one, other in zip(whole[5], later[1]))
    assert not torch.equal(whole[5][0], whole[6][0]) and not torch.equal(whole[5][0], Chunks("tiny", 4, 10 * CHUNK_STEPS)[5][0])
    with pytest.raises(IndexError):
        later[6]


def test_stages_follow_one_another():
    assert sum(stage.part for stage in STAGES) == pytest.approx(1)
    assert all(sum(stage.shares.values()) == pytest.approx(1) for stage in STAGES)
    assert [STAGES.index(stage_at(done)) for done in (0, 0.099, 0.1, 0.349, 0.35, 0.45, 0.61, 0.8, 1.0)] == [0, 0, 1, 1, 2, 3, 4, 5, 5]


def test_training_writes_a_teacher_and_resumes_to_the_same_bits(tmp_path):
    """Also across the end of a chunk, and from a checkpoint in the middle of one."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = 50 * SIZES["tiny"].rows * ROW
    settings = dict(size="tiny", seed=3, tokens=tokens, log_every=20, problems_measured=2)
    record = train(tmp_path / "whole", **settings)
    assert train(tmp_path / "cut", **settings, until=17) is None
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train(tmp_path / "cut", **settings, resume=True, until=40) is None
    again = train(tmp_path / "cut", **settings, resume=True)
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert record["model_sha256"] == again["model_sha256"] == sha256(tmp_path / "cut")

    assert record == {**json.loads((tmp_path / "whole" / "training.json").read_text())}
    assert record["steps"] == steps_of("tiny", tokens) == 50 and [point["step"] for point in record["curve"]] == [20, 40, 50]
    assert [point["loss"] for point in record["curve"]] == [point["loss"] for point in again["curve"]]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] < 5.5
    assert set(record["exact_match"]["test"]) == {*KINDS, "mean"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings and model.generation_config.eos_token_id == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == model.config.vocab_size


def test_a_checkpoint_is_neither_overwritten_nor_mistaken(tmp_path):
    settings = dict(size="tiny", tokens=30_000, log_every=0, problems_measured=0)
    train(tmp_path, **settings, until=1)
    with pytest.raises(ValueError, match="holds a checkpoint"):
        train(tmp_path, **settings)
    with pytest.raises(ValueError, match="same settings"):
        train(tmp_path, **settings, resume=True, seed=9)


def sha256(folder) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# --- the shipped teacher ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped bf16 file, computed with in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(str(SHIPPED), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(str(SHIPPED))


def test_the_teacher_is_small_and_says_how_it_was_made(shipped):
    model, tokenizer = shipped
    made = json.loads((SHIPPED / "training.json").read_text())
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16 * 2**20
    assert {path.name for path in SHIPPED.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"
    }
    assert {"command", "seed", "tokens", "seconds", "versions", "commit", "exact_match", "easy", "level"} <= made.keys()
    assert made["model_sha256"] == sha256(SHIPPED) and made["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer.get_vocab() == build_rich_tokenizer().get_vocab()
    assert made["exact_match"]["validation"]["mean"] >= train_rich.GOAL


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_solves_unseen_problems(shipped, kind):
    from red.evaluate import forced_exact_match

    model, tokenizer = shipped
    fewest, most = LEVELS["small"].steps[kind]
    asked = [problem for steps in {fewest, most} for problem in problems("test", kind, steps, 50, seed=11)]
    assert forced_exact_match(model, tokenizer, asked)["exact_match"] >= 0.9


def test_a_broken_teacher_is_noticed(shipped):
    """A mutation: with one layer's attention silenced the figure must fall to nothing."""
    import copy

    from red.evaluate import forced_exact_match

    broken = copy.deepcopy(shipped[0])
    broken.model.layers[1].self_attn.o_proj.weight.data.zero_()
    assert forced_exact_match(broken, shipped[1], problems("test", "shuffled", 6, 50))["exact_match"] < 0.1
