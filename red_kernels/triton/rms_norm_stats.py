"""RMSNorm and its calibration statistics in one pass (see red_kernels/rms_norm_stats.py for the mathematics).

A program owns a run of consecutive tokens and walks over them a token at a time, a whole row in registers and the next ones on their
way. Three running sums stay in registers beside it: z and z² of the run, and |·| of one segment in a tile of the run. The last goes to row
`tile + segment` of a buffer whenever a segment or a tile ends, as in channel_stats, whose second launch adds those rows; the moments
end as one row a program. The bytes are RMSNorm's own and 2 · 12 a channel for every run of up to TILE tokens. There are 16 warps for
each multiprocessor, as many as the registers hold; the wider the row, the more of them share a program.
Ids in any order: the walk leaves |·| out, and channel_stats takes it from the result. float32 accumulation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels import reference
from red_kernels.triton import channel_stats as per_segment, launch

MOST_CHANNELS = 8192  # of which 16 warps hold three sums in registers; wider streams take PyTorch
MOST_WAITING = 96 * 1024  # bytes: every GPU since Ampere gives a program that much shared memory
FEWEST_TOKENS = 4  # of a program: with fewer, its sums are as many bytes as its tokens


@triton.jit
def rms_norm_stats_kernel(
    x_ptr, x_stride,
    residual_ptr, residual_stride,
    weight_ptr, ids_ptr,
    output_ptr, stream_ptr, mean_square_ptr,
    abs_ptr, held_ptr, first_ptr, last_ptr, moments_ptr,
    tokens, length, width, segments, run, tiles, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_IDS: tl.constexpr, OF_OUTPUT: tl.constexpr, PER_SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    tile = program * tiles
    for start in range(program * run, program * run + run, TILE):  # tiles beyond the last token too: they are read, and must say that they hold none
        begin = start
        top = tl.minimum(tl.minimum(start + TILE, program * run + run), tokens)
        token = begin + tl.arange(0, TILE)
        exists = token < top
        ids = token // length
        if HAS_IDS:
            ids = tl.load(ids_ptr + token, mask=exists, other=-1).to(tl.int32)
        counts = exists & (ids >= 0) & (ids < segments)
        segment = tl.min(tl.where(counts, ids, segments))
        if PER_SEGMENT:
            tl.store(first_ptr + tile, segment)
            tl.store(last_ptr + tile, tl.max(tl.where(counts, ids, -1)))

        while begin < top:  # from a segment's first token, or the tile's, to where the next segment begins
            end = top
            following = segments
            if PER_SEGMENT:
                later = counts & (ids > segment)
                end = tl.min(tl.where(later, token, top))
                following = tl.min(tl.where(later, ids, segments))
            abs_sum = tl.zeros([WIDTH], tl.float32)
            for at in tl.range(begin, end, num_stages=STAGES):
                row = begin.to(tl.int64) + (at - begin)
                x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
                if HAS_RESIDUAL:
                    x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
                    rounded = x.to(stream_ptr.dtype.element_ty)
                    tl.store(stream_ptr + row * width + column, rounded, mask=inside)
                    x = rounded.to(tl.float32)
                mean_square = tl.sum(x * x) / width
                tl.store(mean_square_ptr + row, mean_square)
                normal = (x * tl.rsqrt(mean_square + eps)).to(x_ptr.dtype.element_ty).to(tl.float32)
                output = (weight * normal).to(output_ptr.dtype.element_ty)
                tl.store(output_ptr + row * width + column, output, mask=inside)

                if HAS_IDS:
                    own = tl.load(ids_ptr + row)
                    counted = (own >= 0) & (own < segments)
                else:
                    counted = row >= 0
                z = tl.where(counted, x * tl.rsqrt(tl.where(mean_square < 1e-30, 1e-30, mean_square)), 0.0)
                total += z
                square += z * z
                if PER_SEGMENT:
                    size = tl.abs(output.to(tl.float32)) if OF_OUTPUT else tl.abs(x)
                    abs_sum += tl.where(counted, size, 0.0)
            if PER_SEGMENT:
                if segment < segments:
                    slot = tile + segment
                    tl.store(abs_ptr + slot.to(tl.int64) * width + column, abs_sum, mask=inside)
                    tl.store(held_ptr + slot, tl.sum((counts & (ids == segment)).to(tl.int32)))
                    if following < segments:
                        for absent in range(segment + 1, following):
                            tl.store(held_ptr + tile + absent, 0)
            begin = end
            segment = following
        tile += 1
    place = moments_ptr + program.to(tl.int64) * 2 * width + column
    tl.store(place, total, mask=inside)
    tl.store(place + width, square, mask=inside)


def rms_norm_stats(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D]
    eps: float,
    residual: Tensor | None,  # [B, T, D]
    segment_ids: Tensor | None,  # [B, T] int64, -1 = padding
    num_segments: int,
    of_output: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.rms_norm_stats`, which it calls for more than MOST_CHANNELS channels."""
    batch, length, width = x.shape
    tokens = batch * length
    if width > MOST_CHANNELS:
        return reference.rms_norm_stats(x, weight, eps, residual, segment_ids, num_segments, of_output, ordered)
    output = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    stream = x.new_empty(0 if residual is None else x.shape)
    mean_square = x.new_empty((batch, length), dtype=torch.float32)
    rows = launch.unit_stride(x.reshape(tokens, width))
    added = None if residual is None else launch.unit_stride(residual.reshape(tokens, width))

    block = triton.next_power_of_2(width)
    staged = launch.LAUNCHES["rms_norm_stats"][0].blocks["STAGES"] - 1
    waiting = staged * block * x.element_size() * (1 if residual is None else 2)  # bytes of shared memory for the next rows
    chosen = launch.pick("rms_norm_stats", default=0 if waiting <= MOST_WAITING else 1)
    warps = min(max(chosen.num_warps * block // 4096, 2), 16)
    run = max(triton.cdiv(tokens, launch.processors(x) * (16 // warps)), FEWEST_TOKENS)
    programs, tiles = triton.cdiv(tokens, run), triton.cdiv(run, chosen.blocks["TILE"])
    per_tile = ordered or segment_ids is None
    slots = programs * tiles + num_segments if per_tile else 0
    abs_parts = x.new_empty(slots, width, dtype=torch.float32)
    held = x.new_empty(slots, dtype=torch.int32)
    first, last = (x.new_empty(programs * tiles, dtype=torch.int32) for _ in range(2))
    moments = x.new_empty(programs, 2, width, dtype=torch.float32)
    if programs:
        with launch.on_device_of(x):
            rms_norm_stats_kernel[(programs,)](
                rows, rows.stride(0), added, 0 if added is None else added.stride(0),
                weight.contiguous(), None if segment_ids is None else segment_ids.contiguous(),
                output, stream, mean_square, abs_parts, held, first, last, moments,
                tokens, length, width, num_segments, run, tiles, eps,
                HAS_RESIDUAL=residual is not None, HAS_IDS=segment_ids is not None, OF_OUTPUT=of_output, PER_SEGMENT=per_tile,
                WIDTH=block, **chosen.blocks, num_warps=warps, **launch.at_most(128),
            )  # fmt: skip
    if per_tile:
        abs_sum, count, *_ = per_segment.finish(abs_parts, None, None, held, first, last, num_segments)
    else:
        measured = output if of_output else x if residual is None else stream
        abs_sum, count, *_ = per_segment.channel_stats(measured, segment_ids, num_segments, False, False, False)
    return output, stream, mean_square, abs_sum, count, moments.sum(0)
