"""The Triton kernels of channel_stats, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import ODD, drawn
from test_op_channel_stats import ALL, check, in_order, problem

pytest.importorskip("triton")
from red_kernels import channel_stats
from red_kernels.triton import channel_stats as kernels, launch

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["channel_stats"]]


def check_on(device, x, ids, segments, launches=LAUNCHES, **promise):
    def placed(x, ids, *args, **asked):
        return channel_stats(x.to(device), None if ids is None else ids.to(device), *args, **asked)

    for name in launches:
        with launch.forcing("channel_stats", name):
            check(x, ids, segments, placed, **promise)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("rows", "ordered", "unordered"))
def test_matches_a_loop(on_triton, dtype, kind):
    x, ids, segments = problem(3, 61, 151, 5, dtype, ordered=kind == "ordered")
    check_on(on_triton, x, None if kind == "rows" else ids, 3 if kind == "rows" else segments, ordered=kind == "ordered")


@drawn(
    16,
    batch=range(1, 5),
    length=ODD,
    width=(*ODD, 668, 1025),
    segments=(1, 2, 5, 9),
    ordered=(False, True),
    dtype=(torch.float32, torch.bfloat16),
    launches=[[name] for name in LAUNCHES],
    seed=range(1001),
)
def test_any_shape(on_triton, batch, length, width, segments, ordered, dtype, launches, seed):
    check_on(on_triton, *problem(batch, length, width, segments, dtype, seed, ordered), launches, ordered=ordered)


@pytest.mark.parametrize("runs", ([(-1, 70), (0, 3), (2, 200), (-1, 130), (2, 30), (5, 1), (7, 90)], [(4, 10), (-1, 128), (4, 1), (-1, 300)]))
def test_segments_across_tiles(on_triton, runs):
    """Segments longer than a tile, tiles of padding within one, segments without tokens before, between and after."""
    ids = torch.cat([torch.full((length,), segment) for segment, length in runs])[None]
    x = torch.randn(1, ids.shape[1], 9, generator=torch.Generator().manual_seed(0))
    check_on(on_triton, x, ids, 9, ordered=True)
    check_on(on_triton, x, ids.flip(1), 9, ["short"])


def test_strides(on_triton):
    """Rows apart, a last dimension that is not contiguous, and rows of a batch apart; ids of a transposed tensor."""
    x, ids, segments = problem(3, 9, 40)
    for other in (torch.zeros(3, 9, 97)[..., 13:53], torch.zeros(3, 40, 9).transpose(1, 2), torch.zeros(3, 20, 40)[:, 5:14]):
        check_on(on_triton, other.copy_(x), ids.T.contiguous().T, segments)
        check_on(on_triton, other, in_order(ids).T.contiguous().T, segments, ordered=True)


@pytest.mark.parametrize("ordered", (False, True))
def test_padding_is_not_read(on_triton, ordered):
    x, ids, segments = problem(3, 61, 40, ordered=ordered)
    clean = channel_stats(x.to(on_triton), ids.to(on_triton), segments, **ALL, ordered=ordered)
    x[ids == -1] = float("nan")
    dirty = channel_stats(x.to(on_triton), ids.to(on_triton), segments, **ALL, ordered=ordered)
    assert all(torch.equal(ours, same) for ours, same in zip(dirty, clean, strict=True))


@pytest.mark.parametrize("ordered", (False, True))
def test_nan_spreads_as_in_amax(on_triton, ordered):
    x, ids, segments = problem(3, 61, 40, ordered=ordered)
    x[0, 0, 1], x[0, 0, 2] = float("nan"), float("-inf")  # a token of segment 0
    stats = channel_stats(x.to(on_triton), ids.to(on_triton), segments, **ALL, ordered=ordered)
    for actual in (stats.abs_sum, stats.square_sum, stats.abs_max):
        assert actual.isnan().nonzero().tolist() == [[0, 1]] and actual.isinf().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("ordered", (False, True))
def test_no_valid_token_gives_zero(on_triton, ordered):
    for shape in ((3, 61, 20), (0, 5, 20), (2, 0, 20), (2, 5, 0)):
        x, ids = torch.randn(shape, device=on_triton), torch.full(shape[:2], -1, device=on_triton)
        for values in channel_stats(x, ids, 2, **ALL, ordered=ordered):
            assert values.shape[0] == 2 and values.eq(0).all()
    assert channel_stats(x, ids, 0).abs_sum.shape == (0, 0)


def test_an_id_out_of_range_is_padding(on_triton):
    """No error on a GPU, but no write beyond a buffer either: the check of the values is a CPU's, and passed by here."""
    x, ids, segments = problem(3, 61, 40, ordered=True)
    x, beyond = x.to(on_triton), torch.where(ids < 0, segments + 1000, ids).to(on_triton)
    given_ = channel_stats(x, ids.to(on_triton), segments, **ALL, ordered=True)
    for ours, same in zip(kernels.channel_stats(x, beyond, segments, True, True, True), given_, strict=True):
        assert torch.equal(ours, same)


def test_only_what_was_asked_for(on_triton):
    x, ids, segments = problem(3, 61, 40, ordered=True)
    x, ids = x.to(on_triton), ids.to(on_triton)
    every = channel_stats(x, ids, segments, **ALL, ordered=True)
    for asked in ({}, dict(squares=True), dict(maximum=True)):
        stats = channel_stats(x, ids, segments, **asked, ordered=True)
        assert (stats.square_sum is not None, stats.abs_max is not None) == ("squares" in asked, "maximum" in asked)
        assert all(ours is None or torch.equal(ours, same) for ours, same in zip(stats, every, strict=True))


def test_segments_of_many_tiles(on_triton):
    """More tiles than the second launch looks through, or adds, at a time: segment 0 is in tiles 0 … 279, segment 1 in 280 … 299."""
    parts, held = torch.rand(302, 5, device=on_triton), torch.ones(302, dtype=torch.int32, device=on_triton)
    first = (torch.arange(300, device=on_triton) >= 280).int()
    abs_sum, count, *_ = kernels.finish(parts, None, None, held, first, first, 2)
    assert count.tolist() == [280, 20]
    torch.testing.assert_close(abs_sum, torch.stack([parts[:280].sum(0), parts[281:301].sum(0)]))


def test_repeats_bit_for_bit(on_triton):
    x, ids, segments = problem(2, 70, 300)
    for promise, order in ((True, in_order(ids)), (False, ids)):
        first, second = (channel_stats(x.to(on_triton), order.to(on_triton), segments, **ALL, ordered=promise) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def replaced(position, change):
    """A mutation of one result."""
    return lambda run, args: tuple(change(value) if at == position else value for at, value in enumerate(run(*args)))


MUTATIONS = {
    "zero sum": ("finish", replaced(0, torch.zeros_like)),
    "zero count": ("finish", replaced(1, torch.zeros_like)),
    "zero squares": ("finish", replaced(2, torch.zeros_like)),
    "zero maximum": ("finish", replaced(3, torch.zeros_like)),
    "padding counted": ("channel_stats", lambda run, args: run(args[0], args[1].clamp(min=0), *args[2:])),
    "a part dropped": ("finish", lambda run, args: run(args[0] * (torch.arange(len(args[0]), device=args[0].device) != 1)[:, None], *args[1:])),
    "last channel dropped": ("finish", lambda run, args: run(args[0] * (torch.arange(40, device=args[0].device) < 39), *args[1:])),
    "unordered ids not sorted": ("channel_stats", lambda run, args: run(*args[:5], True)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(on_triton, name, monkeypatch):
    given_ = problem(3, 61, 40)
    check_on(on_triton, *given_, ["short"])
    target, mutation = MUTATIONS[name]
    run = getattr(kernels, target)
    monkeypatch.setattr(kernels, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check_on(on_triton, *given_, ["short"])
