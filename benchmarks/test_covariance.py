"""Covariance of activations, accumulated in float32: one triangle, mirrored."""

import torch

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, Rival, normal
from benchmarks.timing import DEVICE, GPU
from red_kernels import covariance

SHAPES = {"gpu": (6144, 3072), "cpu": (2048, 256), "tiny": (24, 40)}


def test_covariance(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    tokens, width = SHAPES[size]

    def zeros():
        return torch.zeros(width, width, device=DEVICE)

    def own_sum(x, out):
        return x, zeros()

    def product(x, out):
        return out.add_(torch.mm(x.T, x, out_dtype=torch.float32))

    rivals = {
        "eager": Rival(lambda x, out: out.addmm_(x.float().T, x.float()), own_sum),
        "product with float32 output": Rival(product if GPU else None, own_sum, why_not="on a GPU only"),
    }
    work = roofline.covariance(tokens, width, SIZE)
    shape = dict(tokens=tokens, d=width)
    return [Case("covariance", "accumulated", shape, work, lambda: (normal(tokens, width), zeros()), lambda x, out: covariance(x, out=out), rivals)]
