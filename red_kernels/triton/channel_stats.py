"""Channel statistics by one read of the activations (see red_kernels/channel_stats.py for the mathematics).

A program owns a tile of consecutive tokens and a block of channels, and reads each token once: it walks over the segments that occur in
the tile, and of each reads the rows from its first to its last. What it adds up goes to row `tile + segment` of a buffer: ids never
decrease, so those pairs climb a staircase and no two share a row. A second launch adds the rows of a segment, in the order of the
tiles. Beside the activations that moves 2 · 4 · D · (tiles + segments) bytes, 1/32 of bf16 activations in tiles of 128 tokens, most of it in
the cache; no atomics, and nothing is cleared.
Ids in any order are sorted first, stably, and the rows read through the permutation. float32 accumulation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch


@triton.jit
def channel_stats_tile_kernel(
    x_ptr, x_stride,
    ids_ptr, order_ptr,
    abs_ptr, square_ptr, max_ptr,
    held_ptr, first_ptr, last_ptr,
    tokens, length, width, segments, column_blocks,
    HAS_IDS: tl.constexpr, HAS_ORDER: tl.constexpr, SQUARES: tl.constexpr, MAXIMUM: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    token = tile * TILE + tl.arange(0, TILE)
    exists = token < tokens
    ids = token // length
    if HAS_IDS:
        ids = tl.load(ids_ptr + token, mask=exists, other=-1).to(tl.int32)
    counts = exists & (ids >= 0) & (ids < segments)
    first = tl.min(tl.where(counts, ids, segments))
    if column_block == 0:
        tl.store(first_ptr + tile, first)
        tl.store(last_ptr + tile, tl.max(tl.where(counts, ids, -1)))

    segment = first
    while segment < segments:
        here = counts & (ids == segment)
        begin = tl.min(tl.where(here, token, tokens))
        end = tl.max(tl.where(here, token, -1)) + 1
        held = tl.sum(here.to(tl.int32))
        holes = held < end - begin
        abs_sum = tl.zeros([COLUMNS], tl.float32)
        square_sum = tl.zeros([COLUMNS], tl.float32)
        highest = tl.zeros([COLUMNS], tl.int32)
        for start in range(begin, end, ROWS):
            place = start + tl.arange(0, ROWS)
            use = place < end
            if HAS_IDS:  # without holes no thread waits for its ids
                use = use & (tl.load(ids_ptr + place, mask=use & holes, other=segment) == segment)
            row = place.to(tl.int64)
            if HAS_ORDER:
                row = tl.load(order_ptr + place, mask=use, other=0)
            value = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=use[:, None] & inside[None, :], other=0.0).to(tl.float32)
            size = tl.abs(value)
            abs_sum += tl.sum(size, 0)
            if SQUARES:
                square_sum += tl.sum(size * size, 0)
            if MAXIMUM:  # the bits of numbers that are not negative compare as the numbers do, and NaN is the largest
                highest = tl.maximum(highest, tl.max(size.to(tl.int32, bitcast=True), 0))
        slot = tile + segment
        out = slot.to(tl.int64) * width + column
        tl.store(abs_ptr + out, abs_sum, mask=inside)
        if SQUARES:
            tl.store(square_ptr + out, square_sum, mask=inside)
        if MAXIMUM:
            tl.store(max_ptr + out, highest.to(tl.float32, bitcast=True), mask=inside)
        following = tl.min(tl.where(counts & (ids > segment), ids, segments))
        if column_block == 0:
            tl.store(held_ptr + slot, held)
            if following < segments:
                for absent in range(segment + 1, following):
                    tl.store(held_ptr + tile + absent, 0)
        segment = following


@triton.jit
def channel_stats_finish_kernel(
    abs_ptr, square_ptr, max_ptr,
    held_ptr, first_ptr, last_ptr,
    abs_sum_ptr, square_sum_ptr, abs_max_ptr, count_ptr,
    tiles, width, column_blocks,
    SQUARES: tl.constexpr, MAXIMUM: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    begin = tiles
    end = 0
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        exists = tile < tiles
        first = tl.load(first_ptr + tile, mask=exists, other=0)
        last = tl.load(last_ptr + tile, mask=exists, other=-1)
        spans = (first <= segment) & (segment <= last)
        begin = tl.minimum(begin, tl.min(tl.where(spans, tile, tiles)))
        end = tl.maximum(end, tl.max(tl.where(spans, tile + 1, 0)))

    count = tl.zeros([SLOTS], tl.int64)
    abs_sum = tl.zeros([COLUMNS], tl.float32)
    square_sum = tl.zeros([COLUMNS], tl.float32)
    highest = tl.zeros([COLUMNS], tl.int32)
    for start in range(begin, end, SLOTS):
        tile = start + tl.arange(0, SLOTS)
        exists = tile < end  # a tile of nothing but padding wrote no row: its first is beyond every segment
        first = tl.load(first_ptr + tile, mask=exists, other=0)
        last = tl.load(last_ptr + tile, mask=exists, other=-1)
        spans = (first <= segment) & (segment <= last)
        slot = (tile + segment).to(tl.int64)
        held = tl.load(held_ptr + slot, mask=spans, other=0)
        count += held
        # Read beside `held`, not after it: where the tile only passes over this segment that is memory nobody wrote, and not used.
        read = spans[:, None] & inside[None, :]
        place = slot[:, None] * width + column[None, :]
        use = held[:, None] > 0
        abs_sum += tl.sum(tl.where(use, tl.load(abs_ptr + place, mask=read, other=0.0), 0.0), 0)
        if SQUARES:
            square_sum += tl.sum(tl.where(use, tl.load(square_ptr + place, mask=read, other=0.0), 0.0), 0)
        if MAXIMUM:
            bits = tl.load(max_ptr + place, mask=read, other=0.0).to(tl.int32, bitcast=True)
            highest = tl.maximum(highest, tl.max(tl.where(use, bits, 0), 0))
    out = segment.to(tl.int64) * width + column
    tl.store(abs_sum_ptr + out, abs_sum, mask=inside)
    if SQUARES:
        tl.store(square_sum_ptr + out, square_sum, mask=inside)
    if MAXIMUM:
        tl.store(abs_max_ptr + out, highest.to(tl.float32, bitcast=True), mask=inside)
    if column_block == 0:
        tl.store(count_ptr + segment, tl.sum(count))


def finish(
    abs_parts: Tensor,  # [tiles + S, D] fp32: row tile + s holds the sum of segment s in that tile
    square_parts: Tensor | None,  # [tiles + S, D] fp32
    max_parts: Tensor | None,  # [tiles + S, D] fp32
    held: Tensor,  # [tiles + S] int32: tokens of s in the tile, for all s from its first to its last
    first: Tensor,  # [tiles] int32: the lowest segment in the tile, or S
    last: Tensor,  # [tiles] int32: the highest, or -1
    num_segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the parts of every segment, in the order of the tiles: what `channel_stats` returns."""
    width = abs_parts.shape[1]
    abs_sum = abs_parts.new_empty(num_segments, width)
    square_sum = abs_parts.new_empty(0 if square_parts is None else (num_segments, width))
    abs_max = abs_parts.new_empty(0 if max_parts is None else (num_segments, width))
    count = held.new_empty(num_segments, dtype=torch.int64)
    column_blocks = max(triton.cdiv(width, 64), 1)
    if num_segments:
        with launch.on_device_of(abs_parts):
            channel_stats_finish_kernel[(num_segments * column_blocks,)](
                abs_parts, square_parts, max_parts, held, first, last, abs_sum, square_sum, abs_max, count,
                first.shape[0], width, column_blocks,
                SQUARES=square_parts is not None, MAXIMUM=max_parts is not None, TILES=256, SLOTS=16, COLUMNS=64, num_warps=4,
            )  # fmt: skip
    return abs_sum, count, square_sum, abs_max


def _choice(x: Tensor, tokens: int, width: int) -> int:
    """Number of the launch: narrow rows, or few tokens, leave too few programs of the wide one to fill the chip."""
    if width <= 256:
        return 2
    wide = launch.LAUNCHES["channel_stats"][0].blocks
    programs = triton.cdiv(tokens, wide["TILE"]) * triton.cdiv(width, wide["COLUMNS"])
    return 0 if programs >= 2 * launch.processors(x) else 1


def channel_stats(
    x: Tensor,  # [B, T, D]
    segment_ids: Tensor | None,  # [B, T] int64, -1 = padding
    num_segments: int,
    squares: bool,
    maximum: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [S, D] fp32, [S] int64, [S, D] fp32, [S, D] fp32
    """As `reference.channel_stats`."""
    batch, length, width = x.shape
    tokens = batch * length
    order = None
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(tokens)
        if not ordered:
            segment_ids, order = segment_ids.sort(stable=True)
    x = launch.unit_stride(x.reshape(tokens, width))
    chosen = launch.pick("channel_stats", default=_choice(x, tokens, width))
    tiles = triton.cdiv(tokens, chosen.blocks["TILE"])
    column_blocks = max(triton.cdiv(width, chosen.blocks["COLUMNS"]), 1)

    def parts(wanted: bool) -> Tensor | None:
        return x.new_empty(tiles + num_segments, width, dtype=torch.float32) if wanted else None

    abs_parts, square_parts, max_parts = parts(True), parts(squares), parts(maximum)
    held = x.new_empty(tiles + num_segments, dtype=torch.int32)
    first, last = (x.new_empty(tiles, dtype=torch.int32) for _ in range(2))
    if tiles:
        with launch.on_device_of(x):
            channel_stats_tile_kernel[(tiles * column_blocks,)](
                x, x.stride(0), None if segment_ids is None else segment_ids.contiguous(), order,
                abs_parts, square_parts, max_parts, held, first, last, tokens, length, width, num_segments, column_blocks,
                HAS_IDS=segment_ids is not None, HAS_ORDER=order is not None, SQUARES=squares, MAXIMUM=maximum, **chosen.options,
            )  # fmt: skip
    return finish(abs_parts, square_parts, max_parts, held, first, last, num_segments)
