"""The control of RED's start: as many channels, chosen at random."""

import torch

from red.starts.base import StartContext, StartMaps, register, selection


@register("random_selection", needs=("scores",))
def random_selection(context: StartContext) -> StartMaps:
    """A uniformly random set of `d'` channels, the same for all modules. The calibration serves the norm scale only."""
    return selection(context, torch.randperm(context.width, generator=context.generator)[: context.hidden_size])
