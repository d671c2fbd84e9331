"""Calibration statistics: how strong every channel is in every sequence.

    abs_sum[s, c] = Σ_{tokens t of segment s} |x[t, c]|        count[s] = number of those tokens

    square_sum[s, c] = Σ x[t, c]²        abs_max[s, c] = max |x[t, c]|        in the same pass, where they are asked for

`abs_sum / count` is the mean absolute activation per channel from which RED scores channels (arXiv 2605.29327, channel
importance: the L2 norm of it over sequences, then the mean over layers). float32 accumulation, a fixed order of summation.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from red_kernels import backend, checks


class ChannelStats(NamedTuple):
    abs_sum: Tensor  # [S, D] float32
    count: Tensor  # [S] int64
    square_sum: Tensor | None = None  # [S, D] float32
    abs_max: Tensor | None = None  # [S, D] float32


@torch.library.custom_op("red::channel_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    x: Tensor, segment_ids: Optional[Tensor], num_segments: int, squares: bool, maximum: bool, ordered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_ids("channel_stats", segment_ids, num_segments, ordered)
    return backend.implementation("channel_stats", x).channel_stats(x, segment_ids, num_segments, squares, maximum, ordered)


@_op.register_fake
def _(x, segment_ids, num_segments, squares, maximum, ordered):
    def statistic(wanted):
        return x.new_empty((num_segments, x.shape[2]) if wanted else 0, dtype=torch.float32)

    return statistic(True), x.new_empty(num_segments, dtype=torch.int64), statistic(squares), statistic(maximum)


def check_ids(op: str, segment_ids: Tensor | None, num_segments: int, ordered: bool) -> None:
    """Raise ValueError for an id out of range, or out of order where order was promised. CPU tensors only; others pass unread."""
    if segment_ids is None or not segment_ids.is_cpu:
        return
    checks.check_range(op, "segment_ids", segment_ids, -1, num_segments)
    if not ordered:
        return
    flat = segment_ids.flatten()
    highest = flat.cummax(0).values  # padding, -1, is never the highest once there was a token
    fallen = (flat >= 0) & (flat < highest)
    if fallen.any():
        at = int(fallen.nonzero()[0])
        position = [at // segment_ids.shape[1], at % segment_ids.shape[1]]
        raise ValueError(f"{op}: segment_ids{position} = {int(flat[at])} comes after {int(highest[at])}; ids that decrease need ordered=False")


def check_segments(op: str, x: Tensor, segment_ids: Tensor | None, num_segments: int | None) -> int:
    """Check the shapes and dtypes of x [B, T, D] and segment_ids [B, T], and return S."""
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape [B, T, D], got {list(x.shape)}")
    if segment_ids is None:
        if num_segments not in (None, x.shape[0]):
            raise ValueError(f"{op}: num_segments={num_segments} without segment_ids; every row is a segment, so it is {x.shape[0]}")
        return x.shape[0]
    checks.require_dtype(op, "segment_ids", segment_ids, torch.int64)
    checks.require_shape(op, "segment_ids", segment_ids, x.shape[:2], "[B, T]")
    if num_segments is None:
        return max(int(segment_ids.max()) + 1, 0) if segment_ids.numel() else 0
    if num_segments < 0:
        raise ValueError(f"{op}: num_segments must not be negative, got {num_segments}")
    return num_segments


def channel_stats(
    x: Tensor,  # [B, T, D]
    segment_ids: Tensor | None = None,  # [B, T] int64
    num_segments: int | None = None,
    *,
    squares: bool = False,
    maximum: bool = False,
    ordered: bool = False,
) -> ChannelStats:
    """Sum of |x| and number of tokens per segment, and if asked Σ x² and max |x|. Deterministic; not differentiable.

    Args:
        x: activations `[B, T, D]`, any floating dtype.
        segment_ids: the segment of every token, 0 … S-1, or -1 for padding, which is not counted whatever it holds.
            None makes every row a segment of its own, S = B.
        num_segments: S. None takes the largest id plus one, which waits for a GPU and breaks a `torch.compile` graph.
        squares, maximum: also return `square_sum` and `abs_max`, which are None otherwise.
        ordered: the ids never decrease from one token to the next through the rows of the batch, leaving out -1, as in a packed batch:
            a GPU then need not sort them. Ids that break this promise raise an error on a CPU; on a GPU the result is undefined.

    An empty segment has zeros everywhere. NaN spreads to the sums and the maximum of its channel in its segment, as in `torch.amax`.

    Raises: TypeError for dtypes, ValueError for shapes and (on a CPU only) for an id outside -1 … S-1 or out of a promised order.
    """
    checks.require_floating("channel_stats", x=x)
    num_segments = check_segments("channel_stats", x, segment_ids, num_segments)
    abs_sum, count, square_sum, abs_max = _op(x.detach(), segment_ids, num_segments, squares, maximum, ordered)
    return ChannelStats(abs_sum, count, square_sum if squares else None, abs_max if maximum else None)
