"""Measures a model on the embedded example: exact match by greedy decoding, next-token prediction of easy text."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from red.example.corpus import easy_documents, problems


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    steps: int,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 100,
) -> float:
    """The share of `count` problems of `steps` steps that `generate` answers right, word for word, and then stops.

    Greedy, with a KV cache; the model writes freely from the question on and is never shown a correct step.
    """
    asked = problems(split, steps, count, seed)
    correct = 0
    for start in range(0, count, batch_size):
        batch = asked[start : start + batch_size]
        prompts = tokenizer([problem.question for problem in batch], return_tensors="pt", padding=True).to(model.device)
        room = max(len(problem.answer.split()) for problem in batch) + 2  # one word more than a right answer and <eos>
        written = model.generate(
            **prompts,
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, problem in zip(written[:, prompts["input_ids"].shape[1] :].tolist(), batch):
            right = [*tokenizer.convert_tokens_to_ids(problem.answer.split()), tokenizer.eos_token_id]
            correct += row[: len(right)] == right
    return correct / count


@torch.no_grad()
def easy_accuracy_and_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[float, float]:
    """Next-token accuracy and perplexity per word over `count` easy documents, each read from its own `<bos>`."""
    texts = easy_documents(split, count, seed)
    hits, loss, words = 0, 0.0, 0
    for start in range(0, count, batch_size):
        batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="right")
        batch = batch.to(model.device)
        logits = model(**batch).logits[:, :-1].float()
        targets, real = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].bool()
        hits += (logits.argmax(-1) == targets)[real].sum().item()
        loss += cross_entropy(logits[real], targets[real], reduction="sum").item()
        words += real.sum().item()
    return hits / words, math.exp(loss / words)
