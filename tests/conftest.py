"""Shared fixtures: tiny random teachers of every supported family and a 64-word tokenizer. No network, one thread, fixed seeds."""

from __future__ import annotations

import os

# Before torch and transformers are imported: their values are read once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # oversubscribed threads cost up to 100x
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: the kernels then run on the CPU

from tiny_models import FAMILIES, build_tiny_model, build_tiny_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same seed, so its order and its worker do not matter."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_teacher():
    """The factory `tiny_teacher(family="llama", tied=False, seed=0, dtype=torch.float32, **config_overrides)`."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_model():
    """The same factory under the name that reads right for a student."""
    return build_tiny_model


@pytest.fixture()
def tiny_tokenizer():
    """A fresh tokenizer for every test: tests may change it."""
    return build_tiny_tokenizer()


@pytest.fixture(params=FAMILIES)
def family(request):
    """Runs a test once for every supported family."""
    return request.param
