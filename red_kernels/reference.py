"""The truth of every op in plain PyTorch, and the implementation that a CPU runs.

Written to be read as mathematics. Sums accumulate in float32, or in float64 for float64 inputs. Rows that a mask leaves
out are replaced by zeros *before* any arithmetic, because 0 · NaN is NaN. Every op's own file holds its checks,
registration and public function.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_stats(
    x: Tensor,  # [B, T, D]
    segment_ids: Tensor | None,  # [B, T] int64, -1 = padding
    num_segments: int,
) -> tuple[Tensor, Tensor]:  # [S, D] fp32, [S] int64
    """abs_sum[s] = Σ_{tokens of s} |x|; count[s] = number of those tokens."""
    batch, length, width = x.shape
    if segment_ids is None:
        abs_sum = x.abs().sum(dim=1, dtype=accumulator(x.dtype))
        return abs_sum.float(), torch.full((batch,), length, dtype=torch.int64, device=x.device)

    # One more segment collects the padding and is then dropped, so NaN in padding never meets a real sum.
    ids = torch.where(segment_ids < 0, num_segments, segment_ids).flatten()
    values = x.abs().to(accumulator(x.dtype)).reshape(batch * length, width)
    abs_sum = values.new_zeros(num_segments + 1, width)
    if x.is_cpu:
        abs_sum.index_add_(0, ids, values)  # sequential on a CPU
    else:
        abs_sum.index_put_((ids,), values, accumulate=True)  # sorts first; index_add_ is atomics, in any order
    count = ids.new_zeros(num_segments + 1).scatter_add_(0, ids, torch.ones_like(ids))
    # Copies, since the results of a registered op must not share storage with anything else.
    return abs_sum[:num_segments].float().clone(), count[:num_segments].clone()


def along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """View `vector` [k] so that it broadcasts along dimension `dim` of an `ndim`-dimensional tensor."""
    return vector.view([-1 if axis == dim else 1 for axis in range(ndim)])


def gather(x: Tensor, index: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    """y[…, j, …] = x[…, index[j], …] · scale[j]"""
    picked = x.index_select(dim, index)
    if scale is None:
        return picked
    dtype = accumulator(x.dtype)
    return (picked.to(dtype) * along(scale.to(dtype), dim, x.dim())).to(x.dtype)


def gather_backward(grad: Tensor, index: Tensor, dim: int, scale: Tensor | None, width: int) -> Tensor:
    """dx[…, i, …] = Σ_{j: index[j] = i} dy[…, j, …] · scale[j]"""
    grad_y = grad.to(accumulator(grad.dtype))
    if scale is not None:
        grad_y = grad_y * along(scale.to(grad_y.dtype), dim, grad.dim())
    shape = list(grad.shape)
    shape[dim] = width
    return grad_y.new_zeros(shape).index_add_(dim, index, grad_y).to(grad.dtype)


def gather_scale_backward(grad: Tensor, x: Tensor, index: Tensor, dim: int) -> Tensor:
    """dscale[j] = Σ_{all other dimensions} dy[…, j, …] · x[…, index[j], …]"""
    dtype = accumulator(x.dtype)
    product = grad.to(dtype) * x.index_select(dim, index).to(dtype)
    others = [axis for axis in range(x.dim()) if axis != dim]
    return product.sum(dim=others) if others else product


def token_divergence(
    log_p: Tensor,  # [C, V] teacher log-probabilities at the temperature
    log_q: Tensor,  # [C, V] student log-probabilities at the temperature
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:  # [C], [C, V]
    """D(p, q) of every row, and its gradient with respect to the argument of the softmax that gave q."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward":  # KL(p‖q)
        return (p * (log_p - log_q)).sum(-1), q - p
    if divergence == "reverse":  # KL(q‖p)
        ratio = log_q - log_p
        value = (q * ratio).sum(-1)
        return value, q * (ratio - value[:, None])
    # jsd: β KL(p‖m) + (1-β) KL(q‖m), m = β p + (1-β) q. Through m comes -Σ (β p + (1-β) q)/m dm = -Σ dm = 0.
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    ratio = log_q - log_m
    student = (q * ratio).sum(-1)
    value = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * student
    return value, (1 - beta) * q * (ratio - student[:, None])


def linear_kd(
    hidden: Tensor,  # [N, d']
    weight: Tensor,  # [V, d']
    teacher_hidden: Tensor,  # [N, d]
    teacher_weight: Tensor,  # [V, d]
    labels: Tensor,  # [N] int64
    kl_mask: Tensor,  # [N] bool
    temperature: float,
    divergence: str,
    beta: float,
    ce_weight: float,
    kl_weight: float,
    num_tokens: Tensor,  # 0-dim
    num_kl_tokens: Tensor,  # 0-dim
    ignore_index: int,
    chunk_size: int,
    need_grad_hidden: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce, kl, dloss/dhidden [N, d'], dloss/dweight [V, d']), one chunk of logits at a time.

    A gradient that is not needed comes back with no elements.
    """
    dtype = accumulator(hidden.dtype)
    grad_hidden = hidden.new_empty(hidden.shape if need_grad_hidden else 0)
    grad_weight = torch.zeros(weight.shape if need_grad_weight else 0, dtype=dtype, device=weight.device)
    ce = torch.zeros((), dtype=dtype, device=hidden.device)
    kl = torch.zeros((), dtype=dtype, device=hidden.device)
    ce_mask = labels != ignore_index

    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        in_ce, in_kl = ce_mask[rows], kl_mask[rows]
        h = torch.where((in_ce | in_kl)[:, None], hidden[rows], 0)
        h_teacher = torch.where(in_kl[:, None], teacher_hidden[rows], 0)
        target = torch.where(in_ce, labels[rows], 0)[:, None]
        row_ce = in_ce.to(dtype) / num_tokens
        row_kl = in_kl.to(dtype) / num_kl_tokens

        z = (h @ weight.T).to(dtype)  # [C, V]
        log_p = log_softmax((h_teacher @ teacher_weight.T).to(dtype) / temperature, dim=-1)
        log_q1 = log_softmax(z, dim=-1)
        log_q = log_q1 if temperature == 1.0 else log_softmax(z / temperature, dim=-1)
        value, dz = token_divergence(log_p, log_q, divergence, beta)
        ce -= (row_ce * log_q1.gather(1, target)[:, 0]).sum()
        kl += (row_kl * value).sum()
        if not (need_grad_hidden or need_grad_weight):
            continue

        dz_ce = log_q1.exp().scatter_add_(1, target, z.new_full((1, 1), -1.0).expand_as(target))  # softmax - onehot
        dz *= (row_kl * (kl_weight / temperature))[:, None]
        dz += dz_ce.mul_((row_ce * ce_weight)[:, None])
        dz = dz.to(hidden.dtype)
        if need_grad_hidden:
            grad_hidden[rows] = dz @ weight
        if need_grad_weight:
            grad_weight += dz.T @ h

    return ce_weight * ce + kl_weight * kl, ce, kl, grad_hidden, grad_weight.to(weight.dtype)


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
        difference.masked_fill_(~mask[..., None], 0)
    loss = difference.square().sum() / (student.shape[-1] * num_tokens)
    kept = torch.promote_types(student.dtype, teacher.dtype)
    return loss, difference.to(kept) if need_grad else student.new_empty(0, dtype=kept)


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


def erank_spectrum(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(eigenvalues [..., min(N, d)], finite [...])"""
    rows, finite, _ = normalised_rows(x, mask)
    return spectrum(rows), finite


def erank(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(-Σ r ln r) with r = λ / Σ λ [...], finite [...], valid rows [...]); NaN where there is no spectrum."""
    rows, finite, count = normalised_rows(x, mask)
    eigenvalues = spectrum(rows)
    r = eigenvalues / eigenvalues.sum(-1, keepdim=True)  # 0/0 = NaN for a matrix of zeros
    value = (-torch.special.xlogy(r, r).sum(-1)).exp()
    return torch.where(finite & (count >= 2), value, torch.nan), finite, count
