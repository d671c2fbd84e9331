"""The compiled extension beyond test_op_erank.py: its error bounds, threads, fallbacks, the GPU's Jacobi rotations run on a CPU, and the op under sanitizers."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import red_kernels
from red_kernels import backend, extension, reference

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
needs_extension = pytest.mark.skipif(bool(extension.why_not()), reason=extension.why_not())
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(x):
    """(eRank, λ descending) of x [N, d], by the singular values in float64: nothing is squared before they are known."""
    rows = reference.normalised_rows(x, None)[0]
    eigenvalues = torch.linalg.svdvals(rows) ** 2
    r = eigenvalues / eigenvalues.sum()
    return (-torch.special.xlogy(r, r).sum()).exp().item(), eigenvalues


def unit_bound(n: int, k: int, precision: str, device: str = "cpu") -> float:
    """docs/kernels.md, "What squaring costs": the sum over eigenvalues of |Δr|, for n eigenvalues and sums of k terms, on a CPU in blocks of 256."""
    terms = min(k, 256 + math.ceil(k / 256)) if device == "cpu" else k
    return math.sqrt(n) * (terms + n + 6) * UNIT[precision]


def relative_bound(n: int, k: int, precision: str, device: str = "cpu") -> float:
    """Of the effective rank: |ΔH| by Fannes and Audenaert, with half the above as the distance."""
    distance = unit_bound(n, k, precision, device) / 2
    assert distance < 0.5
    entropy = distance * math.log(max(n - 1, 1)) - distance * math.log(distance) - (1 - distance) * math.log(1 - distance)
    return math.expm1(entropy)


HARD = {
    "random": draw(300, 70),
    "wide": draw(70, 300),
    "long sums": draw(3000, 16),
    "rank deficient": draw(200, 5) @ draw(5, 90, seed=1),
    "one dominant direction": draw(300, 1) * 30 + draw(300, 64, seed=1),
    "a tail of eight decades": draw(300, 64) * torch.logspace(0, -4, 64).double(),
    "repeated": torch.cat([torch.eye(64), -torch.eye(64)]).double(),
}


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", UNIT)
@pytest.mark.parametrize("name", HARD)
def test_error_bounds(name, precision, device):
    x = HARD[name]
    value, eigenvalues = truth(x)
    n, k = min(x.shape), max(x.shape)
    found = red_kernels.erank(x.to(device), precision=precision).item()
    spectrum = red_kernels.erank_spectrum(x.to(device), precision=precision).cpu()
    bound = relative_bound(n, k, precision, device)
    assert bound < 0.01 and abs(found / value - 1) <= bound
    assert (spectrum - eigenvalues).abs().sum() <= unit_bound(n, k, precision, device) * eigenvalues.sum()


@needs_extension
@pytest.mark.parametrize("precision", UNIT)
def test_what_squaring_loses(precision):
    """Singular values below sqrt(u) σ_max: gone from the spectrum, where an SVD has them, and no matter to the effective rank."""
    unit = UNIT[precision]
    basis, _ = torch.linalg.qr(draw(64, 8))
    signed = torch.cat([basis, -basis])  # its mean is zero
    x = signed * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0.01 * math.sqrt(unit)]).double()
    x = x @ torch.linalg.qr(draw(8, 8, seed=1))[0]  # off the axes, where the small direction would have a column of its own
    value, eigenvalues = truth(x)
    spectrum = red_kernels.erank_spectrum(x, precision=precision)
    assert eigenvalues[-1] > 0 and (spectrum[-1] / eigenvalues[-1] - 1).abs() > 0.5, "not lost: the docs say it is"
    torch.testing.assert_close(spectrum[:7], eigenvalues[:7], rtol=200 * unit, atol=0)
    assert abs(red_kernels.erank(x, precision=precision).item() / value - 1) < 1e3 * unit


@needs_extension
def test_large_matrices_on_two_threads():
    """MKL's blocked tridiagonalisation gives wrong eigenvalues in a parallel region unless told to use one thread (csrc/lapack.h)."""
    script = """
import torch
from red_kernels import erank_spectrum, extension, reference
assert not extension.why_not()
x = torch.randn(3, 600, 512, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(1)
truth = reference.erank_spectrum(x, None)[0]
torch.set_num_threads(2)
for batch, expected in ((x, truth), (x[:1], truth[:1])):
    assert (erank_spectrum(batch) - expected).abs().max() < 1e-12 * truth.max()
print("right")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "RED_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "right", done.stderr


@needs_extension
@pytest.mark.parametrize("n", (1, 2, 3, 33, 128))
@pytest.mark.parametrize("precision", UNIT)
@pytest.mark.parametrize("device", DEVICES)
def test_jacobi_rotations(n, precision, device):
    """One pass over the planes turns an entry 8 to 10 times n times: errors of a random walk, sqrt(10 n) u, with 10 to spare."""
    x = draw(2, 2 * n + 1, n)
    x[1, :, n // 2 :] = x[1, :, :1]  # rank deficient, and repeated zeros
    gram = (x.mT @ x).to(getattr(torch, precision))
    value, spectrum = extension.gram_erank(gram.to(device))
    expected = torch.linalg.eigvalsh(gram.double()).flip(-1)
    tolerance = 10 * math.sqrt(10 * n) * UNIT[precision]
    assert (spectrum.cpu() - expected).abs().max() <= tolerance * expected.max() and (spectrum.diff() <= 0).all() and (spectrum >= 0).all()
    r = (expected / expected.sum(-1, keepdim=True)).clamp(min=0)
    torch.testing.assert_close(value.cpu(), (-torch.special.xlogy(r, r).sum(-1)).exp(), rtol=n * tolerance * 20, atol=0)
    assert extension.gram_erank(torch.zeros(1, n, n, dtype=torch.float64, device=device))[0].isnan().all()


@needs_extension
@pytest.mark.parametrize("shape", ((40, 9), (9, 40), (300, 33), (33, 700)))
def test_without_lapack(shape, monkeypatch):
    """Own product and Jacobi rotations: what a torch that exports no LAPACK gets."""
    x = draw(2, *shape)
    spectrum, value = torch.empty(2, min(shape), dtype=torch.float64), torch.empty(2, dtype=torch.float64)
    finite, count = torch.empty(2, dtype=torch.bool), torch.empty(2, dtype=torch.int64)
    torch.ops.red_csrc.erank(x, None, False, False, spectrum, value, finite, count)
    torch.testing.assert_close(spectrum, reference.erank_spectrum(x, None)[0], rtol=0, atol=1e-12 * max(shape))
    torch.testing.assert_close(value, reference.erank(x, None)[0], rtol=1e-12, atol=0)
    assert finite.all() and (count == shape[0]).all()

    monkeypatch.setattr(extension, "has", lambda what: False)
    assert extension.takes(torch.zeros(500, 128)) and not extension.takes(torch.zeros(500, 129))


def test_everything_works_without_it(monkeypatch):
    monkeypatch.setenv("RED_BACKEND", "auto")
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    x = draw(2, 20, 5)
    assert backend.select("erank", x) == "torch" and torch.equal(red_kernels.erank(x), reference.erank(x, None)[0])


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    for content, message in ((None, "is not built"), (b"no library", "does not load into torch")):
        library = tmp_path / "_csrc.so"
        if content:
            library.write_bytes(content)
        monkeypatch.setattr(extension, "LIBRARY", library)
        assert message in extension.why_not.__wrapped__()


SANITIZED = """
import torch
print("torch imported", flush=True)
torch.ops.load_library({library!r})
torch.set_num_threads(2)
for dtype in (torch.float32, torch.float64):
    for matrices, rows, width in ((3, 2, 5), (2, 9, 1), (5, 40, 17), (2, 17, 300), (2, 300, 17), (1, 140, 150), (3, 520, 70)):
        for single in (False, True):
            for lapack in (False, True):
                for masked in (False, True):
                    x, least = torch.randn(matrices, rows, width, dtype=dtype), min(rows, width)
                    x[0, 0, 0] = float("nan") if masked else 1
                    mask = torch.rand(matrices, rows) > 0.3 if masked else None
                    spectrum, value = torch.empty(matrices, least, dtype=torch.float64), torch.empty(matrices, dtype=torch.float64)
                    torch.ops.red_csrc.erank(x, mask, single, lapack, spectrum, value, torch.empty(matrices, dtype=torch.bool), torch.empty(matrices, dtype=torch.int64))
for n in (1, 2, 7, 64):
    gram = torch.randn(3, n, n); gram = gram @ gram.mT
    torch.ops.red_csrc.jacobi(gram, torch.empty(3, n).double(), torch.empty(3).double(), torch.empty(3).long(), 0)
print("clean")
"""


def test_under_sanitizers(tmp_path):
    """Address and undefined behaviour: the op itself in torch, every shape with and without LAPACK. Any finding ends the process."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build

    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no address sanitizer here")
    library = tmp_path / "sanitized.so"
    flags = [flag for flag in build.cpp_flags(cuda=False) if flag != "-O3"] + ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, str(ROOT / "csrc" / "erank.cpp"), "-o", str(library), *build.link_flags(None)], check=True)
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    run = [sys.executable, "-c", SANITIZED.format(library=str(library))]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    if "torch imported" not in done.stdout:
        pytest.skip(f"torch does not import under the address sanitizer: {done.stderr[-200:]}")
    assert done.returncode == 0 and done.stdout.split("\n")[1] == "clean", done.stderr[-3000:]
