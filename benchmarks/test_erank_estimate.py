"""The estimate of the effective rank, beside a loop of singular value decompositions, the exact path and eigenvalues of the Gram matrix.

The rows have eigenvalues 1/i, a power law as hidden states have; the truth of the comparison is within the estimate's own error (tests/kernels).
"""

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import DTYPE, SIZE, Case, Rival, faster_than, normal
from benchmarks.timing import DEVICE
from benchmarks.test_erank import looped
from red_kernels import erank, erank_estimate

SHAPES = {"gpu": [(29, 4169, 3072), (29, 2048, 1536)], "cpu": [(2, 2048, 1536)], "tiny": [(2, 40, 24)]}
ONE_PERCENT = 0.01


def test_erank_estimate(measure, case):
    measure(case)


def by_eigvalsh(x):
    """All Gram matrices at once, float32."""
    rows = F.normalize(x.float() - x.float().mean(-2, keepdim=True), dim=-1)
    r = torch.linalg.eigvalsh(rows.mT @ rows if x.shape[-2] >= x.shape[-1] else rows @ rows.mT).clamp(min=0).double()
    r = r / r.sum(-1, keepdim=True)
    return (-torch.special.xlogy(r, r).sum(-1)).exp()


def draw(matrices: int, rows: int, width: int):
    scale = torch.arange(1, width + 1, device=DEVICE).rsqrt()
    return ((normal(matrices, rows, width, dtype=torch.float32) * scale).to(DTYPE),)


def cases(size: str) -> list[Case]:
    found = []
    for matrices, rows, width in SHAPES[size]:
        rivals = {name: Rival(run, capture=False, within=ONE_PERCENT) for name, run in (("exact", erank), ("eigvalsh", by_eigvalsh))}
        rivals["svdvals"] = looped(matrices, rows, width, within=ONE_PERCENT)
        target = "K5" if (matrices, width) == (29, 3072) else None
        found.append(Case(
            "erank", "estimated", dict(matrices=matrices, N=rows, d=width), roofline.erank(matrices, rows, width, SIZE),
            lambda shape=(matrices, rows, width): draw(*shape), lambda x: erank_estimate(x).erank, rivals, target=target,
            goals=(faster_than("svdvals", 50),), seconds=0, repeats=1 if size == "gpu" else 3, capture=False,
        ))  # fmt: skip
    return found
