"""Encoded rows into batches: prompts padded on the left, targets on the right, so that the latent steps of all rows stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from red.errors import REDError
from red.lori.data import TARGETS, Encoded
from red.packing import IGNORE


def prompt_and_target(row: Encoded, target: str, bot: int | None = None, eot: int | None = None) -> tuple[list[int], list[int]]:
    """What a row's model reads first, and what it reads and says then. The first token of the target is given, the others are to be said."""
    said = [*row.prefix, *row.answer]
    if target == "latent":
        return [*row.question, bot], [eot, *said]
    if target not in TARGETS:
        raise REDError(f"target={target!r}: use one of {', '.join(TARGETS)}.")
    steps = row.steps if target == "explicit" else []
    return row.question[:-1], [row.question[-1], *steps, *said]


def anchor_place(row: Encoded, target: str) -> int:
    """Where the last token before the answer stands in the target."""
    return len(row.prefix) + (len(row.steps) if target == "explicit" else 0)


def batch_of(rows: Sequence[Encoded], target: str, *, pad: int, bot: int | None = None, eot: int | None = None) -> dict[str, Tensor]:
    """A batch of B rows.

    Returns:
        `prompt_ids`, `prompt_mask` [B, P] int64; `target_ids`, `target_mask`, `labels` [B, N] int64, labels IGNORE at padding and at the first token (which
        is given); `anchor` [B] int64, where in the target the last token before the answer stands.
    """
    pairs = [prompt_and_target(row, target, bot, eot) for row in rows]
    prompt_ids, prompt_mask = padded([prompt for prompt, _ in pairs], pad, side="left")
    target_ids, target_mask = padded([said for _, said in pairs], pad, side="right")
    labels = target_ids.masked_fill(target_mask == 0, IGNORE)
    labels[:, 0] = IGNORE
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "target_ids": target_ids, "target_mask": target_mask, "labels": labels,
            "anchor": torch.tensor([anchor_place(row, target) for row in rows])}


def padded(rows: Sequence[Sequence[int]], pad: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest], int64."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        part = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, part] = torch.tensor(row, dtype=torch.long)
        mask[place, part] = 1
    return ids, mask
