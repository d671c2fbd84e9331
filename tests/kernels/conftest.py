"""Where Triton kernels run in these tests: on the GPU if there is one, else on the CPU in Triton's interpreter, repaired."""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _interprets() -> bool:
    return DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def _repaired():
    if _interprets():
        import interpreter

        interpreter.repair()


@pytest.fixture
def on_triton(_repaired, monkeypatch):
    """The ops run their Triton kernels; the value is the device on which the tensors must be."""
    pytest.importorskip("triton")
    monkeypatch.setenv("RED_BACKEND", "triton")
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_memory(request, monkeypatch):
    """In a test that runs kernels, memory that nothing wrote holds NaN, so that it cannot pass for a result, or an integer as small as an id."""
    if "on_triton" in request.fixturenames:
        empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: filled(empty(*args, **options)))
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))


def filled(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.fill_(1)
