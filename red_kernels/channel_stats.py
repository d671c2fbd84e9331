"""Calibration statistics: how strong every channel is in every sequence.

    abs_sum[s, c] = Σ_{tokens t of segment s} |x[t, c]|        count[s] = number of those tokens

`abs_sum / count` is the mean absolute activation per channel from which RED scores channels (arXiv 2605.29327, channel
importance: the L2 norm of it over sequences, then the mean over layers). float32 accumulation, a fixed order of summation.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference


class ChannelStats(NamedTuple):
    abs_sum: Tensor  # [S, D] float32
    count: Tensor  # [S] int64


@torch.library.custom_op("red::channel_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _op(x: Tensor, segment_ids: Optional[Tensor], num_segments: int) -> tuple[Tensor, Tensor]:
    backend.select("channel_stats", x)
    if segment_ids is not None:
        checks.check_range("channel_stats", "segment_ids", segment_ids, -1, num_segments)
    return reference.channel_stats(x, segment_ids, num_segments)


@_op.register_fake
def _(x, segment_ids, num_segments):
    return x.new_empty(num_segments, x.shape[2], dtype=torch.float32), x.new_empty(num_segments, dtype=torch.int64)


def channel_stats(
    x: Tensor,  # [B, T, D]
    segment_ids: Tensor | None = None,  # [B, T] int64
    num_segments: int | None = None,
) -> ChannelStats:
    """Sum of |x| and number of tokens per segment. Deterministic; not differentiable.

    Args:
        x: activations `[B, T, D]`, any floating dtype.
        segment_ids: the segment of every token, 0 … S-1, or -1 for padding, which is not counted whatever it holds.
            None makes every row a segment of its own, S = B.
        num_segments: S. None takes the largest id plus one, which waits for a GPU and breaks a `torch.compile` graph.

    Raises: TypeError for dtypes, ValueError for shapes and (on a CPU only) for an id outside -1 … S-1.
    """
    checks.require_floating("channel_stats", x=x)
    if x.dim() != 3:
        raise ValueError(f"channel_stats: x must have shape [B, T, D], got {list(x.shape)}")
    if segment_ids is None:
        if num_segments not in (None, x.shape[0]):
            raise ValueError(
                f"channel_stats: num_segments={num_segments} without segment_ids; every row is a segment, so it is {x.shape[0]}"
            )
        num_segments = x.shape[0]
    else:
        checks.require_dtype("channel_stats", "segment_ids", segment_ids, torch.int64)
        checks.require_shape("channel_stats", "segment_ids", segment_ids, x.shape[:2], "[B, T]")
        if num_segments is None:
            num_segments = max(int(segment_ids.max()) + 1, 0) if segment_ids.numel() else 0
        elif num_segments < 0:
            raise ValueError(f"channel_stats: num_segments must not be negative, got {num_segments}")
    return ChannelStats(*_op(x.detach(), segment_ids, num_segments))
