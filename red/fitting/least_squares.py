"""Linear least squares over data that comes in batches: normal equations in fp64, solved by Cholesky with a relative ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from red.errors import REDError


class LeastSquares:
    """The running normal equations of `min_W Σ |x W - y|²`.

    Batches are multiplied in their own dtype (fp32 or wider) and added up in fp64, on their device; memory is O(n² + n m), whatever the
    number of rows.

    Args:
        n, m: columns of x and of y.
        device: where the batches will be.
    """

    def __init__(self, n: int, m: int, device: torch.device | str = "cpu"):
        self.xx = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.xy = torch.zeros(n, m, dtype=torch.float64, device=device)
        self.rows = 0
        self.yy = 0.0  # Σ |y|², for `residual`

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count rows `x [N, n]` and `y [N, m]`."""
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y).double()
        self.yy += float(y.double().square().sum())
        self.rows += len(x)

    def solve(self, ridge: float) -> Tensor:
        """`W [n, m] = (XᵀX + ridge·tr(XᵀX)/n·I)⁻¹ XᵀY` in fp64; it never fits worse than W = 0."""
        return solve(self.xx, self.xy, ridge)

    def residual(self, solution: Tensor) -> float:
        """`Σ |x W - y|²` of any `W`, from the sums alone."""
        return float(((self.xx @ solution - 2 * self.xy) * solution).sum()) + self.yy


def solve(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """`(xx + ridge·tr(xx)/n·I)⁻¹ xy` by Cholesky in fp64.

    Products in fp32 of activations that one direction dominates leave eigenvalues below zero, perhaps further than the ridge lifts them; the ridge
    is then twice the lowest of them.

    Raises:
        REDError: `xx` or `xy` is not finite, or `xx` is singular and there is no ridge.
    """
    n = len(xx)
    scale = float(xx.diagonal().mean())
    if not torch.isfinite(xx).all() or not torch.isfinite(xy).all():
        raise REDError("The activations that a fit solves for are NaN or infinite. Check the teacher's weights, and load it in fp32 or bf16.")
    if scale == 0:  # nothing moves, as in a module of zeros
        return torch.zeros_like(xy, dtype=torch.float64)
    xx, xy = xx.double(), xy.double()
    factor, info = torch.linalg.cholesky_ex(xx + ridge * scale * torch.eye(n, dtype=torch.float64, device=xx.device))
    if not info.item():
        return torch.cholesky_solve(xy, factor)
    if ridge <= 0:
        raise REDError(f"A least-squares problem of {n} unknowns is singular with ridge={ridge:g}: the calibration text does not move all of them. "
                       "Give a larger ridge (1e-4), or more calibration_samples.")
    lifted = -2 * torch.linalg.eigvalsh(xx)[0].item()  # rounding reaches as far above zero as below: what is smaller means nothing
    return torch.linalg.solve(xx + lifted * torch.eye(n, dtype=torch.float64, device=xx.device), xy)


def sqrt_psd(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
