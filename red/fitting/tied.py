"""A tied head reads through the embedding: it has no map of its own, but the student's basis may be chosen for it.

The head's logits are `y diag(g) Qᵀ Eᵀ`, with `E [vocabulary, d]` the embedding and `Q` its map. Turning the student's stream by an orthogonal
`R` changes nothing else, and makes them `y R diag(g) Rᵀ Qᵀ Eᵀ`: any symmetric matrix `S = R diag(g) Rᵀ` can stand between `y` and `Qᵀ`.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-8  # relative: guards directions that no token or no word moves
WORDS = 8192  # whose embeddings are in fp64 at a time
FLOOR = 1e-7  # of the largest second moment: fp32 says nothing of less


def tied_gain(head: Tensor, down: Tensor, wanted: Tensor, second: Tensor) -> Tensor:
    """The gain `g [d']` with which a tied head comes nearest to the logits of a reader of its own, in the basis as it is.

    Minimises `E |y diag(g) Qᵀ Eᵀ - y wantedᵀ Eᵀ|²` over the logits' differences, in closed form.

    Args:
        head: `E [vocabulary, d]`, the embedding.
        down: `Q [d, d']`, the embedding's map.
        wanted: [d, d'], the map that a head of its own would have, for a gain of one.
        second: `E[yᵀy]` `[d', d']` of the student's normalised stream.
    """
    words = _words(head)
    left = (down.T @ words @ down) * second
    right = (down.T @ words @ wanted @ second).diagonal()
    return torch.linalg.solve(left + _ridge(left), right)


def tied_basis(head: Tensor, down: Tensor, wanted: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation `R [d', d']` of the student's stream and the gain `[d']` with which a tied head comes nearest; arguments as `tied_gain`'s.

    With `G = QᵀEᵀE Q`, `K = wantedᵀEᵀE Q` and `Y = E[yᵀy]`, the best symmetric `S` solves `Y S G + G S Y = Y K + Kᵀ Y`; in the basis `V` with
    `VᵀYV = 1` and `VᵀGV = Λ` it is `S = V Ŝ Vᵀ`, `Ŝ_ij = (Vᵀ(Y K + Kᵀ Y)V)_ij / (λ_i + λ_j)`.
    """
    words = _words(head)
    gram, cross = down.T @ words @ down, wanted.T @ words @ down
    gram = gram + _ridge(gram)
    moves, directions = torch.linalg.eigh(second)
    white = directions / moves.clamp_min(FLOOR * moves[-1]).sqrt()  # fewer tokens than channels, added up in fp32, leave Y indefinite
    values, vectors = torch.linalg.eigh(white.T @ gram @ white)
    basis = white @ vectors  # V
    right = second @ cross
    right = basis.T @ (right + right.T) @ basis
    symmetric = basis @ (right / (values[:, None] + values)) @ basis.T
    gain, rotation = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return rotation, gain


def _words(head: Tensor) -> Tensor:
    """`EᵀE` `[d, d]` of the centred embedding: a logit common to all words says nothing."""
    parts = head.detach().split(WORDS)
    mean = sum(part.double().sum(0) for part in parts).cpu() / len(head)
    total = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64)
    for part in parts:
        centred = part.double().cpu() - mean
        total += centred.T @ centred
    return total


def _ridge(matrix: Tensor) -> Tensor:
    return RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
