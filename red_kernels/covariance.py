"""Second moments of a stream, accumulated in place.

    out += Σ_{tokens t} scale_t² x_t x_tᵀ

With scale_t = 1 / rms(x_t) it is the second moment after a norm, of which principal directions are made. Both triangles get the same bits.
float32 accumulation of one call (float64 for float64 inputs); `out` may be float64, which keeps many calls apart from rounding.
"""

from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks


@torch.library.custom_op("red::covariance", mutates_args={"out"}, device_types=("cpu", "cuda"))
def _op(x: Tensor, scale: Optional[Tensor], mask: Optional[Tensor], out: Tensor) -> None:
    floating = [x, out] if scale is None else [x, out, scale]
    with backend.without_autocast(x):
        backend.implementation("covariance", *floating).covariance(x, scale, mask, out)


@_op.register_fake
def _(x, scale, mask, out):
    return None


def covariance(
    x: Tensor,  # [..., d]
    *,
    scale: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...] bool
    out: Tensor,  # [d, d] float32 or float64
) -> Tensor:  # out
    """Add Σ over the tokens of scale² x xᵀ to `out`, and return it. Not differentiable; the same call gives the same bits.

    Args:
        scale: a factor of every token, applied in float32.
        mask: which tokens count; None = all. The others contribute nothing, even if they (or their scale) hold NaN.
        out: on a GPU float64 runs in PyTorch; a float32 `out` runs in a kernel that makes one triangle and mirrors it.

    Raises: TypeError for dtypes, ValueError for shapes, and for an `out` that requires a gradient.
    """
    checks.require_floating("covariance", x=x)
    if x.dim() < 1:
        raise ValueError("covariance: x must have shape [..., d], got a single number")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"covariance: out must have dtype torch.float32 or torch.float64, got {out.dtype}")
    checks.require_shape("covariance", "out", out, (x.shape[-1], x.shape[-1]), "[d, d], with d from x")
    if scale is not None:
        checks.require_floating("covariance", scale=scale)
        checks.require_shape("covariance", "scale", scale, x.shape[:-1], "x's [...]")
        scale = scale.detach()
    if mask is not None:
        checks.require_dtype("covariance", "mask", mask, torch.bool)
        checks.require_shape("covariance", "mask", mask, x.shape[:-1], "x's [...]")
    if out.requires_grad:
        raise ValueError("covariance: out requires a gradient, which a sum in place has not; pass a buffer without")
    _op(x.detach(), scale, mask, out)
    return out
