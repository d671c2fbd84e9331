"""channel_stats against a float64 loop over segments."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn

from red_kernels import channel_stats, reference

ALL = dict(squares=True, maximum=True)


def problem(batch=3, length=17, width=5, segments=4, dtype=torch.float32, seed=0, ordered=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(-1, segments, (batch, length), generator=g)
    ids[0, 0] = 0  # one token at least
    return x, in_order(ids) if ordered else ids, segments


def in_order(ids):
    """The same padding and the same segments, from the lowest to the highest."""
    valid = ids >= 0
    return ids.masked_scatter(valid, ids[valid].sort().values)


def by_loop(x, ids, segments, dtype):
    """Sums of |x| and of x², highest |x|, and counts."""
    x = x.to(dtype)
    none = x.new_zeros(1, x.shape[2])
    tokens = [x[ids == s].abs() if (ids == s).any() else none for s in range(segments)]
    sums = [torch.stack([sum(part.pow(power)) for part in tokens]) for power in (1, 2)]
    return *sums, torch.stack([part.amax(0) for part in tokens]), torch.tensor([(ids == s).sum() for s in range(segments)])


def check(x, ids, segments, function=channel_stats, **promise):
    rows = torch.arange(x.shape[0])[:, None].expand(x.shape[:2]) if ids is None else ids
    *truths, count = by_loop(x, rows, segments, torch.float64)
    *eagers, _ = by_loop(x, rows, segments, torch.float32)
    stats = function(x, ids, None if ids is None else segments, **ALL, **promise)
    for actual, truth, eager in zip((stats.abs_sum, stats.square_sum, stats.abs_max), truths, eagers, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual.cpu(), truth, eager)
    assert stats.count.dtype == torch.int64 and torch.equal(stats.count.cpu(), count)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("segmented", (True, False))
def test_matches_a_loop(dtype, segmented):
    x, ids, segments = problem(dtype=dtype)
    check(x, ids if segmented else None, segments if segmented else x.shape[0])


@drawn(
    16,
    batch=range(1, 5),
    length=ODD,
    width=(1, 3, 151),
    segments=range(1, 10),
    segmented=(False, True),
    ordered=(False, True),
    dtype=(torch.float32, torch.bfloat16),
    seed=range(1001),
)
def test_any_shape(batch, length, width, segments, segmented, ordered, dtype, seed):
    x, ids, segments = problem(batch, length, width, segments, dtype, seed, ordered)
    check(x, ids if segmented else None, segments if segmented else batch, ordered=ordered)


def test_many_tokens_accumulate_in_float32():
    """4096 ones: a bf16 sum would stop at 256."""
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    for ids in (None, torch.zeros(1, 4096, dtype=torch.int64)):
        stats = channel_stats(x, ids, squares=True)
        assert stats.abs_sum.eq(4096).all() and stats.square_sum.eq(4096).all()


def test_only_what_was_asked_for():
    x, ids, segments = problem()
    every = channel_stats(x, ids, segments, **ALL)
    for asked in ({}, dict(squares=True), dict(maximum=True)):
        stats = channel_stats(x, ids, segments, **asked)
        assert (stats.square_sum is not None, stats.abs_max is not None) == ("squares" in asked, "maximum" in asked)
        assert all(ours is None or torch.equal(ours, same) for ours, same in zip(stats, every, strict=True))


def test_order_changes_nothing_on_a_cpu():
    x, ids, segments = problem(ordered=True)
    given_ = channel_stats(x, ids, segments, **ALL)
    for ours, same in zip(channel_stats(x, ids, segments, **ALL, ordered=True), given_, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("segmented", (True, False))
def test_nan_spreads_as_in_amax(segmented):
    x, ids, segments = problem()
    x[0, 0, 1], x[0, 0, 2] = float("nan"), float("-inf")  # a token of segment 0
    stats = channel_stats(x, ids if segmented else None, segments if segmented else None, **ALL)
    for actual in (stats.abs_sum, stats.square_sum, stats.abs_max):
        assert actual.isnan().nonzero().tolist() == [[0, 1]] and actual.isinf().nonzero().tolist() == [[0, 2]]


def test_padding_is_exactly_nothing():
    x, ids, segments = problem()
    clean = channel_stats(x, ids, segments, **ALL)
    x[ids == -1] = float("nan")
    dirty = channel_stats(x, ids, segments, **ALL)
    assert (ids == -1).any() and all(torch.equal(ours, same) for ours, same in zip(dirty, clean, strict=True))


def test_empty_segments_and_a_batch_of_padding():
    x, ids, _ = problem()
    stats = channel_stats(x, ids, 9, **ALL)
    assert all(values[4:].eq(0).all() for values in stats)
    padding = torch.full_like(ids, -1)
    assert channel_stats(x, padding, **ALL).abs_max.shape == (0, 5)
    assert channel_stats(x, padding, 2).count.tolist() == [0, 0]
    for empty in (x[:, :0], x[:, :, :0]):
        assert [tuple(values.shape) for values in channel_stats(empty, **ALL)] == [(3, empty.shape[2]), (3,)] + 2 * [(3, empty.shape[2])]


def test_segments_are_counted_from_the_ids():
    x, ids, _ = problem()
    assert torch.equal(channel_stats(x, ids).abs_sum, channel_stats(x, ids, int(ids.max()) + 1).abs_sum)


def test_two_runs_agree_bit_for_bit():
    x, ids, segments = problem(4, 1000, 64)
    first = channel_stats(x, ids, segments)
    assert all(torch.equal(channel_stats(x, ids, segments).abs_sum, first.abs_sum) for _ in range(3))


def test_is_not_differentiable():
    x, ids, segments = problem()
    assert not channel_stats(x.requires_grad_(), ids, segments).abs_sum.requires_grad


def test_opcheck():
    x, ids, segments = problem()
    torch.library.opcheck(torch.ops.red.channel_stats.default, (x, ids, segments, False, False, False))
    torch.library.opcheck(torch.ops.red.channel_stats.default, (x, in_order(ids), segments, True, True, True))
    torch.library.opcheck(torch.ops.red.channel_stats.default, (x.bfloat16(), None, x.shape[0], False, True, False))


def test_compiles_whole():
    x, ids, segments = problem()
    function = compiled(channel_stats)
    for args, asked in (((x, ids, segments), {}), ((x,), {}), ((x, in_order(ids), segments), dict(**ALL, ordered=True))):
        actual, eager = function(*args, **asked), channel_stats(*args, **asked)
        assert all(ours is same is None or torch.equal(ours, same) for ours, same in zip(actual, eager, strict=True))


def replaced(position, change):
    """A mutation of one result."""
    return lambda run, args: tuple(change(value) if at == position else value for at, value in enumerate(run(*args)))


MUTATIONS = {
    "zero sum": replaced(0, torch.zeros_like),
    "zero count": replaced(1, torch.zeros_like),
    "zero squares": replaced(2, torch.zeros_like),
    "zero maximum": replaced(3, torch.zeros_like),
    "maximum of another segment": replaced(3, lambda highest: highest.flip(0)),
    "padding counted": lambda run, args: run(args[0], args[1].clamp(min=0), *args[2:]),
    "no absolute value": lambda run, args: (2 * run(args[0].clamp(min=0), *args[1:])[0] - run(*args)[0], *run(*args)[1:]),
    "last token forgotten": lambda run, args: run(args[0][:, :-1], args[1][:, :-1], *args[2:]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    given_ = problem()
    check(*given_)
    run = reference.channel_stats
    monkeypatch.setattr(reference, "channel_stats", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(*given_)


DECREASING = torch.tensor([2, -1, 1])[:, None].expand(3, 17)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.zeros(3, 17)), ValueError, r"x must have shape \[B, T, D\], got \[3, 17\]"),
        (dict(x=torch.zeros(3, 17, 5).int()), TypeError, "x must have a floating dtype"),
        (dict(segment_ids=torch.zeros(3, 16, dtype=torch.int64)), ValueError, "segment_ids must have shape"),
        (dict(segment_ids=torch.zeros(3, 17)), TypeError, "segment_ids must have dtype torch.int64"),
        (dict(segment_ids=torch.full((3, 17), 4)), ValueError, r"segment_ids\[0, 0\] = 4 is out of range; expected -1 to 3"),
        (dict(segment_ids=torch.full((3, 17), -2)), ValueError, r"= -2 is out of range"),
        (dict(segment_ids=DECREASING, ordered=True), ValueError, r"segment_ids\[2, 0\] = 1 comes after 2; ids that decrease need"),
        (dict(num_segments=-1), ValueError, "num_segments must not be negative"),
        (dict(segment_ids=None), ValueError, "num_segments=4 without segment_ids; every row is a segment, so it is 3"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    x, ids, segments = problem()
    with pytest.raises(error, match=message):
        channel_stats(**dict(x=x, segment_ids=ids, num_segments=segments) | change)
