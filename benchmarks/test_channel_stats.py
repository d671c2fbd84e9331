"""K1: statistics of every channel in every segment of packed rows, an eighth of them padding."""

import torch

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, faster_than, normal, packed_segments, percent_of_ceiling, with_compiled
from red_kernels import channel_stats

SHAPES = {"gpu": (8, 2048, 4096, 16), "cpu": (4, 512, 256, 8), "tiny": (2, 24, 40, 3)}


def test_channel_stats(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    batch, length, width, segments = SHAPES[size]
    padded = length // 8

    def draw():
        return normal(batch, length, width), packed_segments(batch, length, segments, padded)

    def eager(x, ids):
        """One addition of all rows to where they belong; padding goes to a segment that is dropped."""
        rows = torch.where((ids >= 0)[..., None], x, 0).abs().float()
        sums = torch.zeros(segments + 1, width, device=x.device)
        return sums.index_add_(0, torch.where(ids < 0, segments, ids).flatten(), rows.flatten(0, 1))[:segments]

    def case(variant: str, **options) -> Case:
        def run(x, ids):
            found = channel_stats(x, ids, segments, ordered=True, **options)
            return [found.abs_sum, found.count, *[getattr(found, name) for name in ("square_sum", "abs_max") if options]]

        work = roofline.channel_stats(batch * (length - padded), batch * padded, width, segments, SIZE, sums=1 + len(options))
        rivals = with_compiled(eager, like=lambda ours: ours[0])
        if options:
            return Case("channel_stats", variant, shape, work, draw, run)
        goals = (percent_of_ceiling(90), faster_than("eager", 4))
        return Case("channel_stats", variant, shape, work, draw, run, rivals, "K1", goals)

    shape = dict(B=batch, T=length, D=width, S=segments)
    return [case("packed"), case("packed, squares and maximum", squares=True, maximum=True)]
