"""The shared map that explains most of what the readers hear, over all read points."""

import torch

from red.fitting.shared_map import balanced, gauge, most_explained, reader_gramians
from red.starts.balanced import massive
from red.starts.base import StartContext, StartMaps, register, shared


@register("explained", needs=("point_covariance",))
def explained(context: StartContext) -> StartMaps:
    """Balanced truncation, then equation (1) of red/fitting/shared_map.py climbed on the Grassmannian: O(L d²) memory."""
    points = context.calibration.point_covariance
    points = points.double() if points.shape[-1] <= 1024 else points  # above, fp64 would double gigabytes for a climb that needs no such digits
    points = points.to(context.teacher.device)
    gramians = torch.stack(list(reader_gramians(context.teacher, points)))
    pooled = points.mean(0)
    traces = gramians.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    heard = (gramians / traces.clamp_min(torch.finfo(traces.dtype).tiny)).sum(0)
    fixed = massive(context).to(points)
    down = most_explained(balanced(pooled, heard, context.hidden_size, fixed), points, gramians, fixed=fixed, on_step=context.on_step)
    down, estimate = gauge(down.double().cpu(), pooled.double().cpu())
    return shared(context, down, estimate)
