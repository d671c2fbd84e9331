"""One map from the teacher's residual stream to the student's, shared by every module, from activations and weights.

Notation, row vectors: `z` is the normalised stream at a read point, `C_i = E[zᵀz]` `[d, d]` its second moment; `R_m = diag(g) W_mᵀ` `[d, out]` is a
reader with its norm's gain; `M_i = mean over readers of R Rᵀ / E|z R|²` says how much the readers of point `i` hear of each direction.
A student that keeps `z Q` (`Q [d, d']`) and estimates the rest linearly explains, of what the readers hear at point `i`, the share

    f_i(Q) = tr[(Qᵀ C_i Q)⁻¹ Qᵀ C_i M_i C_i Q] / tr(M_i C_i)          (1)

The map minimises the mean over the points of `(1 - f_i)²`: squared, because a chain of thought breaks at the point that is explained worst
(on the embedded teacher at a quarter of the width this beats the mean of `1 - f_i`, its logarithm and its maximum). No gradient of the
teacher is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red.fitting.least_squares import solve, sqrt_psd

RIDGE = 1e-6  # of the mean variance: guards directions in which the stream does not move
ITERATIONS = 300
LEARNING_RATE = 1e-2  # of Adam, falling to 0
OUTPUTS = 8192  # of a reader, multiplied at a time: a head has as many as there are words
SCALE = 1e3  # of the loss, which would otherwise sink below Adam's eps


def reader_gramians(teacher: PreTrainedModel, covariances: Iterator[Tensor] | list[Tensor] | Tensor) -> Iterator[Tensor]:
    """`M_i [d, d]` of each of the 2L+1 read points, in reading order, in the dtype and on the device of `C_i`.

    Args:
        covariances: `C_i [d, d]` of each point.
    """
    readers: dict[str, list[str]] = {path: [] for path in families.norm_paths(teacher.config)}
    for tap in families.taps(teacher.config):
        if not tap.writes:
            readers[families.norm_path_of(tap)].append(f"{tap.path}.weight")
    weights = dict(teacher.named_parameters())
    head = teacher.get_output_embeddings().weight
    for (norm, names), covariance in zip(readers.items(), covariances, strict=True):
        gain = teacher.get_submodule(norm).weight.detach().to(covariance)
        total = torch.zeros_like(covariance)
        for weight in [weights[name] for name in names] or [head]:
            squared, power = torch.zeros_like(covariance), torch.zeros((), dtype=covariance.dtype, device=covariance.device)
            for rows in weight.detach().split(OUTPUTS):
                reader = gain[:, None] * rows.to(covariance).T  # R [d, out]
                squared += reader @ reader.T
                power += ((covariance @ reader) * reader).sum()
            if power > 0:  # a reader that hears nothing has no say
                total += squared / power
        yield total / max(1, len(names))


def balanced(covariance: Tensor, gramian: Tensor, width: int, fixed: Tensor | None = None) -> Tensor:
    """Square-root balancing: `Q [d, d']` whose directions both move much (`C`) and are heard much (`M`); orthonormal columns.

    Args:
        covariance, gramian: `C` and `M`, [d, d], pooled over points; their scales do not matter.
        fixed: [d, k] orthonormal directions that are kept in any case, red.fitting.massive's; the first columns of `Q`.
    """
    root = _root(_regular(covariance))  # C = root rootᵀ
    vectors = torch.linalg.svd(root.T @ _regular(gramian) @ root).U
    directions = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return _beside(fixed, directions[:, : width - (0 if fixed is None else fixed.shape[1])])


def explained_shares(down: Tensor, covariances: Tensor, heard: Tensor, totals: Tensor) -> Tensor:
    """`f_i(Q)` [points], equation (1).

    Args:
        down: `Q [d, d']`, any basis of the kept space.
        covariances, heard: `C_i` and `C_i M_i C_i`, [points, d, d].
        totals: `tr(M_i C_i)`, [points].
    """
    kept = _seen_through(down, covariances)  # [points, d', d']
    ridge = RIDGE * torch.eye(down.shape[1], dtype=down.dtype, device=down.device) * kept.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    gained = torch.linalg.solve(kept + ridge, _seen_through(down, heard))
    return gained.diagonal(dim1=-2, dim2=-1).sum(-1) / totals.where(totals > 0, 1.0)  # where no reader hears anything, nothing is explained


def most_explained(down: Tensor, covariances: Tensor, gramians: Tensor, *, fixed: Tensor | None = None,
                   iterations: int = ITERATIONS, on_step=None) -> Tensor:
    """`Q [d, d']` with orthonormal columns that minimises the mean of `(1 - f_i)²`, by Adam on QR from `down`.

    Args:
        down: where to begin, [d, d']; with the fixed directions in front.
        covariances, gramians: `C_i`, `M_i`, [points, d, d].
        fixed: [d, k] orthonormal directions that stay, as in `balanced`.
        on_step: called with the mean share `f` after each iteration.
    """
    heard = covariances @ gramians @ covariances
    totals = (gramians * covariances).sum((-2, -1))
    free = torch.linalg.qr(down).Q[:, 0 if fixed is None else fixed.shape[1] :].clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=LEARNING_RATE)
    first = best = _beside(fixed, free.detach())
    least = float("inf")
    for iteration in range(iterations + 1):
        with torch.enable_grad():
            orthonormal = _beside(fixed, free)
            shares = explained_shares(orthonormal, covariances, heard, totals)
            loss = SCALE * (1 - shares).square().mean()
        if loss.item() < least:
            best, least = orthonormal.detach(), loss.item()
        if iteration == iterations:
            break
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(shares.mean().item())
    if covariances.dtype == torch.float64:
        return best
    ends = [_objective(end, covariances, gramians) for end in (first, best)]  # fp32 may take its own noise for a climb
    return best if ends[1] <= ends[0] else first


def _objective(down: Tensor, covariances: Tensor, gramians: Tensor) -> float:
    """The mean of `(1 - f_i)²` in fp64, one point at a time."""
    lost = []
    for covariance, gramian in zip(covariances, gramians, strict=True):
        covariance, gramian = covariance.double()[None], gramian.double()[None]
        lost.append(1 - explained_shares(down.double(), covariance, covariance @ gramian @ covariance, (gramian * covariance).sum((-2, -1))))
    return float(torch.cat(lost).square().mean())


def gauge(down: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The student's coordinates in the kept space: `(Q [d, d'], O [d', d])` with `O` the linear estimate of the stream from `x Q`.

    Any invertible `T` gives the same estimate from `Q T` and `T⁻¹ O`. A norm sees the length, so `T = (O Oᵀ)^½` is taken, with which
    `|x Q| = |x Q O|`: the student's stream is as long as what it stands for.
    """
    estimate = solve(down.T @ covariance @ down, down.T @ covariance, RIDGE).to(down)
    root = sqrt_psd(estimate @ estimate.T)
    return down @ root, torch.linalg.solve(root, estimate)


def _seen_through(down: Tensor, matrices: Tensor) -> Tensor:
    """`Qᵀ S Q` of symmetric `S` [points, d, d]. `Qᵀ @ S` first would copy every `S` to fold its product, and keep the copy for the gradient."""
    return (matrices @ down).mT @ down


def _root(matrix: Tensor) -> Tensor:
    """Lower triangular, `matrix = root rootᵀ`. Fewer tokens than channels, added up in fp32, leave eigenvalues below zero: those are raised."""
    root, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        values, vectors = torch.linalg.eigh(matrix)
        root = torch.linalg.qr((vectors * values.clamp_min(RIDGE / len(values)).sqrt()).T).R.T
    return root


def _beside(fixed: Tensor | None, free: Tensor) -> Tensor:
    """An orthonormal basis of both spans, the fixed one's first."""
    return torch.linalg.qr(free if fixed is None else torch.cat([fixed.to(free), free], 1)).Q


def _regular(matrix: Tensor) -> Tensor:
    """Trace one, and no direction quite without weight."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix / matrix.trace() + RIDGE * eye / len(matrix)
