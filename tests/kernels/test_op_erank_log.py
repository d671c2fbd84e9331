"""log_erank: the value of erank, and a gradient that survives repeated and zero eigenvalues."""

import pytest
import torch
from op_truth import leaf

from red_kernels import erank, erank_log, log_erank


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "tall": draw(9, 4),
    "wide": draw(4, 9),
    "batch": draw(2, 5, 4),
    "repeated eigenvalues": torch.cat([torch.eye(3), -torch.eye(3)]).double(),
    "a simplex, all eigenvalues equal, one zero": torch.eye(4).double(),
    "rank deficient": draw(7, 2) @ draw(2, 5, seed=1),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    x = CASES[name]
    torch.testing.assert_close(log_erank(x).exp(), erank(x), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(log_erank, leaf(x), atol=1e-5)  # the quotient's error at a zero eigenvalue is eps ln eps


def test_gradient_is_not_zero_and_mutations_are_caught(monkeypatch):
    x = leaf(draw(9, 4))
    log_erank(x).backward()
    assert x.grad.norm() > 1e-2
    backward = erank_log._Entropy.backward
    monkeypatch.setattr(erank_log._Entropy, "backward", staticmethod(lambda ctx, grad: backward(ctx, grad) * 0))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(log_erank, leaf(draw(9, 4)))


def test_masked_rows_may_hold_anything_and_get_no_gradient():
    mask = torch.tensor([True, True, False, True, True, False])
    x = leaf(draw(6, 4).masked_fill(~mask[:, None], float("nan")))
    value = log_erank(x, mask)
    value.backward()
    other = leaf(x[mask])
    log_erank(other).backward()
    torch.testing.assert_close(value.exp(), erank(other), rtol=1e-12, atol=0)
    assert (x.grad[~mask] == 0).all()
    torch.testing.assert_close(x.grad[mask], other.grad)


def test_ascent_raises_the_rank_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        x = leaf((draw(30, 8) * torch.arange(1, 9) ** -2.0).to(dtype))
        before = log_erank(x)
        before.backward()
        assert x.grad.dtype == dtype and log_erank((x + x.grad / x.grad.norm()).detach()) > before + 0.01


@pytest.mark.parametrize("x", (torch.full((3, 4), 0.1), torch.full((3, 4), float("inf")), torch.zeros(1, 4)), ids=("equal", "Inf", "one row"))
def test_without_a_spectrum(x):
    assert log_erank(x).isnan()


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match=r"log_erank: x must have shape \[..., N, d\]"):
        log_erank(torch.zeros(5))
    with pytest.raises(TypeError, match="log_erank: x must have a floating dtype"):
        log_erank(torch.zeros(5, 4).int())
