"""A second embedded text with more kinds of reasoning, for a larger teacher: chains in any order, look-ups, copying, easy sentences.

Every document but the easy ones is a question, up to and with `:`, then a worked answer that ends with `;`. All are space-separated
words of one closed vocabulary (`VOCABULARY`, which begins with that of `red.example.corpus`):

* **chain**: arithmetic in steps, statements in the order in which they are needed. Each step of the answer says its statement again
  before the result, and the step before has just said the other operand, so that a small model can do one step at a time. Here
  modulo 11, with `max` the larger number::

      e = 4 ; e + 7 = s ; s * 3 = z ; z max 5 = q ; ? q : e = 4 ; e + 7 = s 0 ; s * 3 = z 0 ; z max 5 = q 5 ;
      |------------------- question --------------------| |----------------------- answer ----------------------|

* **shuffled**: the same with the statements in any order; the answer is in the order of the steps.
* **lookup**: facts in any order and a path of relations to follow, two hops or more, between people and at last to a thing::

      bob owns lamp ; eve likes kim ; ann likes bob ; ? ann likes owns : ann likes bob ; bob owns lamp ;

* **facts**: look-ups of one hop or more where every relation may lead to a person or to a thing
* **copy**: `b 4 z : b 4 z ;`
* **easy**: the sentences of `red.example.corpus`, which need no memory.

How hard it is, a `Level` says: "small" for a teacher that one CPU thread can train, "full" for a GPU's.

Held-out text is disjoint from training text by construction (`split_of`), and a held-out problem is held out in every order of its
statements.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from red.example import corpus
from red.example.corpus import LETTERS, SPLITS, Document

KINDS = ("chain", "shuffled", "lookup", "facts", "copy")  # of problems; easy text asks nothing

OPERATIONS = {
    "+": lambda a, b, modulus: (a + b) % modulus,
    "-": lambda a, b, modulus: (a - b) % modulus,
    "*": lambda a, b, modulus: a * b % modulus,
    "max": lambda a, b, modulus: max(a, b),
    "min": lambda a, b, modulus: min(a, b),
}
PEOPLE = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "ivy", "kim", "leo", "mia", "ned"]
THINGS = ["lamp", "ring", "boat", "drum", "kite", "sock", "coin", "book", "rope", "clock", "chair", "flute"]
TIES = ["likes", "knows", "trusts"]  # between people
HOLDINGS = ["owns", "wants"]  # of things
NUMBERS = [str(number) for number in range(23)]

# 138 words; the first 94 have the ids that they have in `red.example.corpus`
VOCABULARY = list(
    dict.fromkeys([*corpus.VOCABULARY, *NUMBERS, *OPERATIONS, *PEOPLE, *THINGS, *TIES, *HOLDINGS])
)


@dataclass(frozen=True)
class Level:
    """How hard the problems are. `steps` is the range of each kind, from fewest to most, and means what a `Problem`'s does."""

    modulus: int
    operators: tuple[str, ...]
    steps: Mapping[str, tuple[int, int]]
    most_facts: int  # of a look-up


LEVELS = {
    "small": Level(
        modulus=11,
        operators=("+", "-", "*", "max"),
        steps={"chain": (2, 6), "shuffled": (2, 6), "lookup": (2, 3), "facts": (1, 3), "copy": (4, 16)},
        most_facts=8,
    ),
    "full": Level(
        modulus=23,
        operators=("+", "-", "*", "max", "min"),
        steps={"chain": (2, 8), "shuffled": (2, 8), "lookup": (2, 4), "facts": (1, 4), "copy": (4, 32)},
        most_facts=12,
    ),
}
SHARES = {"chain": 0.20, "shuffled": 0.25, "lookup": 0.15, "facts": 0.15, "copy": 0.05, "easy": 0.20}


@dataclass(frozen=True)
class Problem(corpus.Problem):
    """`steps` is the number of variables of a chain (one is given), of hops of a look-up, of words of a copy."""

    kind: str


def split_of(text: str) -> str:
    """The split that a question or an easy text belongs to: 5 % test, 5 % validation, 90 % train.

    That of `red.example.corpus`, of the text with the statements before its `?` sorted.
    """
    given, asks, asked = text.partition(" ? ")
    return corpus.split_of(" ; ".join(sorted(given.removesuffix(" ;").split(" ; "))) + asks + asked if asks else text)


def documents(
    seed: int,
    split: str = "train",
    *,
    level: str = "small",
    shares: Mapping[str, float] | None = None,
    longest: Mapping[str, int] | None = None,
) -> Iterator[Document]:
    """An endless stream, the same for the same arguments.

    Args:
        level: a key of `LEVELS`.
        shares: of all words, by kind and for "easy"; must sum to 1. None: `SHARES`. The next document is of the kind furthest behind.
        longest: the most steps of a kind, where that is less than its level's. Steps are uniform from the level's fewest to the most.
    """
    _check(split, level)
    shares = dict(SHARES if shares is None else shares)
    if set(shares) - {*KINDS, "easy"} or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={shares}: give a share that is not negative for some of {', '.join(KINDS)}, easy; their sum must be 1")
    ranges = {}
    for kind, (fewest, most) in LEVELS[level].steps.items():
        ranges[kind] = fewest, min(most, (longest or {}).get(kind, most))
        _check_steps(level, kind, ranges[kind][1])
    easy = corpus.documents(seed, split, reasoning_share=0.0)
    words = dict.fromkeys(shares, 0)
    rng = random.Random(f"rich documents {split} {seed}")
    while True:
        total = sum(words.values())
        kind = max(shares, key=lambda k: shares[k] * (total + 1) - words[k])
        if kind == "easy":
            document = next(easy)
        else:
            problem = _draw_in_split(rng, split, LEVELS[level], kind, rng.randint(*ranges[kind]))
            document = Document(f"{problem.question} {problem.answer}", kind, len(problem.question.split()))
        words[kind] += len(document.text.split())
        yield document


def problems(split: str, kind: str, steps: int, count: int, seed: int = 0, *, level: str = "small") -> list[Problem]:
    """`count` distinct problems of one kind and exactly `steps` steps."""
    _check(split, level)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    _check_steps(level, kind, steps)
    if count > 5000:  # 286 000 chains of 2 steps exist in the small level, a twentieth of them in a held-out split
        raise ValueError(f"count={count}: about 14 000 of the shortest chains exist in a held-out split; ask for 5000 at most")
    rng = random.Random(f"rich problems {split} {kind} {steps} {level} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = _draw_in_split(rng, split, LEVELS[level], kind, steps)
        found.setdefault(problem.question, problem)
    return list(found.values())


def _draw_in_split(rng: random.Random, split: str, level: Level, kind: str, steps: int) -> Problem:
    """By rejection: 20 draws on average for a held-out split, 1.1 for training."""
    while True:
        question, answer = _DRAWS[kind](rng, level, steps)
        if split_of(question) == split:
            return Problem(question, answer, steps, kind)


def _chain(rng: random.Random, level: Level, steps: int, shuffle: bool = False) -> tuple[str, str]:
    names = rng.sample(LETTERS, steps)
    value = rng.randrange(level.modulus)
    statements = [f"{names[0]} = {value}"]
    answer = statements.copy()
    for before, after in itertools.pairwise(names):
        operator, operand = rng.choice(level.operators), rng.randrange(1, level.modulus)
        value = OPERATIONS[operator](value, operand, level.modulus)
        statements.append(f"{before} {operator} {operand} = {after}")
        answer.append(f"{statements[-1]} {value}")
    if shuffle:
        rng.shuffle(statements)
    return " ; ".join([*statements, f"? {names[-1]} :"]), " ; ".join(answer) + " ;"


def _shuffled(rng: random.Random, level: Level, steps: int) -> tuple[str, str]:
    return _chain(rng, level, steps, shuffle=True)


def _lookup(rng: random.Random, level: Level, steps: int, mixed: bool = False) -> tuple[str, str]:
    """A path over different relations and people, among two or more other facts of the same people. A person has a relation once
    or never, so there is one answer. `mixed`: every relation may lead to a person or a thing."""

    def ends(person: str, relation: str) -> list[str]:
        others = [other for other in people if other != person]
        if mixed:
            return others + rng.sample(THINGS, len(others))
        return others if relation in TIES else THINGS

    people = rng.sample(PEOPLE, max(steps, rng.randint(3, 5)))
    if mixed:
        path = rng.sample(TIES + HOLDINGS, steps)
    else:
        path = [*rng.sample(TIES, steps - 1), rng.choice(HOLDINGS)]
    met = [*people[1:steps], rng.choice(ends(people[steps - 1], path[-1]))]
    facts = dict(zip(zip(people, path, strict=False), met, strict=False))  # (person, relation) -> person or thing
    answer = [f"{person} {relation} {end}" for (person, relation), end in facts.items()]
    count = rng.randint(steps + 2, level.most_facts)
    while len(facts) < count:
        person, relation = rng.choice(people), rng.choice(TIES + HOLDINGS)
        facts.setdefault((person, relation), rng.choice(ends(person, relation)))
    statements = [f"{person} {relation} {end}" for (person, relation), end in facts.items()]
    rng.shuffle(statements)
    return " ; ".join([*statements, f"? {' '.join([people[0], *path])} :"]), " ; ".join(answer) + " ;"


def _facts(rng: random.Random, level: Level, steps: int) -> tuple[str, str]:
    return _lookup(rng, level, steps, mixed=True)


def _copy(rng: random.Random, level: Level, steps: int) -> tuple[str, str]:
    words = " ".join(rng.choices(LETTERS + NUMBERS[: level.modulus], k=steps))
    return f"{words} :", f"{words} ;"


_DRAWS = {"chain": _chain, "shuffled": _shuffled, "lookup": _lookup, "facts": _facts, "copy": _copy}


def _check(split: str, level: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is not one of {', '.join(LEVELS)}")


def _check_steps(level: str, kind: str, steps: int) -> None:
    fewest, most = LEVELS[level].steps[kind]
    if not fewest <= steps <= most:
        raise ValueError(f"steps={steps}: the {level} level's {kind} has {fewest} to {most}")
