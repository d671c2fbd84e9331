"""The embedded example's text: written-out modular arithmetic and easy template sentences, made on the spot.

Three kinds of document, all space-separated words of one closed vocabulary (`VOCABULARY`):

* **reasoning**: a chain of additions and subtractions modulo 10, statements in chain order, then a worked answer in which the
  operands stand before each result, so that a small model can do one step at a time::

      e = 4 ; e + 7 = s ; s - 7 = z ; ? z : e 4 + 7 = s 1 - 7 = z 4 ;
      |------------- question ------------| |-------- answer --------|

  A problem of `steps` steps names `steps` variables (the one above has 3): one given value and `steps - 1` operations.
* **easy**: five template sentences with Zipfian words; predicting them needs no memory beyond the sentence.
* **copy**: random letters and digits, a colon, the same again. Only a teacher's first training needs them.

Held-out text is disjoint from training text by construction: a document's split is a function of its own words (the hash of the
question for reasoning, of the whole text otherwise), see `split_of`. Two problems that differ only in the variables' names are
different problems.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import ascii_lowercase

MODULUS = 10
SENTENCES = 5  # in an easy document
SPLITS = ("train", "validation", "test")

LETTERS = list(ascii_lowercase)
DIGITS = [str(digit) for digit in range(MODULUS)]
SYMBOLS = ["=", ";", "+", "-", "?", ":"]

# In each list the order is the Zipf rank: word i is drawn with a probability proportional to 1 / (i + 1).
DETERMINERS = ["the", "a", "this", "every"]
ADJECTIVES = ["old", "red", "small", "happy", "green", "quiet", "big", "cold"]
NOUNS = {
    "animal": ["dog", "cat", "bird", "horse", "fish", "mouse"],
    "food": ["apple", "bread", "cake", "soup", "rice", "egg"],
    "place": ["garden", "house", "river", "school", "market", "forest"],
    "person": ["man", "woman", "girl", "boy", "king", "doctor"],
}
VERBS = {  # verb -> what its object may be
    "eats": "food",
    "cooks": "food",
    "sells": "food",
    "visits": "place",
    "leaves": "place",
    "sees": "animal",
    "feeds": "animal",
    "follows": "animal",
    "helps": "person",
    "meets": "person",
    "calls": "person",
    "likes": "person",
}
PREPOSITIONS = ["in", "near", "behind", "at"]
SUBJECTS = ["person", "person", "animal"]
ADJECTIVE_RATE = 0.4
PLACE_RATE = 0.3

# 94 words; `dict.fromkeys` because "a" is a letter and a determiner, and stays one word
VOCABULARY = list(
    dict.fromkeys(
        [*LETTERS, *DIGITS, *SYMBOLS, *DETERMINERS, *ADJECTIVES]
        + [noun for nouns in NOUNS.values() for noun in nouns]
        + [*VERBS, *PREPOSITIONS, "."]
    )
)


@dataclass(frozen=True)
class Document:
    """One document. `text` holds neither `<bos>` nor `<eos>`: `tokenized` adds them.

    `prompt_words` counts the leading words that are given, not to be learned: up to and with `:`; 0 for easy text.
    """

    text: str
    kind: str  # "reasoning" | "easy" | "copy"
    prompt_words: int


@dataclass(frozen=True)
class Problem:
    """`question` ends with `? z :`, `answer` with `;`; a reasoning document is the two with a space between."""

    question: str
    answer: str
    steps: int


def split_of(text: str) -> str:
    """The split that a text belongs to: 5 % test, 5 % validation, 90 % train, by its BLAKE2 hash and nothing else."""
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def documents(
    seed: int,
    split: str = "train",
    *,
    reasoning_share: float = 0.5,
    min_steps: int = 2,
    max_steps: int = 8,
    copy_share: float = 0.0,
) -> Iterator[Document]:
    """An endless stream, the same for the same arguments.

    The shares are of words (= tokens without `<bos>`/`<eos>`): the next document is of the kind furthest behind its share; easy
    text gets what reasoning and copying leave. `steps` is uniform on `min_steps … max_steps`.
    """
    _check_split(split)
    _check_steps(min_steps, max_steps)
    if min(reasoning_share, copy_share) < 0 or reasoning_share + copy_share > 1:
        raise ValueError(
            f"reasoning_share={reasoning_share} and copy_share={copy_share} must not be negative nor sum to more than 1"
        )
    shares = {"reasoning": reasoning_share, "easy": 1 - reasoning_share - copy_share, "copy": copy_share}
    words = dict.fromkeys(shares, 0)
    rng = random.Random(f"documents {split} {seed}")
    while True:
        total = sum(words.values())
        kind = max(shares, key=lambda k: shares[k] * (total + 1) - words[k])
        if kind == "reasoning":
            problem = _draw_problem(rng, split, rng.randint(min_steps, max_steps))
            document = Document(f"{problem.question} {problem.answer}", kind, len(problem.question.split()))
        elif kind == "easy":
            document = Document(_draw_in_split(rng, split, _easy_text), kind, 0)
        else:
            text = _draw_in_split(rng, split, _copy_text)
            document = Document(text, kind, text.split().index(":") + 1)
        words[kind] += len(document.text.split())
        yield document


def problems(split: str, steps: int, count: int, seed: int = 0) -> list[Problem]:
    """`count` distinct problems of exactly `steps` steps."""
    _check_split(split)
    _check_steps(steps, steps)
    if steps == 2 and count > 5000:  # 26 · 25 · 10 · 2 · 10 problems exist, a twentieth of them in a held-out split
        raise ValueError(f"count={count}: about 6 500 problems of 2 steps exist in a held-out split; ask for 5000 at most")
    rng = random.Random(f"problems {split} {steps} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = _draw_problem(rng, split, steps)
        found.setdefault(problem.question, problem)
    return list(found.values())


def easy_documents(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` distinct easy texts of `SENTENCES` sentences."""
    _check_split(split)
    rng = random.Random(f"easy {split} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw_in_split(rng, split, _easy_text)] = None
    return list(found)


def tokenized(documents: Iterable[Document], tokenizer, tokens: int) -> list[dict]:
    """Documents as `{"input_ids": [...], "labels": [...]}`, one dict each, until they hold `tokens` tokens or the stream ends.

    `<bos>` stands in front of every document. `<eos>` ends the answers and the copies; easy text is a window on text without end
    and gets none. `labels` are the ids themselves (a causal model shifts them), with -100 on `<bos>` and on the question.
    """
    rows, total = [], 0
    for document in documents:
        if total >= tokens:
            break
        words = document.text.split()
        ending = [] if document.kind == "easy" else [tokenizer.eos_token_id]
        ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(words), *ending]
        given = 1 + document.prompt_words
        rows.append({"input_ids": ids, "labels": [-100] * given + ids[given:]})
        total += len(ids)
    return rows


def easy_perplexity_limit() -> float:
    """The perplexity per word that no model of easy text can beat: exp of the sentences' entropy over their mean length.

    A sentence tells every choice that made it, and the choices are independent given those before, so entropies add.
    """

    def entropy(weights: Iterable[float]) -> float:  # nats
        weights = list(weights)
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)

    adjective = entropy([ADJECTIVE_RATE, 1 - ADJECTIVE_RATE]) + ADJECTIVE_RATE * entropy(_zipf_weights(ADJECTIVES))
    noun = entropy(_zipf_weights(NOUNS["animal"]))  # the categories have equally many
    phrase = entropy(_zipf_weights(DETERMINERS)) + adjective + noun
    category = entropy(SUBJECTS.count(name) for name in set(SUBJECTS))
    verb = entropy(_zipf_weights(list(VERBS)))
    place = entropy([PLACE_RATE, 1 - PLACE_RATE]) + PLACE_RATE * (entropy(_zipf_weights(PREPOSITIONS)) + phrase)
    phrase_words = 2 + ADJECTIVE_RATE
    sentence_words = phrase_words + 1 + phrase_words + PLACE_RATE * (1 + phrase_words) + 1
    return math.exp((category + phrase + verb + phrase + place) / sentence_words)


def _draw_problem(rng: random.Random, split: str, steps: int) -> Problem:
    """Problems of the split, by rejection: 20 draws on average for a held-out split, 1.1 for training."""
    while True:
        names = rng.sample(LETTERS, steps)
        value = rng.randrange(MODULUS)
        question, answer = [f"{names[0]} = {value} ;"], [f"{names[0]} {value}"]
        for before, after in itertools.pairwise(names):
            sign, operand = rng.choice("+-"), rng.randrange(MODULUS)
            value = (value + operand if sign == "+" else value - operand) % MODULUS
            question.append(f"{before} {sign} {operand} = {after} ;")
            answer.append(f"{sign} {operand} = {after} {value}")
        question.append(f"? {names[-1]} :")
        text = " ".join(question)
        if split_of(text) == split:
            return Problem(text, " ".join([*answer, ";"]), steps)


def _draw_in_split(rng: random.Random, split: str, draw) -> str:
    while split_of(text := draw(rng)) != split:
        pass
    return text


def _copy_text(rng: random.Random) -> str:
    words = " ".join(rng.choices(LETTERS + DIGITS, k=rng.randint(6, 24)))
    return f"{words} : {words}"


def _easy_text(rng: random.Random) -> str:
    return " ".join(word for _ in range(SENTENCES) for word in _sentence(rng))


def _sentence(rng: random.Random) -> list[str]:
    subject = _noun_phrase(rng, rng.choice(SUBJECTS))
    verb = _zipf(rng, list(VERBS))
    words = [*subject, verb, *_noun_phrase(rng, VERBS[verb])]
    if rng.random() < PLACE_RATE:
        words += [_zipf(rng, PREPOSITIONS), *_noun_phrase(rng, "place")]
    return [*words, "."]


def _noun_phrase(rng: random.Random, category: str) -> list[str]:
    words = [_zipf(rng, DETERMINERS)]
    if rng.random() < ADJECTIVE_RATE:
        words.append(_zipf(rng, ADJECTIVES))
    return [*words, _zipf(rng, NOUNS[category])]


def _zipf(rng: random.Random, words: list[str]) -> str:
    return rng.choices(words, _zipf_weights(words))[0]


def _zipf_weights(words: list[str]) -> list[float]:
    return [1 / (rank + 1) for rank in range(len(words))]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")


def _check_steps(fewest: int, most: int) -> None:
    if not 2 <= fewest <= most <= len(LETTERS):
        raise ValueError(
            f"steps from {fewest} to {most}: a chain has 2 to {len(LETTERS)} steps (one letter each), fewest first"
        )
