"""Effective rank of token representations.

    X̂ = rows of X [N, d], minus their mean row, each scaled to unit length (a zero row stays zero)
    λ = eigenvalues of X̂ᵀ X̂        r = λ / Σ λ        eRank = exp(-Σ r ln r)

The entropy of covariance eigenvalues (Roy & Vetterli, "The effective rank", EUSIPCO 2007, applied to the covariance of
normalised representations as in RED, arXiv 2605.29327). 1 ≤ eRank ≤ min(N-1, d). X̂ X̂ᵀ has the same nonzero eigenvalues, so
the smaller Gram matrix is used.

Squaring loses the singular values of X̂ below sqrt(u) σ_max, u = 2⁻⁵³ (or 2⁻²⁴, `precision="float32"`): every eigenvalue carries an *absolute* error of a few u Σ λ. The
effective rank does not see them, since eigenvalues that small have no entropy; the tail of a spectrum does. Bounds: docs/kernels.md.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks


@torch.library.custom_op("red::erank", mutates_args=(), device_types=("cpu", "cuda"))
def _op(x: Tensor, mask: Optional[Tensor], invalid: str, precision: str = "float64") -> Tensor:
    value, finite, count = backend.implementation("erank", x).erank(x, mask, precision)
    if invalid == "raise":
        _raise_where(~finite, "erank", x, lambda _: "holds NaN or Inf in a valid row")
        _raise_where(count < 2, "erank", x, lambda item: f"has too few valid rows ({count[item]}); at least 2 are needed")
        _raise_where(value.isnan(), "erank", x, lambda _: "is all zero once centred (its valid rows are equal), so it has no spectrum")
    return value


@_op.register_fake
def _(x, mask, invalid, precision="float64"):
    return x.new_empty(x.shape[:-2], dtype=torch.float64)


@torch.library.custom_op("red::erank_spectrum", mutates_args=(), device_types=("cpu", "cuda"))
def _spectrum_op(x: Tensor, mask: Optional[Tensor], precision: str = "float64") -> Tensor:
    eigenvalues, finite = backend.implementation("erank_spectrum", x).erank_spectrum(x, mask, precision)
    _raise_where(~finite, "erank_spectrum", x, lambda _: "holds NaN or Inf in a valid row")
    return eigenvalues


@_spectrum_op.register_fake
def _(x, mask, precision="float64"):
    return x.new_empty((*x.shape[:-2], min(x.shape[-2:])), dtype=torch.float64)


def _raise_where(bad: Tensor, op: str, x: Tensor, reason) -> None:
    """ValueError for the first matrix of the batch that is `bad` [...]."""
    if bad.any():
        item = tuple(bad.nonzero()[0].tolist())
        which = f"matrix {list(item)}" if item else "the matrix"
        raise ValueError(f"{op}: {which} of x {list(x.shape)} {reason(item)}")


def _check(op: str, x: Tensor, mask: Tensor | None, precision: str) -> None:
    checks.require_matrices(op, x, mask)
    if precision not in ("float64", "float32"):
        raise ValueError(f"{op}: precision={precision!r}; expected 'float64' or 'float32'")


def _padded(op: str, matrices: Sequence[Tensor], mask: object) -> tuple[Tensor, Tensor]:
    """(x [M, N, d], mask [M, N]) of matrices [N_i, d], with rows of zeros below the shorter ones."""
    if mask is not None:
        raise ValueError(f"{op}: a list of matrices takes no mask; leave the rows out that do not count")
    for number, matrix in enumerate(matrices):
        if matrix.dim() != 2 or matrix.shape[1] != matrices[0].shape[-1] or matrix.dtype != matrices[0].dtype or matrix.device != matrices[0].device:
            found = " and ".join(f"{list(each.shape)} {each.dtype} on {each.device}" for each in (matrices[0], matrix))
            raise ValueError(f"{op}: a list must hold matrices [N_i, d] of one d, dtype and device; number 0 and number {number} are {found}")
    if not matrices:
        raise ValueError(f"{op}: the list of matrices is empty")
    heights = torch.tensor([len(matrix) for matrix in matrices])
    mask = (torch.arange(int(heights.max())) < heights[:, None]).to(matrices[0].device)
    return torch.nn.utils.rnn.pad_sequence(list(matrices), batch_first=True), mask


def erank(
    x: Tensor | Sequence[Tensor],  # [..., N, d], or matrices [N_i, d]
    mask: Tensor | None = None,  # [..., N] bool
    *,
    invalid: str = "raise",
    precision: str = "float64",
) -> Tensor:  # [...] float64
    """Effective rank of every matrix of rows. Not differentiable.

    Args:
        x: token representations, any floating dtype; or a list of M matrices of one width, with any number of rows each: the result is then [M].
        mask: which rows are tokens; None = all. The others may hold anything.
        invalid: what to do about a matrix without a spectrum, that is with NaN or Inf, fewer than two rows, or all rows equal:
            "raise" a ValueError that names it and says why (on a GPU this waits for the result), or put "nan" in its place.
        precision: "float64", or "float32" where a relative error below 1e-5 as a rule, and the bound in docs/kernels.md at worst, will do: the compiled extension then
            makes Gram matrix and eigenvalues in float32, in less time. What runs in PyTorch is float64 all the same.

    Raises: TypeError for dtypes, ValueError for shapes and as `invalid` says.
    """
    if not isinstance(x, Tensor):
        x, mask = _padded("erank", x, mask)
    _check("erank", x, mask, precision)
    if invalid not in ("raise", "nan"):
        raise ValueError(f"erank: invalid={invalid!r}; expected 'raise' or 'nan'")
    return _op(x.detach(), mask, invalid, precision)


def erank_spectrum(
    x: Tensor | Sequence[Tensor],  # [..., N, d], or matrices [N_i, d]
    mask: Tensor | None = None,  # [..., N] bool
    *,
    precision: str = "float64",
) -> Tensor | list[Tensor]:  # [..., min(N, d)] float64, or a list of [min(N_i, d)]
    """Eigenvalues λ of X̂ᵀ X̂, descending (module docstring). They add up to the number of nonzero rows of X̂.

    Fewer than two rows, or equal rows, give zeros. Not differentiable. `precision` as in `erank`.

    Raises: TypeError for dtypes, ValueError for shapes, and naming a matrix with NaN or Inf.
    """
    if not isinstance(x, Tensor):
        matrices = x
        x, mask = _padded("erank_spectrum", x, mask)
        spectra = erank_spectrum(x, mask, precision=precision)
        return [spectrum[: min(matrix.shape)] for spectrum, matrix in zip(spectra, matrices, strict=True)]
    _check("erank_spectrum", x, mask, precision)
    return _spectrum_op(x.detach(), mask, precision)
