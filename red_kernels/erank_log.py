"""ln eRank with a gradient, for an objective that keeps representations from collapsing.

    H = -Σ r ln r,  r = λ / t,  t = Σ λ, of C = X̂ᵀ X̂       dH/dC = U diag(φ) Uᵀ,  φ_i = -(ln r_i + H) / t,       dH/dX̂ = 2 X̂ dH/dC

H is a symmetric function of the eigenvalues, so no 1 / (λ_i - λ_j) appears: repeated eigenvalues are harmless, where the gradient of `torch.linalg.eigh` divides by
zero. In the null space φ has no limit but X̂ φ does, which is 0. What comes before, centring and scaling to unit length, is left to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from red_kernels import checks, reference


class _Entropy(torch.autograd.Function):
    """Unit rows [..., N, d] -> H [...], by the smaller Gram matrix."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        wide = rows.shape[-2] <= rows.shape[-1]
        gram = rows @ rows.mT if wide else rows.mT @ rows
        eigenvalues, vectors = torch.linalg.eigh(gram)
        trace = eigenvalues.clamp(min=0).sum(-1, keepdim=True)
        r = eigenvalues.clamp(min=0) / trace
        entropy = -torch.special.xlogy(r, r).sum(-1)
        ctx.save_for_backward(rows, vectors, r, entropy, trace)
        ctx.wide = wide
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override] - torch's takes any number of gradients
        rows, vectors, r, entropy, trace = ctx.saved_tensors
        null = r <= max(rows.shape[-2:]) * torch.finfo(r.dtype).eps  # rounding of a zero
        slope = torch.where(null, 0, -(torch.where(null, 1, r).log() + entropy[..., None]) / trace)
        of_gram = (vectors * slope[..., None, :]) @ vectors.mT
        return 2 * grad[..., None, None] * (of_gram @ rows if ctx.wide else rows @ of_gram)


def log_erank(
    x: Tensor,  # [..., N, d]
    mask: Tensor | None = None,  # [..., N] bool
) -> Tensor:  # [...] float64
    """ln of the effective rank of every matrix of rows, differentiable once in x; float64 throughout.

    A masked row gets no gradient, and neither does one that equals the mean. NaN where there is no spectrum, as `erank(..., invalid="nan")`; such a
    matrix has a NaN gradient: leave it out before the sum. Costs an eigendecomposition of the smaller Gram matrix, so give it some hundred rows.

    Raises: TypeError for dtypes, ValueError for shapes.
    """
    checks.require_matrices("log_erank", x, mask)
    rows, finite, count = reference.normalised_rows(x, mask)
    return torch.where(finite & (count >= 2), _Entropy.apply(rows), torch.nan)
