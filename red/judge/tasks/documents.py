"""The documents of the local tasks, made on the spot from the held-out splits of the embedded example, and how they are scored.

lm-evaluation-harness loads this file by its path, with the settings of a task as keyword arguments that are not needed here.
"""

from __future__ import annotations

from functools import cache

from datasets import Dataset

from red.example import easy_documents, problems
from red.example.corpus import NOUNS, VERBS
from red.judge.problems import is_right

STEPS, PROBLEMS, TEXTS = (2, 4, 6, 8), 100, 100


def chains(**_) -> dict[str, Dataset]:
    """`PROBLEMS` of each step count in turn, so that the first few (a limit) are of all kinds; others to show as examples."""
    return _chains()


def easy_text(**_) -> dict[str, Dataset]:
    return {"test": Dataset.from_list([{"text": text} for text in _texts(0)])}


def easy_cloze(**_) -> dict[str, Dataset]:
    """Easy texts up to the object of their last verb, and a noun of each category: the verb allows one category only."""
    items = []
    for number, text in enumerate(_texts(1)):
        words = text.split()
        verb = max(place for place, word in enumerate(words) if word in VERBS)
        fits = VERBS[words[verb]]
        place = next(place for place in range(verb, len(words)) if words[place] in NOUNS[fits])
        choices = [words[place] if category == fits else nouns[number % len(nouns)] for category, nouns in NOUNS.items()]
        turn = number % len(choices)  # so that every place is the right one equally often
        choices = choices[turn:] + choices[:turn]
        items.append({"text": " ".join(words[:place]), "choices": choices, "label": choices.index(words[place])})
    return {"test": Dataset.from_list(items)}


@cache  # both models are asked, and a held-out split is found by rejection
def _chains() -> dict[str, Dataset]:
    splits = {}
    for split, count in (("test", PROBLEMS), ("validation", 10)):
        kinds = [problems(split, steps, count) for steps in STEPS]
        splits[split] = Dataset.from_list([vars(problem) for row in zip(*kinds, strict=True) for problem in row])
    return splits


@cache
def _texts(seed: int) -> list[str]:
    return easy_documents("test", TEXTS, seed)


def exact_match(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(is_right(results[0], doc["answer"]))}


def perplexity(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """What lm-evaluation-harness's weighted_perplexity takes: the log-likelihood in nats, and the number of words."""
    return {"word_perplexity": (results[0][0], len(doc["text"].split()))}
