"""What `aot.py` compiles: the ops called at few rows, at widths of real models and at an odd one, in every kind of specialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch

import red_kernels as rk

BF16, FP32 = torch.bfloat16, torch.float32


def tap_mse(width: int, dtype: torch.dtype, index: bool = False) -> None:
    student = torch.zeros(2, 8, width, dtype=dtype, requires_grad=True)
    teacher = torch.zeros(2, 8, 2 * width if index else width, dtype=dtype)
    rk.tap_mse(student, teacher, torch.ones(2, 8, dtype=torch.bool), index=torch.arange(width) if index else None).backward()


def channel_stats(width: int, dtype: torch.dtype, ids: bool = True, ordered: bool = True, **more: bool) -> None:
    x = torch.zeros(2, 80, width, dtype=dtype)
    rk.channel_stats(x, torch.arange(160).view(2, 80) // 50 if ids else None, 4 if ids else None, ordered=ordered, **more)


def rms_norm_stats(width: int, dtype: torch.dtype, residual: bool = True, ids: bool = True, of: str = "stream", ordered: bool = True,
                   length: int = 80) -> None:  # fmt: skip
    x = torch.zeros(2, length, width, dtype=dtype)
    segments = dict(segment_ids=torch.arange(2 * length).view(2, length) // length, num_segments=2, ordered=ordered) if ids else {}
    rk.rms_norm_stats(x, x[0, 0], 1e-5, residual=x if residual else None, of=of, **segments)


def gather(shape: tuple[int, ...], dim: int, k: int, dtype: torch.dtype, scaled: bool = False, inverse: bool = True) -> None:
    x, index = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.arange(k)
    scale = torch.ones(k, requires_grad=True) if scaled else None
    y = rk.gather(x, index, dim, scale, rk.inverse_index(index, shape[dim]) if inverse else None)
    y.backward(torch.zeros_like(y))


def gather_many(dtype: torch.dtype, width: int, k: int, scaled: bool = False) -> None:
    index, scale = torch.arange(k), torch.ones(k) if scaled else None
    readers, writers = [torch.zeros(64, width, dtype=dtype)] * 5, [torch.zeros(width, 64, dtype=dtype)] * 2
    rk.gather_many([*readers, *writers], [index] * 7, [1] * 5 + [0] * 2, [scale] * 7)
    rk.gather_many([torch.zeros(width, width, dtype=dtype)], [(index, index)], [(0, 1)], [(scale, scale)])


def selection_low_rank(width: int, k: int, rank: int, dtype: torch.dtype, factors: torch.dtype) -> None:
    index, down, up = torch.arange(k), torch.zeros(width, rank, dtype=factors), torch.zeros(rank, k, dtype=factors)
    rk.selection_low_rank(torch.zeros(64, width, dtype=dtype), index, down, up, "input")
    rk.selection_low_rank(torch.zeros(width, 64, dtype=dtype), index, down, up, "output")


def covariance(width: int, dtype: torch.dtype, scaled: bool = False) -> None:
    scale, mask = (torch.ones(64), torch.ones(64, dtype=torch.bool)) if scaled else (None, None)
    rk.covariance(torch.zeros(64, width, dtype=dtype), scale=scale, mask=mask, out=torch.zeros(width, width))


def linear_kd(vocabulary: int, width: int, dtype: torch.dtype, divergence: str = "forward", gradients: bool = True, **options) -> None:
    """18 rows in chunks of 16, so that products are summed."""
    hidden, weight = (torch.zeros(rows, width, dtype=dtype, requires_grad=gradients) for rows in (18, vocabulary))
    loss = rk.linear_kd(hidden, weight, hidden, weight, torch.arange(18), divergence=divergence, chunk_size=16, **options).loss
    if gradients:
        loss.backward()


CASES: dict[str, dict[str, Callable[[], object]]] = {  # op → what is special → call
    "covariance": {
        "bf16 8192, scale, mask": lambda: covariance(8192, BF16, scaled=True),
        "fp16 4096, scale, mask": lambda: covariance(4096, torch.float16, scaled=True),
        "bf16 3072": lambda: covariance(3072, BF16),
        "fp32 151, scale, mask": lambda: covariance(151, FP32, scaled=True),
        "fp32 2048": lambda: covariance(2048, FP32),
    },
    "gather_many": {
        "bf16 3072 → 1536": lambda: gather_many(BF16, 3072, 1536),
        "bf16 8192 → 4096, scale": lambda: gather_many(BF16, 8192, 4096, scaled=True),
        "fp32 151 → 17, scale": lambda: gather_many(FP32, 151, 17, scaled=True),
    },
    "selection_low_rank": {
        "bf16 3072 → 1536, rank 64, fp32 factors": lambda: selection_low_rank(3072, 1536, 64, BF16, FP32),
        "bf16 8192 → 4096, rank 16, bf16 factors": lambda: selection_low_rank(8192, 4096, 16, BF16, BF16),
        "fp32 151 → 17, rank 5": lambda: selection_low_rank(151, 17, 5, FP32, FP32),
    },
    "gather": {
        "bf16 activations 3072 → 1536": lambda: gather((2, 64, 3072), -1, 1536, BF16),
        "bf16 readers 3072 → 1536, scale": lambda: gather((256, 3072), -1, 1536, BF16, scaled=True),
        "bf16 writers 3072 → 1536": lambda: gather((3072, 256), 0, 1536, BF16),
        "bf16 writers 8192 → 4096, scale, sums": lambda: gather((8192, 256), 0, 4096, BF16, scaled=True, inverse=False),
        "bf16 activations, sums": lambda: gather((2, 64, 8192), -1, 4096, BF16, inverse=False),
        "fp32 151, scale, sums": lambda: gather((3, 33, 151), 1, 17, FP32, scaled=True, inverse=False),
    },
    "channel_stats": {
        "bf16 4096": lambda: channel_stats(4096, BF16),
        "bf16 4096, by row": lambda: channel_stats(4096, BF16, ids=False),
        "bf16 4096, unordered, all": lambda: channel_stats(4096, BF16, ordered=False, squares=True, maximum=True),
        "fp32 8192, all": lambda: channel_stats(8192, FP32, squares=True, maximum=True),
        "fp32 151, all": lambda: channel_stats(151, FP32, squares=True, maximum=True),
    },
    "rms_norm_stats": {
        "bf16 4096": lambda: rms_norm_stats(4096, BF16),
        "bf16 4096, several tiles": lambda: rms_norm_stats(4096, BF16, length=1100),
        "bf16 8192, output": lambda: rms_norm_stats(8192, BF16, of="output"),
        "bf16 1536, no residual": lambda: rms_norm_stats(1536, BF16, residual=False),
        "bf16 3072, unordered": lambda: rms_norm_stats(3072, BF16, ordered=False),
        "fp32 8192": lambda: rms_norm_stats(8192, FP32),
        "fp32 151, by row, output": lambda: rms_norm_stats(151, FP32, ids=False, of="output"),
    },
    "linear_kd": {
        "bf16 128256, T=2": lambda: linear_kd(128256, 16, BF16, temperature=2.0),
        "bf16 128256, T=1": lambda: linear_kd(128256, 16, BF16),
        "bf16 128256, reverse, T=2": lambda: linear_kd(128256, 16, BF16, "reverse", temperature=2.0),
        "bf16 128256, jsd, softcap, top 64, T=2": lambda: linear_kd(128256, 16, BF16, "jsd", temperature=2.0, logit_softcap=30.0, teacher_top_k=64),
        "fp16 50257, value alone": lambda: linear_kd(50257, 16, torch.float16, gradients=False, temperature=2.0),
        "bf16 1024, width 8192": lambda: linear_kd(1024, 8192, BF16, temperature=2.0),
        "fp32 32000, T=2": lambda: linear_kd(32000, 16, FP32, temperature=2.0),
        "fp32 151, jsd, softcap, T=2": lambda: linear_kd(151, 17, FP32, "jsd", temperature=2.0, logit_softcap=30.0, logit_scale=0.5),
    },
    "tap_mse": {
        "bf16 1536": lambda: tap_mse(1536, BF16),
        "bf16 1536, index": lambda: tap_mse(1536, BF16, index=True),
        "fp32 151": lambda: tap_mse(151, FP32),
    },
}
