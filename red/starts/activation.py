"""RED's start (arXiv 2605.29327): keep the channels that are most active on the calibration text."""

from red.starts.base import StartContext, StartMaps, register, selection


@register("activation", needs=("scores",))
def activation(context: StartContext) -> StartMaps:
    """Every `A` is the selection matrix `H` of the top `d'` channels, every `B` is `Hᵀ`."""
    return selection(context, context.calibration.scores.topk(context.hidden_size).indices)
