"""linear_kd against dense float64 logits: small and large divergences, padded heads, scaled and capped logits, the teacher's top k, errors."""

import pytest
import torch
from op_truth import errors
from test_op_linear_kd import DIVERGENCES, check, dense, doubled, problem, value_and_gradients

from red_kernels import linear_kd


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("beta", "temperature"), ((0.05, 40.0), (0.5, 400.0), (0.9, 40.0)))
def test_a_small_divergence_keeps_its_digits(divergence, beta, temperature):
    """Far below the rounding of the logarithms that it is a difference of; Σ p log p/q would be off by 1e-4 and more."""
    tensors, kl_mask = problem(17, 151, 7, 65)
    options = dict(kl_mask=kl_mask, divergence=divergence, beta=beta, temperature=temperature)
    truth = dense(*doubled(tensors), **options)[2]
    torch.testing.assert_close(linear_kd(*tensors, **options).kl.double(), truth, rtol=3e-6, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence(divergence):
    (hidden, weight, *_, labels), kl_mask = problem(17, 1003)
    twice, options = (hidden, weight, hidden, weight, labels), dict(kl_mask=kl_mask, divergence=divergence, ce_weight=0.0)
    *values, grad_hidden, grad_weight = value_and_gradients(linear_kd, twice, **options)
    assert values[2] == 0 and grad_hidden.abs().max() < 1e-6 and grad_weight.abs().max() < 1e-6


def far_apart(n=13):
    """Models whose probabilities underflow on either side, and a ratio's exponential overflows; eager PyTorch's own jsd is NaN there."""
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem(n)
    return (hidden, weight * 30, teacher_hidden, teacher_weight * 30, labels), kl_mask


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_models(divergence):
    tensors, kl_mask = far_apart()
    truth = value_and_gradients(dense, doubled(tensors), kl_mask=kl_mask, divergence=divergence)
    for ours, true in zip(value_and_gradients(linear_kd, tensors, kl_mask=kl_mask, divergence=divergence), truth, strict=True):
        assert max(errors(ours, true)) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows", ((45, 40), (40, 45), (45, 45), (37, 45)))
def test_padded_heads(divergence, rows):
    """Rows beyond the vocabulary are not there: not even NaN in them matters, and their gradient is 0."""
    tensors, kl_mask = problem(v=rows[0], teacher_v=rows[1])
    options = dict(kl_mask=kl_mask, divergence=divergence, temperature=2.0, vocab_size=37)
    check(tensors, **options)
    for head in (1, 3):
        tensors[head][37:] = float("nan")
    *_, grad_hidden, grad_weight = value_and_gradients(linear_kd, tensors, **options)
    assert grad_hidden.isfinite().all() and grad_weight[37:].eq(0).all() and grad_weight[:37].ne(0).any(-1).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("scale", "softcap"), ((0.3, None), (1.0, 1.5), (2.5, 3.0)))
def test_scaled_and_capped_logits(divergence, scale, softcap):
    tensors, kl_mask = problem()
    check(tensors, kl_mask=kl_mask, divergence=divergence, temperature=2.0, logit_scale=scale, logit_softcap=softcap, chunk_size=4)


@pytest.mark.parametrize("divergence", ("forward", "jsd"))
@pytest.mark.parametrize("k", (1, 5, 36, 37, 1000))
def test_teacher_top_k(divergence, k):
    tensors, kl_mask = problem()
    options = dict(kl_mask=kl_mask, divergence=divergence, temperature=2.0, beta=0.3)
    if k >= 37:
        found, whole = (value_and_gradients(linear_kd, tensors, **options, teacher_top_k=each) for each in (k, None))
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    else:
        check(tensors, **options, teacher_top_k=k)


def test_ties_at_the_last_of_the_top_k_are_kept():
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem()
    teacher_weight[20:24] = teacher_weight[19]
    check((hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask=kl_mask, teacher_top_k=12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(labels=torch.tensor([1, 40, -100])), ValueError, r"labels\[1\] = 40 is out of range; expected 0 to 36 or -100"),
        (dict(labels=torch.tensor([1, 2])), ValueError, r"labels must have shape \[N\] = \[3\], got \[2\]"),
        (dict(labels=torch.tensor([1, 2, 3], dtype=torch.int32)), TypeError, "labels must have dtype torch.int64"),
        (dict(weight=torch.zeros(37, 9)), ValueError, "weight must have shape"),
        (dict(weight=torch.zeros(37, 8, dtype=torch.bfloat16)), TypeError, "weight .* must have dtype torch.float32"),
        (dict(teacher_weight=torch.zeros(38, 13)), ValueError, r"\[V, d\] .* = \[38, 12\], got \[38, 13\]"),
        (dict(teacher_weight=torch.zeros(38, 12)), ValueError, "37 rows, teacher_weight 38; .* give their number as vocab_size, at most 37"),
        (dict(vocab_size=38), ValueError, "vocab_size=38; expected 1 to 37"),
        (dict(vocab_size=0), ValueError, "vocab_size=0; expected 1 to 37"),
        (dict(vocab_size=30, labels=torch.tensor([1, 30, -100])), ValueError, r"labels\[1\] = 30 is out of range; expected 0 to 29 or -100"),
        (dict(logit_scale=0.0), ValueError, "logit_scale must be positive, got 0.0"),
        (dict(logit_softcap=-3.0), ValueError, "logit_softcap must be positive, got -3.0"),
        (dict(teacher_top_k=0), ValueError, "teacher_top_k must be at least 1, got 0"),
        (dict(teacher_top_k=5, divergence="reverse"), ValueError, "teacher_top_k=5 with divergence='reverse': .* infinite"),
        (dict(teacher_hidden=torch.zeros(4, 12)), ValueError, "teacher_hidden must have shape"),
        (dict(hidden=torch.zeros(1, 3, 8)), ValueError, "hidden must have two dimensions"),
        (dict(hidden=torch.zeros(3, 8).int()), TypeError, "hidden must have a floating dtype"),
        (dict(kl_mask=torch.ones(3)), TypeError, "kl_mask must have dtype torch.bool"),
        (dict(divergence="kl"), ValueError, "divergence='kl'; expected one of forward, reverse, jsd"),
        (dict(temperature=0.0), ValueError, "temperature must be positive, got 0.0"),
        (dict(divergence="jsd", beta=1.0), ValueError, "beta=1.0"),
        (dict(chunk_size=0), ValueError, "chunk_size must be at least 1"),
        (dict(num_tokens=0), ValueError, "num_tokens must be positive"),
        (dict(num_kl_tokens=torch.ones(2)), ValueError, r"num_kl_tokens must be a number or a 0-dim tensor, got shape \[2\]"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    tensors, _ = problem(n=3)
    given = dict(zip(("hidden", "weight", "teacher_hidden", "teacher_weight", "labels"), tensors, strict=True)) | change
    with pytest.raises(error, match=message):
        linear_kd(**given)
