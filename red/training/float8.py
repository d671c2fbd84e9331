"""The teacher's decoder layers in float8: e4m3 weights and activations, a scale per token and per output channel, bfloat16 results.

    y = (s_x s_wᵀ) ⊙ (q_x q_wᵀ),   q = x / s rounded to e4m3,   s = max|row| / 448

The products take half the time of bfloat16 ones on a GPU that has them (compute capability 9.0 or newer; `torch._scaled_mm`). The weights are rounded anew in every forward pass: that reads
them once more, but a float8 copy beside the bfloat16 weights, which the projections need, would cost half of the teacher's memory again. The output head and everything of the student stay as they were.
Elsewhere the products are emulated, exact but for the order of the sums.

Measured with the emulation on the embedded teachers (0.8 M parameters, which are sensitive): KL from the float32 teacher of 0.080 nats a token (`chains`) and 0.163 (`massive`, with outlier channels);
bfloat16 has 0.007 and 0.005. So it is off by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from red import families
from red.errors import REDError

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Float8Linear(nn.Linear):
    """What a linear layer of the teacher becomes for a step; it has no state of its own."""

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        rows, weight = x.reshape(-1, x.shape[-1]), self.weight
        found = product(*quantised(rows), *quantised(weight), weight.dtype if weight.dtype != torch.float64 else torch.float32)
        found = found if self.bias is None else found + self.bias
        return found.to(weight.dtype).view(*x.shape[:-1], len(weight))


@contextmanager
def layers(teacher: PreTrainedModel) -> Iterator[None]:
    """The seven linear modules of every layer in float8 inside, as they were after."""
    modules = [teacher.get_submodule(tap.path) for tap in families.taps(teacher.config)]
    before = [type(module) for module in modules]
    try:
        for module in modules:
            module.__class__ = Float8Linear
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__class__ = own


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [m, k] -> its rows in e4m3 [m, k], and their scales [m, 1] float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [m, k] times b [n, k] transposed, with their scales [m, 1] and [n, 1]: [m, n]."""
    if a.is_cuda and dtype == torch.bfloat16:
        return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b.T, out_dtype=dtype, use_fast_accum=True)
    with torch.autocast(a.device.type, enabled=False):
        return ((a.float() @ b.float().T) * scale_a * scale_b.T).to(dtype)


def check(teacher: PreTrainedModel, device: torch.device) -> None:
    """REDError where the GPU or the teacher cannot; a CPU emulates it."""
    if device.type != "cuda":
        return
    odd = [tap.path for tap in families.taps(teacher.config) if any(size % 16 for size in teacher.get_submodule(tap.path).weight.shape)]
    if torch.cuda.get_device_capability(device) < (9, 0):
        raise REDError(f"teacher_fp8=True needs a GPU of compute capability 9.0 or newer, and this one has {torch.cuda.get_device_capability(device)}. Leave it out.")
    if teacher.dtype != torch.bfloat16 or odd:
        raise REDError(f"teacher_fp8=True needs a bfloat16 teacher whose weights have sizes that are multiples of 16; this one is {teacher.dtype}"
                       f"{f', and {odd[0]} is {list(teacher.get_submodule(odd[0]).weight.shape)}' if odd else ''}. Leave it out, or load the teacher in bfloat16.")
