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


CASES: dict[str, dict[str, Callable[[], object]]] = {  # op → what is special → call
    "tap_mse": {
        "bf16 1536": lambda: tap_mse(1536, BF16),
        "bf16 1536, index": lambda: tap_mse(1536, BF16, index=True),
        "fp32 151": lambda: tap_mse(151, FP32),
    },
}
