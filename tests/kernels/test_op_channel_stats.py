"""channel_stats against a float64 loop over segments."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn

from red_kernels import channel_stats, reference


def problem(batch=3, length=17, width=5, segments=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(-1, segments, (batch, length), generator=g)
    ids[0, 0] = 0  # one token at least
    return x, ids, segments


def by_loop(x, ids, segments, dtype):
    x = x.to(dtype)
    sums = [torch.stack([token.abs() for token in x[ids == s]]).sum(0) if (ids == s).any() else x.new_zeros(x.shape[2]) for s in range(segments)]
    return torch.stack(sums), torch.tensor([(ids == s).sum() for s in range(segments)])


def check(x, ids, segments):
    rows = torch.arange(x.shape[0])[:, None].expand(x.shape[:2]) if ids is None else ids
    truth, count = by_loop(x, rows, segments, torch.float64)
    eager, _ = by_loop(x, rows, segments, torch.float32)
    stats = channel_stats(x, ids, None if ids is None else segments)
    assert stats.abs_sum.dtype == torch.float32 and stats.count.dtype == torch.int64
    assert_near(stats.abs_sum, truth, eager)
    assert torch.equal(stats.count, count)


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
    dtype=(torch.float32, torch.bfloat16),
    seed=range(1001),
)
def test_any_shape(batch, length, width, segments, segmented, dtype, seed):
    x, ids, segments = problem(batch, length, width, segments, dtype, seed)
    check(x, ids if segmented else None, segments if segmented else batch)


def test_many_tokens_accumulate_in_float32():
    """4096 ones: a bf16 sum would stop at 256."""
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    for ids in (None, torch.zeros(1, 4096, dtype=torch.int64)):
        assert channel_stats(x, ids).abs_sum.eq(4096).all()


def test_padding_is_exactly_nothing():
    x, ids, segments = problem()
    clean = channel_stats(x, ids, segments)
    x[ids == -1] = float("nan")
    dirty = channel_stats(x, ids, segments)
    assert (ids == -1).any() and torch.equal(dirty.abs_sum, clean.abs_sum) and torch.equal(dirty.count, clean.count)


def test_empty_segments_and_a_batch_of_padding():
    x, ids, _ = problem()
    stats = channel_stats(x, ids, 9)
    assert stats.abs_sum[4:].eq(0).all() and stats.count[4:].eq(0).all()
    padding = torch.full_like(ids, -1)
    assert channel_stats(x, padding).abs_sum.shape == (0, 5)
    assert channel_stats(x, padding, 2).count.tolist() == [0, 0]


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
    torch.library.opcheck(torch.ops.red.channel_stats.default, (x, ids, segments))
    torch.library.opcheck(torch.ops.red.channel_stats.default, (x.bfloat16(), None, x.shape[0]))


def test_compiles_whole():
    x, ids, segments = problem()
    function = compiled(channel_stats)
    for args in ((x, ids, segments), (x,)):
        actual, eager = function(*args), channel_stats(*args)
        assert torch.equal(actual.abs_sum, eager.abs_sum) and torch.equal(actual.count, eager.count)


MUTATIONS = {
    "zero sum": lambda run, args: (torch.zeros_like(run(*args)[0]), run(*args)[1]),
    "zero count": lambda run, args: (run(*args)[0], torch.zeros_like(run(*args)[1])),
    "padding counted": lambda run, args: run(args[0], args[1].clamp(min=0), args[2]),
    "no absolute value": lambda run, args: (run(args[0].clamp(min=0), *args[1:])[0] - run(args[0].clamp(max=0), *args[1:])[0], run(*args)[1]),
    "last token forgotten": lambda run, args: run(args[0][:, :-1], args[1][:, :-1], args[2]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    given_ = problem()
    check(*given_)
    run = reference.channel_stats
    monkeypatch.setattr(reference, "channel_stats", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(*given_)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.zeros(3, 17)), ValueError, r"x must have shape \[B, T, D\], got \[3, 17\]"),
        (dict(x=torch.zeros(3, 17, 5).int()), TypeError, "x must have a floating dtype"),
        (dict(segment_ids=torch.zeros(3, 16, dtype=torch.int64)), ValueError, "segment_ids must have shape"),
        (dict(segment_ids=torch.zeros(3, 17)), TypeError, "segment_ids must have dtype torch.int64"),
        (dict(segment_ids=torch.full((3, 17), 4)), ValueError, r"segment_ids\[0, 0\] = 4 is out of range; expected -1 to 3"),
        (dict(segment_ids=torch.full((3, 17), -2)), ValueError, r"= -2 is out of range"),
        (dict(num_segments=-1), ValueError, "num_segments must not be negative"),
        (dict(segment_ids=None), ValueError, "num_segments=4 without segment_ids; every row is a segment, so it is 3"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    x, ids, segments = problem()
    with pytest.raises(error, match=message):
        channel_stats(**dict(x=x, segment_ids=ids, num_segments=segments) | change)
