"""covariance against a float64 product over the valid tokens."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn

from red_kernels import covariance, reference


def problem(lead=(3, 5), width=7, dtype=torch.float32, seed=0):
    """x, scale, mask (one valid token at least), and what `out` holds before."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(lead, generator=g) < 0.6
    mask.view(-1)[0] = True
    x = torch.randn(*lead, width, generator=g, dtype=torch.float64).to(dtype)
    before = torch.randn(width, width, generator=g)
    return x, torch.rand(lead, generator=g) + 0.5, mask, before + before.T


def dense(x, scale, mask, before):
    if scale is not None:
        x = (x.to(torch.promote_types(x.dtype, scale.dtype)) * scale[..., None]).to(x.dtype)
    x = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    return before + (x.T @ x).to(before.dtype)


def check(x, scale, mask, before, out_dtype=torch.float32):
    truth = dense(x.double(), None if scale is None else scale.double(), mask, before.double())
    eager = dense(x, scale, mask, before.to(out_dtype))
    out = before.to(out_dtype, copy=True)
    assert covariance(x, scale=scale, mask=mask, out=out) is out
    assert_near(out, truth, eager)
    assert torch.equal(out, out.T)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("out_dtype", (torch.float32, torch.float64))
def test_matches_a_dense_product(dtype, scaled, masked, out_dtype):
    x, scale, mask, before = problem(dtype=dtype)
    check(x, scale if scaled else None, mask if masked else None, before, out_dtype)


@drawn(12, lead=((), (1,), (17,), (2, 151), (2, 3, 5)), width=(*ODD, 668), scaled=(True, False), seed=range(1001))
def test_any_shape(lead, width, scaled, seed):
    x, scale, mask, before = problem(lead, width, seed=seed)
    check(x, scale if scaled else None, mask, before)


def test_masked_tokens_are_not_read():
    x, scale, mask, before = problem()
    clean, dirty = before.clone(), before.clone()
    covariance(x, scale=scale, mask=mask, out=clean)
    x[~mask], scale[~mask] = float("nan"), float("nan")
    assert torch.equal(covariance(x, scale=scale, mask=mask, out=dirty), clean)
    covariance(x, scale=scale, mask=torch.zeros_like(mask), out=dirty)
    assert torch.equal(covariance(x[:0], out=dirty), clean)


def test_a_float64_sum_keeps_what_float32_would_round_away():
    out = torch.full((1, 1), 2.0**30, dtype=torch.float64)
    covariance(torch.ones(3, 1), out=out)
    assert out.item() == 2**30 + 3


def test_autocast_changes_nothing():
    x, scale, mask, before = problem()
    plain, cast = before.clone(), before.clone()
    covariance(x, scale=scale, mask=mask, out=plain)
    with torch.autocast("cpu", torch.bfloat16):
        covariance(x, scale=scale, mask=mask, out=cast)
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    x, scale, mask, before = problem(dtype=dtype)
    for args in ((x, scale, mask, before), (x, None, None, before.double())):
        torch.library.opcheck(torch.ops.red.covariance.default, args)


def test_compiles_whole():
    x, scale, mask, before = problem()
    first, second = before.clone(), before.clone()
    function = compiled(lambda x, scale, mask, out: covariance(x, scale=scale, mask=mask, out=out) * 2)
    torch.testing.assert_close(function(x, scale, mask, first), 2 * covariance(x, scale=scale, mask=mask, out=second))
    assert torch.equal(first, second)


MUTATIONS = {
    "nothing added": lambda run, args: None,
    "scale ignored": lambda run, args: run(args[0], None, *args[2:]),
    "scale once": lambda run, args: run(args[0], args[1].sqrt(), *args[2:]),
    "mask ignored": lambda run, args: run(*args[:2], None, args[3]),
    "what out held is lost": lambda run, args: run(*args[:3], args[3].zero_()),
    "one triangle": lambda run, args: (run(*args), args[3].tril_()),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    run = reference.covariance
    check(*problem())
    monkeypatch.setattr(reference, "covariance", lambda *args: MUTATIONS[name](run, args) and None)
    with pytest.raises(AssertionError):
        check(*problem())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(out=torch.zeros(6, 6)), ValueError, r"out must have shape .* = \[7, 7\], got \[6, 6\]"),
        (dict(out=torch.zeros(7, 7).bfloat16()), TypeError, "out must have dtype torch.float32 or torch.float64, got torch.bfloat16"),
        (dict(out=torch.zeros(7, 7, requires_grad=True)), ValueError, "out requires a gradient"),
        (dict(scale=torch.ones(3)), ValueError, "scale must have shape"),
        (dict(scale=torch.ones(3, 5).long()), TypeError, "scale must have a floating dtype"),
        (dict(mask=torch.ones(3, 5)), TypeError, "mask must have dtype torch.bool"),
        (dict(mask=torch.ones(3).bool()), ValueError, "mask must have shape"),
        (dict(x=torch.ones(3, 5, 7).long()), TypeError, "x must have a floating dtype"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        covariance(**dict(x=torch.ones(3, 5, 7), out=torch.zeros(7, 7)) | change)
