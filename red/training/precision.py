"""Products of a frozen bfloat16 weight with a float32 matrix, without a float32 copy of the weight.

A float32 number is the sum of two bfloat16 ones to 2^-18 of itself: `high = bf16(x)`, `low = bf16(x - high)`. The weight is exact in bfloat16, so

    W x = W high + W low

is two products on tensor cores with float32 accumulation, and as exact as one float32 product for what training needs: the error of an entry is at most
2^-17 · Σ |W| |x| besides the accumulation's own. A true float32 product of the same size has a sixteenth of the rate on an H100 (data sheet).
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, one of them possibly a frozen weight in a narrower dtype, in the wider dtype of the two.

    On a GPU a bfloat16 matrix times a float32 one is `split_product`; everything else casts the narrower one.
    """
    if a.is_cuda and {a.dtype, b.dtype} == {torch.bfloat16, torch.float32}:
        return split_product(a, b)
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide) @ b.to(wide)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n] in float32, one of them bfloat16 and the other float32 (module docstring)."""
    if a.dtype == torch.bfloat16:
        high, low = _halves(b)
        return _add_product(_add_product(None, a, high), a, low)
    high, low = _halves(a)
    return _add_product(_add_product(None, high, b), low, b)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b of two bfloat16 matrices, accumulated in float32; on a CPU, which has no such product, through float32 copies."""
    if not a.is_cuda:
        found = a.float() @ b.float()
        return found if total is None else total.add_(found)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
