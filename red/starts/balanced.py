"""Directions that both move much and are heard much: balanced truncation of the pooled stream."""

import torch
from torch import Tensor

from red.fitting.shared_map import balanced as balance
from red.fitting.shared_map import gauge, reader_gramians
from red.starts.base import StartContext, StartMaps, register, shared


@register("balanced", needs=("covariance",))
def balanced(context: StartContext) -> StartMaps:
    """Square-root balancing of `C`, the pooled covariance, and `M`, the pooled Gramian of the readers: O(d²) memory."""
    covariance = context.calibration.covariance
    down, estimate = gauge(balance(covariance, pooled_gramian(context), context.hidden_size), covariance)
    return shared(context, down, estimate)


def pooled_gramian(context: StartContext) -> Tensor:
    """`Σ_i M_i` over the read points, [d, d], each of trace one and relative to the pooled covariance."""
    covariance = context.calibration.covariance
    points = [covariance] * len(context.norms)
    total = torch.zeros_like(covariance)
    for gramian in reader_gramians(context.teacher, points):
        total += gramian / gramian.trace()
    return total
