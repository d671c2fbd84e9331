"""Cross-entropy and distillation from hidden states, the two output heads included: logits never exist whole.

    z = f(hidden · weightᵀ),  z' = f(teacher_hidden · teacher_weightᵀ),  q = softmax(z/T),  p = softmax(z'/T)
    f(x) = logit_scale · x, or c tanh(logit_scale · x / c) with c = logit_softcap (Gemma 2, arXiv 2408.00118)

    ce   = Σ_{labels ≠ ignore_index} -log softmax(z)[label] / num_tokens
    kl   = Σ_{kl_mask} D(p, q) / num_kl_tokens                       no factor T²
    loss = ce_weight · ce + kl_weight · kl

    forward  D = KL(p‖q)                              dD/dz = (q - p) / T
    reverse  D = KL(q‖p)                              dD/dz = q (log q/p - D) / T
    jsd      D = β KL(p‖m) + (1-β) KL(q‖m)            dD/dz = (1-β) q (log q/m - KL(q‖m)) / T
             m = β p + (1-β) q                        generalised JSD, GKD (arXiv 2306.13649)

Every KL(p‖q) is summed as Σ p (e^-r - 1 + r), r = log p/q: no term is negative, and what rounding does to the normalisers of p
and q cancels to first order, so a divergence far below the rounding of a logarithm (high T, equal models) keeps its digits.

Tokens go through in chunks; a chunk's logits are made, its loss summed, and its dloss/dz turned at once into the gradients of
`hidden` and `weight`. So the forward does the whole work and the backward multiplies by one number. Matrix products run
in the inputs' dtype; softmax, loss and the sum of the weight's gradient over chunks are float32 (float64 for float64).
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference

DIVERGENCES = ("forward", "reverse", "jsd")


class LinearKD(NamedTuple):
    loss: Tensor  # 0-dim, differentiable in hidden and weight
    ce: Tensor  # 0-dim, detached
    kl: Tensor  # 0-dim, detached


@torch.library.custom_op("red::linear_kd", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    kl_mask: Tensor,
    temperature: float,
    divergence: str,
    beta: float,
    ce_weight: float,
    kl_weight: float,
    num_tokens: Tensor,
    num_kl_tokens: Tensor,
    ignore_index: int,
    vocab_size: int,
    logit_scale: float,
    logit_softcap: Optional[float],
    teacher_top_k: Optional[int],
    chunk_size: Optional[int],
    need_grad_hidden: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.check_range("linear_kd", "labels", labels, 0, vocab_size, except_value=ignore_index)
    return backend.implementation("linear_kd", hidden, teacher_hidden).linear_kd(
        hidden, weight, teacher_hidden, teacher_weight, labels, kl_mask, temperature, divergence, beta, ce_weight, kl_weight,
        num_tokens, num_kl_tokens, ignore_index, vocab_size, logit_scale, logit_softcap, teacher_top_k, chunk_size,
        need_grad_hidden, need_grad_weight,
    )  # fmt: skip


@_op.register_fake
def _(hidden, weight, *others):
    *_, need_grad_hidden, need_grad_weight = others
    loss, ce, kl = (hidden.new_empty((), dtype=reference.accumulator(hidden.dtype)) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if need_grad_hidden else 0)
    return loss, ce, kl, grad_hidden, weight.new_empty(weight.shape if need_grad_weight else 0)


def _setup_context(ctx, inputs, output):
    _, ce, kl, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(ce, kl, grad_hidden, grad_weight)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _backward(ctx, grad_loss, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return (
        grad_hidden * grad_loss if need_hidden else None,
        grad_weight * grad_loss if need_weight else None,
        *[None] * 19,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def linear_kd(
    hidden: Tensor,  # [N, d']
    weight: Tensor,  # [V, d']
    teacher_hidden: Tensor,  # [N, d]
    teacher_weight: Tensor,  # [V, d], or another number of rows with vocab_size
    labels: Tensor,  # [N] int64
    *,
    kl_mask: Tensor | None = None,  # [N] bool
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    num_tokens: float | Tensor | None = None,
    num_kl_tokens: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_top_k: int | None = None,
    chunk_size: int | None = None,
) -> LinearKD:  # three 0-dim tensors, float32 (float64 for float64 hidden)
    """Fused output head, cross-entropy and divergence from the teacher (module docstring).

    Args:
        hidden, weight: the student's last hidden states, after the final norm, and its head. Gradients go to these two, once.
        teacher_hidden, teacher_weight: the teacher's, over the same vocabulary.
        labels: the token that each row predicts: already shifted by the caller; `ignore_index` = no cross-entropy.
        kl_mask: rows with a divergence; None = `labels != ignore_index`. A row in neither mask contributes exactly zero,
            even if its hidden states are NaN.
        temperature: T of the divergence; the cross-entropy is always at 1.
        divergence: "forward" KL(teacher‖student), "reverse" KL(student‖teacher), or "jsd" with 0 < `beta` < 1.
        num_tokens, num_kl_tokens: the divisors, such as the counts of all micro-batches and ranks (a number, or a 0-dim
            tensor, which does not recompile). None = the rows of this call, at least 1.
        vocab_size: how many rows of both heads are tokens; the rest is padding, in which the two may differ: probability and
            gradient are exactly 0 there. None = all, of two heads with equally many.
        logit_scale, logit_softcap: f above, of both models: z = logit_scale · x, bent to ± logit_softcap if that is given.
        teacher_top_k: p restricted to the teacher's k largest logits, ties at the k-th kept, and renormalised; not for "reverse",
            which is infinite there.
        chunk_size: rows whose logits exist at a time. None = 1024, or what fits a fixed budget of memory on a GPU with Triton.

    Under autocast the products run in its dtype, as those of `nn.Linear` would. A float16 student is refused where it needs
    a gradient: the gradients of a token mean underflow there.

    Raises: TypeError for dtypes, ValueError for shapes and options, and (on a CPU only) for a label outside the vocabulary.
    """
    hidden, weight = _as_autocast(hidden, weight)
    teacher_hidden, teacher_weight = _as_autocast(teacher_hidden, teacher_weight)
    need_grad_hidden = torch.is_grad_enabled() and hidden.requires_grad
    need_grad_weight = torch.is_grad_enabled() and weight.requires_grad
    _check_tensors(hidden, weight, teacher_hidden, teacher_weight, labels, kl_mask)
    vocab_size = _vocabulary(weight.shape[0], teacher_weight.shape[0], vocab_size)
    _check_options(temperature, divergence, beta, logit_scale, logit_softcap, teacher_top_k, chunk_size)
    if teacher_top_k is not None and teacher_top_k >= vocab_size:
        teacher_top_k = None
    if hidden.dtype == torch.float16 and (need_grad_hidden or need_grad_weight):
        raise TypeError("linear_kd: gradients of a float16 student would underflow; use bfloat16 or float32")

    ce_mask = labels != ignore_index
    kl_mask = ce_mask if kl_mask is None else kl_mask
    loss, ce, kl, _, _ = _op(
        hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), labels, kl_mask,
        float(temperature), divergence, float(beta), float(ce_weight), float(kl_weight),
        checks.token_count("linear_kd", "num_tokens", num_tokens, ce_mask, like=hidden),
        checks.token_count("linear_kd", "num_kl_tokens", num_kl_tokens, kl_mask, like=hidden),
        ignore_index, vocab_size, float(logit_scale), None if logit_softcap is None else float(logit_softcap), teacher_top_k,
        chunk_size, need_grad_hidden, need_grad_weight,
    )  # fmt: skip
    return LinearKD(loss, ce, kl)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_tensors(hidden, weight, teacher_hidden, teacher_weight, labels, kl_mask) -> None:
    op = "linear_kd"
    given = dict(hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    checks.require_floating(op, **given)
    for name, tensor in given.items():
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} must have two dimensions, got shape {list(tensor.shape)}")
    rows = hidden.shape[0]
    checks.require_shape(op, "weight", weight, (weight.shape[0], hidden.shape[1]), "[V, d'] with hidden's d'")
    checks.require_shape(op, "teacher_hidden", teacher_hidden, (rows, teacher_hidden.shape[1]), "[N, d] with hidden's N")
    checks.require_shape(op, "teacher_weight", teacher_weight, (teacher_weight.shape[0], teacher_hidden.shape[1]), "[V, d] with teacher_hidden's d")
    checks.require_shape(op, "labels", labels, (rows,), "[N]")
    checks.require_dtype(op, "labels", labels, torch.int64)
    checks.require_dtype(op, "weight (as hidden)", weight, hidden.dtype)
    checks.require_dtype(op, "teacher_weight (as teacher_hidden)", teacher_weight, teacher_hidden.dtype)
    if kl_mask is not None:
        checks.require_shape(op, "kl_mask", kl_mask, (rows,), "[N]")
        checks.require_dtype(op, "kl_mask", kl_mask, torch.bool)


def _vocabulary(rows: int, teacher_rows: int, vocab_size: int | None) -> int:
    """How many tokens there are."""
    if vocab_size is None:
        if rows != teacher_rows:
            raise ValueError(
                f"linear_kd: weight has {rows} rows, teacher_weight {teacher_rows}; if the tokens are the same and the rest is padding, "
                f"give their number as vocab_size, at most {min(rows, teacher_rows)}"
            )
        return rows
    if not 1 <= vocab_size <= min(rows, teacher_rows):
        raise ValueError(f"linear_kd: vocab_size={vocab_size}; expected 1 to {min(rows, teacher_rows)}, the rows of the smaller head")
    return vocab_size


def _check_options(
    temperature: float,
    divergence: str,
    beta: float,
    logit_scale: float,
    logit_softcap: float | None,
    teacher_top_k: int | None,
    chunk_size: int | None,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"linear_kd: divergence={divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"linear_kd: beta={beta} of jsd must lie between 0 and 1, where it is 0; its limits are 'forward' and 'reverse'")
    if divergence == "reverse" and teacher_top_k is not None:
        raise ValueError(
            f"linear_kd: teacher_top_k={teacher_top_k} with divergence='reverse': KL(student‖teacher) is infinite where the teacher is 0; "
            "use 'forward' or 'jsd', or teacher_top_k=None"
        )
    for name, value in dict(temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap).items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"linear_kd: {name} must be positive, got {value}")
    for name, value in dict(teacher_top_k=teacher_top_k, chunk_size=chunk_size).items():
        if value is not None and value < 1:
            raise ValueError(f"linear_kd: {name} must be at least 1, got {value}")
