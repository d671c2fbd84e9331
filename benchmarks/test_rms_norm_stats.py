"""K2: residual, RMSNorm and statistics in one pass, beside the norm alone and beside norm and statistics apart."""

import torch

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, Goal, Rival, compiled, liger, normal, packed_segments, with_compiled
from red_kernels import channel_stats, rms_norm_stats

SHAPES = {"gpu": (8, 2048, 4096, 16), "cpu": (4, 512, 256, 8), "tiny": (2, 24, 40, 3)}
EPS = 1e-6


def test_rms_norm_stats(measure, case):
    measure(case)


def norm(x, residual, weight):
    """As transformers' LlamaRMSNorm after the residual's addition."""
    stream = x + residual
    wide = stream.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype), stream


def liger_norm():
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def without_ids(x, residual, weight, ids):
    return x, residual, weight


def over_the_norm_alone(row: dict) -> float | None:
    ratios = [ratio for name, ratio in row["ratios"].items() if name.startswith("norm alone")]
    return 1 / min(ratios) if ratios else None


def cases(size: str) -> list[Case]:
    batch, length, width, segments = SHAPES[size]
    padded = length // 8

    def draw():
        x, residual = normal(batch, length, width), normal(batch, length, width)
        return x, residual, normal(width, scale=0.1) + 1, packed_segments(batch, length, segments, padded)

    def run(x, residual, weight, ids):
        found = rms_norm_stats(x, weight, EPS, residual=residual, segment_ids=ids, num_segments=segments, ordered=True)
        return found.output, found.stream, found.abs_sum, found.square_sum

    def eager(x, residual, weight, ids):
        output, stream = norm(x, residual, weight)
        wide = torch.where((ids >= 0)[..., None], stream, 0).float()
        z = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).clamp(min=1e-30))
        sums = torch.zeros(segments + 1, width, device=x.device)
        sums.index_add_(0, torch.where(ids < 0, segments, ids).flatten(), wide.abs().flatten(0, 1))
        return output, stream, sums[:segments], z.square().sum((0, 1))

    quick = compiled(norm)

    def apart(x, residual, weight, ids):
        output, stream = (quick or norm)(x, residual, weight)
        return output, stream, channel_stats(stream, ids, segments, ordered=True).abs_sum

    rivals = with_compiled(eager) | {
        "norm alone, eager": Rival(norm, without_ids, like=lambda ours: ours[:2]),
        "norm alone, torch.compile": Rival(quick, without_ids, like=lambda ours: ours[:2], why_not="on a GPU only"),
        "norm alone, Liger": liger(liger_norm, prepare=without_ids, like=lambda ours: ours[:2]),
        "norm and channel_stats apart": Rival(apart, like=lambda ours: ours[:3]),
    }
    work = roofline.rms_norm_stats(batch * length, width, segments, SIZE, residual=True)
    goal = Goal("time over the fastest RMSNorm alone", "<=", 1.10, over_the_norm_alone)
    shape = dict(B=batch, T=length, D=width, S=segments)
    return [Case("rms_norm_stats", "with residual", shape, work, draw, run, rivals, "K2", (goal,))]
