"""gather_many against indexing in float64."""

import pytest
import torch
from op_truth import assert_near, compiled

from red_kernels import gather_many, reference


def problem(dtype=torch.float32, seed=0, shapes=((5, 9), (9, 7), (9, 9), (3, 9), (4, 9)), k=6):
    """Matrices; indices, dims and scales: readers, a writer, both sides, unsorted and repeating."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    tensors = [draw(*shape) for shape in shapes]
    dims = [1, 0, (0, 1), -1, (1, 0)][: len(shapes)]
    indices, scales = [], []
    for n, (x, dim) in enumerate(zip(tensors, dims, strict=True)):
        pair = [torch.randint(0, x.shape[each], (k + n,), generator=g) for each in (dim if isinstance(dim, tuple) else (dim,))]
        factors = [draw(k + n), None if n == 4 else draw(k + n)][: len(pair)]
        indices.append(tuple(pair) if isinstance(dim, tuple) else pair[0])
        scales.append(None if n == 3 else tuple(factors) if isinstance(dim, tuple) else factors[0])
    return tensors, indices, dims, scales


def one_by_one(tensors, indices, dims, scales=None):
    out = []
    for n, (y, index, dim) in enumerate(zip(tensors, indices, dims, strict=True)):
        scale = None if scales is None else scales[n]
        pair = dim if isinstance(dim, tuple) else (dim,)
        index = index if isinstance(dim, tuple) else (index,)
        scale = (None,) * len(pair) if scale is None else scale if isinstance(dim, tuple) else (scale,)
        for each, side, factor in zip(pair, index, scale, strict=True):
            y = y.index_select(each, side)
            y = y if factor is None else y * (factor[:, None] if each % 2 == 0 else factor).to(y.dtype)
        out.append(y)
    return out


def doubled(scales):
    return [None if s is None else tuple(None if t is None else t.double() for t in s) if isinstance(s, tuple) else s.double() for s in scales]


def check(tensors, indices, dims, scales):
    truth = one_by_one([x.double() for x in tensors], indices, dims, doubled(scales))
    eager = one_by_one(tensors, indices, dims, scales)
    for ours, true, other in zip(gather_many(tensors, indices, dims, scales), truth, eager, strict=True):
        assert_near(ours, true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_matches_indexing(dtype):
    check(*problem(dtype))


def test_without_scales_it_is_exact():
    tensors, indices, dims, _ = problem(torch.bfloat16)
    for ours, true in zip(gather_many(tensors, indices, dims), one_by_one(tensors, indices, dims), strict=True):
        assert torch.equal(ours, true) and ours.is_contiguous()
    assert gather_many([], [], []) == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    tensors, (reader, writer, pair, *_), *_ = problem(dtype)
    torch.library.opcheck(torch.ops.red.gather_many.default, (tensors[:3], [None, writer, pair[0]], [reader, None, pair[1]], [None] * 3, [None] * 3))
    torch.library.opcheck(torch.ops.red.gather_many.default, (tensors[:1], [None], [None], [torch.ones(5)], [None]))


def test_compiles_whole():
    given_ = problem()
    for ours, eager in zip(compiled(gather_many)(*given_), gather_many(*given_), strict=True):
        assert torch.equal(ours, eager)


MUTATIONS = {
    "zero output": lambda run, args: [torch.zeros_like(y) for y in run(*args)],
    "row scales ignored": lambda run, args: run(*args[:3], [None] * 5, args[4]),
    "column scales ignored": lambda run, args: run(*args[:4], [None] * 5),
    "last matrix zero": lambda run, args: [*run(*args)[:-1], torch.zeros_like(run(*args)[-1])],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    run = reference.gather_many
    monkeypatch.setattr(reference, "gather_many", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(*problem())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(indices=[torch.tensor([9])]), ValueError, r"indices\[0\]\[0\] = 9 is out of range; expected 0 to 8"),
        (dict(indices=[torch.tensor([1.0])]), TypeError, "index must have dtype torch.int64"),
        (dict(dims=[2]), ValueError, r"dims\[0\] = 2 is not a side of a matrix"),
        (dict(dims=[(1, -1)]), ValueError, r"dims\[0\] = \(1, -1\) is not a side"),
        (dict(dims=[(0, 1)], indices=[(torch.tensor([1]),)]), ValueError, "needs 2 indices and scales, got 1 and 2"),
        (dict(dims=[1, 1]), ValueError, "1 tensors, 1 indices, 2 dims, 1 scales; give one of each"),
        (dict(scales=[torch.ones(2)]), ValueError, r"scales\[0\] must have shape .* = \[1\], got \[2\]"),
        (dict(indices=[()], dims=[()]), ValueError, r"dims\[0\] = \(\) is not a side of a matrix"),
        (dict(tensors=[torch.ones(9)]), ValueError, r"tensors\[0\] must be a matrix, got shape \[9\]"),
        (dict(tensors=[torch.ones(2, 9).long()]), TypeError, r"tensors\[0\] must have a floating dtype"),
        (dict(tensors=[torch.ones(2, 9, requires_grad=True)]), ValueError, "requires a gradient, which gather_many does not make"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        gather_many(**dict(tensors=[torch.ones(4, 9)], indices=[torch.tensor([1])], dims=[1]) | change)
