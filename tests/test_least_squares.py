"""Normal equations in batches against a factorisation of the data itself, and what cannot be solved."""

from __future__ import annotations

import pytest
import torch
from test_fitting import close, ridge_solution

from red.errors import REDError
from red.fitting.least_squares import LeastSquares, solve


def test_least_squares_equals_lstsq_whatever_the_batches():
    x, y = torch.randn(90, 7, dtype=torch.float64), torch.randn(90, 5, dtype=torch.float64)
    for sizes in ([90], [1] * 90, [40, 0, 50]):
        solver = LeastSquares(7, 5)
        for one, other in zip(x.split(sizes), y.split(sizes), strict=True):
            solver.add(one, other)
        for ridge in (1e-12, 0.3):
            found = solver.solve(ridge)
            close(found, ridge_solution(x, y, ridge), 1e-10)
            assert solver.residual(found) == pytest.approx(float((x @ found - y).square().sum()), rel=1e-10)
        assert solver.rows == 90 and solver.yy == pytest.approx(float(y.square().sum()))
        assert solver.solve(1e9).abs().max() < 1e-6 < solver.solve(1e-12).abs().max(), "the ridge pulls to zero"
    single = LeastSquares(7, 5)
    single.add(x.float(), y.float())
    assert single.xx.dtype == torch.float64
    close(single.solve(1e-12), ridge_solution(x, y, 1e-12), 1e-5)


def test_least_squares_refuses_what_it_cannot_solve():
    solver = LeastSquares(3, 2)
    solver.add(torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]]), torch.ones(2, 2))  # nothing moves the third
    with pytest.raises(REDError, match=r"3 unknowns is singular with ridge=0.*larger ridge.*calibration_samples"):
        solver.solve(0.0)
    assert solver.solve(1e-6)[2].abs().max() == 0
    for place in (0, 1):
        broken = [torch.ones(4, 3), torch.ones(4, 2)]
        broken[place][1, 1] = float("nan")
        solver = LeastSquares(3, 2)
        solver.add(*broken)
        with pytest.raises(REDError, match="NaN or infinite.*fp32 or bf16"):
            solver.solve(1e-4)


def test_rounding_below_zero_is_no_obstacle():
    """fp32 sums of activations that one direction dominates are indefinite beyond a small ridge; the solution is still that of fp64 sums."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(4000, 24, generator=draw, dtype=torch.float64)
    x[:, 12:] = x[:, :12] @ torch.randn(12, 12, generator=draw, dtype=torch.float64)  # singular
    x[::50] += 2e4 * torch.randn(24, generator=draw, dtype=torch.float64)
    y = x @ torch.randn(24, 3, generator=draw, dtype=torch.float64)
    coarse, ridge = (x.float().T @ x.float()).double(), 1e-10
    scale = float(coarse.diagonal().mean())
    assert torch.linalg.cholesky_ex(coarse + ridge * scale * torch.eye(24)).info, "the fp32 sums are indefinite here"
    found = solve(coarse, (x.float().T @ y.float()).double(), ridge)
    assert float((x @ found - y).square().sum() / y.square().sum()) < 1e-4
