"""Effective rank of hidden states, beside a loop of singular value decompositions, PyTorch's batched eigenvalues of the Gram matrices, and numpy.

Rivals work in float32, as the input is: the faster choice, and the user's. `exact` is red's default, float64 inside. Both take the compiled extension where it is built.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import GPU, SIZE, Case, Rival, faster_than, normal
from red_kernels import erank, reference

SHAPES = {
    "gpu": ((64, 512, 64), (29, 4169, 3072)),
    "cpu": ((64, 512, 64), (8, 1024, 256), (4, 2048, 512)),
    "tiny": ((2, 24, 12), (3, 9, 20)),
}


def test_erank(measure, case):
    measure(case)


def entropy(eigenvalues):
    r = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return (-torch.special.xlogy(r, r).sum(-1)).exp()


def normalised(x):
    x = x.float()
    return F.normalize(x - x.mean(-2, keepdim=True), dim=-1)


def by_svdvals(x):
    return torch.stack([entropy(torch.linalg.svdvals(normalised(matrix)) ** 2) for matrix in x])


def looped(matrices: int, rows: int, width: int, **options) -> Rival:
    """The loop of svdvals; where it takes minutes, the first matrix times their number."""
    if matrices * rows * width < 10**8:
        return Rival(by_svdvals, capture=False, **options)
    return Rival(by_svdvals, capture=False, prepare=lambda x: (x[:1],), like=lambda ours: ours[:1], times=matrices, **options)


def by_eigvalsh(x):
    rows = normalised(x)
    return entropy(torch.linalg.eigvalsh(rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows).clamp(min=0))


def by_numpy(x):
    import numpy

    rows = x.numpy()
    rows = rows - rows.mean(1, keepdims=True)
    rows /= numpy.linalg.norm(rows, axis=-1, keepdims=True)
    return entropy(torch.from_numpy(numpy.linalg.svd(rows, compute_uv=False) ** 2))


def by_reference(x):
    return reference.erank(x, None)[0]


def cases(size: str) -> list[Case]:
    rivals = {
        "eigvalsh of the Gram matrix": Rival(by_eigvalsh, capture=False),
        "reference, float64": Rival(by_reference if size != "gpu" else None, why_not="it is the same eigenvalues at this size", capture=False),
        "numpy": Rival(None if GPU else by_numpy, why_not="on a CPU only", capture=False),
    }
    found = []
    for matrices, rows, width in SHAPES[size]:
        shape, work = dict(matrices=matrices, N=rows, d=width), roofline.erank(matrices, rows, width, SIZE)
        repeats = 1 if width > 1000 else 5  # svdvals takes seconds there
        draw, target = partial(normal, matrices, rows, width), "K5" if width == 3072 else None
        for name, precision in (("exact", "float64"), ("float32", "float32")):
            run = partial(erank, precision=precision)
            found.append(Case(
                "erank", f"{name} {matrices}x{rows}x{width}", shape, work, lambda draw=draw: (draw(),), run, {"svdvals": looped(matrices, rows, width), **rivals},
                target=target, goals=(faster_than("svdvals", 10),) if target else (), seconds=0, repeats=repeats, capture=False,
            ))  # fmt: skip
    return found
