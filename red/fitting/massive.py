"""Massive activations: the few directions that a norm needs and no reader hears.

At some tokens, often the first of a text, a large model's stream is tens of times longer than elsewhere, in one or few directions that
hardly change with the text (arXiv 2402.17762). The readers' gains there are small, so by what they hear (red/fitting/shared_map.py) these directions
are dropped. But the norm divides by the length: without them such a token's other channels, which the norm had shrunk to nothing, come out large,
and every later token attends to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGER = 8.0  # a massive token's RMS over the geometric mean of all tokens'
KEPT = 0.99  # of its squared length must lie in the directions
MOST = 8  # directions: real models have one to four


def massive_directions(longest: Tensor, mean_log_rms: Tensor, most: int = MOST) -> Tensor:
    """[d, k] fp64, orthonormal: the fewest principal directions that hold KEPT of every massive token's squared length; k = 0 where none is massive.

    Args:
        longest: [points, n, d], the longest tokens of each read point.
        mean_log_rms: [points], the mean logarithm of all tokens' RMS.
        most: k is not larger.
    """
    rms = longest.double().square().mean(-1).sqrt()
    massive = longest.double()[rms > LONGER * mean_log_rms.exp()[:, None]]  # [tokens, d]
    if not len(massive):
        return torch.zeros(longest.shape[-1], 0, dtype=torch.float64)
    units = massive / massive.norm(dim=-1, keepdim=True)
    directions = torch.linalg.svd(units, full_matrices=False).Vh.T  # [d, tokens or d]
    least = (units @ directions).square().cumsum(-1).min(0).values  # the least that k + 1 directions hold of any token
    enough = int((least < KEPT).sum()) + 1
    return directions[:, : min(enough, most, directions.shape[1])]
