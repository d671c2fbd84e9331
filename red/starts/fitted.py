"""The fitted start: the most explained shared map, readers fitted to the student's own stream, writers that repair it."""

from red.starts.base import StartContext, StartMaps, register
from red.starts.explained import explained


@register("fitted", needs=("point_covariance", "batches"), fit="full")
def fitted(context: StartContext) -> StartMaps:
    """`explained`; what is fitted comes after it, layer by layer, in red/fitting/fit.py."""
    return explained(context)
