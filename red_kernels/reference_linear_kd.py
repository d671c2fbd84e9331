"""The truth of linear_kd in plain PyTorch (see reference.py), and the implementation that a CPU runs."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

ROWS = 1024  # of a chunk, unless the caller says


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), finite where p = 0, so that p · log(p / q) is 0 there."""
    return (log_p - log_q).clamp(min=torch.finfo(log_p.dtype).min)


def divergence_terms(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """p (e^-r - 1 + r) = q - p + p r with r = log(p / q): every term >= 0, and they add up to KL(p‖q), since Σ p = Σ q.

    Rounding of r enters the term of an r near 0 in second order; in p r it would in first, as large as a small divergence itself.
    """
    near = (torch.expm1(-ratio) + ratio) * p
    return torch.where(ratio.abs() < 0.5, near, torch.addcmul(q - p, p, ratio))


def token_divergence(
    log_p: Tensor,  # [C, V] teacher log-probabilities at the temperature
    log_q: Tensor,  # [C, V] student log-probabilities at the temperature
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:  # [C], [C, V]
    """D(p, q) of every row, and its gradient with respect to the argument of the softmax that gave q."""
    p, q = log_p.exp(), log_q.exp()
    ratio = log_ratio(log_p, log_q)
    if divergence == "forward":  # KL(p‖q)
        return divergence_terms(p, q, ratio).sum(-1), q - p
    if divergence == "reverse":  # KL(q‖p)
        ratio = -ratio
        return divergence_terms(q, p, ratio).sum(-1), q * (ratio - (q * ratio).sum(-1, keepdim=True))

    # jsd: β KL(p‖m) + (1-β) KL(q‖m), m = β p + (1-β) q. Through m comes -Σ (β p + (1-β) q)/m dm = -Σ dm = 0.
    # log m = max(log p, log q) + s, s <= 0: made from log(p / q), since log m itself would round away a small ratio to it.
    weight = torch.where(ratio > 0, ratio.new_full((), 1 - beta), ratio.new_full((), beta))  # of the smaller of p and q
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

    for start in range(0, hidden.shape[0], chunk_size or ROWS):
        rows = slice(start, start + (chunk_size or ROWS))
        in_ce, in_kl = ce_mask[rows], kl_mask[rows]
        h = torch.where((in_ce | in_kl)[:, None], hidden[rows], 0)
        h_teacher = torch.where(in_kl[:, None], teacher_hidden[rows], 0)
        target = torch.where(in_ce, labels[rows], 0)[:, None]
        row_ce = in_ce.to(dtype) / num_tokens
        row_kl = in_kl.to(dtype) / num_kl_tokens

        z = capped((h @ weight_shown.T).to(dtype))  # [C, V]
        z_teacher = (h_teacher @ teacher_weight.T).to(dtype)
        if teacher_top_k is not None:
            last = z_teacher.topk(teacher_top_k, sorted=False).values.amin(-1, keepdim=True)
            log_p = log_softmax((capped(z_teacher) / temperature).masked_fill_(z_teacher < last, -torch.inf), dim=-1)
        else:
            log_p = log_softmax(capped(z_teacher) / temperature, dim=-1)
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
        if logit_softcap is not None:
            dz *= 1 - (z / logit_softcap).square()
        dz = (dz if logit_scale == 1.0 else dz * logit_scale).to(hidden.dtype)
        if need_grad_hidden:
            grad_hidden[rows] = dz @ weight_shown
        if need_grad_weight:
            grad_weight[:vocab_size] += dz.T @ h

    return ce_weight * ce + kl_weight * kl, ce, kl, grad_hidden, grad_weight.to(weight.dtype)
