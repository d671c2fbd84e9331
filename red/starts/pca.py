"""The top principal directions of the normalised residual stream, one map shared by all modules."""

import torch

from red.starts.base import StartContext, StartMaps, register, shared


@register("pca", needs=("covariance",))
def pca(context: StartContext) -> StartMaps:
    """The leading `d'` eigenvectors of the pooled second moment `E[zᵀz]` (not centred: a norm does not centre either)."""
    _, vectors = torch.linalg.eigh(context.calibration.covariance)  # ascending
    return shared(context, vectors.flip(1)[:, : context.hidden_size])
