"""rms_norm_stats against float64, and against transformers' norm bit for bit."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn
from test_op_channel_stats import by_loop, in_order

from red_kernels import channel_stats, reference, rms_norm_stats

EPS = 1e-3  # large enough that a forgotten one shows
FLOATS = ("output", "stream", "mean_square", "abs_sum", "sum", "square_sum")


def problem(batch=3, length=17, width=5, segments=4, dtype=torch.float32, seed=0, ordered=True, residual=True, segmented=True):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    ids = torch.randint(-1, segments, (batch, length), generator=g)
    ids[0, 0] = 0  # one token at least
    given_ = dict(x=draw(batch, length, width), weight=draw(width) + 1, eps=EPS, of=("stream", "output")[seed % 2])
    given_ |= dict(residual=draw(batch, length, width)) if residual else {}
    return given_ | (dict(segment_ids=in_order(ids) if ordered else ids, num_segments=segments, ordered=ordered) if segmented else {})


def by_hand(x, weight, eps, of, residual=None, segment_ids=None, num_segments=None, ordered=False, dtype=torch.float32):
    """All results in `dtype`, from inputs that are in it; the rounded stream is given as x."""
    x, weight = x.to(dtype), weight.to(dtype)
    mean_square = x.square().mean(-1)
    output = weight * (x / (mean_square + eps).sqrt()[..., None])
    ids = torch.arange(x.shape[0])[:, None].expand(x.shape[:2]) if segment_ids is None else segment_ids
    abs_sum, _, _, count = by_loop(x if of == "stream" else output, ids, num_segments or x.shape[0], dtype)
    z = x[ids >= 0] / mean_square[ids >= 0].clamp(min=1e-30).sqrt()[:, None]
    return dict(output=output, stream=x, mean_square=mean_square, abs_sum=abs_sum, count=count, sum=z.sum(0), square_sum=z.square().sum(0))


def check(given_, function=rms_norm_stats):
    actual = function(**given_)
    stream = given_["x"] if given_.get("residual") is None else given_["x"] + given_["residual"]
    truth = by_hand(**given_ | dict(x=stream), dtype=torch.float64)
    eager = by_hand(**given_ | dict(x=stream), dtype=torch.promote_types(stream.dtype, torch.float32))
    if given_["of"] == "output":  # what is measured is what the model gets, rounded: summed in float64, for the truth of the sum
        ids = given_.get("segment_ids")
        rows = torch.arange(stream.shape[0])[:, None].expand(stream.shape[:2]) if ids is None else ids
        truth["abs_sum"] = by_loop(actual.output.cpu(), rows, len(truth["abs_sum"]), torch.float64)[0]
        eager["abs_sum"] = truth["abs_sum"].float()
    eager["output"] = reference_output(stream, given_["weight"])
    assert torch.equal(actual.stream.cpu(), stream) and torch.equal(actual.count.cpu(), truth["count"])
    for name in FLOATS:
        assert_near(getattr(actual, name).cpu(), truth[name], eager[name])


def reference_output(stream, weight, eps=EPS):
    up = stream.float()
    return weight * (up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + eps)).to(stream.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("of", ("stream", "output"))
def test_matches_float64(dtype, residual, of):
    for segmented, ordered in ((False, False), (True, False), (True, True)):
        check(problem(dtype=dtype, residual=residual, segmented=segmented, ordered=ordered) | dict(of=of))


@drawn(
    16,
    batch=range(1, 5),
    length=ODD,
    width=(*ODD[1:], 668),
    segments=range(1, 10),
    ordered=(False, True),
    residual=(False, True),
    segmented=(False, True),
    dtype=(torch.float32, torch.bfloat16),
    seed=range(1001),
)
def test_any_shape(batch, length, width, segments, ordered, residual, segmented, dtype, seed):
    check(problem(batch, length, width, segments, dtype, seed, ordered, residual, segmented))


@pytest.mark.parametrize(
    "dtypes", ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
)
def test_is_the_norm_of_transformers_bit_for_bit(dtypes):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    given_ = problem(4, 33, 668, dtype=dtypes[0])
    norm = LlamaRMSNorm(668, EPS).to(dtypes[1])
    norm.weight.data.copy_(given_["weight"])
    given_["weight"] = norm.weight
    stats = rms_norm_stats(**given_)
    stream = given_["x"] + given_["residual"]
    assert torch.equal(stats.output, norm(stream)) and torch.equal(stats.stream, stream) and not stats.output.requires_grad


def test_one_channel():
    """z is 1 or -1, so the channel must have a sign, or its sum can be zero."""
    given_ = problem(width=1, residual=False)
    check(given_ | dict(x=given_["x"].abs()))


def test_abs_sum_is_that_of_channel_stats():
    given_ = problem()
    ids = given_["segment_ids"], given_["num_segments"]
    for of in ("stream", "output"):
        stats = rms_norm_stats(**given_ | dict(of=of))
        other = channel_stats(getattr(stats, of), *ids)
        assert torch.equal(stats.abs_sum, other.abs_sum) and torch.equal(stats.count, other.count)


def test_without_a_residual_the_stream_is_x_itself():
    given_ = problem(residual=False)
    assert rms_norm_stats(**given_).stream.data_ptr() == given_["x"].data_ptr()


def padded_with(value, given_):
    x = given_["x"].clone()
    x[given_["segment_ids"] < 0] = value
    return given_ | dict(x=x)


def test_padding_is_normalised_and_counted_nowhere():
    given_ = problem(ordered=False)
    clean, dirty, large = rms_norm_stats(**given_), rms_norm_stats(**padded_with(float("nan"), given_)), rms_norm_stats(**padded_with(9.0, given_))
    padding = given_["segment_ids"] < 0
    assert padding.any() and dirty.output[padding].isnan().all() and large.output[padding].isfinite().all()
    for name in ("abs_sum", "count", "sum", "square_sum"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name)) and torch.equal(getattr(large, name), getattr(clean, name))
    assert torch.equal(dirty.output[~padding], clean.output[~padding])


def test_rows_of_zeros_and_no_tokens():
    given_ = problem(residual=False)
    for zeros in (torch.zeros(3, 17, 5), torch.zeros(3, 0, 5)):
        stats = rms_norm_stats(**given_ | dict(x=zeros, segment_ids=given_["segment_ids"][:, : zeros.shape[1]]))
        assert all(getattr(stats, name).eq(0).all() for name in FLOATS) and stats.square_sum.shape == (5,)


def test_is_not_differentiable():
    given_ = problem(residual=False)
    stats = rms_norm_stats(**given_ | dict(x=given_["x"].clone().requires_grad_()))
    assert not any(values.requires_grad for values in stats)


def test_opcheck():
    for given_ in (problem(), problem(dtype=torch.bfloat16, residual=False, segmented=False)):
        args = [given_.get(name) for name in ("x", "weight", "eps", "residual", "segment_ids")]
        torch.library.opcheck(torch.ops.red.rms_norm_stats.default, (*args, given_.get("num_segments", 3), given_["of"] == "output", True))


def test_compiles_whole():
    function = compiled(rms_norm_stats)
    for given_ in (problem(), problem(residual=False, ordered=False), problem(segmented=False)):
        for ours, eager in zip(function(**given_), rms_norm_stats(**given_), strict=True):
            assert torch.equal(ours, eager)


def replaced(position, change):
    """A mutation of one result."""
    return lambda run, args: tuple(change(value) if at == position else value for at, value in enumerate(run(*args)))


MUTATIONS = {
    **{f"zero {name}": replaced(at, torch.zeros_like) for at, name in enumerate(("output", "stream", "mean square", "abs_sum", "count", "moments"))},
    "moments exchanged": replaced(5, lambda moments: moments.flip(0).clone()),
    "residual ignored": lambda run, args: run(*args[:3], torch.zeros_like(args[0]), *args[4:]),
    "eps ignored": lambda run, args: run(*args[:2], 0.0, *args[3:]),
    "weight ignored": lambda run, args: run(args[0], torch.ones_like(args[1]), *args[2:]),
    "of ignored": lambda run, args: run(*args[:6], not args[6], args[7]),
    "padding counted": lambda run, args: run(*args[:4], args[4].clamp(min=0), *args[5:]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    given_ = problem(ordered=False)
    check(given_)
    run = reference.rms_norm_stats
    monkeypatch.setattr(reference, "rms_norm_stats", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(given_)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.zeros(3, 17)), ValueError, r"x must have shape \[B, T, D\], got \[3, 17\]"),
        (dict(x=torch.zeros(3, 17, 0)), ValueError, "D >= 1"),
        (dict(x=torch.zeros(3, 17, 5).int()), TypeError, "x must have a floating dtype"),
        (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \[D\] = \[5\], got \[4\]"),
        (dict(residual=torch.zeros(3, 1, 5)), ValueError, "residual must have shape"),
        (dict(residual=torch.zeros(3, 17, 5).bfloat16()), TypeError, "residual must have dtype torch.float32"),
        (dict(of="input"), ValueError, "of='input' is unknown; expected one of stream, output"),
        (dict(segment_ids=torch.zeros(3, 17)), TypeError, "segment_ids must have dtype torch.int64"),
        (dict(segment_ids=torch.full((3, 17), 4)), ValueError, r"segment_ids\[0, 0\] = 4 is out of range; expected -1 to 3"),
        (dict(segment_ids=torch.tensor([2, -1, 1])[:, None].expand(3, 17)), ValueError, r"segment_ids\[2, 0\] = 1 comes after 2"),
        (dict(segment_ids=None), ValueError, "num_segments=4 without segment_ids"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    with pytest.raises(error, match=f"rms_norm_stats: .*{message}"):
        rms_norm_stats(**problem() | change)
