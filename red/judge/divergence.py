"""How far a student's predictions are from its teacher's on held-out text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from red.data.loading import check_examples, pad_id
from red.errors import REDError
from red.evaluate import encode, evaluating, pad
from red.judge.statistics import ratio_error

TOKENS = 512  # whose distributions are compared at once: three of [512, 128 256] in fp32 are 0.8 GB


def kl_to_teacher(teacher, student, examples: Sequence[dict], *, batch_size: int = 8) -> dict:
    """Mean KL(teacher‖student) per predicted token, in nats, with both models' own losses and how often they agree.

    Args:
        teacher, student: causal language models of one vocabulary, each on its device.
        examples: what `red.data.loading.load_examples` returned; tokens labelled -100 do not count, nor does the first of an example. Examples with
            the same "number" are pieces of one document.
        batch_size: examples that are read together.

    Returns:
        `kl`, `teacher_loss`, `student_loss` (nats per token) and `agreement` (share of tokens with the same likeliest prediction), each as
        `{"mean", "stderr"}`; `tokens`, `documents`. Standard errors treat documents as the independent ones; None for one document. The models
        run in their own dtype; probabilities, logarithms and differences are fp32, sums over documents fp64.

    Raises:
        REDError: different vocabularies, or nothing to predict.
    """
    vocabularies = teacher.config.vocab_size, student.config.vocab_size
    if len(set(vocabularies)) > 1:
        raise REDError(f"The teacher's vocabulary has {vocabularies[0]} entries and the student's {vocabularies[1]}: there is no divergence between them. "
                       "Name the teacher that the student was made from.")
    check_examples(examples, None, vocabularies[0])
    fill = pad_id(config=teacher.config)
    totals: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(5))  # document -> count, and the four sums
    rows = [(ids, counted, example.get("number", place)) for place, (example, (ids, counted)) in enumerate(zip(examples, encode(None, examples), strict=True))]
    rows = sorted((row for row in rows if any(row[1][1:])), key=lambda row: len(row[0]))
    if not rows:
        raise REDError(f"The {len(examples)} documents have no token to predict: each needs two tokens or more that are not masked. Give longer text.")
    with evaluating(teacher), evaluating(student):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            counted = torch.zeros(len(chosen), max(len(ids) for ids, _, _ in chosen) - 1, dtype=torch.bool)
            for row, (_, flags, _) in enumerate(chosen):
                counted[row, : len(flags) - 1] = torch.tensor(flags[1:])
            logits, targets = [], None
            for model in (teacher, student):
                ids, mask = pad([ids for ids, _, _ in chosen], model, fill, side="right")
                logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][counted.to(model.device)])
                targets = ids[:, 1:][counted.to(model.device)]
            values = torch.cat([_compare(a.to(b.device), b, c) for a, b, c in zip(*(part.split(TOKENS) for part in (*logits, targets)), strict=True)])
            owners = torch.arange(len(chosen)).unsqueeze(1).expand_as(counted)[counted]
            sums = torch.zeros(len(chosen), 5, dtype=torch.float64).index_add_(0, owners, values.double().cpu())
            for (_, _, number), row in zip(chosen, sums.numpy(), strict=True):
                totals[number] += row
    table = np.stack(list(totals.values()))
    count = table[:, 0]
    found = {name: {"mean": float(column.sum() / count.sum()), "stderr": ratio_error(column, count)}
             for name, column in zip(("kl", "teacher_loss", "student_loss", "agreement"), table[:, 1:].T, strict=True)}
    return {**found, "tokens": int(count.sum()), "documents": len(table)}


def _compare(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] twice, ids [n] -> fp32 [n, 5]: 1, KL, both negative log-likelihoods, agreement."""
    first, second = (F.log_softmax(logits.float(), -1) for logits in (teacher, student))
    at = targets.unsqueeze(1)
    kl = F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    same = (first.argmax(-1) == second.argmax(-1)).float()
    return torch.stack([torch.ones_like(kl), kl, -first.gather(1, at).squeeze(1), -second.gather(1, at).squeeze(1), same], -1)
