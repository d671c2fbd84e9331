"""The Triton kernel of covariance, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import ODD, assert_near, drawn
from test_op_covariance import dense, problem

pytest.importorskip("triton")
from red_kernels import covariance
from red_kernels.triton import covariance as kernels, launch

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["covariance"]]


def placed(*tensors, device):
    return [None if x is None else x.to(device) for x in tensors]


def check(device, x, scale, mask, before, launches=LAUNCHES):
    truth = dense(x.double(), None if scale is None else scale.double(), mask, before.double())
    # The inputs are exact, so a product of float32 copies is how near one comes: half precision is no excuse.
    eager = dense(x.float(), scale, mask, before)
    for name in launches:
        x_, scale_, mask_ = placed(x, scale, mask, device=device)
        out = before.clone().to(device)
        with launch.forcing("covariance", name):
            covariance(x_, scale=scale_, mask=mask_, out=out)
        assert torch.equal(out, out.T)
        on_tensor_cores = device.type == "cuda" and x.dtype == torch.float32  # three products, whose sums they cut off instead of rounding (arXiv 2203.03341)
        if (scale is None or x.dtype == torch.float32) and not on_tensor_cores:
            assert_near(out.cpu(), truth, eager)
        else:  # two terms of a product hold 2⁻¹⁷ of it
            bound = dense(x.double().abs(), None if scale is None else scale.double(), mask, before.double().abs()) * 2**-16
            assert ((out.cpu() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("masked", (True, False))
def test_matches_a_dense_product(on_triton, dtype, scaled, masked):
    x, scale, mask, before = problem((3, 33), 151, dtype)
    check(on_triton, x, scale if scaled else None, mask if masked else None, before)


@drawn(
    10,
    lead=((), (1,), (70,), (2, 3, 5)),
    width=(*ODD, 200),
    scaled=(True, False),
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    seed=range(1001),
)
def test_any_shape(on_triton, lead, width, scaled, dtype, seed):
    x, scale, mask, before = problem(lead, width, dtype, seed=seed)
    check(on_triton, x, scale if scaled else None, mask, before)


def test_every_tile_of_a_long_triangle(on_triton):
    """36 tiles of 64: the place of a tile in the triangle comes from a square root."""
    x, *_ = problem((3,), 500)
    check(on_triton, x, None, None, torch.zeros(500, 500), launches=["small"])


def test_strides(on_triton):
    """Rows apart, channels that are not contiguous, a transposed out that is not symmetric: each triangle keeps what it held."""
    x, scale, mask, _ = problem((6, 9), 40)
    apart = torch.zeros(6, 9, 97)[..., 13:53]
    turned = torch.zeros(6, 40, 9).transpose(1, 2)
    for other in (apart, turned):
        check(on_triton, other.copy_(x), scale, mask.T.contiguous().T, torch.zeros(40, 40), launches=["small"])
    before = torch.randn(40, 40)
    out = before.to(on_triton).T.contiguous().T
    covariance(*placed(x, device=on_triton), out=out)
    assert_near(out.cpu(), dense(x.double(), None, None, before.double()), dense(x, None, None, before))


def test_masked_tokens_are_not_read(on_triton):
    x, scale, mask, before = problem((3, 33), 40, torch.bfloat16)
    clean, dirty = (before.clone().to(on_triton) for _ in range(2))
    x_, scale_, mask_ = placed(x, scale, mask, device=on_triton)
    covariance(x_, scale=scale_, mask=mask_, out=clean)
    x_[~mask_], scale_[~mask_] = float("nan"), float("inf")
    covariance(x_, scale=scale_, mask=mask_, out=dirty)
    assert torch.equal(clean, dirty)
    covariance(x_, scale=scale_, mask=torch.zeros_like(mask_), out=dirty)
    covariance(x_[:0], out=dirty)
    assert torch.equal(clean, dirty)


def test_repeats_bit_for_bit(on_triton):
    x, scale, mask, before = placed(*problem((3, 50), 151, torch.bfloat16), device=on_triton)
    first, second = (covariance(x, scale=scale, mask=mask, out=before.clone()) for _ in range(2))
    assert torch.equal(first, second)


MUTATIONS = {
    "nothing added": lambda run, args: None,
    "scale ignored": lambda run, args: run(args[0], None, *args[2:]),
    "mask ignored": lambda run, args: run(*args[:2], None, args[3]),
    "what out held is lost": lambda run, args: run(*args[:3], args[3].zero_()),
    "one triangle": lambda run, args: (run(*args), args[3].tril_()) and None,
    "last tokens dropped": lambda run, args: run(args[0][:-1], args[1][:-1], args[2][:-1], args[3]),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_mutations_are_caught(on_triton, name, dtype, monkeypatch):
    run = kernels.covariance
    given_ = problem(dtype=dtype)
    check(on_triton, *given_, launches=["small"])
    monkeypatch.setattr(kernels, "covariance", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(on_triton, *given_, launches=["small"])
