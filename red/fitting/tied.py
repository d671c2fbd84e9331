"""A tied head reads through the embedding: only its norm's gain can be fitted."""

from __future__ import annotations

import torch
from torch import Tensor


def tied_gain(head: Tensor, down: Tensor, wanted: Tensor, second: Tensor) -> Tensor:
    """The gain `g [d']` with which a tied head comes nearest to the logits of a reader of its own.

    Minimises `E |y diag(g) Qᵀ Eᵀ - y wantedᵀ Eᵀ|²` over the logits' differences, in closed form.

    Args:
        head: `E [vocabulary, d]`, the embedding.
        down: `Q [d, d']`, the embedding's map.
        wanted: [d, d'], the map that a head of its own would have, for a gain of one.
        second: `E[yᵀy]` `[d', d']` of the student's normalised stream.
    """
    centred = head.detach().double().cpu()
    centred = centred - centred.mean(0)  # a logit common to all words says nothing
    gram = centred.T @ centred
    left = (down.T @ gram @ down) * second
    right = (down.T @ gram @ wanted @ second).diagonal()
    ridge = 1e-8 * left.diagonal().mean() * torch.eye(len(left), dtype=left.dtype)
    return torch.linalg.solve(left + ridge, right)
