"""Checks and conversions shared by the public functions.

Shapes and dtypes are checked everywhere. Values are looked at on CPU tensors only: on a GPU reading one would wait for
all queued work. Value checks are called from inside the registered implementations, where `torch.compile` does not look.
"""

import torch
from torch import Tensor

from red_kernels import reference


def require_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")


def require_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {meaning} = {list(shape)}, got {list(tensor.shape)}")


def require_matrices(op: str, x: Tensor, mask: Tensor | None) -> None:
    """x [..., N, d] of a floating dtype with a mask [..., N] bool or None."""
    require_floating(op, x=x)
    if x.dim() < 2 or x.shape[-1] < 1 or x.shape[-2] < 1:
        raise ValueError(f"{op}: x must have shape [..., N, d] with N and d of at least 1, got {list(x.shape)}")
    if mask is not None:
        require_dtype(op, "mask", mask, torch.bool)
        require_shape(op, "mask", mask, x.shape[:-1], "[..., N]")


def require_index(op: str, index: Tensor) -> None:
    require_dtype(op, "index", index, torch.int64)
    if index.dim() != 1:
        raise ValueError(f"{op}: index must be one-dimensional [k], got shape {list(index.shape)}")


def check_range(op: str, name: str, values: Tensor, low: int, high: int, except_value: int | None = None) -> None:
    """Raise ValueError naming the first of `values` outside [low, high). CPU tensors only; others pass unread."""
    if not values.is_cpu:
        return
    bad = (values < low) | (values >= high)
    if except_value is not None:
        bad &= values != except_value
    if bad.any():
        position = bad.nonzero()[0].tolist()
        besides = "" if except_value is None else f" or {except_value}"
        value = values[tuple(position)].item()
        raise ValueError(f"{op}: {name}{position} = {value} is out of range; expected {low} to {high - 1}{besides}")


def token_count(
    op: str,
    name: str,
    value: float | Tensor | None,
    mask: Tensor | None,  # [...] bool; not None where `value` is
    like: Tensor,
) -> Tensor:  # 0-dim, in the accumulator's dtype of `like`, on its device
    """The divisor of a token mean: `value`, or the number of True in `mask`, at least 1.

    A given tensor is not read (no synchronisation), only kept off zero, so that an empty global batch gives 0, not NaN.
    """
    dtype = reference.accumulator(like.dtype)
    if value is None:
        assert mask is not None
        return mask.sum().clamp(min=1).to(dtype)
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{op}: {name} must be a number or a 0-dim tensor, got shape {list(value.shape)}")
        return value.detach().to(device=like.device, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    return torch.full((), value, dtype=dtype, device=like.device)
