"""The selected rows and columns of many weights at once, such as all of a layer: a teacher cut to the student's hidden size.

    y_n[i, j] = x_n[rows_n[i], columns_n[j]] · row_scale_n[i] · column_scale_n[j]

A reader of the residual stream (q, k, v, gate, up) loses columns, a writer (o, down) rows, and either side of any weight may stay
whole. One launch takes a layer, so that its small weights need not wait for each other. Without gradients: the weights are frozen.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks

Side = Tensor | None


@torch.library.custom_op("red::gather_many", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    tensors: Sequence[Tensor],
    rows: Sequence[Optional[Tensor]],
    columns: Sequence[Optional[Tensor]],
    row_scales: Sequence[Optional[Tensor]],
    column_scales: Sequence[Optional[Tensor]],
) -> list[Tensor]:
    for n, x in enumerate(tensors):
        for dim, index in enumerate((rows[n], columns[n])):
            if index is not None:
                checks.check_range("gather_many", f"indices[{n}]", index, 0, x.shape[dim])
    floating = [x for x in (*tensors, *row_scales, *column_scales) if x is not None]
    return backend.implementation("gather_many", *floating).gather_many(tensors, rows, columns, row_scales, column_scales)


@_op.register_fake
def _(tensors, rows, columns, row_scales, column_scales):
    return [
        x.new_empty(x.shape[0] if row is None else row.shape[0], x.shape[1] if column is None else column.shape[0])
        for x, row, column in zip(tensors, rows, columns, strict=True)
    ]


def gather_many(
    tensors: Sequence[Tensor],  # [R_n, C_n] each
    indices: Sequence[Tensor | tuple[Tensor, Tensor]],  # [k_n] int64 each
    dims: Sequence[int | tuple[int, int]],
    scales: Sequence[Side | tuple[Side, Side]] | None = None,  # [k_n] each
) -> list[Tensor]:  # [r_n, c_n] each, in the dtype of its tensor
    """Rows (dim 0) or columns (dim 1) `indices[n]` of every matrix, each times its scale.

    Args:
        dims: the side of each tensor that is chosen from. A pair, such as (0, 1), takes both: `x[rows][:, columns]`; its index, and
            its scale if it has one, are then pairs in the same order.
        scales: one for each tensor, or None for those without.

    Products in float32 (float64 for float64), rounded once. Not differentiable: `gather` is.

    Raises: TypeError for dtypes, ValueError for lengths, shapes, a tensor or scale that requires a gradient, and (on a CPU only) for an
    index out of range.
    """
    scales = [None] * len(tensors) if scales is None else scales
    if not len(tensors) == len(indices) == len(dims) == len(scales):
        counts = f"{len(tensors)} tensors, {len(indices)} indices, {len(dims)} dims, {len(scales)} scales"
        raise ValueError(f"gather_many: {counts}; give one of each per tensor")
    chosen: list[list[Side]] = []
    for n, (x, index, dim, scale) in enumerate(zip(tensors, indices, dims, scales, strict=True)):
        chosen.append(_sides(n, x, index, dim, scale))
    rows, columns, row_scales, column_scales = ([each[side] for each in chosen] for side in range(4))
    return _op(list(tensors), rows, columns, row_scales, column_scales) if tensors else []


def _sides(n: int, x: Tensor, index, dim, scale) -> list[Side]:
    """[row index, column index, row scale, column scale] of tensor `n`, checked."""
    checks.require_floating("gather_many", **{f"tensors[{n}]": x})
    if x.dim() != 2:
        raise ValueError(f"gather_many: tensors[{n}] must be a matrix, got shape {list(x.shape)}")
    one = isinstance(dim, int)
    dim_list, index_list = ((dim,), (index,)) if one else (tuple(dim), tuple(index))
    scale_list = (scale,) if one else (None,) * len(dim_list) if scale is None else tuple(scale)
    if not dim_list or any(not -2 <= each < 2 for each in dim_list) or len({each % 2 for each in dim_list}) != len(dim_list):
        raise ValueError(f"gather_many: dims[{n}] = {dim} is not a side of a matrix; expected 0, 1, or a pair of both")
    if not len(dim_list) == len(index_list) == len(scale_list):
        raise ValueError(f"gather_many: dims[{n}] = {dim} needs {len(dim_list)} indices and scales, got {len(index_list)} and {len(scale_list)}")
    sides: list[Side] = [None] * 4
    for each, side_index, side_scale in zip(dim_list, index_list, scale_list, strict=True):
        checks.require_index("gather_many", side_index)
        if side_scale is not None:
            checks.require_floating("gather_many", **{f"scales[{n}]": side_scale})
            checks.require_shape("gather_many", f"scales[{n}]", side_scale, side_index.shape, "that of its index, [k]")
        sides[each % 2], sides[2 + each % 2] = side_index, side_scale
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sides[2:])):
        raise ValueError(f"gather_many: tensors[{n}] or its scale requires a gradient, which gather_many does not make; detach it, or use gather")
    return sides
