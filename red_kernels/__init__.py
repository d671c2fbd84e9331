"""The ops of the project as `torch.library` ops (`red::…`). Imports torch and nothing else at import time."""

from red_kernels.channel_stats import ChannelStats, channel_stats
from red_kernels.covariance import covariance
from red_kernels.erank import erank, erank_spectrum
from red_kernels.erank_estimate import ERankEstimate, erank_estimate
from red_kernels.erank_log import log_erank
from red_kernels.erank_stream import ERankStream
from red_kernels.gather import gather, inverse_index
from red_kernels.gather_many import gather_many
from red_kernels.linear_kd import LinearKD, linear_kd
from red_kernels.rms_norm_stats import RMSNormStats, rms_norm_stats
from red_kernels.selection_low_rank import selection_low_rank
from red_kernels.tap_mse import tap_mse

__all__ = [
    "ChannelStats",
    "ERankEstimate",
    "ERankStream",
    "LinearKD",
    "RMSNormStats",
    "channel_stats",
    "covariance",
    "erank",
    "erank_estimate",
    "erank_spectrum",
    "gather",
    "gather_many",
    "inverse_index",
    "linear_kd",
    "log_erank",
    "rms_norm_stats",
    "selection_low_rank",
    "tap_mse",
]
