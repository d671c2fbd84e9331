"""What a fit will cost, from the shapes alone: counted operations over a measured rate, and the tensors that are held."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from red import families
from red.fitting.shared_map import ITERATIONS

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """The cost of calibration, shared map and fit together. Only products are counted: small models on a CPU take two to four times as long. Bytes are of
    the largest moment, beside the teacher's own weights."""

    flops: float
    seconds: float | None  # None where no rate was given
    host_bytes: int
    device_bytes: int

    def __str__(self) -> str:
        minutes = "" if self.seconds is None else f", at least {duration(self.seconds)} at this device's measured rate"
        return (f"{self.flops / 1e12:.3g} TFLOP{minutes}; {self.host_bytes / GIB:.2g} GiB on the host, "
                f"{self.device_bytes / GIB:.2g} GiB on the device beside the teacher")


def forecast(config: PreTrainedConfig, hidden_size: int, tokens: int, *, explained: bool = True, fit: str = "full", sweeps: int = 1,
             teacher_bytes: int = 4, rate: float | None = None) -> Forecast:
    """The forecast of a start with a fit.

    Args:
        config: the teacher's.
        hidden_size: the student's width d'.
        tokens: of the calibration text, padding included.
        explained: whether the map is `explained` (per-point covariances, O(L d²) memory) or `balanced` (O(d²)).
        fit: "none", "readers" or "full".
        sweeps: of calibration, map and fit; between them both models' logits are compared.
        teacher_bytes: bytes of an element of the teacher's weights and stream.
        rate: floating-point operations a second; `measured_rate` finds it.
    """
    n, d, narrow = float(tokens), config.hidden_size, hidden_size
    points, head_dim = 2 * config.num_hidden_layers + 1, families.head_dim(config)
    attention = config.num_attention_heads * head_dim
    key_value = getattr(config, "num_key_value_heads", config.num_attention_heads) * head_dim
    outputs = config.num_hidden_layers * (attention + 2 * key_value + 2 * config.intermediate_size)  # of all readers
    inputs = config.num_hidden_layers * (attention + config.intermediate_size)  # of all writers

    def forward(width: int) -> float:
        return 2 * n * width * (outputs + inputs)

    flops = forward(d) + points * 2 * n * d * d  # calibration
    if explained:
        flops += points * (4 * d**3 + 3 * ITERATIONS * 4 * d * d * narrow) + 4 * d * d * outputs
    student = 4 * narrow * (outputs + inputs + 2 * config.vocab_size)  # bytes, fp32
    # the climb: three matrices of each point, their products with Q and those of the gradient; in fp64 where red/starts/explained.py takes it
    climb = (8 if d <= 1024 else 4) * points * (3 * d * d + 4 * d * narrow + 4 * narrow * narrow) if explained else 8 * 4 * d * d
    maps = {"none": 2, "readers": 2 + 2, "full": 2 + 4}[fit] * config.num_hidden_layers  # of [d, d'], fp64: the start's, one for all readers of a point, then the fitted
    host, device = (4 * points * d * d if explained else 0) + 8 * d * narrow * maps, max(climb, 8 * 3 * d * d)
    if fit != "none":
        flops += forward(d) + 2 * forward(narrow) + points * 2 * n * narrow * (narrow + d)
        host += tokens * (teacher_bytes * d + 4 * narrow)
        device = max(device, student + 8 * (narrow * narrow + narrow * d))
    if fit == "full":
        flops += forward(d) + 2 * n * d * inputs + (points - 1) * (2 * n * d * (d + 2 * narrow) + d**3)
        device = max(device, student + 8 * (2 * d * d + 2 * d * narrow))
    if fit != "none" and sweeps > 1:
        host += 4 * points * d * d if explained else 0  # the first calibration is the caller's, beside that of a later sweep
        flops = sweeps * flops + (sweeps - 1) * 2 * n * config.vocab_size * (d + narrow)
    return Forecast(flops, None if rate is None else flops / rate, int(host), int(device))


def measured_rate(device: torch.device | str, size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of one matrix product in `dtype` of `size`³, the best of a few within about a tenth of a second."""
    a = torch.ones(size, size, device=device, dtype=dtype)  # not random: the caller's generator stays where it is
    best, spent = float("inf"), 0.0
    while spent < 0.1:
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
        spent += time.perf_counter() - began
    return 2 * size**3 / best


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def duration(seconds: float) -> str:
    """In words, such as 90 s, 5 min or 3.2 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
