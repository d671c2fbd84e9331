"""Effective rank of hidden states, beside a loop of singular value decompositions."""

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, Rival, normal
from red_kernels import erank

SHAPES = {"gpu": (2, 4169, 3072), "cpu": (4, 512, 128), "tiny": (2, 24, 12)}


def test_erank(measure, case):
    measure(case)


def by_svdvals(x):
    found = []
    for matrix in x.double() if x.is_cpu else x.float():
        eigenvalues = torch.linalg.svdvals(F.normalize(matrix - matrix.mean(0), dim=-1)) ** 2
        r = eigenvalues / eigenvalues.sum()
        found.append((-torch.special.xlogy(r, r).sum()).exp())
    return torch.stack(found)


def cases(size: str) -> list[Case]:
    matrices, rows, width = SHAPES[size]
    shape, work = dict(matrices=matrices, N=rows, d=width), roofline.erank(matrices, rows, width, SIZE)
    rivals = {"svdvals": Rival(by_svdvals, capture=False)}
    repeats = 1 if size == "gpu" else 5  # svdvals takes seconds there
    return [Case("erank", "exact", shape, work, lambda: (normal(matrices, rows, width),), erank, rivals, seconds=0, repeats=repeats, capture=False)]
