"""How csrc/ becomes one shared library: compilers, flags, and the ninja file. Used by setup.py and by the tests of the build; knows nothing of setuptools.

The library stands on PyTorch's stable ABI (torch/csrc/stable), for the version of the torch it is built with and all later ones. Its CUDA part has its own CUDA
runtime inside, so that one library serves a torch with CUDA and one without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90")  # machine code for these, and PTX of the last for whatever comes later
CHOICES = ("auto", "0", "1")


class CannotBuild(Exception):
    """Something that the library needs is missing; the message names it."""


def cuda_choice() -> str:
    """RED_BUILD_CUDA: "auto" (unset), "0" or "1"."""
    choice = os.environ.get("RED_BUILD_CUDA") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"RED_BUILD_CUDA={choice!r}; expected one of {', '.join(CHOICES)}")
    return choice


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if found is None:
        raise CannotBuild("no C++ compiler (CXX, c++ or g++)")
    return found


def toolkit() -> Path | None:
    """The root of the CUDA toolkit. What `nvcc` on the PATH is may be a wrapper, so that comes last."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if on_path := shutil.which("nvcc"):
        roots.append(str(Path(on_path).resolve().parents[1]))
    return next((Path(root) for root in roots if root and (Path(root) / "bin" / "nvcc").is_file()), None)


def ninja() -> str:
    try:
        import ninja as package

        found = shutil.which("ninja", path=package.BIN_DIR)
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which("ninja")
    if found is None:
        raise CannotBuild("no ninja (pip install ninja)")
    return found


def torch_flags() -> list[str]:
    try:
        import torch
    except ImportError:
        raise CannotBuild("no torch here (an isolated build has none: pip install --no-build-isolation)") from None
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}", "-isystem", str(torch_root() / "include")]


def torch_root() -> Path:
    import torch

    return Path(torch.__file__).parent


def cpp_flags(cuda: bool) -> list[str]:
    return ["-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *(["-DRED_CUDA"] if cuda else []), *torch_flags()]


def cuda_flags() -> list[str]:
    codes = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in ARCHITECTURES]
    newest = ARCHITECTURES[-1]
    return ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes,
            f"-gencode=arch=compute_{newest},code=compute_{newest}", *torch_flags()]  # fmt: skip


def link_flags(root: Path | None) -> list[str]:
    flags = ["-shared", f"-L{torch_root() / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
    if root is not None:
        flags += [f"-L{root / folder}" for folder in ("lib64", "lib") if (root / folder).is_dir()] + ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return flags


def ninja_text(output: Path, root: Path | None) -> str:
    """The ninja file that makes `output`, with the CUDA part if `root`, a toolkit, is given. Paths must not hold blanks."""

    def line(words: list[str]) -> str:
        return " ".join(word.replace("$", "$$") for word in words)

    text = [
        f"rule cpp\n  command = {line([compiler(), *cpp_flags(root is not None)])} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler()} $in {line(link_flags(root))} -o $out",
        f"build erank.o: cpp {HERE / 'erank.cpp'}",
    ]
    objects = ["erank.o"]
    if root is not None:
        text.append(f"rule cuda\n  command = {line([str(root / 'bin' / 'nvcc'), *cuda_flags()])} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc")
        text.append(f"build erank_cuda.o: cuda {HERE / 'erank.cu'}")
        objects.append("erank_cuda.o")
    text.append(f"build {output}: link {' '.join(objects)}\n")
    return "\n".join(text)


def build(output: Path, folder: Path, cuda: str = "auto") -> str:
    """Make the library at `output`, with intermediate files in `folder`; says what was made.

    Raises: CannotBuild where something is missing or does not compile, which for cuda="auto" is never nvcc.
    """
    if sys.platform != "linux":
        raise CannotBuild(f"it is made on Linux only, this is {sys.platform}")
    root = None if cuda == "0" else toolkit()
    if cuda == "1" and root is None:
        raise CannotBuild("RED_BUILD_CUDA=1, but no nvcc (CUDA_HOME, CUDA_PATH, /usr/local/cuda, or on the PATH)")
    try:
        _ninja(output, folder, root)
    except CannotBuild as error:
        if root is None or cuda == "1":
            raise
        print(f"red: {root / 'bin' / 'nvcc'} does not make the CUDA part, so it is left out: {error}", file=sys.stderr)
        root = None
        _ninja(output, folder, None)
    return "CPU and CUDA" if root is not None else "CPU"


def _ninja(output: Path, folder: Path, root: Path | None) -> None:
    folder = folder / ("cuda" if root else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    if any(" " in str(path) for path in (output, folder, HERE, torch_root())):
        raise CannotBuild(f"a path with a blank in it: {output}, {HERE} or {torch_root()}")
    (folder / "build.ninja").write_text(ninja_text(output.resolve(), root))
    done = subprocess.run([ninja(), "-C", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotBuild(f"the compiler failed:\n{(done.stdout + done.stderr)[-3000:]}")


if __name__ == "__main__":  # into this checkout, without an installation: python csrc/build.py
    print(build(HERE.parent / "red_kernels" / "_csrc.so", HERE.parent / "build" / "csrc", cuda_choice()))
