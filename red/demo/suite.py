"""What is measured of a teacher and of its students, on the held-out text of one split.

Exact match, easy text and effective rank belong to a model alone; the divergence says how far a student is from its teacher, token by token, and tells
students apart long before or after the exact match does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from red.data.loading import pad_id
from red.erank import hidden_erank
from red.errors import REDError
from red.evaluate import encode, evaluating, exact_match, forced_exact_match, generate_answers, pad, text_quality
from red.example import Document, Problem, documents, easy_documents, problems, rich_corpus, tokenized

SHOWN = 20  # answers that a run keeps, to be looked at
DIVERGENCES = {"kl_easy": "easy text", "kl_reasoning": "reasoning answers"}


@dataclass(frozen=True)
class Corpus:
    """An embedded text as runs and measurements use it. The easy texts are the same ones in all."""

    documents: Callable[[int, str, float], Iterator[Document]]  # of a seed, a split, and the share of the words that is reasoning
    problems: Callable[[str, str, int, int], list[Problem]]  # of a split: so many of a kind and a number of steps
    steps: Mapping[str, tuple[int, ...]]  # of the measured problems, by kind
    length: int  # tokens of a row, unless a run says otherwise: the longest document fits


def _chains(seed: int, split: str, reasoning_share: float) -> Iterator[Document]:
    return documents(seed, split, reasoning_share=reasoning_share)


def _rich(seed: int, split: str, reasoning_share: float) -> Iterator[Document]:
    """The kinds of problem keep their shares of each other."""
    known = {kind: share for kind, share in rich_corpus.SHARES.items() if kind != "easy"}
    shares = {kind: reasoning_share * share / sum(known.values()) for kind, share in known.items()}
    return rich_corpus.documents(seed, split, shares={**shares, "easy": 1 - reasoning_share})


CORPORA = {
    "chains": Corpus(_chains, lambda split, kind, steps, count: problems(split, steps, count), {"chain": (2, 4, 6, 8)}, 112),
    "rich": Corpus(_rich, rich_corpus.problems, {"chain": (2, 4, 6), "shuffled": (2, 4, 6), "lookup": (2, 3), "facts": (1, 3), "copy": (4, 16)}, 128),
}
LEVELS = {None: "chains", "small": "rich"}  # what a teacher's training.json says of its text


def corpus_of(teacher_path: str) -> str:
    """The key in CORPORA of the text that a teacher was trained on; "chains" if its folder does not say."""
    file = Path(teacher_path) / "training.json"
    level = json.loads(file.read_text()).get("level") if file.is_file() else None
    if level not in LEVELS:
        raise REDError(f"The teacher in {teacher_path} was trained at level={level!r}, for which there is no suite; there is one for "
                       f"{', '.join(repr(name) for name in LEVELS if name)}.")
    return LEVELS[level]


class Suite:
    """Held-out text and the measurements on it; the same for a teacher and all its students.

    Args:
        tokenizer: the teacher's.
        run: a StudentRun; its `corpus` and sizes (`problems`, `final_problems`, `easy_texts`, `erank_tokens`) count.
        split: "validation" or "test".
        teacher: with it, `light` and `full` tell the student's divergence from it too; its logits are computed once, here.
    """

    def __init__(self, tokenizer, run, split: str, teacher=None):
        self.tokenizer, self.run = tokenizer, run
        corpus = CORPORA[run.corpus]
        self.kinds = {kind: {n: corpus.problems(split, kind, n, run.final_problems) for n in steps} for kind, steps in corpus.steps.items()}
        self.problems = next(iter(self.kinds.values()))  # of which answers are shown
        self.easy = easy_documents(split, run.easy_texts)
        # Reasoning text whose questions do not count: the eRank of the states in which the model works an answer out.
        self.reasoning = tokenized(corpus.documents(1, split, 1.0), tokenizer, 3 * run.erank_tokens)
        compared = {"kl_easy": self.easy, "kl_reasoning": self.reasoning} if teacher is not None else {}
        self.compared = {name: _by_length(encode(tokenizer, texts[: run.easy_texts])) for name, texts in compared.items()}
        self.expected = {name: next_token_log_probs(teacher, tokenizer, rows) for name, rows in self.compared.items()}

    def full(self, model, *, generate: bool = True) -> dict:
        """Exact match on all problems, easy text, divergence, eRank per layer. `generate=False` finds the same exact match without generating."""
        return {
            **self._exact_match(exact_match if generate else forced_exact_match, model, self.run.final_problems),
            **text_quality(model, self.tokenizer, self.easy),
            **self.divergence(model),
            "erank": hidden_erank(model, self.tokenizer, self.reasoning, max_tokens=self.run.erank_tokens),
        }

    def light(self, model) -> dict:
        """Exact match on the first problems of each kind, without generating, easy text and divergence: part of a second, not seconds."""
        return {**self._exact_match(forced_exact_match, model, self.run.problems),
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
        return {problem.question: text for problem, text in zip(shown, generate_answers(model, self.tokenizer, shown), strict=True)}

    def _exact_match(self, measure, model, count: int) -> dict:
        """As `red.evaluate` returns it; of several kinds the mean over the kinds, and the shares by kind and steps: `{"chain 2": share, …}`."""
        found = {kind: measure(model, self.tokenizer, [problem for part in by_steps.values() for problem in part[:count]])
                 for kind, by_steps in self.kinds.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return {"exact_match": sum(scores["exact_match"] for scores in found.values()) / len(found),
                "exact_match_by_steps": {f"{kind} {steps}": share for kind, scores in found.items() for steps, share in scores["exact_match_by_steps"].items()}}


def by_kind(by_steps: Mapping[str, float]) -> dict[str, float]:
    """The means over the step counts of each kind in an "exact_match_by_steps"; of shares without a kind, the shares themselves."""
    kinds: dict[str, list[float]] = {}
    for name, share in by_steps.items():
        kinds.setdefault(name.split()[0], []).append(share)
    return {kind: sum(shares) / len(shares) for kind, shares in kinds.items()}


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
