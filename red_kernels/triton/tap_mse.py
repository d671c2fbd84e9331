"""Masked mean-squared error of a tap and its difference, one read of both sides (see red_kernels/tap_mse.py for the mathematics).

A program owns ROWS tokens and walks over their width; the row sums become one partial sum per program, and a second launch of one
program adds those in their order: no atomics, so a run repeats bit for bit. float32 accumulation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch


@triton.jit
def tap_mse_kernel(
    student_ptr, student_stride,
    teacher_ptr, teacher_stride,
    mask_ptr, index_ptr,
    difference_ptr, partial_ptr,
    tokens, width,
    HAS_MASK: tl.constexpr, HAS_INDEX: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < tokens
    counts = exists
    if HAS_MASK:
        counts = tl.load(mask_ptr + row, mask=exists, other=0) != 0
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        source = column
        if HAS_INDEX:
            source = tl.max_contiguous(tl.load(index_ptr + column, mask=inside, other=0), 2)  # as in gather.py, for Triton 3.6
        # A masked token is not read: whatever it holds, NaN too, its difference is zero.
        read = counts[:, None] & inside[None, :]
        s = tl.load(student_ptr + row[:, None] * student_stride + column[None, :], mask=read, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + row[:, None] * teacher_stride + source[None, :], mask=read, other=0.0).to(tl.float32)
        difference = s - t
        total += tl.sum(difference * difference, 1)
        if KEEP:
            place = difference_ptr + row[:, None] * width + column[None, :]
            tl.store(place, difference.to(difference_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])
    tl.store(partial_ptr + program, tl.sum(total))


@triton.jit
def tap_mse_finish_kernel(partial_ptr, programs, num_tokens_ptr, width, loss_ptr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + place, mask=place < programs, other=0.0)
    tl.store(loss_ptr, tl.sum(total) / (width * tl.load(num_tokens_ptr)))


@triton.jit
def tap_mse_backward_kernel(difference_ptr, grad_ptr, num_tokens_ptr, width, out_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(grad_ptr) * 2 / (width * tl.load(num_tokens_ptr))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    difference = tl.load(difference_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (difference * factor).to(out_ptr.dtype.element_ty), mask=place < size)


def tap_mse(
    student: Tensor,  # [..., w]
    teacher: Tensor,  # [..., w], or [..., d] with index
    mask: Tensor | None,  # [...] bool
    index: Tensor | None,  # [w] int64
    num_tokens: Tensor,  # 0-dim fp32
    need_grad: bool,
) -> tuple[Tensor, Tensor]:  # 0-dim fp32, [..., w]
    """As `reference.tap_mse`."""
    width, tokens = student.shape[-1], student.numel() // student.shape[-1]
    kept = torch.promote_types(student.dtype, teacher.dtype)
    difference = student.new_empty(student.shape if need_grad else 0, dtype=kept)
    loss = student.new_empty((), dtype=torch.float32)
    student = launch.unit_stride(student.reshape(tokens, width))
    teacher = launch.unit_stride(teacher.reshape(tokens, teacher.shape[-1]))
    chosen = launch.pick("tap_mse", default=0 if width > 128 else 1)
    programs = triton.cdiv(tokens, chosen.blocks["ROWS"])
    partial = student.new_empty(programs, dtype=torch.float32)
    with launch.on_device_of(student):
        if programs:
            tap_mse_kernel[(programs,)](
                student, student.stride(0), teacher, teacher.stride(0), None if mask is None else mask.contiguous(),
                None if index is None else index.contiguous(), difference, partial, tokens, width,
                HAS_MASK=mask is not None, HAS_INDEX=index is not None, KEEP=need_grad, **chosen.options,
            )  # fmt: skip
        tap_mse_finish_kernel[(1,)](partial, programs, num_tokens, width, loss, BLOCK=1024, num_warps=4)
    return loss, difference


def tap_mse_backward(grad: Tensor, difference: Tensor, num_tokens: Tensor) -> Tensor:
    """As `reference.tap_mse_backward`."""
    out, size, block = torch.empty_like(difference), difference.numel(), 2048
    if size:
        with launch.on_device_of(difference):
            tap_mse_backward_kernel[(triton.cdiv(size, block),)](
                difference, grad, num_tokens, difference.shape[-1], out, size, BLOCK=block, num_warps=8
            )  # fmt: skip
    return out
