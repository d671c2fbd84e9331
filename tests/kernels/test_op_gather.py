"""gather against a product with the one-hot matrix that it stands for."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn, leaf

from red_kernels import gather, inverse_index, reference


def problem(shape=(4, 9), dim=-1, k=6, dtype=torch.float32, seed=0, repeat=False):
    """x, index [k] (each channel once unless `repeat`), scale [k], and a gradient for the output."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    width = shape[dim]
    index = torch.randint(0, width, (k,), generator=g) if repeat or k > width else torch.randperm(width, generator=g)[:k]
    out = list(shape)
    out[dim] = k
    return draw(*shape), index, draw(k), draw(*out)


def dense(x, index, dim=-1, scale=None):
    """x @ H along `dim`, H [D, k] with scaled standard basis vectors as columns."""
    selection = torch.nn.functional.one_hot(index, x.shape[dim]).T.to(x.dtype)
    if scale is not None:
        selection = selection * scale.to(x.dtype)
    return (x.movedim(dim, -1) @ selection).movedim(-1, dim)


def value_and_gradients(function, x, index, dim, scale, grad):
    x, scale = leaf(x), None if scale is None else leaf(scale)
    y = function(x, index, dim, scale)
    y.backward(grad)
    return [y.detach(), x.grad] + ([] if scale is None else [scale.grad])


def check(x, index, dim, scale, grad):
    double = [None if t is None else t.double() for t in (scale, grad)]
    truth = value_and_gradients(dense, x.double(), index, dim, *double)
    eager = value_and_gradients(dense, x, index, dim, scale, grad)
    for ours, true, other in zip(value_and_gradients(gather, x, index, dim, scale, grad), truth, eager, strict=True):
        assert_near(ours, true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("dim", (-1, 0, 1))
@pytest.mark.parametrize("repeat", (True, False))
def test_matches_the_one_hot_product(dtype, scaled, dim, repeat):
    x, index, scale, grad = problem((5, 4, 9), dim, 4, dtype, repeat=repeat)
    check(x, index, dim, scale if scaled else None, grad)


@drawn(
    16,
    shape=[(n,) for n in ODD] + [(n, m) for n in ODD for m in ODD],
    k=(1, 2, 37),
    dim=range(-2, 2),
    scaled=(False, True),
    seed=range(1001),
)
def test_any_shape(shape, k, dim, scaled, seed):
    dim = max(-len(shape), min(dim, len(shape) - 1))
    x, index, scale, grad = problem(shape, dim, k, seed=seed)
    check(x, index, dim, scale if scaled else None, grad)


def test_a_selection_is_exact_and_other_channels_are_not_read():
    x, index, _, grad = problem(dtype=torch.bfloat16)
    x[:, sorted(set(range(9)) - set(index.tolist()))] = float("nan")
    y, grad_x = value_and_gradients(gather, x, index, -1, None, grad)
    assert torch.equal(y, x[:, index]) and torch.equal(grad_x[:, index], grad) and grad_x.isfinite().all()


def test_float32_scale_of_bf16_channels():
    x, index, scale, grad = problem(dtype=torch.bfloat16)
    scale = scale.float()
    y, grad_x, grad_scale = value_and_gradients(gather, x, index, -1, scale, grad)
    assert (y.dtype, grad_x.dtype, grad_scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    check(x, index, -1, scale, grad)


def test_repeated_channels_accumulate_in_float32():
    """256 ones and then 64 halves: in bf16 the halves would all be rounded away."""
    x, index = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True), torch.zeros(320, dtype=torch.int64)
    gather(x, index).backward(torch.cat([torch.ones(256), torch.full((64,), 0.5)]).bfloat16()[None])
    assert x.grad.item() == 288.0


def test_inverse_index():
    index = torch.tensor([3, 0, 4])
    assert inverse_index(index, 6).tolist() == [1, -1, -1, 0, 2, -1]
    assert inverse_index(index[:0], 2).tolist() == [-1, -1]


@pytest.mark.parametrize("dim", (-1, 0))
def test_an_inverse_changes_nothing(dim):
    x, index, scale, grad = problem((9, 9), dim, 6)
    inverse = inverse_index(index, 9)
    with_it = value_and_gradients(lambda *args: gather(*args, inverse), x, index, dim, scale, grad)
    for ours, same in zip(with_it, value_and_gradients(gather, x, index, dim, scale, grad), strict=True):
        assert torch.equal(ours, same)


def test_noncontiguous_input_and_no_channels():
    x, index, scale, _ = problem((9, 4), 0)
    assert torch.equal(gather(x.T, index, -1, scale), gather(x.T.contiguous(), index, -1, scale))
    assert gather(x, index[:0], 0).shape == (0, 4)


@pytest.mark.parametrize("repeat", (True, False))
def test_gradcheck_twice(repeat):
    x, index, scale, _ = problem((2, 5, 3), 1, 4, torch.float64, repeat=repeat)
    inputs = leaf(x), leaf(scale)
    assert torch.autograd.gradcheck(lambda x, s: gather(x, index, 1, s), inputs)
    assert torch.autograd.gradgradcheck(lambda x, s: gather(x, index, 1, s), inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    x, index, scale, _ = problem(dtype=dtype)
    for args in ((leaf(x), index, 1, leaf(scale)), (leaf(x), index, 1, None), (x, index, 1, leaf(scale)), (x, index, 1, scale)):
        torch.library.opcheck(torch.ops.red.gather.default, args)
        torch.library.opcheck(torch.ops.red.gather.default, (*args, inverse_index(index, 9)))


def test_opcheck_of_the_gradients():
    x, index, scale, grad = problem()
    torch.library.opcheck(torch.ops.red.gather_backward.default, (leaf(grad), index, 1, leaf(scale), 9, inverse_index(index, 9)))
    torch.library.opcheck(torch.ops.red.gather_backward.default, (leaf(grad), index, 1, None, 9, None))
    torch.library.opcheck(torch.ops.red.gather_scale_backward.default, (leaf(grad), leaf(x), index, 1))


def test_compiles_whole():
    x, index, scale, grad = problem()
    function = compiled(gather)
    for each in (scale, None):
        actual = value_and_gradients(function, x, index, -1, each, grad)
        for ours, eager in zip(actual, value_and_gradients(gather, x, index, -1, each, grad), strict=True):
            torch.testing.assert_close(ours, eager)


MUTATIONS = {
    "zero output": ("gather", lambda run, args: torch.zeros_like(run(*args))),
    "zero dx": ("gather_backward", lambda run, args: torch.zeros_like(run(*args))),
    "zero dscale": ("gather_scale_backward", lambda run, args: torch.zeros_like(run(*args))),
    "scale ignored": ("gather", lambda run, args: run(*args[:3], None)),
    "scale ignored backward": ("gather_backward", lambda run, args: run(*args[:3], None, *args[4:])),
    "first channels": ("gather", lambda run, args: run(args[0], torch.arange(6), *args[2:])),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    x, index, scale, grad = problem()
    check(x, index, -1, scale, grad)
    target, mutation = MUTATIONS[name]
    run = getattr(reference, target)
    monkeypatch.setattr(reference, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(x, index, -1, scale, grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(index=torch.tensor([0, 9])), ValueError, r"index\[1\] = 9 is out of range; expected 0 to 8"),
        (dict(index=torch.tensor([-1])), ValueError, r"index\[0\] = -1 "),
        (dict(index=torch.tensor([0.0])), TypeError, "index must have dtype torch.int64"),
        (dict(index=torch.zeros(2, 2, dtype=torch.int64)), ValueError, "index must be one-dimensional"),
        (dict(dim=2), ValueError, r"dim=2 is out of range for x of shape \[4, 9\]"),
        (dict(scale=torch.ones(5)), ValueError, r"scale must have shape .* = \[6\], got \[5\]"),
        (dict(scale=torch.ones(6).long()), TypeError, "scale must have a floating dtype"),
        (dict(x=torch.ones(4, 9).long()), TypeError, "x must have a floating dtype"),
        (dict(inverse=torch.zeros(9)), TypeError, "inverse must have dtype torch.int64"),
        (dict(inverse=torch.zeros(8).long()), ValueError, r"inverse must have shape .* = \[9\], got \[8\]"),
        (dict(index=torch.tensor([2, 5]), inverse=torch.full((9,), -1)), ValueError, r"inverse\[2\] = -1, expected 0; make it with inverse_index"),
        (dict(index=torch.tensor([2]), inverse=torch.zeros(9).long()), ValueError, "inverse has 9 entries other than -1, expected 1"),
        (dict(index=torch.tensor([2, 2]), inverse=torch.zeros(9).long()), ValueError, "index has 2 twice, which has no inverse"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    x, index, scale, _ = problem()
    with pytest.raises(error, match=message):
        gather(**dict(x=x, index=index) | change)


def test_errors_of_inverse_index():
    with pytest.raises(ValueError, match="inverse_index: index has 4 twice, which has no inverse"):
        inverse_index(torch.tensor([1, 4, 4]), 9)
    with pytest.raises(ValueError, match=r"inverse_index: index\[1\] = 9 is out of range; expected 0 to 8"):
        inverse_index(torch.tensor([1, 9]), 9)
