"""Effective rank of wide matrices without their spectrum: a deflated stochastic trace estimate that knows its error.

    A = X̂ᵀ X̂ or X̂ X̂ᵀ, whichever is smaller (n × n, never formed; X̂ as in red_kernels.erank), R = A / tr A, and tr A is known: the number of nonzero rows
    ln eRank = tr f(R),  f(r) = -r ln r
             = tr Qᵀ f(R) Q                                  Q: s blocks of a block Krylov space, where the large eigenvalues are
             + a (n - dim Q) + c tr P R P                    P = I - Q Qᵀ; both traces are known exactly
             + E gᵀ P (f(R) - a - c R) P g                   Gaussian probes g, Lanczos quadrature

Deflation and sampling are Hutch++ (Meyer, Musco, Musco & Woodruff, "Hutch++", SOSA 2021) on a Krylov space (Chen & Hallman, "Krylov-aware stochastic trace
estimation", SIMAX 2023): f(R) is projected, not f of the projected R, so that an unconverged Q costs variance and no bias. The line a + c r is
ours: least squares on the nodes of the quadrature. ln r changes slowly, so what is left to sample is small: for 3 standard errors of 1 % at d = 3072 and
eRank 361 (eigenvalues 1/i) plain probes need 33 000, deflation of 64 directions leaves 2 000, and the line 7.

Gauss quadrature of -r ln r is never too small and Gauss-Radau with a node at 0 never too large (the signs of its derivatives), so the two enclose each
probe's value; the block's quadrature is too large by a share of what its last block took off. float32 products and float64 for all that is small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from red_kernels import checks
from red_kernels.erank import erank

BLOCK = 16  # columns of a Krylov block: 128 directions in blocks of 16 cost a third more time than in blocks of 32 and halve the block quadrature's error
EXACT_BELOW = 1024  # n up to which the exact path is taken: at 768 and two threads neither was reliably faster, at 1536 the estimate was
QUANTILE = 2.5  # standard errors that count as the statistical error: 98 % for 32 probes
REMAINDER = 0.5  # what the block quadrature still has too much is at most this share of what its last block took off: 0.49 was the most in 32 cases
ROUNDING = 2e-5  # of ln eRank: float32 eigenvalues (1e-6 of tr A in all) times -ln r of the smallest


class ERankEstimate(NamedTuple):
    """What `erank_estimate` returns: unpacks as `value, error`."""

    erank: Tensor  # [...] float64
    error: Tensor  # [...] float64, in units of eRank; 0 where the exact path ran


def erank_estimate(
    x: Tensor,  # [..., N, d]
    mask: Tensor | None = None,  # [..., N] bool
    *,
    directions: int = 192,
    probes: int = 32,
    steps: int = 20,
    seed: int = 0,
    tolerance: float | None = 0.01,
    invalid: str = "raise",
) -> ERankEstimate:
    """Effective rank of every matrix of rows, with a bound of its error that holds in more than 95 of 100 cases. Not differentiable.

    Args:
        x: token representations, any floating dtype; products are float32, float64 for float64.
        mask: which rows are tokens; None = all. The others may hold anything.
        directions: dimensions that are taken out before sampling, rounded up to blocks of 16.
        probes: Gaussian vectors, at least 4; the statistical error falls as 1/√probes.
        steps: of Lanczos a probe, at least 3. Power laws need most: 14 leave 1.1 % at d = 3072 and eigenvalues 1/i, 20 leave .4 %.
        seed: of directions and probes. Equal calls give equal results, and a matrix's result does not depend on the others of its batch but for rounding.
        tolerance: a matrix whose error exceeds this share of its eRank is done again by the exact path; None: never.
            Matrices of min(N, d) up to 1024, or up to three times the directions and a block, take the exact path at once.
        invalid: "raise" a ValueError for a matrix without a spectrum, or put "nan" in its place, as in `erank`.

    On a GPU nothing waits for the device before the last step, small eigenvalue problems and the choice of the matrices to be done again.

    Raises: TypeError for dtypes, ValueError for shapes and settings, and for a matrix without a spectrum.
    """
    checks.require_matrices("erank_estimate", x, mask)
    if invalid not in ("raise", "nan"):
        raise ValueError(f"erank_estimate: invalid={invalid!r}; expected 'raise' or 'nan'")
    for name, value, least in (("directions", directions, 1), ("probes", probes, 4), ("steps", steps, 3)):
        if value < least:
            raise ValueError(f"erank_estimate: {name} must be at least {least}, got {value}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"erank_estimate: tolerance must be positive, or None for no exact path, got {tolerance}")
    x, blocks = x.detach(), math.ceil(directions / BLOCK)
    least = max(3 * (blocks + 1) * BLOCK, EXACT_BELOW)
    if min(x.shape[-2:]) <= (least if tolerance is not None else (blocks + 1) * BLOCK):
        value = erank(x, mask, invalid=invalid)
        return ERankEstimate(value, torch.zeros_like(value))

    matrices = x.reshape(-1, *x.shape[-2:])
    masks = None if mask is None else mask.reshape(-1, mask.shape[-1])
    value, error = _estimate(matrices, masks, blocks, probes, steps, seed)
    limit = torch.full_like(value, torch.inf) if tolerance is None else tolerance * value
    again = ~(error <= limit)  # NaN too: the exact path says why
    if again.any():
        chosen = again.nonzero()[:, 0]
        value[chosen] = erank(matrices[chosen], None if masks is None else masks[chosen], invalid="nan")
        error[chosen] = value[chosen] * 0
        if invalid == "raise" and value.isnan().any():
            erank(x, mask)  # names the matrix and the reason
    return ERankEstimate(value.view(x.shape[:-2]), error.view(x.shape[:-2]))


def unit_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """X̂ of one matrix [N, d] in float32 (float64 for float64), and which of its rows are not zero [N] bool; all zero where a valid entry is not finite.

    The mean is a float32 and its remainder, so that rows far from the origin lose nothing, and rows equal to the mean are zero as they are in float64.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(work) if mask is None else torch.where(mask[:, None], x, 0).to(work)
    count = x.shape[0] if mask is None else mask.sum().clamp(min=1)
    largest = x.abs().amax()
    most = 120 if work == torch.float32 else 1000
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1)).exponent.clamp(-most, most)
    x = x * torch.ldexp(torch.ones_like(largest), -exponent)  # a power of two: exact, and squares stay in range
    size = torch.linalg.vector_norm(x, dim=-1).amax()
    mean = x.sum(0, dtype=torch.float64) / count
    high = mean.to(work)
    x = x.sub(high).sub_((mean - high).to(work))
    norm = torch.linalg.vector_norm(x, dim=-1)
    kept = norm > 2 * (x.shape[0] + 16) * torch.finfo(torch.float64).eps * size  # the rounding of a mean in float64, and of its remainder
    kept = kept & largest.isfinite()
    if mask is not None:
        kept = kept & mask
    return torch.where(kept[:, None], x / norm[:, None], 0), kept


def _estimate(x: Tensor, mask: Tensor | None, blocks: int, probes: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """(eRank [B], error [B]) of x [B, N, d]; NaN where there is no spectrum. Everything wide comes before the first small eigenvalue problem."""
    pairs = [unit_rows(matrix, None if mask is None else mask[place]) for place, matrix in enumerate(x)]
    rows, kept = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    trace = kept.sum(-1).double()  # [B] tr A
    wide = rows.shape[-2] < rows.shape[-1]
    tall = rows.mT if wide else rows  # [B, N or d, n]
    live = kept[..., None].to(rows.dtype) if wide else None  # the other coordinates of a wide matrix are an exact null space
    dimension = trace if wide else torch.full_like(trace, rows.shape[-1])
    generator = torch.Generator(x.device).manual_seed(seed)

    def normal(columns: int) -> Tensor:
        drawn = torch.randn(tall.shape[-1], columns, generator=generator, device=x.device, dtype=rows.dtype).expand(len(x), -1, -1)
        return drawn if live is None else drawn * live

    # The Krylov space: blocks of Q span its first part, one more serves the quadrature.
    basis = _orthonormal(normal(BLOCK))
    image = tall @ basis
    for _ in range(blocks):
        block = tall.mT @ image[..., -BLOCK:]
        block = block / torch.linalg.vector_norm(block, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
        block = block - basis @ (basis.mT @ block)
        # what an exhausted space has left is rounding; a little of something else keeps the block of full rank, and any orthonormal block will do
        block = _columns(block, 1e-3) + normal(BLOCK) * (1e-3 / math.sqrt(tall.shape[-1]))
        for _ in range(2):
            block = _orthonormal(block - basis @ (basis.mT @ block))
        basis = torch.cat([basis, block], -1)
        image = torch.cat([image, tall @ block], -1)
    gram = (image.mT @ image).double() / trace[:, None, None].clamp(min=1)  # R between Q and one block more
    deflated = basis[..., : blocks * BLOCK]

    # Lanczos on the probes, each a column of its own; probes beyond Q, the operator not.
    def outside(v: Tensor) -> Tensor:
        return v - deflated @ (deflated.mT @ v)

    vector = outside(outside(normal(probes)))
    mass = torch.linalg.vector_norm(vector, dim=-2)
    alphas, betas, done = [], [], []
    vector = vector / mass[:, None].clamp(min=1e-30)
    for step in range(steps):
        done.append(vector)
        image = tall @ vector
        alphas.append(image.square().sum(-2))
        if step == steps - 1:
            break
        following = tall.mT @ image
        for earlier in [*done, *done[-2:]]:  # against all, the two that matter twice: ghosts would count an eigenvalue again
            following = following - earlier * (earlier * following).sum(-2, keepdim=True)
        beta = torch.linalg.vector_norm(following, dim=-2)
        betas.append(beta)
        vector = following / beta[:, None].clamp(min=1e-30)
    scale = trace[:, None, None].clamp(min=1)
    alphas, betas = torch.stack(alphas, -1).double() / scale, torch.stack(betas, -1).double() / scale

    rank = blocks * BLOCK
    inside = torch.diagonal(gram, dim1=-2, dim2=-1)[:, :rank].sum(-1)  # tr Qᵀ R Q
    top, top_error = _block_quadrature(gram, rank)
    rest, rest_error = _sampled(alphas, betas, mass.double().square(), dimension - rank, 1 - inside)
    entropy = top + rest
    error = top_error + rest_error + ROUNDING
    value = torch.where(trace > 0, entropy.exp(), torch.nan)
    return value, torch.where(dimension > rank + 1, value * error.expm1(), torch.inf)


def _columns(block: Tensor, least: float) -> Tensor:
    """Columns scaled to unit length, those shorter than `least` of the longest one not quite."""
    norm = torch.linalg.vector_norm(block, dim=-2, keepdim=True)
    return block / (norm + least * norm.amax(-1, keepdim=True)).clamp(min=1e-30)


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns of the span of block [B, n, k]: Cholesky QR, three times, the first shifted, so that rounding cannot make a pivot negative
    (Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, "Shifted Cholesky QR", SISC 2020). Only products and small factors: no wait for a GPU."""
    identity = torch.eye(block.shape[-1], device=block.device, dtype=block.dtype)
    for shift in (1e-5, 1e-6, 0.0):
        gram = block.mT @ block
        scale = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
        factor, _ = torch.linalg.cholesky_ex(gram + shift * scale * identity)
        block = torch.linalg.solve_triangular(factor.mT, block, upper=True, left=False)
    return block


def _function(r: Tensor) -> Tensor:
    r = r.clamp(min=0)
    return -torch.xlogy(r, r)


def _block_quadrature(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(tr Qᵀ f(R) Q [B], its error [B]) from gram [B, rank + BLOCK, rank + BLOCK], R between Q and one block more."""
    nodes, vectors = torch.linalg.eigh(gram)
    value = (_function(nodes) * vectors[:, :rank].square().sum(-2)).sum(-1)
    coarse = _function(torch.linalg.eigvalsh(gram[:, :rank, :rank])).sum(-1)
    too_much = REMAINDER * (coarse - value).clamp(min=0)
    return value - too_much / 2, too_much / 2


def _sampled(alphas: Tensor, betas: Tensor, mass: Tensor, dimension: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """tr P f(R) P [B] and its error, from the Lanczos coefficients [B, probes, steps] and [B, probes, steps - 1] of probes with square norms mass [B, probes].

    dimension and trace [B]: tr P and tr P R P, which are known.
    """
    probes = mass.shape[-1]
    estimates = []
    radau = alphas.clone()  # the last diagonal entry that gives an eigenvalue 0
    pivot, taken = alphas[..., 0], torch.zeros_like(alphas[..., 0])
    for step in range(1, alphas.shape[-1]):
        taken = betas[..., step - 1].square() / pivot.clamp(min=1e-30)
        pivot = alphas[..., step] - taken
    radau[..., -1] = torch.minimum(taken, alphas[..., -1])
    line: tuple[Tensor, ...] = ()
    for diagonal in (alphas, radau):
        matrix = torch.diag_embed(diagonal) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
        nodes, vectors = torch.linalg.eigh(matrix)
        nodes, weights = nodes.clamp(min=0), vectors[..., 0, :].square() * mass[..., None]
        if not line:
            line = _line(nodes.flatten(1), weights.flatten(1))
        offset, slope = (part[:, None] for part in line)
        left = (weights * (_function(nodes) - offset[..., None] - slope[..., None] * nodes)).sum(-1)  # [B, probes]
        estimates.append(left)
    middle, half = (estimates[0] + estimates[1]) / 2, (estimates[0] - estimates[1]).abs().mean(-1) / 2
    deviation = (middle - middle.mean(-1, keepdim=True)).square().sum(-1) / (probes - 3)  # two of the samples' freedoms made the line
    value = line[0] * dimension + line[1] * trace + middle.mean(-1)
    return value, QUANTILE * (deviation / probes).sqrt() + half


def _line(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(a [B], c [B]) of the least squares line a + c r through f at nodes [B, k] with weights [B, k]."""
    total = weights.sum(-1).clamp(min=1e-300)
    values = _function(nodes)
    x, y = ((weights * part).sum(-1) / total for part in (nodes, values))
    spread = (weights * (nodes - x[:, None]).square()).sum(-1)
    slope = (weights * (nodes - x[:, None]) * (values - y[:, None])).sum(-1) / spread.clamp(min=1e-300)
    return y - slope * x, slope
