"""RMSNorm that also takes the calibration statistics of what it reads, in the same pass.

    stream = x + residual        m[t] = mean_c stream[t, c]²        output = weight · stream / sqrt(m + eps)

    abs_sum[s, c] = Σ_{tokens t of segment s} |stream[t, c]|, or of |output[t, c]|        count[s] = number of those tokens

    sum[c] = Σ_t z[t, c]        square_sum[c] = Σ_t z[t, c]²        z = stream / sqrt(m), over all tokens that have a segment

RMSNorm as of arXiv 1910.07467, rounded where transformers' LlamaRMSNorm rounds: the stream to its dtype, the normalised stream
again to it, the product with the weight last. `abs_sum / count` scores channels as in RED (arXiv 2605.29327); `sum` and `square_sum` are
the moments of the stream as a norm without gain and without eps returns it. float32 accumulation; of a float64 stream the statistics are
float64, and the output has float32's accuracy, as transformers' has.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference
from red_kernels.channel_stats import check_ids, check_segments

STATISTICS_OF = ("stream", "output")


class RMSNormStats(NamedTuple):
    output: Tensor  # [B, T, D]
    stream: Tensor  # [B, T, D]: x + residual, or x itself
    mean_square: Tensor  # [B, T] float32 (float64 for float64)
    abs_sum: Tensor  # [S, D] float32
    count: Tensor  # [S] int64
    sum: Tensor  # [D] float32 (float64 for float64)
    square_sum: Tensor  # [D] likewise


@torch.library.custom_op("red::rms_norm_stats", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Optional[Tensor],
    segment_ids: Optional[Tensor],
    num_segments: int,
    of_output: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_ids("rms_norm_stats", segment_ids, num_segments, ordered)
    implementation = backend.implementation("rms_norm_stats", x, weight)
    return implementation.rms_norm_stats(x, weight, eps, residual, segment_ids, num_segments, of_output, ordered)


@_op.register_fake
def _(x, weight, eps, residual, segment_ids, num_segments, of_output, ordered):
    dtype = reference.accumulator(x.dtype)
    return (
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape[:2], dtype=dtype),
        x.new_empty(num_segments, x.shape[2], dtype=torch.float32),
        x.new_empty(num_segments, dtype=torch.int64),
        x.new_empty(2, x.shape[2], dtype=dtype),
    )


def rms_norm_stats(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    residual: Tensor | None = None,  # [B, T, D]
    segment_ids: Tensor | None = None,  # [B, T] int64
    num_segments: int | None = None,
    of: str = "stream",
    ordered: bool = False,
) -> RMSNormStats:
    """RMSNorm of x + residual, and the statistics of every channel. Deterministic; not differentiable.

    Args:
        x: what is normalised, in any floating dtype, with the `residual` added first and rounded to that dtype. Without a residual the
            `stream` of the result is x itself.
        weight: the gain of the norm; the output has the wider dtype of x and weight.
        eps: added to the mean square in the output, and nowhere else. `mean_square` is without it, and z divides by the square root
            of `mean_square`, or of 1e-30 for a row of zeros.
        segment_ids, num_segments: as in `channel_stats`. Tokens of padding, id -1, are normalised, but whatever they hold is in no sum.
        of: take abs_sum of the "stream" or of the "output".
        ordered: as in `channel_stats`. Unordered ids cost a GPU a second pass over the stream or output, sorted.

    Raises: TypeError for dtypes, ValueError for shapes, for another `of`, and (on a CPU only) for ids as `channel_stats` does.
    """
    checks.require_floating("rms_norm_stats", x=x, weight=weight)
    num_segments = check_segments("rms_norm_stats", x, segment_ids, num_segments)
    if x.shape[2] < 1:
        raise ValueError(f"rms_norm_stats: x must have shape [B, T, D] with D >= 1, got {list(x.shape)}")
    checks.require_shape("rms_norm_stats", "weight", weight, x.shape[2:], "[D]")
    if residual is not None:
        checks.require_dtype("rms_norm_stats", "residual", residual, x.dtype)
        checks.require_shape("rms_norm_stats", "residual", residual, x.shape, "x's [B, T, D]")
        residual = residual.detach()
    if of not in STATISTICS_OF:
        raise ValueError(f"rms_norm_stats: of={of!r} is unknown; expected one of {', '.join(STATISTICS_OF)}")
    output, stream, mean_square, abs_sum, count, moments = _op(
        x.detach(), weight.detach(), eps, residual, segment_ids, num_segments, of == "output", ordered
    )
    return RMSNormStats(output, x.detach() if residual is None else stream, mean_square, abs_sum, count, *moments.unbind())
