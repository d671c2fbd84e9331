"""A selection with a low-rank correction (see red_kernels/selection_low_rank.py for the mathematics).

The first product, and those of the backward, are ordinary ones and go to the library. The second product has few terms, so what it costs
is its result and what is gathered: one kernel starts its accumulator from the gathered tile, adds the product, rounds once, and so reads
the weight once and writes the result once. Blocks are large enough that the factors are read from L2 a few times only.

Float32 factors of a half-precision weight are split into two bfloat16 terms, x = hi + lo to 2⁻¹⁷, and multiplied as hi hi + hi lo + lo hi
with float32 accumulation: 2⁻¹⁶ of a term, far inside the rounding of a half-precision result. Float32 weights multiply in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch


@triton.jit
def split_dot(a, b, total):
    """total + a @ b of float32 operands, each as the sum of two bfloat16."""
    a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
    a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
    b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(a_low, b_high, total)
    total = tl.dot(a_high, b_low, total)
    return tl.dot(a_high, b_high, total)


@triton.jit
def selection_low_rank_kernel(
    weight_ptr, weight_stride, weight_rows, weight_columns,
    row_index_ptr, column_index_ptr,
    left_ptr, left_row_stride, left_term_stride,
    right_ptr, right_term_stride, right_column_stride,
    out_ptr, rows, columns, terms,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    # Columns fastest: programs beside each other share rows of the left factor and, where columns are chosen, of the weight.
    column_blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % column_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = row < rows, column < columns
    if row_index_ptr is not None:
        source_row = tl.load(row_index_ptr + row, mask=exists, other=-1)
        source_column = column
        read_row, read_column = (source_row >= 0) & (source_row < weight_rows), inside
    else:
        source_row = row
        source_column = tl.max_contiguous(tl.load(column_index_ptr + column, mask=inside, other=-1), 2)  # as in `pick_rows`
        read_row, read_column = exists, (source_column >= 0) & (source_column < weight_columns)
    place = weight_ptr + source_row[:, None] * weight_stride + source_column[None, :]
    total = tl.load(place, mask=read_row[:, None] & read_column[None, :], other=0.0).to(tl.float32)
    for start in range(0, terms, TERMS):
        term = start + tl.arange(0, TERMS).to(tl.int64)
        known = term < terms
        left = left_ptr + row[:, None] * left_row_stride + term[None, :] * left_term_stride
        right = right_ptr + term[:, None] * right_term_stride + column[None, :] * right_column_stride
        a = tl.load(left, mask=exists[:, None] & known[None, :], other=0.0).to(tl.float32)
        b = tl.load(right, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if EXACT:
            total = tl.dot(a, b, total, input_precision="ieee")
        else:
            total = split_dot(a, b, total)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


def halves(x: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 tensors whose sum is `x` to 2⁻¹⁷ (exactly, for a bfloat16 `x`)."""
    if x.dtype == torch.bfloat16:
        return (x,)
    high = x.bfloat16()
    return high, (x.float() - high.float()).bfloat16()


def product(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:  # [m, k], [k, n] → [m, n] fp32
    """a @ b with a float32 result: of bfloat16 terms, two for a float32 operand, where the weight is bfloat16; else of float32 copies."""
    if weight.dtype != torch.bfloat16:
        return a.float() @ b.float()
    total, with_wide_result = None, a.is_cuda and torch.version.hip is None
    for left in halves(a):
        for right in halves(b):
            term = torch.mm(left, right, out_dtype=torch.float32) if with_wide_result else left.float() @ right.float()
            total = term if total is None else total.add_(term)
    return total


def selection_low_rank(
    weight: Tensor,  # [out, d], or [d, in] on the output side
    index: Tensor,  # [d'] int64
    down: Tensor,  # [d, r]
    up: Tensor,  # [r, d']
    side: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.selection_low_rank`."""
    index = index.contiguous()
    if side == "input":
        first = product(weight, down, weight)
        left, right, sides, shape = first, up, (None, index), (weight.shape[0], len(index))
    else:
        first = product(down.T, weight, weight)
        left, right, sides, shape = up.T, first, (index, None), (len(index), weight.shape[1])
    out = weight.new_empty(shape)
    if out.numel():
        chosen = launch.pick("selection_low_rank", default=1 if weight.dtype == torch.float32 else 0)
        source = launch.unit_stride(weight)
        programs = triton.cdiv(shape[0], chosen.blocks["ROWS"]) * triton.cdiv(shape[1], chosen.blocks["COLUMNS"])
        with launch.on_device_of(weight):
            selection_low_rank_kernel[(programs,)](
                source, source.stride(0), *weight.shape, *sides, left, *left.stride(), right, *right.stride(), out, *shape, down.shape[1],
                EXACT=weight.dtype == torch.float32, **chosen.options,
            )  # fmt: skip
    return out, first


def selection_low_rank_backward(grad: Tensor, weight: Tensor, product_: Tensor, up: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """As `reference.selection_low_rank_backward`."""
    if side == "input":
        return product(weight.T, product(grad, up.T, weight), weight), product(product_.T, grad, weight)
    return product(weight, product(up, grad, weight).T, weight), product(product_, grad.T, weight)
