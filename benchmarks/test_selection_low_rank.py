"""Weights of a selection with a low-rank part, W[:, G] + (W U) V and its mirror for writers: the gather in the second product's epilogue."""

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, normal, selection, with_compiled
from red_kernels import selection_low_rank

SHAPES = {"gpu": (8192, 3072, 1536, 128), "cpu": (1024, 512, 256, 32), "tiny": (24, 40, 20, 16)}


def test_selection_low_rank(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    return [case(*SHAPES[size], side) for side in ("input", "output")]


def case(other: int, width: int, kept: int, rank: int, side: str) -> Case:
    index = selection(width, kept)

    def draw():
        weight = normal(other, width) if side == "input" else normal(width, other)
        return weight, normal(width, rank, scale=width**-0.5), normal(rank, kept, scale=rank**-0.5)

    def eager(weight, down, up):
        if side == "input":
            return weight[:, index] + (weight @ down) @ up
        return weight[index] + up.T @ (down.T @ weight)

    return Case(
        "selection_low_rank", f"{side} side", dict(out=other, d=width, kept=kept, rank=rank),
        roofline.selection_low_rank(other, width, kept, rank, SIZE, SIZE), draw,
        lambda weight, down, up: selection_low_rank(weight, index, down, up, side), with_compiled(eager),
    )  # fmt: skip
