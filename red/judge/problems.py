"""Problems with one right answer, from a file of the kind GSM8K (arXiv 2110.14168) made common, and what counts as having answered one."""

from __future__ import annotations

import math
import re
from pathlib import Path

from red.data.text import check_surrogates
from red.errors import REDError
from red.evaluate import words
from red.example import Problem
from red.files import json_lines, require_existing

FINAL = "####"  # GSM8K's sign before the final answer
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def load_problems(path: str | Path) -> list[Problem]:
    """Read `.jsonl`, one `{"question": text, "answer": text or number, "steps": whole number}` a line; other keys are ignored.

    `steps` may be left out (1): scores are also given by it.

    Raises:
        REDError: a missing or empty file, or a broken line, by its number.
    """
    path = require_existing(path, "The file of problems")
    found = [_problem(item, f"{path}, line {number}") for number, item in json_lines(path)]
    if not found:
        raise REDError(f'{path} holds no problem. Give one {{"question": …, "answer": …}} a line.')
    return found


def _problem(item, place: str) -> Problem:
    if not isinstance(item, dict):
        raise REDError(f'{place} holds a {type(item).__name__}; expected {{"question": …, "answer": …}}.')
    for key in ("question", "answer"):
        if key not in item:
            raise REDError(f"{place} has no {key!r}; it has {', '.join(map(repr, item)) or 'no keys'}.")
    question, answer, steps = item["question"], item["answer"], item.get("steps", 1)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and abs(answer) < math.inf:  # NaN is not either
        answer = f"{answer}"
    for key, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise REDError(f"{place} has {key}={str(value)[:80]!r}; expected text that is not empty.")
        check_surrogates(value, f"{place}, {key}:")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise REDError(f"{place} has steps={str(steps)[:80]!r}; expected a whole number, or leave it out.")
    if not final_answer(answer):
        raise REDError(f"{place} has an answer that ends with {FINAL!r} and names no result after it.")
    return Problem(question.strip(), answer.strip(), steps)


def final_answer(answer: str) -> str:
    """What is to be found in a reply: what stands behind the last `####`, or the whole answer where there is none."""
    return answer.rpartition(FINAL)[2].strip()


def is_right(reply: str, answer: str) -> bool:
    """Whether a reply gives the problem's answer.

    Of an answer with `####`, or of one that is a number alone, only the result counts: against what the reply has behind its own `####`, or else
    against the last number in it; 1,000 is 1000.0. Any other answer must be given word for word, blanks aside, as
    `red.evaluate.exact_match` asks.
    """
    wanted = final_answer(answer)
    if FINAL not in answer and not isinstance(_canonical(wanted), float):
        return words(reply) == words(answer)
    given = final_answer(reply) if FINAL in reply else (NUMBER.findall(reply) or [""])[-1]
    return _canonical(given) == _canonical(wanted)


def _canonical(text: str):
    plain = text.strip().lstrip("$").rstrip(".").strip()
    if NUMBER.fullmatch(plain):
        return float(plain.replace(",", ""))
    return words(plain)
