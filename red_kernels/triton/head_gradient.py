"""The gradient of an output head, summed over chunks of tokens in float32, and narrowed at the end without a second copy of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROW_BLOCK = 8192


@triton.jit
def linear_kd_narrow_kernel(wide_ptr, narrow_ptr, first, last, BLOCK: tl.constexpr):
    """narrow[i] = wide[i] for first <= i < last, both at the start of the same memory."""
    place = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(wide_ptr + place, mask=place < last, other=0.0).to(tl.float32)
    tl.debug_barrier()  # a program's own elements are all read before it writes over any of them
    tl.store(narrow_ptr + place, x.to(narrow_ptr.dtype.element_ty), mask=place < last)


def narrowed(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total`, contiguous float32, in a dtype half as wide and in the first half of its own memory.

    Entry i goes where entry i/2 was. So the first block is done by one program, and each launch then does as many entries as all
    before it: what it writes over has been read by an earlier launch.
    """
    narrow = torch.empty(0, dtype=dtype, device=total.device).set_(total.untyped_storage(), 0, total.shape, total.stride())
    first, last = 0, NARROW_BLOCK
    while first < total.numel():
        last = min(last, total.numel())
        linear_kd_narrow_kernel[(triton.cdiv(last - first, NARROW_BLOCK),)](total, narrow, first, last, BLOCK=NARROW_BLOCK, num_warps=8)
        first, last = last, 2 * last
    return narrow


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta · total + a b, in total's dtype; total is not read if beta = 0."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # no product of two dtypes here; the copies cost memory
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
