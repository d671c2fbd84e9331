"""Which implementation of an op runs: `RED_BACKEND=auto|torch|triton`, read at every call (auto when unset)."""

import os

CHOICES = ("auto", "torch", "triton")
TRITON_OPS: frozenset[str] = frozenset()  # names of the ops that have a Triton kernel


def select(op: str) -> str:
    """Return "torch" or "triton" for `op`, or say why the requested backend cannot run it.

    Called inside the registered implementations, so `torch.compile` never traces the environment.
    """
    choice = os.environ.get("RED_BACKEND") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"RED_BACKEND={choice!r} is not a backend; expected one of {', '.join(CHOICES)}")
    if choice == "triton" and op not in TRITON_OPS:
        raise RuntimeError(f"RED_BACKEND=triton: no Triton kernel for op {op!r} yet; use RED_BACKEND=auto or torch")
    return "torch"
