"""The Triton kernels of gather, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import ODD, assert_near, drawn
from test_op_gather import dense, problem, value_and_gradients

pytest.importorskip("triton")
from red_kernels import gather, inverse_index
from red_kernels.triton import gather as kernels, gather_sums, launch

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["gather"]]


def check(device, x, index, dim, scale, grad, inverse=False, launches=LAUNCHES):
    double = [None if t is None else t.double() for t in (scale, grad)]
    truth = value_and_gradients(dense, x.double(), index, dim, *double)
    eager = value_and_gradients(dense, x, index, dim, scale, grad)
    placed = [t.to(device) if isinstance(t, torch.Tensor) else t for t in (x, index, dim, scale, grad)]
    other_way = inverse_index(index, x.shape[dim]).to(device) if inverse else None
    for name in launches:
        with launch.forcing("gather", name):
            actual = value_and_gradients(lambda *args: gather(*args, other_way), *placed)
        for ours, true, other in zip(actual, truth, eager, strict=True):
            assert_near(ours.cpu(), true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("dim", (-1, 0, 1))
@pytest.mark.parametrize("way", ("repeats", "sorted", "inverse"))
def test_matches_the_one_hot_product(on_triton, dtype, scaled, dim, way):
    x, index, scale, grad = problem((5, 4, 9), dim, 4, dtype, repeat=way == "repeats")
    check(on_triton, x, index, dim, scale if scaled else None, grad, inverse=way == "inverse")


@drawn(
    8,
    shape=[(n,) for n in ODD] + [(n, m) for n in ODD for m in (*ODD, 300)] + [(2, 3, 40), (3, 33, 2), (2, 2, 3, 5)],
    k=(1, 2, 37),
    dim=range(-3, 3),
    scaled=(False, True),
    seed=range(1001),
)
def test_any_shape(on_triton, shape, k, dim, scaled, seed):
    dim = max(-len(shape), min(dim, len(shape) - 1))
    x, index, scale, grad = problem(shape, dim, k, seed=seed)
    check(on_triton, x, index, dim, scale if scaled else None, grad, inverse=k <= shape[dim])


@pytest.mark.parametrize(("shape", "dim", "k"), (((9, 1100), -1, 530), ((11, 1030), 0, 5)))
def test_more_rows_and_columns_than_a_program_takes(on_triton, shape, dim, k):
    x, index, scale, grad = problem(shape, dim, k, torch.bfloat16)
    for inverse in (False, True):
        check(on_triton, x, index, dim, scale.float(), grad, inverse, launches=LAUNCHES[:2])


@pytest.mark.parametrize("dim", (-1, 1, 0))
def test_strides(on_triton, dim):
    """Rows apart, a last dimension that is not contiguous, and a gradient that is one number everywhere."""
    x, index, scale, grad = problem((3, 7, 11), dim, 3)
    apart = torch.zeros(3, 9, 40)[:, 1:8, 5:16]
    turned = torch.zeros(3, 11, 7).transpose(1, 2)
    for other in (apart, turned):
        check(on_triton, other.copy_(x), index, dim, scale, grad, inverse=True, launches=LAUNCHES[:2])
    check(on_triton, x, index, dim, scale, torch.ones(()).expand_as(grad), inverse=True, launches=LAUNCHES[:2])


@pytest.mark.parametrize("dim", (-1, 0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_selection_is_exact_and_other_channels_are_not_read(on_triton, dim, dtype):
    x, index, _, grad = problem((9, 9), dim, 6, dtype)
    left_out = sorted(set(range(9)) - set(index.tolist()))
    x.movedim(dim, 0)[left_out] = float("nan")
    inverse = inverse_index(index, 9).to(on_triton)
    for way in (None, inverse):
        placed = x.to(on_triton), index.to(on_triton), dim, None, grad.to(on_triton)
        y, grad_x = value_and_gradients(lambda *args: gather(*args, way), *placed)  # noqa: B023
        assert torch.equal(y.cpu(), x.index_select(dim, index))
        assert torch.equal(grad_x.cpu().index_select(dim, index), grad) and grad_x.isfinite().all()
        assert grad_x.cpu().movedim(dim, 0)[left_out].eq(0).all()


def test_the_sum_of_many_shares(on_triton):
    """More shares of the scale's gradient than the last launch adds at a time."""
    partial, out = torch.rand(40, 70, device=on_triton), torch.empty(70, device=on_triton)
    gather_sums.gather_scale_finish_kernel[(2,)](partial, out, 40, 70, SHARES=16, COLUMNS=64, num_warps=4)
    torch.testing.assert_close(out, partial.sum(0))


def test_repeated_channels_accumulate_in_float32(on_triton):
    """256 ones and then 64 halves: in bf16 the halves would all be rounded away."""
    x, index = torch.zeros(1, 1, dtype=torch.bfloat16, device=on_triton, requires_grad=True), torch.zeros(320, dtype=torch.int64, device=on_triton)
    gather(x, index).backward(torch.cat([torch.ones(256), torch.full((64,), 0.5)]).bfloat16()[None].to(on_triton))
    assert x.grad.item() == 288.0


@pytest.mark.parametrize("shape", ((0, 5), (3, 0, 4), (3, 5)))
def test_nothing_to_do(on_triton, shape):
    x, index = torch.ones(shape, device=on_triton, requires_grad=True), torch.zeros(0, dtype=torch.int64, device=on_triton)
    scale = torch.ones(0, device=on_triton, requires_grad=True)
    for dim in range(len(shape)):
        y = gather(x, index, dim, scale)
        gradients = torch.autograd.grad(y, (x, scale), torch.ones_like(y))
        assert y.numel() == 0 and gradients[0].eq(0).all() and gradients[0].shape == x.shape and gradients[1].shape == (0,)
    if shape == (0, 5):
        scale = torch.ones(2, device=on_triton, requires_grad=True)
        gather(x, torch.tensor([3, 1], device=on_triton), -1, scale).sum().backward()
        assert scale.grad.eq(0).all()


@pytest.mark.parametrize("dim", (-1, 0))
def test_repeats_bit_for_bit(on_triton, dim):
    given_ = [t.to(on_triton) if isinstance(t, torch.Tensor) else t for t in problem((23, 130), dim, 60, repeat=True)]
    first, second = (value_and_gradients(gather, given_[0], given_[1], dim, given_[2], given_[3]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives(on_triton):
    """The gradients are ops with gradients: of every pair of inputs, against dense autograd."""
    x, index, scale, grad = (t.to(on_triton) for t in problem((3, 9), -1, 5, repeat=True))

    def second(function):
        inputs = [t.detach().requires_grad_() for t in (x, scale, grad)]
        first = torch.autograd.grad(function(inputs[0], index, -1, inputs[1]), inputs[:2], inputs[2], create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), inputs)

    for ours, true in zip(second(gather), second(dense), strict=True):
        assert true.norm() > 0
        torch.testing.assert_close(ours, true)


MUTATIONS = {
    "zero output": ("gather", lambda run, args: torch.zeros_like(run(*args))),
    "zero dx": ("gather_backward", lambda run, args: torch.zeros_like(run(*args))),
    "zero dscale": ("gather_scale_backward", lambda run, args: torch.zeros_like(run(*args))),
    "scale ignored": ("gather", lambda run, args: run(*args[:3], None)),
    "scale ignored backward": ("gather_backward", lambda run, args: run(*args[:3], None, *args[4:])),
    "scale of another channel": ("gather_backward", lambda run, args: run(*args[:3], args[3].roll(1), *args[4:])),
    "last row dropped": ("gather", lambda run, args: run(*args) * (torch.arange(4, device=args[0].device) < 3)[:, None]),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("inverse", (True, False))
def test_mutations_are_caught(on_triton, name, inverse, monkeypatch):
    x, index, scale, grad = problem()
    check(on_triton, x, index, -1, scale, grad, inverse, launches=LAUNCHES[:1])
    target, mutation = MUTATIONS[name]
    run = getattr(kernels, target)
    monkeypatch.setattr(kernels, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(on_triton, x, index, -1, scale, grad, inverse, launches=LAUNCHES[:1])
