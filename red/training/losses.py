"""The objective: which tokens count in which term, and what divides it. No maths of its own; that is in `red_kernels`.

    loss = ce_weight · CE  +  kl_weight · KL_T  +  tap_weight · Σ_layers Σ_taps MSE

CE and KL are means over the tokens with a label, the taps over the tokens that are not padding; all counts are global: over the
micro-batches of an optimiser step and over all ranks.
`kl_reduction="sequence"` is the public LRC code's instead ("batchmean" of [batch, seq, vocab]): KL over every position, labelled or not, summed over
the sequence and divided by the number of rows only. It weighs KL by the sequence length; with no T² factor that is about 2048/1600 = 1.3 of a
token mean at T = 40 and 2048 tokens, and 2048 at T = 1. `lrc_faithful` takes it, and taps over every position, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from red.data.packing import IGNORE


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
    labelled = tokens = torch.zeros((), dtype=torch.int64, device=device)
    positions = rows = 0
    for batch in batches:
        labels = batch["labels"]
        labelled = labelled + (next_labels(labels) != IGNORE).sum().to(device)
        tokens = tokens + batch["token_mask"].sum().to(device)
        positions, rows = positions + labels.numel(), rows + len(labels)
    return Counts(labelled.float(), tokens.float(), *(torch.full((), float(number), device=device) for number in (positions, rows)))  # filled by the device
