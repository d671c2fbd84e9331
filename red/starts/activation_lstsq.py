"""RED's channels, and readers that predict the dropped channels from the kept ones by least squares."""

import torch

from red.starts.base import StartContext, StartMaps, register, selection

RIDGE = 1e-4  # of the mean kept variance: only guards the solve against channels that never move


@register("activation_lstsq", needs=("scores", "covariance"))
def activation_lstsq(context: StartContext) -> StartMaps:
    """Readers see `z_G O` with `O = (C_kk + εI)⁻¹ C_k:`, the linear estimate of the whole stream from the kept channels."""
    channels = context.calibration.scores.topk(context.hidden_size).indices.sort().values
    covariance = context.calibration.covariance
    kept = covariance[channels][:, channels]
    ridge = RIDGE * kept.diagonal().mean() * torch.eye(len(channels), dtype=kept.dtype)
    estimate = torch.linalg.solve(kept + ridge, covariance[channels])  # O [d', d]
    estimate[:, channels] = torch.eye(len(channels), dtype=kept.dtype)  # a kept channel is known, ridge or not
    return selection(context, channels, reader_up=estimate)
