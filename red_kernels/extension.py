"""The compiled extension: effective rank in C++ and CUDA (csrc/). The only file that knows it; finds and loads the library, or says why not.

Functions have the names and signatures of `reference`. On a CPU: a thread a matrix, MKL's or LAPACK's values-only solver. On a GPU: own kernels centre and normalise;
the Gram matrix, and the eigenvalues of one larger than `JACOBI_LARGEST`, are PyTorch's; smaller ones are own Jacobi rotations with the entropy fused.
Rows are centred and normalised in float64 whatever `precision` is: it is that of the Gram matrix and of its eigenvalues. Error bounds: docs/kernels.md.
"""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_csrc.so")
JACOBI_LARGEST = 128  # n of a float64 matrix that fits in a GPU block's shared memory, and that a CPU without LAPACK solves


@functools.cache
def why_not() -> str:
    """Why the extension cannot be used; empty if it can."""
    if not LIBRARY.exists():
        return "the compiled extension is not built: it takes a C++ compiler, ninja and pip install --no-build-isolation (make setup)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:  # built for a later torch, or for another machine
        return f"the compiled extension does not load into torch {torch.__version__}, build it again: {error}"
    return ""


@functools.cache
def has(what: str) -> bool:
    """Whether the library was built with "cuda", and finds "lapack" in this torch."""
    return not why_not() and getattr(torch.ops.red_csrc, f"has_{what}")()


def takes(x: Tensor) -> bool:
    """Whether the library can do the matrices of x [..., N, d]."""
    if why_not() or x.numel() == 0:
        return False
    return has("cuda") if x.is_cuda else x.is_cpu and (has("lapack") or min(x.shape[-2:]) <= JACOBI_LARGEST)


def erank(x: Tensor, mask: Tensor | None, precision: str = "float64") -> tuple[Tensor, Tensor, Tensor]:
    """(eRank [...] float64, NaN where there is no spectrum; finite [...]; valid rows [...])"""
    value, _, finite, count = _run(x, mask, precision)
    return value, finite, count


def erank_spectrum(x: Tensor, mask: Tensor | None, precision: str = "float64") -> tuple[Tensor, Tensor]:
    """(eigenvalues [..., min(N, d)] float64, descending; finite [...])"""
    _, eigenvalues, finite, _ = _run(x, mask, precision)
    return eigenvalues, finite


def _run(x: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *batch, rows, width = x.shape
    number, least = math.prod(batch), min(rows, width)
    x = x.reshape(number, rows, width).contiguous()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if mask is not None:
        mask = mask.reshape(number, rows).contiguous()
    value, eigenvalues = _new(x, number), _new(x, number, least)
    finite, count = _new(x, number, dtype=torch.bool), _new(x, number, dtype=torch.int64)
    if x.is_cuda:
        value, eigenvalues = _on_cuda(x, mask, precision, finite, count)
    else:
        torch.ops.red_csrc.erank(x, mask, precision == "float32", True, eigenvalues, value, finite, count)
    return value.view(batch), eigenvalues.view(*batch, least), finite.view(batch), count.view(batch)


def _on_cuda(x: Tensor, mask: Tensor | None, precision: str, finite: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(eRank [M], eigenvalues [M, n]) of x [M, N, d]; fills finite and count."""
    number, rows, width = x.shape
    normalised = _new(x, number, rows, width, dtype=getattr(torch, precision))
    mean, norms, sizes = _new(x, number, width), _new(x, number, rows), _new(x, number, 2)
    torch.ops.red_csrc.normalised_rows(x, mask, normalised, finite, count, mean, norms, sizes, torch.cuda.current_stream(x.device).cuda_stream)
    value, eigenvalues = gram_erank(normalised @ normalised.mT if rows <= width else normalised.mT @ normalised)
    return torch.where(finite & (count >= 2), value, torch.nan), eigenvalues


def gram_erank(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(eRank [M], NaN for zeros; eigenvalues [M, n] descending) of symmetric matrices [M, n, n], float32 or float64, without negative eigenvalues.

    On a CPU this is the GPU's algorithm, for tests; `erank` does not use it.
    """
    number, n, _ = gram.shape
    if n > JACOBI_LARGEST:
        eigenvalues = torch.linalg.eigvalsh(gram).double().clamp(min=0).flip(-1)
        r = eigenvalues / eigenvalues.sum(-1, keepdim=True)  # 0/0 = NaN
        return (-torch.special.xlogy(r, r).sum(-1)).exp(), eigenvalues
    eigenvalues, value, sweeps = _new(gram, number, n), _new(gram, number), _new(gram, number, dtype=torch.int64)
    stream = torch.cuda.current_stream(gram.device).cuda_stream if gram.is_cuda else 0
    torch.ops.red_csrc.jacobi(gram.contiguous(), eigenvalues, value, sweeps, stream)
    return value, eigenvalues


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
