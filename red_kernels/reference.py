"""The truth of every op in plain PyTorch, and the implementation that a CPU runs.

Written to be read as mathematics. Sums accumulate in float32, or in float64 for float64 inputs. Rows that a mask leaves
out are replaced by zeros *before* any arithmetic, because 0 · NaN is NaN. Every op's own file holds its checks,
registration and public function.
"""

import torch
from torch import Tensor

from red_kernels.reference_linear_kd import linear_kd  # noqa: F401
from red_kernels.rows import zero_rows
from red_kernels.reference_selection import (  # noqa: F401
    covariance,
    gather,
    gather_backward,
    gather_many,
    gather_scale_backward,
    selection_low_rank,
    selection_low_rank_backward,
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_stats(
    x: Tensor,  # [B, T, D]
    segment_ids: Tensor | None,  # [B, T] int64, -1 = padding
    num_segments: int,
    squares: bool,
    maximum: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [S, D] fp32, [S] int64, [S, D] fp32, [S, D] fp32
    """abs_sum[s] = Σ_{tokens of s} |x|; count[s] = number of those tokens; Σ x²; max |x|, of which NaN is the largest.

    What was not asked for comes without elements. In what order the ids come makes no difference here.
    """
    batch, length, width = x.shape
    size, dtype = x.abs(), accumulator(x.dtype)
    square_sum, abs_max = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    if segment_ids is None:
        if squares:
            square_sum = size.to(dtype).square().sum(1).float()
        if maximum:
            abs_max = size.amax(1).float() if length else x.new_zeros((batch, width), dtype=torch.float32)
        return size.sum(1, dtype=dtype).float(), torch.full((batch,), length, dtype=torch.int64, device=x.device), square_sum, abs_max

    # One more segment collects the padding and is then dropped, so NaN in padding never meets a real sum.
    ids = torch.where(segment_ids < 0, num_segments, segment_ids).flatten()
    size = size.to(dtype).reshape(batch * length, width)

    def sums(values: Tensor) -> Tensor:
        total = values.new_zeros(num_segments + 1, width)
        if x.is_cpu:
            total.index_add_(0, ids, values)  # sequential on a CPU
        else:
            total.index_put_((ids,), values, accumulate=True)  # sorts first; index_add_ is atomics, in any order
        return total[:num_segments].float().clone()  # copies, since the results of a registered op must not share storage with anything else

    if squares:
        square_sum = sums(size.square())
    if maximum:
        highest = size.new_zeros(num_segments + 1, width).scatter_reduce_(0, ids[:, None].expand_as(size), size, "amax")
        abs_max = highest[:num_segments].float().clone()
    count = ids.new_zeros(num_segments + 1).scatter_add_(0, ids, torch.ones_like(ids))
    return sums(size), count[:num_segments].clone(), square_sum, abs_max


def rms_norm_stats(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D]
    eps: float,
    residual: Tensor | None,  # [B, T, D]
    segment_ids: Tensor | None,  # [B, T] int64, -1 = padding
    num_segments: int,
    of_output: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output [B, T, D], stream [B, T, D], mean square [B, T], abs_sum [S, D] fp32, count [S] int64, [Σ z, Σ z²] [2, D]).

    The output is made in the order of transformers' LlamaRMSNorm, bit for bit. The stream comes without elements if it is x.
    """
    rounded = x if residual is None else x + residual
    stream = rounded.float()
    mean_square = stream.pow(2).mean(-1, keepdim=True)
    output = weight * (stream * torch.rsqrt(mean_square + eps)).to(x.dtype)
    if x.dtype == torch.float64:  # which transformers normalises in float32: the model's output is that, the statistics are not
        stream, mean_square = rounded, rounded.pow(2).mean(-1, keepdim=True)
    abs_sum, count, *_ = channel_stats(output if of_output else rounded, segment_ids, num_segments, False, False, ordered)
    z = stream * torch.rsqrt(mean_square.clamp(min=1e-30))
    if segment_ids is not None:
        z.masked_fill_((segment_ids < 0)[..., None], 0)
    moments = torch.stack([z.sum((0, 1)), z.square().sum((0, 1))])
    return output.contiguous(), x.new_empty(0) if residual is None else rounded.contiguous(), mean_square[..., 0], abs_sum, count, moments


def tap_mse(
    student: Tensor,  # [..., w]
    teacher: Tensor,  # [..., w], or [..., d] with index
    mask: Tensor | None,  # [...] bool
    index: Tensor | None,  # [w] int64
    num_tokens: Tensor,  # 0-dim
    need_grad: bool,
) -> tuple[Tensor, Tensor]:  # 0-dim, [..., w]
    """(Σ_tokens mean_w (s - t)² / num_tokens, s - t): the difference is the gradient but for a factor.

    The difference comes in the wider dtype of the two, without elements if no gradient is needed.
    """
    dtype = accumulator(student.dtype)
    target = teacher if index is None else teacher.index_select(-1, index)
    difference = student.to(dtype) - target.to(dtype)
    if mask is not None:
        difference = zero_rows(difference, mask)
    loss = difference.square().sum() / (student.shape[-1] * num_tokens)
    kept = torch.promote_types(student.dtype, teacher.dtype)
    return loss, difference.to(kept).contiguous() if need_grad else student.new_empty(0, dtype=kept)


def tap_mse_backward(grad: Tensor, difference: Tensor, num_tokens: Tensor) -> Tensor:
    """dloss/dstudent = 2 (s - t) / (w · num_tokens); the factor stays in the accumulator's dtype, where it cannot underflow."""
    factor = grad * 2 / (difference.shape[-1] * num_tokens)
    return (difference.to(factor.dtype) * factor).to(difference.dtype)


def normalised_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [..., N, d] in float64, centred and scaled to unit norm; whether all are finite [...]; row count [...]."""
    valid = x.new_ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    x = torch.where(valid[..., None], x.double(), 0)
    finite = x.isfinite().all(-1).all(-1)
    x = torch.where(finite[..., None, None], x, 0)
    count = valid.sum(-1)

    # eRank does not change with the scale of x; a power of two (exact) brings the largest entry near 1, so squares stay in float64.
    exponent = torch.frexp(x.abs().amax(dim=(-2, -1), keepdim=True)).exponent.clamp(-1000, 1000)
    x = torch.ldexp(x, -exponent.double())
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    mean = x.sum(-2, keepdim=True) / count.clamp(min=1)[..., None, None]
    x = torch.where(valid[..., None], x - mean, 0)

    # A row equal to the mean leaves the mean's rounding error, at most N ulp: that is a zero row, not a direction.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norm <= x.shape[-2] * torch.finfo(torch.float64).eps * size
    return torch.where(zero, 0, x / torch.where(zero, 1, norm)), finite, count


def spectrum(rows: Tensor) -> Tensor:
    """Eigenvalues, descending, of the smaller of X Xᵀ and Xᵀ X, whose nonzero eigenvalues are the same."""
    gram = rows @ rows.mT if rows.shape[-2] <= rows.shape[-1] else rows.mT @ rows
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)


def erank_spectrum(x: Tensor, mask: Tensor | None, precision: str = "float64") -> tuple[Tensor, Tensor]:
    """(eigenvalues [..., min(N, d)], finite [...]), in float64 whatever `precision` would do with."""
    rows, finite, _ = normalised_rows(x, mask)
    return spectrum(rows), finite


def erank(x: Tensor, mask: Tensor | None, precision: str = "float64") -> tuple[Tensor, Tensor, Tensor]:
    """(exp(-Σ r ln r) with r = λ / Σ λ [...], finite [...], valid rows [...]); NaN where there is no spectrum. In float64 whatever `precision` would do with."""
    rows, finite, count = normalised_rows(x, mask)
    eigenvalues = spectrum(rows)
    r = eigenvalues / eigenvalues.sum(-1, keepdim=True)  # 0/0 = NaN for a matrix of zeros
    value = (-torch.special.xlogy(r, r).sum(-1)).exp()
    return torch.where(finite & (count >= 2), value, torch.nan), finite, count
