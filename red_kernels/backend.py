"""Which implementation of an op runs: `RED_BACKEND=auto|torch|triton`, read at every call (auto when unset).

auto takes the Triton kernel for tensors on a GPU, and PyTorch for all others, for float64, and where Triton is not installed; for the ops of the compiled
extension it takes that, on a CPU and on a GPU, where it is built. torch takes neither.
"""

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from red_kernels import extension, reference

CHOICES = ("auto", "torch", "triton")
TRITON_OPS = frozenset({"channel_stats", "covariance", "gather", "gather_many", "linear_kd", "rms_norm_stats", "selection_low_rank", "tap_mse"})  # names of the ops that have a Triton kernel
EXTENSION_OPS = frozenset({"erank", "erank_spectrum"})  # of csrc/
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select(op: str, *tensors: Tensor) -> str:
    """Return "torch", "triton" or "extension" for `op` on these floating `tensors`, or say why the requested backend cannot run it.

    Called inside the registered implementations, so `torch.compile` never traces the environment.

    Raises: ValueError for an unknown RED_BACKEND, RuntimeError where RED_BACKEND=triton cannot be had.
    """
    choice = os.environ.get("RED_BACKEND") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"RED_BACKEND={choice!r} is not a backend; expected one of {', '.join(CHOICES)}")
    if choice == "triton":
        require_triton(op, *tensors)
        return "triton"
    if choice == "auto" and op in EXTENSION_OPS:
        return "extension" if all(extension.takes(x) for x in tensors) else "torch"
    usable = choice == "auto" and op in TRITON_OPS and all(x.is_cuda and x.dtype in TRITON_DTYPES for x in tensors)
    return "triton" if usable and triton_or_warn() else "torch"


def implementation(op: str, *tensors: Tensor, file: str | None = None) -> ModuleType:
    """The module whose functions run `op` on `tensors`: `reference`, `extension`, or the kernels of red_kernels/triton/, in `file` or the op's own."""
    chosen = select(op, *tensors)
    if chosen != "triton":
        return extension if chosen == "extension" else reference
    return importlib.import_module(f"red_kernels.triton.{file or op}")


def require_triton(op: str, *tensors: Tensor) -> None:
    def refuse(why: str) -> None:
        raise RuntimeError(f"RED_BACKEND=triton: {why}; use RED_BACKEND=auto or torch")

    if op not in TRITON_OPS:
        refuse(f"no Triton kernel for op {op!r} yet")
    if not installed():
        refuse("Triton is not installed (pip install triton)")
    for x in tensors:
        if x.dtype not in TRITON_DTYPES:
            refuse(f"op {op!r} has no Triton kernel for {x.dtype}")
        if not x.is_cuda and not interpreting():
            refuse(f"op {op!r} got a tensor on {x.device}, where Triton runs in its interpreter only (TRITON_INTERPRET=1, slow)")


def without_autocast(x: Tensor) -> torch.autocast:
    """Inside, products have the dtype of their operands: autocast reaches into a registered op, where it would round them to half precision."""
    return torch.autocast(x.device.type, enabled=False)


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU: read by Triton once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_or_warn() -> bool:
    if not installed():
        warnings.warn("Triton is not installed, so the ops of red_kernels run in PyTorch, slower: pip install triton", stacklevel=2)
    return installed()
