"""A channel-selection projection as a gather.

A selection H [d, d'] has standard basis vectors as columns (RED, arXiv 2605.29327), so `x @ H` is a choice of channels:

    y[…, j, …] = x[…, index[j], …] · scale[j]

    dx[…, i, …] = Σ_{j: index[j] = i} dy[…, j, …] · scale[j]        dscale[j] = Σ dy[…, j, …] · x[…, index[j], …]

Products and sums in float32 (float64 for float64 inputs), results in the input's dtype. The two gradients are ops of their own, and
the gradients of those are the three ops again, so it is differentiable any number of times.

A selection takes no channel twice, and is used at every step: `inverse_index` finds once where every channel went, and with it the sum
for dx has one term or none.
"""

from typing import Optional

import torch
from torch import Tensor

from red_kernels import backend, checks, reference

DEVICES = ("cpu", "cuda")


def _kernels(x: Tensor, *others: Tensor | None):
    return backend.implementation("gather", x, *(other for other in others if other is not None))


@torch.library.custom_op("red::gather", mutates_args=(), device_types=DEVICES)
def _op(x: Tensor, index: Tensor, dim: int, scale: Optional[Tensor], inverse: Optional[Tensor] = None) -> Tensor:
    checks.check_range("gather", "index", index, 0, x.shape[dim])
    if inverse is not None:
        _check_inverse(index, inverse)
    return _kernels(x, scale).gather(x, index, dim, scale)


@torch.library.custom_op("red::gather_backward", mutates_args=(), device_types=DEVICES)
def _backward_op(grad: Tensor, index: Tensor, dim: int, scale: Optional[Tensor], width: int, inverse: Optional[Tensor]) -> Tensor:
    return _kernels(grad, scale).gather_backward(grad, index, dim, scale, width, inverse)


@torch.library.custom_op("red::gather_scale_backward", mutates_args=(), device_types=DEVICES)
def _scale_backward_op(grad: Tensor, x: Tensor, index: Tensor, dim: int) -> Tensor:
    return _kernels(grad, x).gather_scale_backward(grad, x, index, dim)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if axis == dim else length for axis, length in enumerate(x.shape)])


@_op.register_fake
def _(x, index, dim, scale, inverse=None):
    return _resized(x, dim, index.shape[0])


@_backward_op.register_fake
def _(grad, index, dim, scale, width, inverse):
    return _resized(grad, dim, width)


@_scale_backward_op.register_fake
def _(grad, x, index, dim):
    return x.new_empty(index.shape[0], dtype=reference.accumulator(x.dtype))


def _setup_context(ctx, inputs, output):
    x, index, dim, scale, inverse = inputs
    ctx.dim, ctx.width = dim, x.shape[dim]
    # x is only needed for the gradient of the scale: without one, do not keep it alive.
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, index, scale, inverse)


def _backward(ctx, grad):
    x, index, scale, inverse = ctx.saved_tensors
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward_op(grad, index, ctx.dim, scale, ctx.width, inverse)
    if ctx.needs_input_grad[3]:
        grad_scale = _scale_backward_op(grad, x, index, ctx.dim).to(scale.dtype)
    return grad_x, None, None, grad_scale, None


def _setup_backward(ctx, inputs, output):
    grad, index, ctx.dim, scale, _, inverse = inputs
    ctx.save_for_backward(grad if ctx.needs_input_grad[3] else None, index, scale, inverse)


def _backward_of_backward(ctx, grad_dx):
    grad, index, scale, inverse = ctx.saved_tensors
    grad_grad = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_grad = _op(grad_dx, index, ctx.dim, scale, inverse)
    if ctx.needs_input_grad[3]:
        grad_scale = _scale_backward_op(grad, grad_dx, index, ctx.dim).to(scale.dtype)
    return grad_grad, None, None, grad_scale, None, None


def _setup_scale_backward(ctx, inputs, output):
    grad, x, index, ctx.dim = inputs
    ctx.save_for_backward(grad, x, index)


def _backward_of_scale_backward(ctx, grad_dscale):
    grad, x, index = ctx.saved_tensors
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_grad = _op(x, index, ctx.dim, grad_dscale).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_x = _backward_op(grad, index, ctx.dim, grad_dscale, x.shape[ctx.dim], None).to(x.dtype)
    return grad_grad, grad_x, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_backward_of_backward, setup_context=_setup_backward)
_scale_backward_op.register_autograd(_backward_of_scale_backward, setup_context=_setup_scale_backward)


def inverse_index(index: Tensor, width: int) -> Tensor:  # [k] int64 → [width] int64
    """Where every channel went: inverse[i] = j with index[j] = i, and -1 for a channel that `index` leaves out.

    Raises: TypeError for the dtype, ValueError for the shape and (on a CPU only) for an entry outside 0 … width-1 or one that repeats.
    """
    checks.require_index("inverse_index", index)
    checks.check_range("inverse_index", "index", index, 0, width)
    inverse = torch.full((width,), -1, dtype=torch.int64, device=index.device)
    inverse = inverse.scatter(0, index, torch.arange(len(index), device=index.device))
    _check_inverse(index, inverse, op="inverse_index")
    return inverse


def _check_inverse(index: Tensor, inverse: Tensor, op: str = "gather") -> None:
    """ValueError unless `inverse` is that of `index`. CPU tensors only; others pass unread. The index is within range already."""
    if not inverse.is_cpu:
        return
    position = torch.arange(len(index))
    wrong = inverse[index] != position
    if wrong.any():
        j = int(wrong.nonzero()[0])
        if (index == index[j]).sum() > 1:
            raise ValueError(f"{op}: index has {int(index[j])} twice, which has no inverse; give each channel once, or inverse=None")
        raise ValueError(f"{op}: inverse[{int(index[j])}] = {int(inverse[index[j]])}, expected {j}; make it with inverse_index(index, width)")
    if (inverse >= 0).sum() != len(index):
        raise ValueError(f"{op}: inverse has {int((inverse >= 0).sum())} entries other than -1, expected {len(index)}; make it with inverse_index")


def gather(
    x: Tensor,  # [..., D, ...]
    index: Tensor,  # [k] int64
    dim: int = -1,
    scale: Tensor | None = None,  # [k]
    inverse: Tensor | None = None,  # [D] int64
) -> Tensor:  # [..., k, ...], dtype of x
    """Channels `index` of `x` along `dim`, each times its `scale`. Differentiable in `x` and `scale`, any number of times.

    An index may repeat; its gradients add up in the order of the index. One that does not may come with its `inverse_index`, which
    spares the backward a sort. A call costs more than the kernel where the tensor is small: the functions of
    `red_kernels.triton.gather` can be called as they are, without the registered op and without gradients.

    Raises: TypeError for dtypes, ValueError for shapes and (on a CPU only) for an index outside 0 … D-1 or a wrong inverse.
    """
    checks.require_floating("gather", x=x)
    checks.require_index("gather", index)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"gather: dim={dim} is out of range for x of shape {list(x.shape)}")
    if scale is not None:
        checks.require_floating("gather", scale=scale)
        checks.require_shape("gather", "scale", scale, index.shape, "that of index, [k]")
    if inverse is not None:
        checks.require_dtype("gather", "inverse", inverse, torch.int64)
        checks.require_shape("gather", "inverse", inverse, x.shape[dim : dim + 1 or None], "[D]")
    return _op(x, index, dim % x.dim(), scale, inverse)
