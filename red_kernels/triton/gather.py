"""Choice of channels along any dimension, and its gradients (see red_kernels/gather.py for the mathematics).

`pick_rows` does the work: a program owns ROWS rows of the result and walks over their columns, so an index of columns is read once for
ROWS rows. Read and written once: x's columns that are chosen (which at a density above a few per cent are all of its 32-byte sectors)
and the result. The indexed loads go through L1 rather than rows through shared memory: neighbours of a sorted index lie within one or
two lines, and an unsorted one finds the program's own rows in L1, since a program reads nothing else. An entry outside the input gives
zero without a read; that is how an inverse index, -1 where a channel was left out, makes the gradient in one pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch
from red_kernels.triton.gather_sums import as_three, gather_scale_backward, summed_backward

__all__ = ["gather", "gather_backward", "gather_scale_backward", "pick_rows"]


@triton.jit
def pick_rows(
    x_ptr, x_stride, x_rows, x_columns,
    row_index_ptr, row_scale_ptr,
    column_index_ptr, column_scale_ptr,
    out_ptr, row, rows, columns,
    SCALE_AT_SOURCE: tl.constexpr, CONTIGUOUS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[row, j] = x[row_index[row], column_index[j]] times their scales, for one block of rows (int64) and all columns."""
    exists = row < rows
    source_row = row
    if row_index_ptr is not None:
        source_row = tl.load(row_index_ptr + row, mask=exists, other=-1)
    read_row = exists & (source_row >= 0) & (source_row < x_rows)
    if row_scale_ptr is not None:
        scale_row = source_row if SCALE_AT_SOURCE else row
        row_scale = tl.load(row_scale_ptr + scale_row, mask=read_row, other=0.0).to(tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if CONTIGUOUS:
            # Not 16 bytes of the result to a thread: threads side by side then read neighbours, which lie within two or three lines.
            column = tl.max_contiguous(column, CONTIGUOUS)
        inside = column < columns
        source = column
        read = inside
        if column_index_ptr is not None:
            source = tl.load(column_index_ptr + column, mask=inside, other=-1)
            read = (source >= 0) & (source < x_columns)
            # Says which way the threads run, which Triton 3.6 gets wrong; of an unknown alignment, nothing is loaded two at once.
            source = tl.max_contiguous(source, 2)
        place = x_ptr + source_row[:, None] * x_stride + source[None, :]
        value = tl.load(place, mask=read_row[:, None] & read[None, :], other=0.0)  # without a scale no arithmetic: the same bits
        if row_scale_ptr is not None:
            value = value.to(tl.float32) * row_scale[:, None]
        if column_scale_ptr is not None:
            scale_column = source if SCALE_AT_SOURCE else column
            value = value.to(tl.float32) * tl.load(column_scale_ptr + scale_column, mask=read, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + row[:, None] * columns + column[None, :], value.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit
def gather_kernel(
    x_ptr, x_batch_stride, x_stride, x_rows, x_columns,
    row_index_ptr, row_scale_ptr,
    column_index_ptr, column_scale_ptr,
    out_ptr, rows, columns,
    SCALE_AT_SOURCE: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pick_rows(
        x_ptr + batch * x_batch_stride, x_stride, x_rows, x_columns, row_index_ptr, row_scale_ptr, column_index_ptr, column_scale_ptr,
        out_ptr + batch * rows * columns, row, rows, columns, SCALE_AT_SOURCE, CONTIGUOUS, COLUMNS,
    )  # fmt: skip


def _pick(x: Tensor, index: Tensor, dim: int, scale: Tensor | None, scale_at_source: bool) -> Tensor:
    """y[…, j, …] = x[…, index[j], …] · scale[j], or · scale[index[j]]; zero where the index is outside x."""
    out = x.new_empty([len(index) if axis == dim else size for axis, size in enumerate(x.shape)])
    if not out.numel():
        return out
    if not x.numel():
        return out.zero_()
    index, scale = index.contiguous(), None if scale is None else scale.contiguous()
    last, x = dim == x.dim() - 1, as_three(x, dim)
    rows, columns = (x.shape[1], len(index)) if last else (len(index), x.shape[2])
    sides = (None, None, index, scale) if last else (index, scale, None, None)
    chosen = launch.pick("gather", default=2 if columns <= 128 else 0 if last else 1)
    with launch.on_device_of(x):
        gather_kernel[(x.shape[0] * triton.cdiv(rows, chosen.blocks["ROWS"]),)](
            x, x.stride(0), x.stride(1), x.shape[1], x.shape[2], *sides, out, rows, columns,
            SCALE_AT_SOURCE=scale_at_source, CONTIGUOUS=2 if last else 0, **chosen.options,
        )  # fmt: skip
    return out


def gather(x: Tensor, index: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    """As `reference.gather`; `dim` counts from the front. An entry outside x gives zero."""
    return _pick(x, index, dim, scale, scale_at_source=False)


def gather_backward(grad: Tensor, index: Tensor, dim: int, scale: Tensor | None, width: int, inverse: Tensor | None = None) -> Tensor:
    """As `reference.gather_backward`: one pass with the inverse of the index, else a stable sort and sums in the order of the index."""
    if inverse is not None:
        return _pick(grad, inverse, dim, scale, scale_at_source=True)
    return summed_backward(grad, index, dim, scale, width)
