"""Chosen rows and columns of up to GROUP matrices in one launch (see red_kernels/gather_many.py for the mathematics).

The grid is flat over the row blocks of all results; a program finds its matrix among the first blocks, and then does what `gather` does:
ROWS rows, all columns, with the same two to a thread whether they are chosen or copied: one kernel has one layout. What
describes the matrices travels as arguments of the launch, so nothing is copied to the device and a CUDA graph can capture it.
"""

import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch
from red_kernels.triton.gather import pick_rows

GROUP = 8  # matrices of a launch: a layer has seven


@triton.jit
def gather_many_kernel(
    x_ptrs, x_strides, x_rows, x_columns,
    row_index_ptrs, row_scale_ptrs, column_index_ptrs, column_scale_ptrs,
    out_ptrs, rows, columns, first_blocks,
    COUNT: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for n in tl.static_range(COUNT):
        if (program >= first_blocks[n]) & (program < first_blocks[n + 1]):
            row = (program - first_blocks[n]).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            pick_rows(
                x_ptrs[n], x_strides[n], x_rows[n], x_columns[n],
                row_index_ptrs[n], row_scale_ptrs[n], column_index_ptrs[n], column_scale_ptrs[n],
                out_ptrs[n], row, rows[n], columns[n], False, CONTIGUOUS, COLUMNS,
            )  # fmt: skip


def gather_many(
    tensors: list[Tensor],  # [R_n, C_n] each
    rows: list[Tensor | None],  # [r_n] int64
    columns: list[Tensor | None],  # [c_n] int64
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
) -> list[Tensor]:  # [r_n, c_n] each
    """As `reference.gather_many`."""
    outs = []
    for x, row, column in zip(tensors, rows, columns, strict=True):
        outs.append(x.new_empty(x.shape[0] if row is None else len(row), x.shape[1] if column is None else len(column)))
    work = [n for n, out in enumerate(outs) if out.numel()]
    chosen = launch.pick("gather_many")
    for start in range(0, len(work), GROUP):
        group = work[start : start + GROUP]
        xs = [launch.unit_stride(tensors[n]) for n in group]
        sides = [tuple(None if side[n] is None else side[n].contiguous() for n in group) for side in (rows, row_scales, columns, column_scales)]
        first_blocks = [0]
        for n in group:
            first_blocks.append(first_blocks[-1] + triton.cdiv(outs[n].shape[0], chosen.blocks["ROWS"]))
        with launch.on_device_of(xs[0]):
            gather_many_kernel[(first_blocks[-1],)](
                tuple(xs), tuple(x.stride(0) for x in xs), tuple(x.shape[0] for x in xs), tuple(x.shape[1] for x in xs), *sides,
                tuple(outs[n] for n in group), tuple(outs[n].shape[0] for n in group), tuple(outs[n].shape[1] for n in group),
                tuple(first_blocks), COUNT=len(group), CONTIGUOUS=2, **chosen.options,
            )  # fmt: skip
    return outs
