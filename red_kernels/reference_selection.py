"""The truth of the ops of a projection: a selection of channels, and a selection with a low-rank correction (see reference.py)."""

import torch
from torch import Tensor


def along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """View `vector` [k] so that it broadcasts along dimension `dim` of an `ndim`-dimensional tensor."""
    return vector.view([-1 if axis == dim else 1 for axis in range(ndim)])


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of its sums: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather(x: Tensor, index: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    """y[…, j, …] = x[…, index[j], …] · scale[j]"""
    picked = x.index_select(dim, index)
    if scale is None:
        return picked
    picked = wide(picked)
    return (picked * along(scale.to(picked.dtype), dim, x.dim())).to(x.dtype)


def gather_backward(grad: Tensor, index: Tensor, dim: int, scale: Tensor | None, width: int, inverse: Tensor | None = None) -> Tensor:
    """dx[…, i, …] = Σ_{j: index[j] = i} dy[…, j, …] · scale[j]. The inverse is a short cut for kernels; the sum needs none."""
    grad_y = wide(grad)
    if scale is not None:
        grad_y = grad_y * along(scale.to(grad_y.dtype), dim, grad.dim())
    shape = list(grad.shape)
    shape[dim] = width
    return grad_y.new_zeros(shape).index_add_(dim, index, grad_y).to(grad.dtype)


def gather_scale_backward(grad: Tensor, x: Tensor, index: Tensor, dim: int) -> Tensor:
    """dscale[j] = Σ_{all other dimensions} dy[…, j, …] · x[…, index[j], …]"""
    product = wide(grad) * wide(x.index_select(dim, index))
    others = [axis for axis in range(x.dim()) if axis != dim]
    return product.sum(dim=others) if others else product


def gather_many(
    tensors: list[Tensor],  # [R_n, C_n] each
    rows: list[Tensor | None],  # [r_n] int64
    columns: list[Tensor | None],  # [c_n] int64
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
) -> list[Tensor]:  # [r_n, c_n] each
    """y_n[i, j] = x_n[rows[i], columns[j]] · row_scale[i] · column_scale[j]; None leaves a side as it is."""
    picked = []
    for x, row, column, row_scale, column_scale in zip(tensors, rows, columns, row_scales, column_scales, strict=True):
        y = x if row is None else x.index_select(0, row)
        y = y if column is None else y.index_select(1, column)
        if row_scale is not None:
            y = wide(y) * wide(row_scale)[:, None]
        if column_scale is not None:
            y = wide(y) * wide(column_scale)
        picked.append(y.to(x.dtype, copy=True))
    return picked


def selection_low_rank(
    weight: Tensor,  # [out, d], or [d, in] on the output side
    index: Tensor,  # [d'] int64
    down: Tensor,  # [d, r]
    up: Tensor,  # [r, d']
    side: str,
) -> tuple[Tensor, Tensor]:
    """(W P [out, d'], W down [out, r]) on the input side, (Pᵀ W [d', in], downᵀ W [r, in]) on the output side, P = S + down up."""
    weight_, down, up = wide(weight), wide(down), wide(up)
    if side == "input":
        product = weight_ @ down
        return (weight_.index_select(1, index) + product @ up).to(weight.dtype), product
    product = down.T @ weight_
    return (weight_.index_select(0, index) + up.T @ product).to(weight.dtype), product


def selection_low_rank_backward(
    grad: Tensor,  # the shape of the result
    weight: Tensor,
    product: Tensor,  # W down, or downᵀ W
    up: Tensor,
    side: str,
) -> tuple[Tensor, Tensor]:  # d down [d, r], d up [r, d']
    """Input side: (Wᵀ (dY upᵀ), (W down)ᵀ dY); output side: (W (up dY)ᵀ, (downᵀ W) dYᵀ)."""
    grad, weight, up = wide(grad), wide(weight), wide(up)
    if side == "input":
        return weight.T @ (grad @ up.T), product.T @ grad
    return weight @ (up @ grad).T, product @ grad.T


def covariance(x: Tensor, scale: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """out += Σ_tokens scale² x xᵀ; the product of one call is made in x's accumulator, and mirrored."""
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)
    x = wide(x)
    if scale is not None:
        scale = scale.to(x.dtype)
        x = x * (scale if mask is None else torch.where(mask, scale, 0))[..., None]
    x = x.reshape(-1, x.shape[-1])
    product = (x.T @ x).tril()  # a matrix product does not promise equal bits on both sides of the diagonal
    out += (product + product.tril(-1).T).to(out.dtype)
