"""RED_BACKEND, and the public names."""

import pytest
import torch

import red_kernels
from red_kernels import backend

X = torch.randn(2, 3, 4)
CALLS = {
    "channel_stats": lambda: red_kernels.channel_stats(X),
    "rms_norm_stats": lambda: red_kernels.rms_norm_stats(X, X[0, 0], 1e-5),
    "covariance": lambda: red_kernels.covariance(X, out=torch.zeros(4, 4)),
    "gather": lambda: red_kernels.gather(X, torch.tensor([1])),
    "gather_many": lambda: red_kernels.gather_many([X[0]], [torch.tensor([1])], [0]),
    "linear_kd": lambda: red_kernels.linear_kd(X[0], X[1], X[0], X[1], torch.tensor([0, 1, 2])),
    "selection_low_rank": lambda: red_kernels.selection_low_rank(X[0], torch.tensor([1]), torch.ones(4, 2), torch.ones(2, 1), "input"),
    "tap_mse": lambda: red_kernels.tap_mse(X, X),
    "erank": lambda: red_kernels.erank(X),
    "erank_spectrum": lambda: red_kernels.erank_spectrum(X),
}


def test_public_names():
    not_ops = {"ChannelStats", "LinearKD", "RMSNormStats", "ERankEstimate", "ERankStream", "erank_estimate", "log_erank", "inverse_index"}
    assert set(red_kernels.__all__) == {*CALLS, *not_ops}


@pytest.mark.parametrize("op", CALLS)
def test_every_op_obeys_the_environment(op, monkeypatch):
    for choice in ("auto", "torch", ""):
        monkeypatch.setenv("RED_BACKEND", choice)
        CALLS[op]()
    monkeypatch.setenv("RED_BACKEND", "triton")
    if op not in backend.TRITON_OPS:
        with pytest.raises(RuntimeError, match=f"no Triton kernel for op '{op}' yet"):
            CALLS[op]()
    monkeypatch.setenv("RED_BACKEND", "cuda")
    with pytest.raises(ValueError, match="RED_BACKEND='cuda' is not a backend; expected one of auto, torch, triton"):
        CALLS[op]()


@pytest.mark.parametrize("op", CALLS)
def test_every_op_is_registered_for_cpu_and_cuda(op):
    name = f"red::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
