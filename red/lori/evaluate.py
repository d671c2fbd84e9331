"""Scores of a latent model and its baselines: answers compared as numbers, words said, and the time an answer takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch

from red.data.loading import pad_id
from red.lori.batch import padded, prompt_and_target
from red.lori.data import Row, encode_rows, same_answer
from red.lori.files import Facts
from red.lori.generation import generate
from red.lori.model import LatentModel, special_ids


def answer(model: LatentModel, tokenizer, rows: Sequence[Row], facts: Facts, *, batch_size: int = 64,
           max_new_tokens: int = 256) -> tuple[list[str], list[int]]:
    """What the model says to each question, as text, and how many tokens that is (latent steps and the end token not counted).

    Args:
        rows: only their questions are read.
        max_new_tokens: cut a model that does not end.
    """
    encoded = encode_rows([Row(row.question, (), "0") for row in rows], tokenizer, answer_prefix=facts.answer_prefix)
    bot, eot = special_ids(tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(encoded[index].question))
    texts, counts = [""] * len(rows), [0] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        pairs = [prompt_and_target(encoded[index], facts.target, bot, eot) for index in chosen]
        ids, mask = (value.to(model.device) for value in padded([prompt for prompt, _ in pairs], pad_id(tokenizer), side="left"))
        first = torch.tensor([target[0] for _, target in pairs], device=model.device)
        said = generate(model, ids, mask, first, max_new_tokens=max_new_tokens, eos_ids={tokenizer.eos_token_id})
        for index, row in zip(chosen, said.ids, strict=True):
            texts[index], counts[index] = tokenizer.decode(row, skip_special_tokens=True), len(row)
    return texts, counts


def accuracy(model: LatentModel, tokenizer, rows: Sequence[Row], facts: Facts, **settings) -> dict:
    """`{"accuracy", "accuracy_by_steps": {"2": share, …}, "tokens": mean}`; the steps are those of the row, the accuracy is over all rows."""
    texts, counts = answer(model, tokenizer, rows, facts, **settings)
    right = [same_answer(text, row.answer, facts.answer_prefix) for text, row in zip(texts, rows, strict=True)]
    by_steps = defaultdict(list)
    for row, hit in zip(rows, right, strict=True):
        by_steps[len(row.steps)].append(hit)
    return {"accuracy": fmean(right), "accuracy_by_steps": {str(steps): fmean(hits) for steps, hits in sorted(by_steps.items())}, "tokens": fmean(counts)}


def latency(model: LatentModel, tokenizer, rows: Sequence[Row], facts: Facts) -> float:
    """Milliseconds from question to finished answer, one question at a time, mean over the rows after one that warms up."""
    answer(model, tokenizer, rows[:1], facts, batch_size=1)
    _synchronise(model)
    began = time.perf_counter()
    answer(model, tokenizer, rows, facts, batch_size=1)
    _synchronise(model)
    return 1000 * (time.perf_counter() - began) / len(rows)


def _synchronise(model: LatentModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
