"""The objective: which tokens count in which term, and what divides it. No maths of its own; that is in `red_kernels`.

    loss = ce_weight · CE  +  kl_weight · KL_T  +  tap_weight · Σ_layers Σ_taps MSE

CE and KL are means over the tokens with a label, the taps over the tokens that are not padding; all counts are global: over the
micro-batches of an optimiser step and over all ranks.
`lrc_faithful` takes the public LRC code's reductions instead: KL over every position, summed over the sequence and divided by the number of
rows only ("batchmean" of [batch, seq, vocab]), and taps over every position, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Counts:
    """What the terms of one optimiser step are divided by; 0-dim float tensors, so that no host waits for a device."""

    labels: Tensor  # tokens with a label
    tokens: Tensor  # tokens that are not padding
    positions: Tensor  # all positions, B · T
    rows: Tensor  # B

    def stacked(self) -> Tensor:
        return torch.stack([self.labels, self.tokens, self.positions, self.rows])


def next_labels(labels: Tensor) -> Tensor:
    """labels [B, T] -> the label that each position predicts [B, T]; the last position predicts none."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], 1)


def count(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Counts:
    """The counts of all micro-batches of one optimiser step on this rank."""
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        labels = next_labels(batch["labels"])
        totals += torch.tensor([0.0, 0.0, labels.numel(), len(labels)], dtype=torch.float64)
        totals[0] += (labels != IGNORE).sum().cpu()
        totals[1] += batch["token_mask"].sum().cpu()
    return Counts(*totals.to(device, torch.float32).unbind())
