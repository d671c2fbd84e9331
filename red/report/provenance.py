"""What a result says beside its numbers: versions, commit, device; and how it is written."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import red
from red.files import atomic_write_json

DISTRIBUTIONS = ("red-distill", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy")


def finite(value: Any) -> Any:
    """The same value with `None` for NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Strict JSON, whole or absent; NaN and infinity become null."""
    atomic_write_json(path, finite(value), indent=1)


def versions() -> dict[str, str]:
    """Python and the distributions that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The git commit of the running `red`, with "-dirty" if tracked files differ, those aside that a study writes; "unknown" if it is not run from its repository."""
    package = Path(red.__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may lie in a virtual environment inside some other repository: only a tracked file proves that it is ours
    if git("ls-files", "--error-unmatch", "__init__.py") is None or (revision := git("rev-parse", "HEAD")) is None:
        return "unknown"
    written = (":(exclude,top)benchmarks/results", ":(exclude,top)docs")  # a study adds a line to its results after each run
    return revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written) else "")


def device(name: str) -> str:
    """A device in words: "cpu: <model>, 4 cores" or the GPU's name."""
    if name == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"cpu: {model}, {os.cpu_count()} cores"
