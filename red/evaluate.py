"""Scores of a causal language model: exact match on problems, next-token accuracy and perplexity on plain text.

`exact_match` lets the model generate; `forced_exact_match` finds the same number in one forward pass and serves the many measurements
during a training run. Works for any Hugging Face causal language model and tokenizer, on the model's device; whether a module trains
or evaluates, and the random generators, are as before afterwards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from red.data.loading import pad_id
from red.errors import REDError

Item = Any  # a text, a list of ids, or a dict with "input_ids" (and perhaps "labels"), as data sets have them


def exact_match(model, tokenizer, problems: Sequence, *, batch_size: int = 256) -> dict:
    """The share of problems that greedy generation answers word for word and then stops.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer; what it adds in front of a text (`<bos>`) is added in front of a question.
        problems: objects with `question: str`, `answer: str`, `steps: int`.
        batch_size: questions that are answered together.

    Returns:
        `{"exact_match": mean over the step counts, "exact_match_by_steps": {"2": share, …}}`.
    """
    given = generate_answers(model, tokenizer, problems, batch_size=batch_size)
    return _by_steps(problems, [words(text) == words(problem.answer) for text, problem in zip(given, problems, strict=True)])


def forced_exact_match(model, tokenizer, problems: Sequence, *, batch_size: int = 256) -> dict:
    """`exact_match` without generating: is every token of the right answer the likeliest after the right ones before it?

    By induction that is the same question, one forward pass instead of one per token. The two can differ where the tokenizer
    has several spellings of the answer (only the one it would choose counts here) or two logits are equal to rounding.
    """
    prompts, answers = _prompts(tokenizer, problems), _answers(tokenizer, problems)
    right = [False] * len(problems)
    with evaluating(model):
        for chosen in _batches(problems, prompts, batch_size):
            ids, mask = pad([prompts[i] + answers[i] for i in chosen], model, pad_id(tokenizer), side="right")
            predicted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].argmax(-1)
            hits = predicted == ids[:, 1:]
            for row, i in enumerate(chosen):
                start = len(prompts[i]) - 1  # this position predicts the answer's first token
                right[i] = bool(hits[row, start : start + len(answers[i])].all())
    return _by_steps(problems, right)


def generate_answers(model, tokenizer, problems: Sequence, *, batch_size: int = 256) -> list[str]:
    """What the model says to each question: greedy, batched, with a key/value cache, up to its end token."""
    prompts, answers = _prompts(tokenizer, problems), _answers(tokenizer, problems)
    ends = _end_ids(model, tokenizer)
    texts = [""] * len(problems)
    with evaluating(model):
        for chosen in _batches(problems, prompts, batch_size):
            ids, mask = pad([prompts[i] for i in chosen], model, pad_id(tokenizer), side="left")
            # The end token is part of `answers`: a model that does not stop there says one word too many and is wrong.
            room = max(len(answers[i]) for i in chosen)
            said = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, num_beams=1, use_cache=True,
                temperature=None, top_p=None, top_k=None, eos_token_id=ends or None, pad_token_id=pad_id(tokenizer),
            )[:, ids.shape[1] :].tolist()
            for i, row in zip(chosen, said, strict=True):
                stop = next((place for place, token in enumerate(row) if token in ends), len(row))
                texts[i] = tokenizer.decode(row[:stop]).strip()  # with special tokens: one in the middle of an answer is wrong
    return texts


def text_quality(model, tokenizer, texts: Sequence[Item], *, batch_size: int = 32, max_length: int | None = None) -> dict:
    """Next-token accuracy and perplexity over all tokens but the first of each document; padding does not count.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; may be None if `texts` are lists of ids.
        texts: texts, lists of ids, or dicts with "input_ids".
        batch_size: documents that are read together.
        max_length: documents are cut to this many tokens; None: the model's `max_position_embeddings`.

    Returns:
        `{"easy_accuracy": share, "easy_perplexity": exp(mean negative log-likelihood in nats)}`; the perplexity of a model that
        returns NaN is NaN.
    """
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    rows = [row for row, _ in encode(tokenizer, texts, max_length=limit) if len(row) > 1]
    if not rows:
        raise REDError(f"{len(texts)} texts have no token to predict: each needs two tokens or more. Give longer texts.")
    rows.sort(key=len)
    right = count = 0
    loss = 0.0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            ids, mask = pad(rows[start : start + batch_size], model, pad_id(tokenizer), side="right")
            real = mask[:, 1:].bool()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][real].float()
            targets = ids[:, 1:][real]
            right += int((logits.argmax(-1) == targets).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="none").double().sum())
            count += len(targets)
    mean = loss / count
    return {"easy_accuracy": right / count, "easy_perplexity": math.exp(mean) if mean < 700 else (math.inf if mean == mean else math.nan)}


def words(text: str) -> list[str]:
    """A text as its words: how many blanks stand between them is the tokenizer's business, not the model's."""
    return text.split()


def encode(tokenizer, texts: Iterable[Item], *, max_length: int | None = None) -> list[tuple[list[int], list[bool]]]:
    """Each item as `(ids, counted)`; `counted` is False where an item's "labels" say -100, else True."""
    encoded = []
    for item in texts:
        if isinstance(item, str):
            if tokenizer is None:
                raise REDError("A text needs a tokenizer, and tokenizer=None. Pass the model's tokenizer, or lists of token ids.")
            item = tokenizer(item)["input_ids"]
        ids = list(item["input_ids"]) if hasattr(item, "keys") else list(item)
        labels = item.get("labels") if hasattr(item, "keys") else None
        counted = [label != -100 for label in labels] if labels is not None else [True] * len(ids)
        encoded.append((ids[:max_length], counted[:max_length]))
    return encoded


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _by_steps(problems: Sequence, right: list[bool]) -> dict:
    found = defaultdict(list)
    for problem, hit in zip(problems, right, strict=True):
        found[problem.steps].append(hit)
    if not found:
        raise REDError("exact match of 0 problems is not a number. Give at least one problem.")
    shares = {str(steps): sum(hits) / len(hits) for steps, hits in sorted(found.items())}
    return {"exact_match": sum(shares.values()) / len(shares), "exact_match_by_steps": shares}


def _prompts(tokenizer, problems: Sequence) -> list[list[int]]:
    return [tokenizer(problem.question)["input_ids"] for problem in problems]


def _answers(tokenizer, problems: Sequence) -> list[list[int]]:
    """The ids of each answer, with the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [tokenizer(" " + problem.answer, add_special_tokens=False)["input_ids"] + end for problem in problems]


def _batches(problems: Sequence, prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of problems that go together: the same number of steps (so answers of one length), prompts of similar lengths."""
    order = sorted(range(len(problems)), key=lambda i: (problems[i].steps, len(prompts[i])))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or problems[batch[0]].steps != problems[i].steps):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: list[list[int]], model, fill: int, *, side: str) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, both [rows, longest]. Left for generating, right for reading (positions count from 0)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, values in enumerate(rows):
        place = slice(longest - len(values), None) if side == "left" else slice(0, len(values))
        ids[row, place] = torch.tensor(values)
        mask[row, place] = 1
    return ids.to(model.device), mask.to(model.device)


def _end_ids(model, tokenizer) -> list[int]:
    """The tokens that end an answer: the model's own (a chat model may have several), and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    return sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
