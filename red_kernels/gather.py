"""A channel-selection projection as a gather.

A selection H [d, d'] has standard basis vectors as columns (RED, arXiv 2605.29327), so `x @ H` is a choice of channels:

    y[…, j, …] = x[…, index[j], …] · scale[j]

    dx[…, i, …] = Σ_{j: index[j] = i} dy[…, j, …] · scale[j]        dscale[j] = Σ dy[…, j, …] · x[…, index[j], …]

Products and sums in float32 (float64 for float64 inputs), results in the input's dtype.
"""

from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference


@torch.library.custom_op("red::gather", mutates_args=(), device_types=("cpu", "cuda"))
def _op(x: Tensor, index: Tensor, dim: int, scale: Optional[Tensor]) -> Tensor:
    backend.select("gather", x)
    checks.check_range("gather", "index", index, 0, x.shape[dim])
    return reference.gather(x, index, dim, scale)


@_op.register_fake
def _(x, index, dim, scale):
    return x.new_empty([index.shape[0] if axis == dim else size for axis, size in enumerate(x.shape)])


def _setup_context(ctx, inputs, output):
    x, index, dim, scale = inputs
    ctx.dim, ctx.width = dim, x.shape[dim]
    # x is only needed for the gradient of the scale: without one, do not keep it alive.
    keep_x = x if ctx.needs_input_grad[3] else None
    ctx.save_for_backward(keep_x, index, scale)


def _backward(ctx, grad):
    x, index, scale = ctx.saved_tensors
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = reference.gather_backward(grad, index, ctx.dim, scale, ctx.width)
    if ctx.needs_input_grad[3]:
        grad_scale = reference.gather_scale_backward(grad, x, index, ctx.dim).to(scale.dtype)
    return grad_x, None, None, grad_scale


_op.register_autograd(_backward, setup_context=_setup_context)


def gather(
    x: Tensor,  # [..., D, ...]
    index: Tensor,  # [k] int64
    dim: int = -1,
    scale: Tensor | None = None,  # [k]
) -> Tensor:  # [..., k, ...], dtype of x
    """Channels `index` of `x` along `dim`, each times its `scale`. Differentiable in `x` and `scale`.

    An index may repeat; its gradients add up.

    Raises: TypeError for dtypes, ValueError for shapes and (on a CPU only) for an index outside 0 … D-1.
    """
    checks.require_floating("gather", x=x)
    checks.require_index("gather", index)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"gather: dim={dim} is out of range for x of shape {list(x.shape)}")
    if scale is not None:
        checks.require_floating("gather", scale=scale)
        checks.require_shape("gather", "scale", scale, index.shape, "that of index, [k]")
    return _op(x, index, dim % x.dim(), scale)
