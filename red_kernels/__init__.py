"""The ops of the project as `torch.library` ops (`red::…`). Imports torch and nothing else at import time."""

from red_kernels.channel_stats import ChannelStats, channel_stats
from red_kernels.erank import erank, erank_spectrum
from red_kernels.gather import gather
from red_kernels.linear_kd import LinearKD, linear_kd
from red_kernels.tap_mse import tap_mse

__all__ = [
    "ChannelStats",
    "LinearKD",
    "channel_stats",
    "erank",
    "erank_spectrum",
    "gather",
    "linear_kd",
    "tap_mse",
]
