"""A weight under a projection that is a selection plus a low-rank correction, without the dense projection.

    P = S + down up,  S [d, d'] the selection of channels `index`, down [d, r], up [r, d']

    reader, W [out, d]:   W P  = W[:, index] + (W down) up            d down = Wᵀ (dY upᵀ)        d up = (W down)ᵀ dY
    writer, W [d, in]:    Pᵀ W = W[index] + upᵀ (downᵀ W)             d down = W (up dY)ᵀ         d up = (downᵀ W) dYᵀ

The selection is RED's (arXiv 2605.29327), the correction of rank r << d' is trained on top of it. The first product is kept for the
backward: r columns instead of d. Every product has float32 accumulation and result (float64 for float64), and Y is rounded once, to the
weight's dtype, after the sum. Factors may be float32 beside a half-precision weight; their gradients come in their own dtypes.
"""

import torch
from torch import Tensor

from red_kernels import backend, checks, reference

SIDES = ("input", "output")


@torch.library.custom_op("red::selection_low_rank", mutates_args=(), device_types=("cpu", "cuda"))
def _op(weight: Tensor, index: Tensor, down: Tensor, up: Tensor, side: str) -> tuple[Tensor, Tensor]:
    checks.check_range("selection_low_rank", "index", index, 0, down.shape[0])
    with backend.without_autocast(weight):
        return backend.implementation("selection_low_rank", weight, down, up).selection_low_rank(weight, index, down, up, side)


@torch.library.custom_op("red::selection_low_rank_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward_op(grad: Tensor, weight: Tensor, product: Tensor, up: Tensor, side: str) -> tuple[Tensor, Tensor]:
    with backend.without_autocast(weight):
        return backend.implementation("selection_low_rank", weight, up).selection_low_rank_backward(grad, weight, product, up, side)


@_op.register_fake
def _(weight, index, down, up, side):
    dtype = reference.accumulator(weight.dtype)
    width, rank = index.shape[0], down.shape[1]
    if side == "input":
        return weight.new_empty(weight.shape[0], width), weight.new_empty(weight.shape[0], rank, dtype=dtype)
    return weight.new_empty(width, weight.shape[1]), weight.new_empty(rank, weight.shape[1], dtype=dtype)


@_backward_op.register_fake
def _(grad, weight, product, up, side):
    return product.new_empty(weight.shape[1 if side == "input" else 0], up.shape[0]), product.new_empty(up.shape)


def _setup_context(ctx, inputs, output):
    weight, _, down, up, ctx.side = inputs
    _, product = output
    ctx.mark_non_differentiable(product)
    ctx.dtypes = down.dtype, up.dtype
    ctx.save_for_backward(weight, product, up)


def _backward(ctx, grad, _):
    weight, product, up = ctx.saved_tensors
    grad_down, grad_up = _backward_op(grad, weight, product, up, ctx.side)
    return None, None, grad_down.to(ctx.dtypes[0]), grad_up.to(ctx.dtypes[1]), None


_op.register_autograd(_backward, setup_context=_setup_context)


def selection_low_rank(
    weight: Tensor,  # [out, d] for side="input", [d, in] for side="output"
    index: Tensor,  # [d'] int64
    down: Tensor,  # [d, r]
    up: Tensor,  # [r, d']
    side: str,
) -> Tensor:  # [out, d'] or [d', in], dtype of weight
    """`weight @ P` for side="input", `Pᵀ @ weight` for side="output", with P = selection of `index` + down @ up.

    The side says where the weight meets the residual stream: a reader at its input, a writer at its output. Differentiable (once) in
    `down` and `up`; the weight is frozen.

    Raises: TypeError for dtypes, ValueError for the side, shapes, a weight that requires a gradient, and (on a CPU only) for an index
    outside 0 … d-1.
    """
    op = "selection_low_rank"
    if side not in SIDES:
        raise ValueError(f"{op}: side={side!r} is not a side of a weight; expected 'input' (readers) or 'output' (writers)")
    checks.require_floating(op, weight=weight, down=down, up=up)
    checks.require_index(op, index)
    if weight.dim() != 2 or down.dim() != 2:
        raise ValueError(f"{op}: weight and down must be matrices, got shapes {list(weight.shape)} and {list(down.shape)}")
    width = weight.shape[1 if side == "input" else 0]
    checks.require_shape(op, "down", down, (width, down.shape[1]), "[d, r], with d from weight")
    checks.require_shape(op, "up", up, (down.shape[1], index.shape[0]), "[r, d'], from down and index")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(f"{op}: weight requires a gradient, but only down and up get one; pass weight.detach()")
    return _op(weight, index, down, up, side)[0]
