"""Directions that both move much and are heard much: balanced truncation of the pooled stream, massive directions kept."""

import torch
from torch import Tensor

from red.fitting.massive import MOST, massive_directions
from red.fitting.shared_map import balanced as balance
from red.fitting.shared_map import gauge, reader_gramians
from red.starts.base import StartContext, StartMaps, register, shared


@register("balanced", needs=("covariance",))
def balanced(context: StartContext) -> StartMaps:
    """Square-root balancing of `C`, the pooled covariance, and `M`, the pooled Gramian of the readers: O(d²) memory."""
    covariance = context.calibration.covariance
    down = balance(covariance, pooled_gramian(context), context.hidden_size, massive(context))
    down, estimate = gauge(down, covariance)
    return shared(context, down, estimate)


def massive(context: StartContext) -> Tensor:
    """The teacher's massive directions, [d, k], at most a quarter of the student's width."""
    calibration = context.calibration
    return massive_directions(calibration.longest, calibration.mean_log_rms, min(MOST, context.hidden_size // 4))


def pooled_gramian(context: StartContext) -> Tensor:
    """`Σ_i M_i` over the read points, [d, d], each of trace one and relative to the pooled covariance."""
    covariance = context.calibration.covariance
    points = [covariance] * len(context.norms)
    total = torch.zeros_like(covariance)
    for gramian in reader_gramians(context.teacher, points):
        total += gramian / gramian.trace().clamp_min(torch.finfo(gramian.dtype).tiny)
    return total
