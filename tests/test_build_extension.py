"""How csrc/ is built: RED_BUILD_CUDA, what happens without a compiler, and what the CUDA compiler says of the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402

needs_compiler = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a C++ compiler on Linux")
needs_nvcc = pytest.mark.skipif(build.toolkit() is None or not shutil.which("c++"), reason="no nvcc here (CUDA_HOME, CUDA_PATH, /usr/local/cuda, or on the PATH)")


@pytest.fixture()
def no_toolkit(monkeypatch):
    monkeypatch.setattr(build, "toolkit", lambda: None)


def test_the_choice(monkeypatch):
    for given, found in ((None, "auto"), ("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        monkeypatch.delenv("RED_BUILD_CUDA", raising=False)
        if given is not None:
            monkeypatch.setenv("RED_BUILD_CUDA", given)
        assert build.cuda_choice() == found
    monkeypatch.setenv("RED_BUILD_CUDA", "yes")
    with pytest.raises(ValueError, match="RED_BUILD_CUDA='yes'; expected one of auto, 0, 1"):
        build.cuda_choice()


def test_the_target_is_the_torch_it_is_built_with():
    major, minor = torch.__version__.split(".")[:2]
    (flag,) = [flag for flag in build.torch_flags() if flag.startswith("-DTORCH_TARGET_VERSION=")]
    assert int(flag.partition("=")[2], 16) == (int(major) << 56) + (int(minor) << 48)


@needs_compiler
@pytest.mark.parametrize("target", ("0x020b000000000000", None), ids=("torch 2.11", "this torch"))
def test_the_cpu_part_compiles_for(target):
    """The oldest torch that red supports, by its subset of the headers: what came later is hidden by TORCH_TARGET_VERSION."""
    flags = [f"-DTORCH_TARGET_VERSION={target}" if target and "TARGET_VERSION" in flag else flag for flag in build.cpp_flags(cuda=False)]
    subprocess.run([build.compiler(), *flags, "-Werror", "-fsyntax-only", str(build.HERE / "erank.cpp")], check=True)


@needs_compiler
def test_cuda_demanded_and_missing_fails_loudly(no_toolkit, tmp_path):
    with pytest.raises(build.CannotBuild, match="RED_BUILD_CUDA=1, but no nvcc"):
        build.build(tmp_path / "x.so", tmp_path / "build", "1")


@needs_compiler
def test_an_nvcc_that_does_not_work_leaves_the_cpu_part(monkeypatch, tmp_path, capsys):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken toolkit; exit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "toolkit", lambda: tmp_path)
    with pytest.raises(build.CannotBuild, match="broken toolkit"):
        build.build(tmp_path / "x.so", tmp_path / "build", "1")
    assert build.build(tmp_path / "x.so", tmp_path / "build", "auto") == "CPU"
    assert "does not make the CUDA part, so it is left out" in capsys.readouterr().err
    script = f"import torch; torch.ops.load_library({str(tmp_path / 'x.so')!r}); print(torch.ops.red_csrc.has_cuda())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def install(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py's build_ext of a copy of the sources, in place."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "red_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_compiler_it_installs_and_says_so(tmp_path):
    done = install(tmp_path, CXX=str(tmp_path / "none"), PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the compiled extension is left out, and erank runs in PyTorch, slower: no C++ compiler" in done.stderr
    assert not list((tmp_path / "red_kernels").glob("*.so"))


def test_without_a_compiler_it_fails_where_cuda_is_demanded(tmp_path):
    done = install(tmp_path, CXX=str(tmp_path / "none"), PATH=str(tmp_path), RED_BUILD_CUDA="1")
    assert done.returncode != 0 and "CannotBuild" in done.stderr


# ---- what the CUDA compiler says ----

KERNELS = {"prepare": 2, "column_means": 2, "normalise": 4, "zero_rows": 2, "jacobi_kernel": 2}  # and their instantiations


def resources(report: str) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(registers, spilled bytes) of every instantiation, by kernel and architecture, from `nvcc -Xptxas -v`."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    pattern = r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for name, architecture, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        (kernel,) = [kernel for kernel in KERNELS if kernel in name]
        found.setdefault((kernel, architecture), []).append((int(registers), int(stores) + int(loads)))
    return found


@needs_nvcc
@pytest.mark.parametrize("target", ("0x020b000000000000", None), ids=("torch 2.11", "this torch"))
def test_kernels_compile_without_spills(target, tmp_path):
    flags = [f"-DTORCH_TARGET_VERSION={target}" if target and "TARGET_VERSION" in flag else flag for flag in build.cuda_flags()]
    nvcc = build.toolkit() / "bin" / "nvcc"
    done = subprocess.run([str(nvcc), *flags, "-Xptxas", "-v", "-c", str(build.HERE / "erank.cu"), "-o", str(tmp_path / "erank.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    found = resources(done.stderr)
    assert {key: len(each) for key, each in found.items()} == {(kernel, f"sm_{one}"): count for kernel, count in KERNELS.items() for one in build.ARCHITECTURES}
    assert all(spilled == 0 for each in found.values() for _, spilled in each), found
    assert max(registers for each in found.values() for registers, _ in each) <= 64, found  # 256 threads of these leave four blocks a multiprocessor


def test_a_spill_is_seen():
    report = """ptxas info    : Compiling entry function '_Z13jacobi_kernelIdE' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers"""
    assert resources(report) == {("jacobi_kernel", "sm_90"): [(255, 16)]}


@needs_nvcc
def test_the_largest_matrix_fits_in_shared_memory():
    """Of the GPU with the least of those it is built for: 163 KiB a block on sm_80."""
    from red_kernels.extension import JACOBI_LARGEST

    most = int(re.search(r"kMost = (\d+)", (build.HERE / "erank.cu").read_text()).group(1))
    assert most == JACOBI_LARGEST and 34 * 8 + most // 2 * 32 + most * (most + 1) * 8 <= 163 * 1024
