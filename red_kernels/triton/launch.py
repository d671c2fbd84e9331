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
    registers: int | None = None  # at most, a thread; unset, ptxas may rather spill a little to fit one program more

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        limit = at_most(self.registers) if self.registers else {}
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


LAUNCHES: dict[str, tuple[Launch, ...]] = {
    # Read once: a thread has ROWS loads of 16 bytes in flight; a tile long enough that its sums are few bytes beside its tokens.
    "channel_stats": (
        Launch("wide", dict(TILE=128, ROWS=16, COLUMNS=1024), num_warps=4),
        Launch("short", dict(TILE=64, ROWS=16, COLUMNS=512), num_warps=2),
        Launch("narrow", dict(TILE=64, ROWS=32, COLUMNS=128), num_warps=4),
    ),
    # Indexed loads are one channel each: eight of them in flight in a thread, two of its row; rows as they are read 16 bytes a thread.
    "gather": (
        Launch("columns", dict(ROWS=4, COLUMNS=512), num_warps=8),
        Launch("rows", dict(ROWS=2, COLUMNS=1024), num_warps=4),
        Launch("narrow", dict(ROWS=32, COLUMNS=32), num_warps=4),
    ),
    # Tiles of 128 read little for what they multiply; small widths need the programs, float32 the registers.
    "covariance": (
        Launch("large", dict(TOKENS=64, CHANNELS=128), num_warps=8, num_stages=3),
        Launch("small", dict(TOKENS=32, CHANNELS=64), num_warps=4, num_stages=3),
    ),
    "selection_low_rank": (
        Launch("large", dict(ROWS=128, COLUMNS=64, TERMS=32), num_warps=8),
        Launch("small", dict(ROWS=64, COLUMNS=32, TERMS=32), num_warps=4),
    ),
    "gather_many": (Launch("wide", dict(ROWS=4, COLUMNS=512), num_warps=8), Launch("narrow", dict(ROWS=16, COLUMNS=128), num_warps=8)),
    # 8 lanes a thread and DEPTH · 16 bytes of each model in flight. "whole": one row a multiprocessor at a time, half of it in the cache.
    "linear_kd": (
        Launch("wide", dict(DEPTH=2, LANES=1024), num_warps=4, registers=168),
        Launch("narrow", dict(DEPTH=1, LANES=512), num_warps=2, registers=128),
        Launch("whole", dict(DEPTH=1, LANES=4096), num_warps=16, registers=128),
    ),
    # num_warps is that of a width of 4096: 16 channels a thread, whose three sums leave room for 16 warps on a multiprocessor.
    "rms_norm_stats": (
        Launch("staged", dict(TILE=128, STAGES=3), num_warps=8),
        Launch("direct", dict(TILE=128, STAGES=1), num_warps=8),
    ),
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


LINEAR_KD_BYTES = 960 << 20


def linear_kd_rows(rows: int, row_bytes: int, held_bytes: int) -> int:
    """Rows of a chunk of linear_kd: as few chunks as fit, of equal size, in whole tiles of 128 rows.

    Logits and the `held_bytes` of the head's gradient share LINEAR_KD_BYTES (with the library's workspace less than 1 GiB); logits get a
    quarter of it at least. More rows than 2048 only cost memory: the products are bound by arithmetic long before.
    """
    budget = max(LINEAR_KD_BYTES - held_bytes, LINEAR_KD_BYTES // 4)
    most = min(max(budget // row_bytes // 128, 1) * 128, 2048)
    chunks = -(-rows // most) or 1
    return -(-rows // (chunks * 128)) * 128 or 128


def on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the one that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device; on a CPU (interpreter, ahead-of-time compilation) a few."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def at_most(registers: int) -> dict[str, int]:
    """The launch option that holds a thread to so many registers, for the compiler to trade none of them for warps; NVIDIA's only."""
    return {} if torch.version.hip else {"maxnreg": registers}
