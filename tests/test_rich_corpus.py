"""The rich corpus: right answers, disjoint splits, a closed vocabulary, and the same text for the same arguments."""

import hashlib
import itertools
import random

import pytest

from red.example import corpus, rich_corpus
from red.example.rich_corpus import KINDS, LEVELS, SHARES, SPLITS, VOCABULARY, documents, problems, split_of
from red.example.rich_model import build_rich_tokenizer
from red.example.rich_stream import CHUNK_STEPS, Chunks
from red.example.train_teacher import ROW

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
