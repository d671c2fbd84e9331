"""How every kernel is launched: all block sizes and warp counts in one place, few and named.

The first launch of an op is its default. Nothing is tuned at run time, since another block size is another order of summation: one
device gives one result. `benchmarks/gpu_round.py` times every launch that is named here.
"""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    name: str
    blocks: dict[str, int]  # the kernel's constexprs
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


LAUNCHES: dict[str, tuple[Launch, ...]] = {
    # Memory-bound: a program reads 2 · ROWS · COLUMNS elements a turn, at least 16 bytes a thread.
    "tap_mse": (
        Launch("wide", dict(ROWS=4, COLUMNS=1024), num_warps=8),
        Launch("narrow", dict(ROWS=16, COLUMNS=128), num_warps=4),
    ),
}  # fmt: skip

_forced: dict[str, str] = {}


def pick(op: str, default: int = 0) -> Launch:
    """The launch of `op`: the one forced by `forcing`, or number `default` of its list (a heuristic's choice)."""
    if op in _forced:
        return next(launch for launch in LAUNCHES[op] if launch.name == _forced[op])
    return LAUNCHES[op][default]


@contextmanager
def forcing(op: str, name: str):
    """Launch `op` as `name` inside this context, whatever the heuristic says: for tests and for timing."""
    if name not in [launch.name for launch in LAUNCHES[op]]:
        raise ValueError(f"{op} has no launch {name!r}; it has {', '.join(launch.name for launch in LAUNCHES[op])}")
    _forced[op] = name
    try:
        yield
    finally:
        del _forced[op]


def on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the one that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device; on a CPU (interpreter, ahead-of-time compilation) a few."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
