"""What is measured of a teacher and of its students, on the held-out text of one split.

Exact match, easy text and effective rank belong to a model alone; the divergence says how far a student is from its teacher, token by token, and tells
students apart long before or after the exact match does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from red.data import pad_id
from red.erank import hidden_erank
from red.evaluate import encode, evaluating, exact_match, forced_exact_match, generate_answers, pad, text_quality
from red.example import documents, easy_documents, problems, tokenized

STEP_COUNTS = (2, 4, 6, 8)  # of the measured problems
SHOWN = 20  # answers that a run keeps, to be looked at
DIVERGENCES = {"kl_easy": "easy text", "kl_reasoning": "reasoning answers"}


class Suite:
    """Held-out text and the measurements on it; the same for a teacher and all its students.

    Args:
        tokenizer: the teacher's.
        run: a StudentRun; its sizes (`problems`, `final_problems`, `easy_texts`, `erank_tokens`) count.
        split: "validation" or "test".
        teacher: with it, `light` and `full` tell the student's divergence from it too; its logits are computed once, here.
    """

    def __init__(self, tokenizer, run, split: str, teacher=None):
        self.tokenizer, self.run = tokenizer, run
        self.problems = {n: problems(split, n, run.final_problems) for n in STEP_COUNTS}
        self.easy = easy_documents(split, run.easy_texts)
        # Reasoning text whose questions do not count: the eRank of the states in which the model works an answer out.
        self.reasoning = tokenized(documents(1, split, reasoning_share=1.0), tokenizer, 3 * run.erank_tokens)
        compared = {"kl_easy": self.easy, "kl_reasoning": self.reasoning} if teacher is not None else {}
        self.compared = {name: _by_length(encode(tokenizer, texts[: run.easy_texts])) for name, texts in compared.items()}
        self.expected = {name: next_token_log_probs(teacher, tokenizer, rows) for name, rows in self.compared.items()}

    def full(self, model, *, generate: bool = True) -> dict:
        """Exact match on all problems, easy text, divergence, eRank per layer. `generate=False` finds the same exact match without generating."""
        return {
            **(exact_match if generate else forced_exact_match)(model, self.tokenizer, self._problems(self.run.final_problems)),
            **text_quality(model, self.tokenizer, self.easy),
            **self.divergence(model),
            "erank": hidden_erank(model, self.tokenizer, self.reasoning, max_tokens=self.run.erank_tokens),
        }

    def light(self, model) -> dict:
        """Exact match on the first problems of each kind, without generating, easy text and divergence: part of a second, not seconds."""
        return {**forced_exact_match(model, self.tokenizer, self._problems(self.run.problems)),
                **text_quality(model, self.tokenizer, self.easy), **self.divergence(model)}

    def divergence(self, model) -> dict[str, float]:
        """`{"kl_easy", "kl_reasoning"}`: KL(teacher‖model) in nats, mean over the predicted tokens; empty without a teacher."""
        found = {}
        for name, rows in self.compared.items():
            expected = self.expected[name]
            difference = expected - next_token_log_probs(model, self.tokenizer, rows)
            found[name] = float((expected.exp() * difference).sum(-1).double().mean())
        return found

    def answers(self, model) -> dict[str, str]:
        """What the model says to the first problems of four steps: {question: text}."""
        shown = self.problems[4][:SHOWN]
        return {problem.question: text for problem, text in zip(shown, generate_answers(model, self.tokenizer, shown))}

    def _problems(self, count: int) -> list:
        return [problem for found in self.problems.values() for problem in found[:count]]


def next_token_log_probs(model, tokenizer, rows: list[tuple[list[int], list[bool]]], *, batch_size: int = 64) -> Tensor:
    """[tokens, V] fp32 log-probabilities where the next token counts, in the order of `rows`, which are `red.evaluate.encode`'s."""
    found = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids, mask = pad([ids for ids, _ in part], model, pad_id(tokenizer), side="right")
            counted = torch.zeros_like(mask, dtype=torch.bool)
            for row, (_, flags) in enumerate(part):
                counted[row, : len(flags)] = torch.tensor(flags, device=counted.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][counted[:, 1:]]
            found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


def _by_length(rows: list[tuple[list[int], list[bool]]]) -> list[tuple[list[int], list[bool]]]:
    return sorted(rows, key=lambda row: len(row[0]))  # little padding
