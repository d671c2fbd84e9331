"""Second moments, one triangle of tiles and its mirror (see red_kernels/covariance.py for the mathematics).

A program owns a tile on or below the diagonal, walks over all tokens, and adds its sum to the tile and to the mirrored one: half the
products of X Xᵀ. It takes all tokens because a split would need a workspace; a width of 2048 gives 136 tiles of 128, about one for every
processor. `out` is read and written once. On the diagonal only the lower half of a tile is used, so the triangles agree bit for bit.

Without a scale half-precision inputs multiply as they are, which is exact. With one, scale² x of one side is float32; rounding it to half
precision would add an error the size of the input's own to every product, so it is split into two bfloat16 terms (2⁻¹⁷) instead: two
products for bfloat16, three for float16, whose x itself takes two terms. Float32 inputs multiply as three products of tensor cores
(tf32x3: 2⁻²¹), or in float32 on AMD.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch
from red_kernels.triton.selection_low_rank import split_dot


@triton.jit
def covariance_kernel(
    x_ptr, x_stride, scale_ptr, mask_ptr,
    out_ptr, out_row_stride, out_column_stride,
    tokens, width,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Tile `program` of the triangle, row by row: the first of row r is r (r + 1) / 2. The root may be one off.
    program = tl.program_id(0)
    below = ((tl.sqrt(8.0 * program.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    below = tl.where(below * (below + 1) // 2 > program, below - 1, below)
    below = tl.where((below + 1) * (below + 2) // 2 <= program, below + 1, below)
    beside = program - below * (below + 1) // 2
    row = below * CHANNELS + tl.arange(0, CHANNELS)
    column = beside * CHANNELS + tl.arange(0, CHANNELS)
    exists, inside = row < width, column < width

    total = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < tokens
        if mask_ptr is not None:
            counts = tl.load(mask_ptr + token, mask=counts, other=0) != 0
        place = x_ptr + token.to(tl.int64)[:, None] * x_stride
        left = tl.load(place + row[None, :], mask=counts[:, None] & exists[None, :], other=0.0)
        right = tl.load(place + column[None, :], mask=counts[:, None] & inside[None, :], other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + token, mask=counts, other=0.0).to(tl.float32)
            scaled = left.to(tl.float32) * (scale * scale)[:, None]
            if x_ptr.dtype.element_ty == tl.bfloat16:
                high = scaled.to(tl.bfloat16)
                total = tl.dot(tl.trans((scaled - high.to(tl.float32)).to(tl.bfloat16)), right, total)
                total = tl.dot(tl.trans(high), right, total)
            elif x_ptr.dtype.element_ty == tl.float16:
                total = split_dot(tl.trans(scaled), right.to(tl.float32), total)
            else:
                total = tl.dot(tl.trans(scaled), right, total, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)

    if below == beside:
        total = tl.where(row[:, None] >= column[None, :], total, tl.trans(total))
    row_place, column_place = row.to(tl.int64), column.to(tl.int64)
    tile = out_ptr + row_place[:, None] * out_row_stride + column_place[None, :] * out_column_stride
    mask = exists[:, None] & inside[None, :]
    tl.store(tile, tl.load(tile, mask=mask, other=0.0) + total, mask=mask)
    if below != beside:
        mirror = out_ptr + column_place[:, None] * out_row_stride + row_place[None, :] * out_column_stride
        mask = inside[:, None] & exists[None, :]
        tl.store(mirror, tl.load(mirror, mask=mask, other=0.0) + tl.trans(total), mask=mask)


def covariance(x: Tensor, scale: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """As `reference.covariance`, for a float32 `out`."""
    width = x.shape[-1]
    tokens = x.numel() // max(width, 1)
    if not tokens or not width:
        return
    x = launch.unit_stride(x.reshape(tokens, width))
    # Operands of two terms have the registers for small tiles only, scaled ones those for few tokens.
    two_terms = x.dtype == torch.float32 or (x.dtype == torch.float16 and scale is not None)
    chosen = launch.LAUNCHES["covariance"][1] if two_terms else launch.pick("covariance", default=1 if width <= 512 else 0)
    options = chosen.options | (dict(TOKENS=32) if scale is not None else {})
    precision = "tf32x3" if torch.version.hip is None else "ieee"
    tiles = triton.cdiv(width, chosen.blocks["CHANNELS"])
    with launch.on_device_of(x):
        covariance_kernel[(tiles * (tiles + 1) // 2,)](
            x, x.stride(0), None if scale is None else scale.contiguous(), None if mask is None else mask.contiguous(),
            out, *out.stride(), tokens, width, PRECISION=precision, **options,
        )  # fmt: skip
