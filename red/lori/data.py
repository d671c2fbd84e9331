"""Rows of a question, its worked steps and the answer, as GSM8k-Aug has them, and what of a row a model reads and says.

    {"question": "Ann has 3 bags of 4 apples and eats 2. How many are left?", "steps": ["<<3*4=12>>", "<<12-2=10>>"], "answer": "10"}

A model reads the prompt and is trained on the target; `<bot>` and `<eot>` stand around the latent steps:

    explicit   question | <bot> + steps + <eot> + prefix + answer + eos      (without <bot> and <eot> where the tokenizer does not know them)
    no CoT     question | prefix + answer + eos
    latent     question + <bot> | <eot> + prefix + answer + eos
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from red.data.text import check_surrogates
from red.errors import REDError
from red.files import json_lines, nearest, require_existing

BOT, EOT = "<bot>", "<eot>"
TARGETS = ("explicit", "none", "latent")  # what stands between question and answer
NUMBER = re.compile(r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")  # 10-5 is a difference, 1,2 two numbers
BRACKETS = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class Row:
    """One problem. `steps` are texts in order; without any, the row cannot serve a method that needs the chain of thought."""

    question: str
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Encoded:
    """A row as token ids. The prompt has what the tokenizer puts in front of a text; everything else has no special tokens of its own."""

    question: list[int]
    steps: list[list[int]]  # the rationale, step by step
    prefix: list[int]  # between rationale and answer; its last token is the anchor
    answer: list[int]  # with eos

    def rationale(self, first: int = 0) -> list[int]:
        """The steps' tokens from this step on."""
        return [token for step in self.steps[first:] for token in step]


def load_rows(source, *, question_column: str = "question", steps_column: str = "steps", answer_column: str = "answer") -> list[Row]:
    """Rows from a path to .jsonl, a path to a folder that `datasets.save_to_disk` wrote, a `datasets.Dataset`, or an iterable of dicts or Rows.

    The steps are a list of texts, or one text: cut at its `<<…>>` where it has any, else at its lines.

    Raises:
        REDError: a missing path, file or column, or an answer that is empty; the message has the row's number.
    """
    rows = []
    columns = (question_column, steps_column, answer_column)
    for number, item in enumerate(_items(source)):
        if isinstance(item, Row):
            rows.append(item)
            continue
        if not isinstance(item, Mapping):
            raise REDError(f"Row {number} is a {type(item).__name__}; expected an object with {', '.join(columns)}.")
        question, answer, steps = item.get(question_column), item.get(answer_column), item.get(steps_column)
        if isinstance(question, (list, Mapping)) or isinstance(answer, (list, Mapping)) or isinstance(steps, (Mapping, int, float)):
            raise REDError(f"Row {number} has {question!r:.40} as question, {answer!r:.40} as answer and {steps!r:.40} as steps; expected a text, a text or number, and a list of texts or a text.")
        for column in (question_column, answer_column):
            if item.get(column) is None or not str(item[column]).strip():
                if column in item:
                    raise REDError(f"Row {number} has an empty {column!r}. Fill it, or leave the row out.")
                like = nearest(column, item)
                raise REDError(f"Row {number} has no {column!r}; it has {', '.join(map(repr, item)) or 'nothing'}. "
                               f"Name the column{f', perhaps {like!r}' if like else ''}: question_column, steps_column, answer_column.")
        rows.append(Row(str(question).strip(), split_steps(steps), str(answer).strip()))
        check_surrogates(" ".join((rows[-1].question, *rows[-1].steps, rows[-1].answer)), f"Row {number}")
    if not rows:
        raise REDError("There are no rows. Give problems with a question, steps and an answer.")
    return rows


def split_steps(steps) -> tuple[str, ...]:
    """The steps of a row as a tuple of texts; see `load_rows`."""
    if steps is None:
        return ()
    if isinstance(steps, str):
        steps = BRACKETS.findall(steps) or steps.splitlines()
    return tuple(text for step in steps if (text := str(step).strip()))


def number(text: str) -> float | None:
    """The last number of a text; None where there is none. "1,234.50" is 1234.5."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def same_answer(said: str, right: str, prefix: str = "") -> bool:
    """Do the answers agree: as numbers where the right one has one, else as words? Of `said`, what follows the last `prefix` counts."""
    if prefix.strip() and prefix.strip() in said:
        said = said.rpartition(prefix.strip())[2]
    expected = number(right)
    if expected is None:
        return said.split() == right.split()
    found = number(said)
    return found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)


def encode_rows(rows: Sequence[Row], tokenizer, *, answer_prefix: str, drop_last_step: bool = False, max_length: int | None = None) -> list[Encoded]:
    """Token ids of every part. The parts are joined by single blanks, which a byte-level tokenizer sees in front of the later part.

    Args:
        drop_last_step: leave the last step out of the rationale, so that the state before the answer must compute it instead of copying it, as CODI
            (arXiv 2502.21074) does; a row of one step keeps it.
        max_length: of question, rationale, prefix and answer together.

    Raises:
        REDError: an empty prefix, a tokenizer without an end token, or a row that is longer than `max_length`.
    """
    if tokenizer.eos_token_id is None:
        raise REDError("The tokenizer has no end token, so no model could learn where an answer ends. Set tokenizer.eos_token.")

    def ids(text: str) -> list[int]:
        return list(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) if text else []

    prefix = ids(answer_prefix.strip())
    if not prefix:
        raise REDError(f"answer_prefix={answer_prefix!r} has no token: the state before the answer is that of its last one. Use 'The answer is:'.")
    encoded = []
    for place, row in enumerate(rows):
        steps = row.steps[:-1] if drop_last_step and len(row.steps) > 1 else row.steps
        question = list(tokenizer(row.question)["input_ids"])
        if len(question) > 1 and question[-1] == tokenizer.eos_token_id:
            question.pop()  # some tokenizers end every text
        one = Encoded(question, [ids(step) for step in steps], prefix, [*ids(row.answer), tokenizer.eos_token_id])
        length = sum(map(len, (one.question, one.rationale(), one.prefix, one.answer)))
        if max_length is not None and length > max_length:
            raise REDError(f"Row {place} has {length} tokens, more than max_length={max_length}. Raise max_length, or leave the row out: "
                           "a chain of thought that is cut has no answer.")
        encoded.append(one)
    return encoded


def rows_hash(encoded: Iterable[Encoded]) -> str:
    """SHA-256 of the token ids, in order."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(json.dumps([row.question, row.steps, row.prefix, row.answer], separators=(",", ":")).encode())
    return digest.hexdigest()


def _items(source) -> Iterable:
    if not isinstance(source, (str, Path)):
        return source
    path = require_existing(source, "The data")
    if path.is_dir():
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError as error:
            raise REDError(f"{path} is a folder, and reading a saved data set needs the `datasets` package. Run: pip install datasets") from error
        try:
            found = load_from_disk(str(path))
        except FileNotFoundError as error:
            raise REDError(f"{path} is not a folder that datasets.save_to_disk wrote: {error}") from error
        if isinstance(found, DatasetDict) and "train" not in found:
            raise REDError(f"{path} has the splits {', '.join(found)} and no 'train'. Give the folder of one split.")
        return found["train"] if isinstance(found, DatasetDict) else found
    if path.suffix not in (".jsonl", ".json"):
        raise REDError(f"{path} is no .jsonl file; expected one object a line with question, steps and answer.")
    return [value for _, value in json_lines(path)]
