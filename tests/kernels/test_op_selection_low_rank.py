"""selection_low_rank against products with the dense projection that it stands for."""

import pytest
import torch
from op_truth import assert_near, compiled, drawn, leaf

from red_kernels import reference, selection_low_rank


def problem(side="input", other=5, width=9, k=6, rank=3, dtype=torch.float32, factors=None, seed=0):
    """weight, index, down, up, and a gradient for the result; the correction is as large as the selection."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weight = draw(other, width) if side == "input" else draw(width, other)
    index = torch.randperm(width, generator=g)[:k] if k <= width else torch.randint(0, width, (k,), generator=g)
    down, up = draw(width, rank) / (width * rank) ** 0.5, draw(rank, k)
    grad = draw(other, k) if side == "input" else draw(k, other)
    factors = factors or dtype
    return weight.to(dtype), index, down.to(factors), up.to(factors), grad.to(dtype)


def dense(weight, index, down, up, side):
    projection = torch.nn.functional.one_hot(index, down.shape[0]).T.to(down.dtype) + down @ up
    projection = projection.to(weight.dtype)
    return weight @ projection if side == "input" else projection.T @ weight


def value_and_gradients(function, weight, index, down, up, side, grad):
    down, up = leaf(down), leaf(up)
    y = function(weight, index, down, up, side)
    y.backward(grad)
    return [y.detach(), down.grad, up.grad]


def check(side, weight, index, down, up, grad):
    double = [t.double() for t in (down, up)]
    truth = value_and_gradients(dense, weight.double(), index, *double, side, grad.double())
    # Wider than the inputs, since the op accumulates in float32; rounded as it rounds.
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, down, up, grad)]
    eager = value_and_gradients(dense, wide[0], index, *wide[1:3], side, wide[3])
    eager = [e.to(t.dtype) for e, t in zip(eager, (weight, down, up), strict=True)]
    for ours, true, other in zip(value_and_gradients(selection_low_rank, weight, index, down, up, side, grad), truth, eager, strict=True):
        assert_near(ours, true, other)


DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("side", ("input", "output"))
def test_matches_the_dense_projection(side, dtypes):
    check(side, *problem(side, dtype=dtypes[0], factors=dtypes[1]))


@drawn(12, side=("input", "output"), other=(1, 17, 129), width=(1, 9, 151), k=(1, 6, 37), rank=(1, 3, 40), seed=range(1001))
def test_any_shape(side, other, width, k, rank, seed):
    check(side, *problem(side, other, width, k, rank, seed=seed))


@pytest.mark.parametrize("side", ("input", "output"))
def test_a_zero_correction_is_the_selection(side):
    weight, index, down, up, _ = problem(side, dtype=torch.bfloat16)
    assert torch.equal(selection_low_rank(weight, index, down, torch.zeros_like(up), side), weight.index_select(1 if side == "input" else 0, index))
    assert torch.equal(selection_low_rank(weight, index, down[:, :0], up[:0], side), weight.index_select(1 if side == "input" else 0, index))


@pytest.mark.parametrize("side", ("input", "output"))
def test_gradcheck(side):
    weight, index, down, up, _ = problem(side, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d, u: selection_low_rank(weight, index, d, u, side), (leaf(down), leaf(up)))


@pytest.mark.parametrize("side", ("input", "output"))
def test_autocast_changes_nothing(side):
    weight, index, down, up, grad = problem(side)
    plain = value_and_gradients(selection_low_rank, weight, index, down, up, side, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(selection_low_rank, weight, index, down, up, side, grad)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize("side", ("input", "output"))
@pytest.mark.parametrize("dtypes", DTYPES[:3])
def test_opcheck(side, dtypes):
    weight, index, down, up, _ = problem(side, dtype=dtypes[0], factors=dtypes[1])
    torch.library.opcheck(torch.ops.red.selection_low_rank.default, (weight, index, leaf(down), leaf(up), side))
    torch.library.opcheck(torch.ops.red.selection_low_rank.default, (weight, index, down, up, side))


@pytest.mark.parametrize("side", ("input", "output"))
def test_compiles_whole(side):
    weight, index, down, up, grad = problem(side)
    function = compiled(selection_low_rank)
    actual = value_and_gradients(function, weight, index, down, up, side, grad)
    for ours, eager in zip(actual, value_and_gradients(selection_low_rank, weight, index, down, up, side, grad), strict=True):
        torch.testing.assert_close(ours, eager)


MUTATIONS = {
    "zero output": ("selection_low_rank", lambda run, args: (torch.zeros_like(run(*args)[0]), run(*args)[1])),
    "no correction": ("selection_low_rank", lambda run, args: (run(*args[:2], torch.zeros_like(args[2]), *args[3:])[0], run(*args)[1])),
    "index ignored": ("selection_low_rank", lambda run, args: run(args[0], torch.arange(6), *args[2:])),
    "product lost": ("selection_low_rank", lambda run, args: (run(*args)[0], torch.zeros_like(run(*args)[1]))),
    "zero ddown": ("selection_low_rank_backward", lambda run, args: (torch.zeros_like(run(*args)[0]), run(*args)[1])),
    "zero dup": ("selection_low_rank_backward", lambda run, args: (run(*args)[0], torch.zeros_like(run(*args)[1]))),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("side", ("input", "output"))
def test_mutations_are_caught(name, side, monkeypatch):
    check(side, *problem(side))
    target, mutation = MUTATIONS[name]
    run = getattr(reference, target)
    monkeypatch.setattr(reference, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(side, *problem(side))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(side="in"), ValueError, "side='in' is not a side of a weight; expected 'input'"),
        (dict(weight=torch.ones(5, 9, requires_grad=True)), ValueError, "weight requires a gradient, but only down and up get one"),
        (dict(weight=torch.ones(5)), ValueError, "weight and down must be matrices"),
        (dict(weight=torch.ones(5, 8)), ValueError, r"down must have shape .* = \[8, 3\], got \[9, 3\]"),
        (dict(up=torch.ones(2, 6)), ValueError, r"up must have shape .* = \[3, 6\], got \[2, 6\]"),
        (dict(index=torch.tensor([0, 1, 2, 9, 3, 4])), ValueError, r"index\[3\] = 9 is out of range; expected 0 to 8"),
        (dict(index=torch.ones(6)), TypeError, "index must have dtype torch.int64"),
        (dict(down=torch.ones(9, 3).long()), TypeError, "down must have a floating dtype"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    weight, index, down, up, _ = problem()
    with pytest.raises(error, match=message):
        selection_low_rank(**dict(weight=weight, index=index, down=down, up=up, side="input") | change)
