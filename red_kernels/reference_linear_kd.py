"""The truth of linear_kd in plain PyTorch (see reference.py), and the implementation that a CPU runs."""

import torch
from torch import Tensor

from red_kernels.rows import zero_rows

ROWS = 1024  # of a chunk, unless the caller says
CACHED = 2**17  # logits that a CPU takes through all passes at once, so that they stay in its cache: half the time of passes over a chunk


def softmaxes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(log_softmax(x), softmax(x)) over the last dimension. PyTorch's log_softmax takes four times as long on a CPU."""
    x = x - x.amax(-1, keepdim=True)
    e = x.exp()
    total = e.sum(-1, keepdim=True)
    return x.sub_(total.log()), e.div_(total)


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), finite where p = 0, so that p · log(p / q) is 0 there."""
    return (log_p - log_q).clamp(min=torch.finfo(log_p.dtype).min)


def divergence_terms(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """p (e^-r - 1 + r) = q - p + p r with r = log(p / q): every term >= 0, and they add up to KL(p‖q), since Σ p = Σ q.

    Rounding of r enters the term of an r near 0 in second order; in p r it would in first, as large as a small divergence itself.
    """
    size = ratio.abs()
    small = torch.lt(size, 0.5, out=torch.empty_like(ratio))  # 1 or 0: a bool, and `where`, are slow on a CPU
    clamped = ratio.clamp(-0.5, 0.5)
    near = torch.expm1(-clamped).add_(clamped).mul_(p)
    return torch.addcmul(q - p, p, ratio).lerp_(near, small)


def token_divergence(
    log_p: Tensor,  # [C, V] teacher log-probabilities at the temperature
    p: Tensor,  # [C, V] exp(log_p)
    log_q: Tensor,  # [C, V] student log-probabilities at the temperature
    q: Tensor,  # [C, V] exp(log_q)
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:  # [C], [C, V]
    """D(p, q) of every row, and its gradient with respect to the argument of the softmax that gave q."""
    ratio = log_ratio(log_p, log_q)
    if divergence == "forward":  # KL(p‖q)
        return divergence_terms(p, q, ratio).sum(-1), q - p
    if divergence == "reverse":  # KL(q‖p)
        ratio = -ratio
        return divergence_terms(q, p, ratio).sum(-1), q * (ratio - (q * ratio).sum(-1, keepdim=True))

    # jsd: β KL(p‖m) + (1-β) KL(q‖m), m = β p + (1-β) q. Through m comes -Σ (β p + (1-β) q)/m dm = -Σ dm = 0.
    # log m = max(log p, log q) + s, s <= 0: made from log(p / q), since log m itself would round away a small ratio to it.
    weight = torch.gt(ratio, 0, out=torch.empty_like(ratio)).mul_(1 - 2 * beta).add_(beta)  # of the smaller of p and q: 1-β or β
    s = torch.log1p(weight * torch.expm1(-ratio.abs()))
    ratio_p, ratio_q = ratio.clamp(max=0) - s, -ratio.clamp(min=0) - s
    m = beta * p + (1 - beta) * q
    value = beta * divergence_terms(p, m, ratio_p).sum(-1) + (1 - beta) * divergence_terms(q, m, ratio_q).sum(-1)
    return value, (1 - beta) * q * (ratio_q - (q * ratio_q).sum(-1, keepdim=True))


def linear_kd(
    hidden: Tensor,  # [N, d']
    weight: Tensor,  # [>= vocab_size, d']
    teacher_hidden: Tensor,  # [N, d]
    teacher_weight: Tensor,  # [>= vocab_size, d]
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
    vocab_size: int,
    logit_scale: float,
    logit_softcap: float | None,
    teacher_top_k: int | None,
    chunk_size: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce, kl, dloss/dhidden [N, d'], dloss/dweight, of weight's shape), one chunk of logits at a time.

    A gradient that is not needed comes back with no elements.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if need_grad_hidden else 0)
    grad_weight = torch.zeros(weight.shape if need_grad_weight else 0, dtype=dtype, device=weight.device)
    ce = torch.zeros((), dtype=dtype, device=hidden.device)
    kl = torch.zeros((), dtype=dtype, device=hidden.device)
    ce_mask = labels != ignore_index
    weight_shown, teacher_weight = weight[:vocab_size], teacher_weight[:vocab_size]  # rows beyond are padding, not tokens

    def capped(z: Tensor) -> Tensor:
        z = z if logit_scale == 1.0 else z * logit_scale
        return z if logit_softcap is None else torch.tanh(z / logit_softcap) * logit_softcap

    def rows_of(z: Tensor, z_teacher: Tensor, target: Tensor, row_ce: Tensor, row_kl: Tensor, need_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of logits [R, V] and targets [R, 1]: cross-entropy and divergence, summed, and dloss/d(hidden · weightᵀ) [R, V]."""
        z = capped(z)
        if teacher_top_k is not None:
            last = z_teacher.topk(teacher_top_k, sorted=False).values.amin(-1, keepdim=True)
            log_p, p = softmaxes((capped(z_teacher) / temperature).masked_fill_(z_teacher < last, -torch.inf))
        else:
            z_teacher = capped(z_teacher)
            log_p, p = softmaxes(z_teacher if temperature == 1.0 else z_teacher / temperature)
        log_q1, q1 = softmaxes(z)
        log_q, q = (log_q1, q1) if temperature == 1.0 else softmaxes(z / temperature)
        value, dz = token_divergence(log_p, p, log_q, q, divergence, beta)
        row_ce_sum, row_kl_sum = -(row_ce * log_q1.gather(1, target)[:, 0]).sum(), (row_kl * value).sum()
        if not need_grad:
            return row_ce_sum, row_kl_sum, None

        dz_ce = q1.scatter_add_(1, target, z.new_full((1, 1), -1.0).expand_as(target))  # softmax - onehot
        dz *= (row_kl * (kl_weight / temperature))[:, None]
        dz += dz_ce.mul_((row_ce * ce_weight)[:, None])
        if logit_softcap is not None:
            dz *= 1 - (z / logit_softcap).square()
        return row_ce_sum, row_kl_sum, dz if logit_scale == 1.0 else dz * logit_scale

    chunk_size, need_grad = chunk_size or ROWS, need_grad_hidden or need_grad_weight
    block_size = chunk_size if hidden.is_cuda else max(CACHED // vocab_size, 1)
    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        in_ce, in_kl = ce_mask[rows], kl_mask[rows]
        h, h_teacher = zero_rows(hidden[rows], in_ce | in_kl), zero_rows(teacher_hidden[rows], in_kl)
        target = torch.where(in_ce, labels[rows], 0)[:, None]
        row_ce = in_ce.to(dtype) / num_tokens
        row_kl = in_kl.to(dtype) / num_kl_tokens

        z, z_teacher = h @ weight_shown.T, h_teacher @ teacher_weight.T  # [C, V]; then z becomes dloss/dz, block by block
        for first in range(0, len(h), block_size):
            block = slice(first, first + block_size)
            of_ce, of_kl, dz = rows_of(z[block].to(dtype), z_teacher[block].to(dtype), target[block], row_ce[block], row_kl[block], need_grad)
            ce += of_ce
            kl += of_kl
            if need_grad:
                z[block] = dz  # pyrefly: ignore[unsupported-operation] - a Tensor where need_grad is set
        if need_grad_hidden:
            grad_hidden[rows] = z @ weight_shown
        if need_grad_weight:
            if h.dtype == grad_weight.dtype:
                grad_weight[:vocab_size].addmm_(z.T, h)
            else:
                grad_weight[:vocab_size] += z.T @ h

    return ce_weight * ce + kl_weight * kl, ce, kl, grad_hidden, grad_weight.to(weight.dtype)
