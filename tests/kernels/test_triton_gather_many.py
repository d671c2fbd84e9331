"""The Triton kernel of gather_many, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import assert_near, drawn
from test_op_gather_many import doubled, one_by_one, problem

pytest.importorskip("triton")
from red_kernels import gather_many
from red_kernels.triton import gather_many as kernels, launch

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["gather_many"]]


def placed(values, device):
    if isinstance(values, torch.Tensor):
        return values.to(device)
    return type(values)(placed(value, device) for value in values) if isinstance(values, (list, tuple)) else values


def check(device, tensors, indices, dims, scales, launches=LAUNCHES):
    truth = one_by_one([x.double() for x in tensors], indices, dims, doubled(scales))
    eager = one_by_one(tensors, indices, dims, scales)
    for name in launches:
        with launch.forcing("gather_many", name):
            actual = gather_many(*(placed(each, device) for each in (tensors, indices, dims, scales)))
        for ours, true, other in zip(actual, truth, eager, strict=True):
            assert_near(ours.cpu(), true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_matches_indexing(on_triton, dtype):
    check(on_triton, *problem(dtype))


@drawn(
    8,
    shapes=(((1, 1),), ((129, 2), (3, 600)), ((17, 70), (5, 3), (2, 530)), ((1, 1003), (65, 1), (9, 9), (33, 129), (7, 8))),
    k=(1, 2, 40, 520),
    dtype=(torch.float32, torch.bfloat16),
    seed=range(1001),
)
def test_any_shape(on_triton, shapes, k, dtype, seed):
    check(on_triton, *problem(dtype, seed, shapes, k), launches=LAUNCHES[:1])


def test_more_matrices_than_a_launch_takes_and_empty_ones(on_triton):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n % 5, 9, generator=g) for n in range(2 * kernels.GROUP + 3)]
    index = torch.tensor([4, 0])
    ours = gather_many(placed(tensors, on_triton), [index.to(on_triton)] * len(tensors), [1] * len(tensors))
    for y, x in zip(ours, tensors, strict=True):
        assert torch.equal(y.cpu(), x[:, index])
    assert gather_many([tensors[1].to(on_triton)], [index[:0].to(on_triton)], [1])[0].shape == (1, 0)


def test_strides_and_mixed_dtypes(on_triton):
    tensors, indices, dims, scales = problem()
    tensors[0] = torch.zeros(5, 40)[:, 3:12].copy_(tensors[0])
    tensors[1] = tensors[1].T.contiguous().T
    tensors[2] = tensors[2].bfloat16()
    check(on_triton, tensors, indices, dims, scales)


def test_a_selection_is_exact_and_what_it_leaves_out_is_not_read(on_triton):
    x = torch.randn(9, 9).bfloat16()
    x[2], x[:, 5] = float("nan"), float("inf")
    rows, columns = torch.tensor([0, 8, 1]), torch.tensor([8, 0, 4, 6])
    y, = gather_many([x.to(on_triton)], [placed((rows, columns), on_triton)], [(0, 1)])  # fmt: skip
    assert torch.equal(y.cpu(), x[rows][:, columns]) and y.isfinite().all()


MUTATIONS = {
    "zero output": lambda run, args: [torch.zeros_like(y) for y in run(*args)],
    "row scales ignored": lambda run, args: run(*args[:3], [None] * 5, args[4]),
    "column scales ignored": lambda run, args: run(*args[:4], [None] * 5),
    "last matrix zero": lambda run, args: [*run(*args)[:-1], torch.zeros_like(run(*args)[-1])],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(on_triton, name, monkeypatch):
    run = kernels.gather_many
    monkeypatch.setattr(kernels, "gather_many", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(on_triton, *problem(), launches=LAUNCHES[:1])
