"""A control of RED's start: the channels that vary most, rather than those that are most active."""

from red.starts.base import StartContext, StartMaps, register, selection


@register("variance", needs=("scores",))
def variance(context: StartContext) -> StartMaps:
    """The top `d'` channels by the variance over tokens of the normalised stream `z = x / rms(x)`, mean over the `2L + 1` read points.

    A channel that is large and constant is active and tells tokens apart no more than a silent one; here it counts for nothing.
    """
    statistics = context.calibration
    spread = statistics.mean_square.mean(0) - statistics.mean.square().mean(0)  # mean over points of E[z²] - E[z]²
    return selection(context, spread.topk(context.hidden_size).indices)
