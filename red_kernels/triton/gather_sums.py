"""The gradients of a gather that are sums: to x where channels may repeat, and to the scale. No atomics, so a run repeats bit for bit.

To x: a stable sort of the index puts the gradients of each channel beside each other, in the order of the index, and a program adds up
its own channels' (as many turns as the most frequent of them has entries). To the scale: programs add up shares of the other dimensions,
a second launch adds the shares in their order. float32 accumulation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch


@triton.jit
def gather_sum_kernel(
    grad_ptr, grad_batch_stride, grad_stride,
    order_ptr, starts_ptr, scale_ptr,
    out_ptr, rows, columns,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) // column_blocks
    batch = (block // row_blocks).to(tl.int64)
    row = (block % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % column_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if LAST:
        column = tl.max_contiguous(column, 2)  # as in `pick_rows`
    exists, inside = row < rows, column < columns
    # The channels are the columns (LAST) or the rows; entries first … end of the order are those of each.
    channel = column if LAST else row
    known = inside if LAST else exists
    first = tl.load(starts_ptr + channel, mask=known, other=0)
    end = tl.load(starts_ptr + channel + 1, mask=known, other=0)
    grad_ptr += batch * grad_batch_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for turn in range(tl.max(end - first)):
        live = first + turn < end
        entry = tl.load(order_ptr + first + turn, mask=live, other=0)
        if LAST:
            entry = tl.max_contiguous(entry, 2)
        scale = tl.full([1], 1.0, tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + entry, mask=live, other=0.0).to(tl.float32)
        if LAST:
            place, read, scale = grad_ptr + row[:, None] * grad_stride + entry[None, :], exists[:, None] & live[None, :], scale[None, :]
        else:
            place, read, scale = grad_ptr + entry[:, None] * grad_stride + column[None, :], live[:, None] & inside[None, :], scale[:, None]
        total += tl.load(place, mask=read, other=0.0).to(tl.float32) * scale
    out_ptr += batch * rows * columns
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit
def gather_scale_columns_kernel(
    grad_ptr, grad_stride, x_ptr, x_stride, index_ptr, partial_ptr, rows, columns, x_columns, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.max_contiguous(tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), 2)  # as in `pick_rows`
    inside = column < columns
    source = tl.load(index_ptr + column, mask=inside, other=-1)
    read = (source >= 0) & (source < x_columns)
    source = tl.max_contiguous(source, 2)
    first = tl.program_id(1).to(tl.int64) * share
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, share, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & read[None, :]
        dy = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + source[None, :], mask=mask, other=0.0).to(tl.float32)
        total += dy * x
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * columns + column, tl.sum(total, 0), mask=inside)


@triton.jit
def gather_scale_rows_kernel(
    grad_ptr, grad_batch_stride, grad_stride, x_ptr, x_batch_stride, x_stride, index_ptr, partial_ptr,
    batches, rows, columns, x_rows, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    source = tl.load(index_ptr + row, mask=exists, other=-1)
    read = (source >= 0) & (source < x_rows)
    first = tl.program_id(1).to(tl.int64) * share
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for batch in range(first, tl.minimum(first + share, batches)):
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = read[:, None] & (column < columns)[None, :]
            dy = tl.load(grad_ptr + batch * grad_batch_stride + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + batch * x_batch_stride + source[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            total += dy * x
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(total, 1), mask=exists)


@triton.jit
def gather_scale_finish_kernel(partial_ptr, out_ptr, shares, columns, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([SHARES, COLUMNS], tl.float32)
    for start in range(0, shares, SHARES):
        share = start + tl.arange(0, SHARES)
        place = partial_ptr + share.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(place, mask=(share < shares)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=inside)


def as_three(x: Tensor, dim: int) -> Tensor:
    """[..., D, ...] as [batches, rows, columns], the channels last if they are, else in the middle."""
    if dim == x.dim() - 1:
        return launch.unit_stride(x.reshape(1, -1, x.shape[dim]))
    return launch.unit_stride(x.reshape(x.shape[:dim].numel(), x.shape[dim], -1))


def summed_backward(grad: Tensor, index: Tensor, dim: int, scale: Tensor | None, width: int) -> Tensor:
    """dx[…, i, …] = Σ_{j: index[j] = i} dy[…, j, …] · scale[j], in the order of j."""
    out = grad.new_empty([width if axis == dim else size for axis, size in enumerate(grad.shape)])
    if not grad.numel():
        return out.zero_()
    last = dim == grad.dim() - 1
    ordered, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(width + 1, device=index.device))
    grad = as_three(grad, dim)
    rows, columns = (grad.shape[1], width) if last else (width, grad.shape[2])
    chosen = launch.pick("gather", default=2 if columns <= 128 else 0 if last else 1)
    blocks = triton.cdiv(rows, chosen.blocks["ROWS"]) * triton.cdiv(columns, chosen.blocks["COLUMNS"])
    with launch.on_device_of(grad):
        gather_sum_kernel[(grad.shape[0] * blocks,)](
            grad, grad.stride(0), grad.stride(1), order, starts, None if scale is None else scale.contiguous(),
            out, rows, columns, LAST=last, **chosen.options,
        )  # fmt: skip
    return out


def gather_scale_backward(grad: Tensor, x: Tensor, index: Tensor, dim: int) -> Tensor:
    """As `reference.gather_scale_backward`."""
    width, out = len(index), x.new_empty(len(index), dtype=torch.float32)
    if not grad.numel():
        return out.zero_()
    last, index = dim == x.dim() - 1, index.contiguous()
    grad, x = as_three(grad, dim), as_three(x, dim)
    chosen = launch.pick("gather", default=2 if grad.shape[2] <= 128 else 0 if last else 1)
    row_block, column_block = chosen.blocks["ROWS"], chosen.blocks["COLUMNS"]
    # Shares enough for four programs a processor, whose partial sums still weigh nothing beside the input.
    blocks = triton.cdiv(width, column_block if last else row_block)
    turns = triton.cdiv(grad.shape[1], row_block) if last else grad.shape[0]
    shares = max(1, min(turns, triton.cdiv(4 * launch.processors(x), blocks)))
    turns = triton.cdiv(turns, shares)
    shares = triton.cdiv(grad.shape[1] if last else grad.shape[0], turns * (row_block if last else 1))
    partial = out.new_empty(shares, width)
    with launch.on_device_of(x):
        if last:
            gather_scale_columns_kernel[(blocks, shares)](
                grad, grad.stride(1), x, x.stride(1), index, partial, grad.shape[1], width, x.shape[2], turns * row_block, **chosen.options
            )  # fmt: skip
        else:
            gather_scale_rows_kernel[(blocks, shares)](
                grad, grad.stride(0), grad.stride(1), x, x.stride(0), x.stride(1), index, partial,
                grad.shape[0], width, grad.shape[2], x.shape[1], turns, **chosen.options,
            )  # fmt: skip
        gather_scale_finish_kernel[(triton.cdiv(width, 64),)](partial, out, shares, width, SHARES=16, COLUMNS=64, num_warps=4)
    return out
