"""Encoded rows into batches: prompts padded on the left, targets on the right, so that the latent steps of all rows stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from red.errors import REDError
from red.lori.data import TARGETS, Encoded
from red.data.packing import IGNORE


def prompt_and_target(row: Encoded, target: str, bot: int | None = None, eot: int | None = None, *,
                      hidden_steps: int | None = None) -> tuple[list, list]:
    """What a row's model reads first, and what it reads and says then. The first token of the target is given, the others are to be said.

    Args:
        hidden_steps: of a latent target: how many steps the latent ones stand for, the others are said in words; None: all.
    """
    if target not in TARGETS:
        raise REDError(f"target={target!r}: use one of {', '.join(TARGETS)}.")
    said = [*row.prefix, *row.answer]
    if target == "latent":
        return [*row.question, bot], [eot, *(row.rationale(hidden_steps) if hidden_steps is not None else []), *said]
    if target == "explicit" and bot is not None:
        return row.question, [bot, *row.rationale(), eot, *said]
    return row.question[:-1], [row.question[-1], *(row.rationale() if target == "explicit" else []), *said]


def batch_of(rows: Sequence[Encoded], target: str, *, pad: int, bot: int | None = None, eot: int | None = None,
             hidden_steps: int | None = None) -> dict[str, Tensor]:
    """A batch of B rows; see `prompt_and_target`.

    Returns:
        `prompt_ids`, `prompt_mask` [B, P] int64; `target_ids`, `target_mask`, `labels` [B, N] int64, labels IGNORE at padding and at the first token (which
        is given); `anchor` [B] int64, where in the target the last token before the answer stands.
    """
    pairs = [prompt_and_target(row, target, bot, eot, hidden_steps=hidden_steps) for row in rows]
    prompt_ids, prompt_mask = padded([prompt for prompt, _ in pairs], pad, side="left")
    target_ids, target_mask = padded([said for _, said in pairs], pad, side="right")
    labels = target_ids.masked_fill(target_mask == 0, IGNORE)
    labels[:, 0] = IGNORE
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "target_ids": target_ids, "target_mask": target_mask, "labels": labels,
            "anchor": torch.tensor([len(said) - len(row.answer) - 1 for (_, said), row in zip(pairs, rows, strict=True)])}


def padded(rows: Sequence[Sequence[int]], pad: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest], int64."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        part = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, part] = torch.tensor(row, dtype=torch.long)
        mask[place, part] = 1
    return ids, mask
