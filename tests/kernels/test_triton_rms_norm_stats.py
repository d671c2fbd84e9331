"""The Triton kernel of rms_norm_stats, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import drawn
from test_op_rms_norm_stats import FLOATS, check, padded_with, problem, replaced

pytest.importorskip("triton")
from red_kernels import rms_norm_stats
from red_kernels.triton import channel_stats as per_segment, launch, rms_norm_stats as kernels

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["rms_norm_stats"]]


def placed(device):
    """The op with its tensors moved to `device`."""
    return lambda **given_: rms_norm_stats(**{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given_.items()})


def check_on(device, given_, launches=LAUNCHES):
    for name in launches:
        with launch.forcing("rms_norm_stats", name):
            check(given_, placed(device))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("residual", "of"), ((True, "stream"), (False, "output")))
@pytest.mark.parametrize("kind", ("rows", "ordered", "unordered"))
def test_matches_float64(on_triton, dtype, residual, of, kind):
    check_on(on_triton, problem(2, 5, 151, dtype=dtype, residual=residual, segmented=kind != "rows", ordered=kind == "ordered") | dict(of=of))


@drawn(
    14,
    batch=range(1, 4),
    length=(1, 2, 3, 11),
    width=(2, 3, 17, 129, 668, 1025),
    segments=range(1, 10),
    ordered=(False, True),
    residual=(False, True),
    segmented=(False, True),
    dtype=(torch.float32, torch.bfloat16),
    seed=range(1001),
)
def test_any_shape(on_triton, batch, length, width, segments, ordered, residual, segmented, dtype, seed):
    check_on(on_triton, problem(batch, length, width, segments, dtype, seed, ordered, residual, segmented), LAUNCHES[:1])


def test_one_channel(on_triton):
    given_ = problem(2, 5, 1, residual=False)
    check_on(on_triton, given_ | dict(x=given_["x"].abs()))


@pytest.mark.parametrize("runs", ([(-1, 7), (0, 3), (2, 40), (-1, 30), (2, 5), (5, 1), (7, 9)], [(4, 1), (-1, 50), (4, 1), (-1, 20)]))
def test_segments_across_runs_and_tiles(on_triton, runs, monkeypatch):
    """Few programs of several tiles: segments longer than a tile, tiles of padding within one, segments without tokens between."""
    small = launch.Launch("small", dict(TILE=8, STAGES=1), num_warps=4096)  # of which a row of 9 channels gets one
    monkeypatch.setitem(launch.LAUNCHES, "rms_norm_stats", (small, small))
    monkeypatch.setattr(launch, "processors", lambda _: 1)
    given_ = problem(1, sum(length for _, length in runs), 9, segments=9)
    given_["segment_ids"] = torch.cat([torch.full((length,), segment) for segment, length in runs])[None]
    check_on(on_triton, given_, ["small"])


def test_the_last_program_may_have_fewer_tiles(on_triton, monkeypatch):
    """Three programs of nine tokens, and of seven, in tiles of eight: the tile that the last one lacks must not count as anything."""
    small = launch.Launch("small", dict(TILE=8, STAGES=1), num_warps=4096)
    monkeypatch.setitem(launch.LAUNCHES, "rms_norm_stats", (small, small))
    monkeypatch.setattr(launch, "processors", lambda _: 3)
    check_on(on_triton, problem(1, 25, 9, segments=3), ["small"])


def test_nan_spreads_over_its_row(on_triton):
    """To every channel's moments, as in the reference: the row's mean square is NaN. abs_sum knows the channel."""
    given_ = problem(1, 5, 9, segmented=False, residual=False)
    given_["x"][0, 3, 4] = float("nan")
    stats = placed(on_triton)(**given_)
    assert stats.mean_square.isnan().cpu().tolist() == [[False, False, False, True, False]]
    assert stats.output[0, 3].isnan().all() and stats.sum.isnan().all() and stats.square_sum.isnan().all()
    assert stats.abs_sum.isnan().sum() == 1 and stats.abs_sum[0, 4].isnan()


def test_strides(on_triton):
    """Rows apart, a last dimension that is not contiguous, and a weight and ids that are not."""
    given_ = problem(2, 4, 40)
    given_["weight"] = torch.stack([given_["weight"]] * 2, -1)[:, 0]
    given_["segment_ids"] = given_["segment_ids"].T.contiguous().T
    for other in (torch.zeros(2, 4, 97)[..., 13:53], torch.zeros(2, 40, 4).transpose(1, 2)):
        check_on(on_triton, given_ | dict(x=other.copy_(given_["x"])))
        check_on(on_triton, given_ | dict(residual=other))


@pytest.mark.parametrize("ordered", (False, True))
def test_padding_is_normalised_and_counted_nowhere(on_triton, ordered):
    given_, run = problem(2, 9, 40, ordered=ordered), placed(on_triton)
    clean, dirty, large = run(**given_), run(**padded_with(float("nan"), given_)), run(**padded_with(9.0, given_))
    padding = (given_["segment_ids"] < 0).to(on_triton)
    assert dirty.output[padding].isnan().all() and large.output[padding].isfinite().all()
    for name in ("abs_sum", "count", "sum", "square_sum"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name)) and torch.equal(getattr(large, name), getattr(clean, name))
    assert torch.equal(dirty.output[~padding], clean.output[~padding])


def test_rows_of_zeros_and_no_tokens(on_triton):
    given_ = problem(2, 5, residual=False)
    for zeros in (torch.zeros(2, 5, 5), torch.zeros(2, 0, 5)):
        stats = placed(on_triton)(**given_ | dict(x=zeros, segment_ids=given_["segment_ids"][:, : zeros.shape[1]]))
        assert all(getattr(stats, name).eq(0).all() for name in FLOATS) and stats.square_sum.shape == (5,)


def test_nothing_but_padding(on_triton):
    for ordered in (False, True):
        given_ = problem(2, 5, ordered=ordered)
        stats = placed(on_triton)(**given_ | dict(segment_ids=torch.full((2, 5), -1)))
        assert all(values.eq(0).all() for values in stats[3:]) and stats.output.isfinite().all()


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.float16))
def test_dtype_of_the_output(on_triton, weight_dtype):
    given_ = problem(2, 5, dtype=torch.bfloat16)
    given_["weight"] = given_["weight"].to(weight_dtype)
    assert placed(on_triton)(**given_).output.dtype == torch.float32
    check_on(on_triton, given_)


def test_wider_than_the_kernel_takes_the_reference(on_triton, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_CHANNELS", 4)
    monkeypatch.setattr(kernels, "rms_norm_stats_kernel", None)
    check_on(on_triton, problem(width=5))


def test_repeats_bit_for_bit(on_triton):
    given_ = problem(2, 9, 300)
    first, second = (placed(on_triton)(**given_) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows_but_the_second(parts):
    return (torch.arange(len(parts), device=parts.device) != 1)[:, None]


MUTATIONS = {
    **{
        f"zero {name}": (kernels, "rms_norm_stats", replaced(at, torch.zeros_like))
        for at, name in enumerate(("output", "stream", "mean square", "abs_sum", "count", "moments"))
    },
    "moments exchanged": (kernels, "rms_norm_stats", replaced(5, lambda moments: moments.flip(0))),
    "eps ignored": (kernels, "rms_norm_stats", lambda run, args: run(*args[:2], 0.0, *args[3:])),
    "of ignored": (kernels, "rms_norm_stats", lambda run, args: run(*args[:6], not args[6], args[7])),
    "padding counted": (kernels, "rms_norm_stats", lambda run, args: run(*args[:4], args[4].clamp(min=0), *args[5:])),
    "a part dropped": (per_segment, "finish", lambda run, args: run(args[0] * rows_but_the_second(args[0]), *args[1:])),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(on_triton, name, monkeypatch):
    given_ = problem(2, 5)
    check_on(on_triton, given_, ["direct"])
    module, target, mutation = MUTATIONS[name]
    run = getattr(module, target)
    monkeypatch.setattr(module, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check_on(on_triton, given_, ["direct"])
