"""The Triton kernel of selection_low_rank, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import assert_near, drawn, errors
from test_op_selection_low_rank import dense, problem, value_and_gradients

pytest.importorskip("triton")
from red_kernels import selection_low_rank
from red_kernels.triton import launch, selection_low_rank as kernels

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["selection_low_rank"]]


def check(device, side, weight, index, down, up, grad, launches=LAUNCHES):
    truth = value_and_gradients(dense, weight.double(), index, down.double(), up.double(), side, grad.double())
    eager = value_and_gradients(dense, *(t if t is index else t.float() for t in (weight, index, down, up)), side, grad.float())
    eager = [e.to(t.dtype) for e, t in zip(eager, (weight, down, up), strict=True)]
    for name in launches:
        with launch.forcing("selection_low_rank", name):
            actual = value_and_gradients(selection_low_rank, *(t.to(device) for t in (weight, index, down, up)), side, grad.to(device))
        for ours, true, other in zip(actual, truth, eager, strict=True):
            if ours.dtype == torch.float32 and weight.dtype == torch.bfloat16:
                assert true.norm() > 0 and max(errors(ours.cpu(), true)) < 2**-15  # float32 gradients of factors in two terms
            else:
                assert_near(ours.cpu(), true, other)


DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("side", ("input", "output"))
def test_matches_the_dense_projection(on_triton, side, dtypes):
    check(on_triton, side, *problem(side, 21, 40, 30, 19, *dtypes))


@drawn(
    10,
    side=("input", "output"),
    other=(1, 17, 150),
    width=(1, 9, 151),
    k=(1, 6, 137),
    rank=(1, 3, 40),
    dtypes=DTYPES[:3],
    seed=range(1001),
)
def test_any_shape(on_triton, side, other, width, k, rank, dtypes, seed):
    check(on_triton, side, *problem(side, other, width, k, rank, *dtypes, seed=seed))


@pytest.mark.parametrize("side", ("input", "output"))
def test_strides(on_triton, side):
    weight, index, down, up, grad = problem(side, 21, 40, 30, 19)
    apart = torch.zeros(weight.shape[0], 97)[:, 5 : 5 + weight.shape[1]].copy_(weight)
    turned = weight.T.contiguous().T
    for other in (apart, turned):
        check(on_triton, side, other, index, down.T.contiguous().T, up.T.contiguous().T, grad.T.contiguous().T, launches=LAUNCHES[:1])


@pytest.mark.parametrize("side", ("input", "output"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_zero_correction_is_the_selection(on_triton, side, dtype):
    weight, index, down, up, _ = (t.to(on_triton) for t in problem(side, dtype=dtype))
    picked = weight.index_select(1 if side == "input" else 0, index)
    assert torch.equal(selection_low_rank(weight, index, down, torch.zeros_like(up), side), picked)
    assert torch.equal(selection_low_rank(weight, index, down[:, :0], up[:0], side), picked)
    assert selection_low_rank(weight, index[:0], down, up[:, :0], side).numel() == 0


def test_two_terms_hold_a_float32_factor():
    """Of a factor: 2⁻¹⁷. Of a product of float32 and bfloat16 numbers: as much, where rounding the factor would give 2⁻⁹."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 200, generator=g), torch.randn(200, 17, generator=g).bfloat16()
    high, low = kernels.halves(a)
    assert ((high.double() + low.double() - a.double()).abs() <= a.double().abs() * 2**-17).all()
    truth = a.double() @ b.double()
    two, one = errors(kernels.product(a, b, b), truth), errors(kernels.product(a.bfloat16(), b, b), truth)
    assert max(two) < 2**-17 and min(one) > 2**-11
    assert max(errors(kernels.product(b.T, a.T, b), truth.T)) < 2**-17


def test_the_sum_is_rounded_once(on_triton):
    """Half-precision results of float32 factors are those of float64, rounded, but for ties that two terms cannot tell."""
    weight, index, down, up, _ = problem("input", 40, 50, 45, 33, torch.bfloat16, torch.float32)
    truth = dense(weight.double(), index, down.double(), up.double(), "input").bfloat16()
    ours = selection_low_rank(*(t.to(on_triton) for t in (weight, index, down, up)), "input").cpu()
    assert (ours != truth).float().mean() < 0.01


@pytest.mark.parametrize("side", ("input", "output"))
def test_repeats_bit_for_bit(on_triton, side):
    *given_, grad = (t.to(on_triton) for t in problem(side, 150, 80, 70, 40, torch.bfloat16, torch.float32))
    first, second = (value_and_gradients(selection_low_rank, *given_, side, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MUTATIONS = {
    "zero output": ("selection_low_rank", lambda run, args: (torch.zeros_like(run(*args)[0]), run(*args)[1])),
    "no correction": ("selection_low_rank", lambda run, args: (run(*args[:2], torch.zeros_like(args[2]), *args[3:])[0], run(*args)[1])),
    "index ignored": ("selection_low_rank", lambda run, args: run(args[0], torch.arange(6, device=args[0].device), *args[2:])),
    "product lost": ("selection_low_rank", lambda run, args: (run(*args)[0], torch.zeros_like(run(*args)[1]))),
    "zero ddown": ("selection_low_rank_backward", lambda run, args: (torch.zeros_like(run(*args)[0]), run(*args)[1])),
    "zero dup": ("selection_low_rank_backward", lambda run, args: (run(*args)[0], torch.zeros_like(run(*args)[1]))),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("side", ("input", "output"))
def test_mutations_are_caught(on_triton, name, side, monkeypatch):
    given_ = problem(side)
    check(on_triton, side, *given_)
    target, mutation = MUTATIONS[name]
    run = getattr(kernels, target)
    monkeypatch.setattr(kernels, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(on_triton, side, *given_)
