"""Effective rank of token representations.

    X̂ = rows of X [N, d], minus their mean row, each scaled to unit length (a zero row stays zero)
    λ = eigenvalues of X̂ᵀ X̂        r = λ / Σ λ        eRank = exp(-Σ r ln r)

The entropy of covariance eigenvalues (Roy & Vetterli, "The effective rank", EUSIPCO 2007, applied to the covariance of
normalised representations as in RED, arXiv 2605.29327). 1 ≤ eRank ≤ min(N-1, d). X̂ X̂ᵀ has the same nonzero eigenvalues, so
the smaller Gram matrix is used. All in float64.
"""

from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference


@torch.library.custom_op("red::erank", mutates_args=(), device_types=("cpu", "cuda"))
def _op(x: Tensor, mask: Optional[Tensor], invalid: str) -> Tensor:
    backend.select("erank", x)
    value, finite, count = reference.erank(x, mask)
    if invalid == "raise":
        _raise_where(~finite, "erank", x, lambda _: "holds NaN or Inf in a valid row")
        _raise_where(count < 2, "erank", x, lambda item: f"has too few valid rows ({count[item]}); at least 2 are needed")
        _raise_where(value.isnan(), "erank", x, lambda _: "is all zero once centred (its valid rows are equal), so it has no spectrum")
    return value


@_op.register_fake
def _(x, mask, invalid):
    return x.new_empty(x.shape[:-2], dtype=torch.float64)


@torch.library.custom_op("red::erank_spectrum", mutates_args=(), device_types=("cpu", "cuda"))
def _spectrum_op(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    backend.select("erank_spectrum", x)
    eigenvalues, finite = reference.erank_spectrum(x, mask)
    _raise_where(~finite, "erank_spectrum", x, lambda _: "holds NaN or Inf in a valid row")
    return eigenvalues


@_spectrum_op.register_fake
def _(x, mask):
    return x.new_empty((*x.shape[:-2], min(x.shape[-2:])), dtype=torch.float64)


def _raise_where(bad: Tensor, op: str, x: Tensor, reason) -> None:
    """ValueError for the first matrix of the batch that is `bad` [...]."""
    if bad.any():
        item = tuple(bad.nonzero()[0].tolist())
        which = f"matrix {list(item)}" if item else "the matrix"
        raise ValueError(f"{op}: {which} of x {list(x.shape)} {reason(item)}")


def _check(op: str, x: Tensor, mask: Tensor | None) -> None:
    checks.require_floating(op, x=x)
    if x.dim() < 2 or x.shape[-1] < 1 or x.shape[-2] < 1:
        raise ValueError(f"{op}: x must have shape [..., N, d] with N and d of at least 1, got {list(x.shape)}")
    if mask is not None:
        checks.require_dtype(op, "mask", mask, torch.bool)
        checks.require_shape(op, "mask", mask, x.shape[:-1], "[..., N]")


def erank(
    x: Tensor,  # [..., N, d]
    mask: Tensor | None = None,  # [..., N] bool
    *,
    invalid: str = "raise",
) -> Tensor:  # [...] float64
    """Effective rank of every matrix of rows. Not differentiable.

    Args:
        x: token representations, any floating dtype.
        mask: which rows are tokens; None = all. The others may hold anything.
        invalid: what to do about a matrix without a spectrum, that is with NaN or Inf, fewer than two rows, or all rows equal:
            "raise" a ValueError that names it and says why (on a GPU this waits for the result), or put "nan" in its place.
    """
    _check("erank", x, mask)
    if invalid not in ("raise", "nan"):
        raise ValueError(f"erank: invalid={invalid!r}; expected 'raise' or 'nan'")
    return _op(x.detach(), mask, invalid)


def erank_spectrum(
    x: Tensor,  # [..., N, d]
    mask: Tensor | None = None,  # [..., N] bool
) -> Tensor:  # [..., min(N, d)] float64
    """Eigenvalues λ of X̂ᵀ X̂, descending (module docstring). They add up to the number of nonzero rows of X̂.

    Fewer than two rows, or equal rows, give zeros. Not differentiable.

    Raises: TypeError for dtypes, ValueError for shapes, and naming a matrix with NaN or Inf.
    """
    _check("erank_spectrum", x, mask)
    return _spectrum_op(x.detach(), mask)
