"""Mean-squared error of a tap: one module's output in the student against the teacher's.

    L = Σ_{valid tokens} (1/w) Σ_j (s_j - t_{index[j]})² / num_tokens

    dL/ds = 2 (s - t) / (w · num_tokens)        dL/dt = minus that, scattered back through the index

The clone loss of LRC (arXiv 2505.12781) with a token mean. Value and gradient come from one pass over the tap: the op returns
s - t, in the wider of the two dtypes, and the backward multiplies it by one number. float32 accumulation (float64 for float64).
"""

from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference


@torch.library.custom_op("red::tap_mse", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    student: Tensor,
    teacher: Tensor,
    mask: Optional[Tensor],
    index: Optional[Tensor],
    num_tokens: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    if index is not None:
        checks.check_range("tap_mse", "index", index, 0, teacher.shape[-1])
    return backend.implementation("tap_mse", student, teacher).tap_mse(student, teacher, mask, index, num_tokens, need_grad)


@torch.library.custom_op("red::tap_mse_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward_op(grad: Tensor, difference: Tensor, num_tokens: Tensor) -> Tensor:
    return backend.implementation("tap_mse", difference).tap_mse_backward(grad, difference, num_tokens)


@_backward_op.register_fake
def _(grad, difference, num_tokens):
    return torch.empty_like(difference)


@_op.register_fake
def _(student, teacher, mask, index, num_tokens, need_grad):
    loss = student.new_empty((), dtype=reference.accumulator(student.dtype))
    kept = torch.promote_types(student.dtype, teacher.dtype)
    return loss, student.new_empty(student.shape if need_grad else 0, dtype=kept)


def _setup_context(ctx, inputs, output):
    student, teacher, mask, index, num_tokens, need_grad = inputs
    _, difference = output
    ctx.mark_non_differentiable(difference)
    ctx.teacher_width, ctx.dtypes = teacher.shape[-1], (student.dtype, teacher.dtype)
    ctx.save_for_backward(difference, index, num_tokens)


def _backward(ctx, grad_loss, _):
    difference, index, num_tokens = ctx.saved_tensors
    student_dtype, teacher_dtype = ctx.dtypes
    grad_student = grad_teacher = None
    grad = _backward_op(grad_loss, difference, num_tokens)
    if ctx.needs_input_grad[0]:
        grad_student = grad.to(student_dtype)
    if ctx.needs_input_grad[1]:
        grad_teacher = -grad
        if index is not None:
            grad_teacher = torch.ops.red.gather_backward(grad_teacher, index, grad.dim() - 1, None, ctx.teacher_width, None)
        grad_teacher = grad_teacher.to(teacher_dtype)
    return grad_student, grad_teacher, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def tap_mse(
    student: Tensor,  # [..., w]
    teacher: Tensor,  # [..., w], or [..., d] with index
    mask: Tensor | None = None,  # [...] bool
    *,
    index: Tensor | None = None,  # [w] int64
    num_tokens: float | Tensor | None = None,
) -> Tensor:  # 0-dim, float32 (float64 for a float64 student)
    """Σ over valid tokens of the mean over the width of (student - teacher[..., index])², divided by `num_tokens`.

    Args:
        mask: which tokens count; None = all. The others contribute exactly zero, even if they hold NaN.
        index: the teacher's channels to compare with, as of a selection; None compares equal widths.
        num_tokens: the divisor, such as the token count of all micro-batches and ranks (a number, or a 0-dim tensor, which
            does not recompile). None = the valid tokens of this call, at least 1.

    Differentiable (once) in `student`, and in `teacher` if it requires a gradient.

    Raises: TypeError for dtypes, ValueError for shapes and (on a CPU only) for an index outside 0 … d-1.
    """
    checks.require_floating("tap_mse", student=student, teacher=teacher)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"tap_mse: student must have shape [..., w] with w >= 1, got {list(student.shape)}")
    checks.require_shape("tap_mse", "teacher", teacher, (*student.shape[:-1], *teacher.shape[-1:]), "student's [...] and a width")
    if index is None:
        if teacher.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"tap_mse: student has width {student.shape[-1]}, teacher {teacher.shape[-1]}; give index [{student.shape[-1]}], "
                "the teacher's channels to compare with"
            )
    else:
        checks.require_index("tap_mse", index)
        checks.require_shape("tap_mse", "index", index, student.shape[-1:], "[w]")
    if mask is not None:
        checks.require_dtype("tap_mse", "mask", mask, torch.bool)
        checks.require_shape("tap_mse", "mask", mask, student.shape[:-1], "student's [...]")

    if num_tokens is None and mask is None:
        num_tokens = max(student.numel() // student.shape[-1], 1)
    count = checks.token_count("tap_mse", "num_tokens", num_tokens, mask, like=student)
    need_grad = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    loss, _ = _op(student, teacher, mask, index, count, need_grad)
    return loss
