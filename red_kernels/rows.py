"""Rows that a mask leaves out, set to zero without looking at what they hold (NaN included)."""

import torch
from torch import Tensor


def zero_rows(x: Tensor, keep: Tensor) -> Tensor:
    """x [..., w] where keep [...] (bool), 0 elsewhere; x itself where it keeps everything and that can be asked without waiting.

    On a CPU only the rows to be zeroed are touched: PyTorch's `where` and `masked_fill` take some 8 ns an element there, twenty times a copy's time.
    """
    if x.device.type != "cpu":
        return torch.where(keep[..., None], x, 0)
    left_out = keep.logical_not().flatten().nonzero()[:, 0]
    if not len(left_out):
        return x
    return x.flatten(0, -2).index_fill(0, left_out, 0).view_as(x)
