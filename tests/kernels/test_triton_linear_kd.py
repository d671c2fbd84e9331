"""The Triton kernels of linear_kd, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import assert_near, drawn, errors
from test_op_linear_kd import DIVERGENCES, NEEDS, dense, doubled, leaf, problem, replace, value_and_gradients
from test_op_linear_kd_options import far_apart

pytest.importorskip("triton")
import itertools

from red_kernels import linear_kd
from red_kernels.triton import head_gradient, launch, linear_kd as kernels

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["linear_kd"]]


def placed(device, tensors):
    return [x.to(device) for x in tensors]


def check(device, tensors, kl_mask, launches=LAUNCHES[:1], **options):
    truth = value_and_gradients(dense, doubled(tensors), kl_mask=kl_mask, **options)
    eager = value_and_gradients(dense, tensors, kl_mask=kl_mask, **options)
    for name in launches:
        with launch.forcing("linear_kd", name):
            actual = value_and_gradients(linear_kd, placed(device, tensors), kl_mask=kl_mask.to(device), **options)
        for ours, true, other in zip(actual, truth, eager, strict=True):
            assert_near(ours.cpu(), true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", (1.0, 2.5))
def test_matches_dense_autograd(on_triton, dtype, divergence, temperature):
    tensors, kl_mask = problem(6, dtype=dtype)
    options = dict(divergence=divergence, temperature=temperature, beta=0.3, ce_weight=0.7, kl_weight=1.9, chunk_size=4)
    check(on_triton, tensors, kl_mask, LAUNCHES if dtype == torch.float32 else LAUNCHES[:1], **options)


@drawn(
    9,
    n=(2, 3, 5),
    v=(17, 151, 668, 1100),
    widths=[(narrow, wide) for narrow in (1, 7, 33) for wide in (1, 8, 65)],
    divergence=DIVERGENCES,
    beta=(0.05, 0.5, 0.9),
    temperature=(0.5, 1.0, 4.0, 40.0),
    chunk_size=(None, 2, 5, 64),
    launches=[(name,) for name in LAUNCHES],
    seed=range(1001),
)
def test_any_shape(on_triton, n, v, widths, divergence, beta, temperature, chunk_size, launches, seed):
    tensors, kl_mask = problem(n, v, *widths, seed=seed)
    check(on_triton, tensors, kl_mask, launches, divergence=divergence, beta=beta, temperature=temperature, chunk_size=chunk_size)


@pytest.mark.parametrize("launches", [(name,) for name in LAUNCHES])
def test_a_row_of_several_blocks(on_triton, launches):
    """Its largest logits in its last block, so that every earlier sum must shrink; and one gradient of several waves of narrowing."""
    blocks = next(chosen.blocks for chosen in launch.LAUNCHES["linear_kd"] if chosen.name == launches[0])
    v = 2 * blocks["DEPTH"] * blocks["LANES"] + 17
    tensors, kl_mask = problem(3, v, 8, 12)
    for weight in (tensors[1], tensors[3]):
        weight *= torch.linspace(0.1, 4, v)[:, None]
    check(on_triton, tensors, kl_mask, launches, divergence="reverse", temperature=2.0, chunk_size=2)


def test_hidden_states_wider_than_a_block(on_triton):
    tensors, kl_mask = problem(3, 17, 1100, 8)
    check(on_triton, [tensors[0], tensors[1] / 12, *tensors[2:]], kl_mask, LAUNCHES, temperature=2.0)


@pytest.mark.parametrize("divergence", ("forward", "jsd"))
def test_padded_heads_scaled_logits_and_top_k(on_triton, divergence):
    tensors, kl_mask = problem(n=7, v=45, teacher_v=40)
    options = dict(vocab_size=37, logit_scale=0.6, logit_softcap=1.5, teacher_top_k=5, temperature=2.0)
    check(on_triton, tensors, kl_mask, LAUNCHES, divergence=divergence, beta=0.3, chunk_size=3, **options)
    for head in (1, 3):
        tensors[head][37:] = float("nan")
    *_, grad_weight = value_and_gradients(linear_kd, placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), **options)
    assert grad_weight.isfinite().all() and grad_weight[37:].eq(0).all() and grad_weight[:37].ne(0).any()


def test_ties_at_the_last_of_the_top_k_are_kept(on_triton):
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem(n=5)
    teacher_weight[20:24] = teacher_weight[19]
    check(on_triton, (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask, teacher_top_k=12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_small_divergence_keeps_its_digits(on_triton, divergence):
    tensors, kl_mask = problem(5, 700, 7, 7)
    options = dict(divergence=divergence, beta=0.05, temperature=400.0)
    truth = dense(*doubled(tensors), kl_mask=kl_mask, **options)[2]
    kl = linear_kd(*placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), **options).kl
    assert truth < 1e-4
    torch.testing.assert_close(kl.cpu().double(), truth, rtol=3e-6, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_models(on_triton, divergence):
    tensors, kl_mask = far_apart(4)
    truth = value_and_gradients(dense, doubled(tensors), kl_mask=kl_mask, divergence=divergence)
    found = value_and_gradients(linear_kd, placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), divergence=divergence)
    for ours, true in zip(found, truth, strict=True):
        assert max(errors(ours.cpu(), true)) < 1e-5


@pytest.mark.parametrize("teacher", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes_of_the_models_may_differ(on_triton, teacher):
    tensors, kl_mask = problem(5)
    mixed = [*tensors[:2], tensors[2].to(teacher), tensors[3].to(teacher), tensors[4]]
    check(on_triton, mixed, kl_mask)


def test_float16_value(on_triton):
    tensors, kl_mask = problem(5, dtype=torch.float16)
    truth = dense(*doubled(tensors), kl_mask=kl_mask, temperature=2.0)
    eager = dense(*tensors, kl_mask=kl_mask, temperature=2.0)
    for ours, true, other in zip(linear_kd(*placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), temperature=2.0), truth, eager, strict=True):
        assert_near(ours.cpu(), true, other)


def test_strides(on_triton):
    """Rows apart, last dimensions that are not contiguous, masks and labels of every second token."""
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem(7)
    plain = value_and_gradients(linear_kd, placed(on_triton, (hidden, weight, teacher_hidden, teacher_weight, labels)), kl_mask=kl_mask.to(on_triton))
    turned = [x.to(on_triton).T.contiguous().T for x in (hidden, weight, teacher_hidden, teacher_weight)]
    apart = [torch.stack([x, x], 1).to(on_triton)[:, 0] for x in (labels, kl_mask)]
    for ours, same in zip(value_and_gradients(linear_kd, [*turned, apart[0]], kl_mask=apart[1]), plain, strict=True):
        torch.testing.assert_close(ours, same)


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_rows_in_neither_mask_are_exactly_nothing(on_triton, poison):
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem(n=11)
    dead = ~kl_mask & (labels == -100)
    run = lambda: value_and_gradients(  # noqa: E731
        linear_kd, placed(on_triton, (hidden, weight, teacher_hidden, teacher_weight, labels)), kl_mask=kl_mask.to(on_triton), chunk_size=4
    )
    clean = run()
    hidden[dead], teacher_hidden[~kl_mask] = poison, poison
    dirty = run()
    for ours, same in zip(dirty, clean, strict=True):
        assert torch.equal(ours, same)
    assert dead.sum() > 1 and (~kl_mask & ~dead).any() and dirty[3].cpu()[dead].eq(0).all()


@pytest.mark.parametrize("divergence", ("forward", "jsd"))
def test_a_token_that_the_teacher_excludes(on_triton, divergence, monkeypatch):
    """Its logit -inf, its probability 0: the rest as if it had no such row of the head."""
    tensors, kl_mask = problem(5)
    tensors[2][:, 0] = 1.0
    tensors[3][7] = 0.0
    tensors[3][7, 0] = -torch.inf
    every = torch.ones_like(kl_mask)  # a row of zeros, as the reference makes of one outside the mask, would meet 0 · inf
    run = lambda device: value_and_gradients(linear_kd, placed(device, tensors), kl_mask=every.to(device), divergence=divergence)  # noqa: E731
    found = run(on_triton)
    monkeypatch.setenv("RED_BACKEND", "torch")
    for ours, expected in zip(found, run("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-6)
        assert ours.isfinite().all()


@pytest.mark.parametrize("rows", (0, 5))
def test_no_target_at_all_gives_zero(on_triton, rows):
    tensors, _ = problem(n=6)
    tensors = [t[:rows] if t.shape[0] == 6 else t for t in tensors]
    tensors[4] = torch.full((rows,), -100)
    for ours in value_and_gradients(linear_kd, placed(on_triton, tensors), chunk_size=2):
        assert ours.eq(0).all()


@pytest.mark.parametrize("needs", NEEDS)
def test_gradient_work_only_where_needed(on_triton, needs):
    tensors, kl_mask = problem(5)
    full = value_and_gradients(linear_kd, placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), chunk_size=2)
    student = [t.to(on_triton).requires_grad_(need) for t, need in zip(tensors[:2], needs, strict=True)]
    loss = linear_kd(*student, *placed(on_triton, tensors[2:]), kl_mask=kl_mask.to(on_triton), chunk_size=2).loss
    torch.testing.assert_close(loss.detach(), full[0], rtol=1e-6, atol=0)  # a kernel without gradients may contract other products
    if any(needs):
        (3.0 * loss).backward()
    for tensor, need, gradient in zip(student, needs, full[3:], strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


def test_the_sum_of_many_rows(on_triton):
    """More rows than the last launch adds at a time."""
    n = 2 * kernels.FINISH_BLOCK + 3
    ce, kl = torch.rand(2, n, device=on_triton).unbind()
    counts, found = torch.tensor([7.0, 9.0], device=on_triton), torch.empty(3, device=on_triton)
    kernels.linear_kd_finish_kernel[(1,)](ce, kl, n, *counts.unbind(), 0.5, 2.0, *found.unbind(), BLOCK=kernels.FINISH_BLOCK, num_warps=4)
    expected = ce.sum() / 7, kl.sum() / 9
    torch.testing.assert_close(found, torch.stack([0.5 * expected[0] + 2 * expected[1], *expected]))


def test_repeats_bit_for_bit(on_triton):
    tensors, kl_mask = problem(dtype=torch.bfloat16)
    first, second = (value_and_gradients(linear_kd, placed(on_triton, tensors), kl_mask=kl_mask.to(on_triton), chunk_size=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weight_gradient_accumulates_in_float32(on_triton):
    tensors, kl_mask = problem(n=40, v=11, dtype=torch.bfloat16)
    truth = value_and_gradients(dense, doubled(tensors), kl_mask=kl_mask)[4]
    device = placed(on_triton, tensors)
    chunked, whole = (value_and_gradients(linear_kd, device, kl_mask=kl_mask.to(on_triton), chunk_size=rows)[4].cpu() for rows in (2, 40))
    assert errors(chunked, truth)[0] < 1.5 * errors(whole, truth)[0]


@pytest.mark.parametrize("size", (1, 5000, 8192, 8193, 16384, 70001))
def test_narrowing_within_the_same_memory(on_triton, size):
    """Of an exact size, and in as many launches as there are doublings of the first block."""
    total = torch.randn(size, 1, device=on_triton)
    expected = total.to(torch.bfloat16)
    actual = kernels.narrowed(total, torch.bfloat16)
    assert torch.equal(actual, expected) and actual.data_ptr() == total.data_ptr()


def test_no_launch_of_the_narrowing_writes_where_it_reads(on_triton, monkeypatch):
    """The programs of a launch run side by side: entries first … last of the narrow tensor end where entry first of the wide one begins."""
    spans = []
    monkeypatch.setattr(head_gradient, "linear_kd_narrow_kernel", {(blocks,): lambda *args, **options: spans.append(args[2:]) for blocks in range(1, 99)})
    kernels.narrowed(torch.randn(300_001, 1, device=on_triton), torch.bfloat16)
    assert spans[0] == (0, head_gradient.NARROW_BLOCK) and spans[-1][1] == 300_001
    for (_, before), (first, last) in itertools.pairwise(spans):
        assert first == before and 2 * last <= 4 * first


@pytest.mark.parametrize(
    ("rows", "row_bytes", "held", "expected"),
    (
        (6144, 4 * 128256, 2 * 128256 * 1536, 1024),  # 919 MB: half of the gradient's float32, and two models' bf16 logits
        (6144, 8 * 128256, 0, 896),
        (100, 4 * 128256, 0, 128),
        (0, 4 * 128256, 0, 128),
        (1 << 20, 4 * 32000, 0, 2048),
        (6144, 4 * 262144, 2 * 262144 * 5376, 128),
    ),
)
def test_rows_of_a_chunk(rows, row_bytes, held, expected):
    found = launch.linear_kd_rows(rows, row_bytes, held)
    assert found == expected and found % 128 == 0
    assert found == 128 or found * row_bytes + held <= launch.LINEAR_KD_BYTES


MUTATIONS = {
    "zero loss": lambda run, args: replace(0, torch.zeros_like)(run(*args)),
    "zero kl": lambda run, args: replace(2, torch.zeros_like)(run(*args)),
    "zero dhidden": lambda run, args: replace(3, torch.zeros_like)(run(*args)),
    "zero dweight": lambda run, args: replace(4, torch.zeros_like)(run(*args)),
    "kl mask ignored": lambda run, args: run(*replace(5, torch.ones_like)(args)),
    "label mask ignored": lambda run, args: run(*replace(4, lambda labels: labels.clamp(min=0))(args)),
    "temperature ignored": lambda run, args: run(*replace(6, lambda _: 1.0)(args)),
    "padding counted": lambda run, args: run(*replace(14, lambda _: 45)(args)),
    "scale ignored": lambda run, args: run(*replace(15, lambda _: 1.0)(args)),
    "softcap ignored": lambda run, args: run(*replace(16, lambda _: None)(args)),
    "top k ignored": lambda run, args: run(*replace(17, lambda _: None)(args)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(on_triton, name, monkeypatch):
    tensors, kl_mask = problem(5, v=45, teacher_v=45)
    options = dict(temperature=2.0, chunk_size=3, logit_scale=0.7, logit_softcap=2.0, teacher_top_k=9, vocab_size=37)
    if name == next(iter(MUTATIONS)):
        check(on_triton, tensors, kl_mask, **options)
    run = kernels.linear_kd
    monkeypatch.setattr(kernels, "linear_kd", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(on_triton, tensors, kl_mask, **options)


KERNEL_MUTATIONS = {
    "chunks overwrite each other": ("add_product", lambda run, total, a, b, beta: run(total, a, b, 0)),
    "gradient not narrowed": ("narrowed", lambda run, total, dtype: torch.zeros_like(total, dtype=dtype)),
}


@pytest.mark.parametrize("name", KERNEL_MUTATIONS)
def test_mutations_of_the_sum_over_chunks_are_caught(on_triton, name, monkeypatch):
    tensors, kl_mask = problem(5, dtype=torch.bfloat16)
    target, mutation = KERNEL_MUTATIONS[name]
    run = getattr(kernels, target)
    monkeypatch.setattr(kernels, target, lambda *args, **named: mutation(run, *args, **named))
    with pytest.raises(AssertionError):
        check(on_triton, tensors, kl_mask, chunk_size=3)


def test_opcheck(on_triton):
    tensors, kl_mask = problem(3)
    student = leaf(tensors[0].to(on_triton)), leaf(tensors[1].to(on_triton))
    counts = torch.tensor(9.0, device=on_triton), torch.tensor(8.0, device=on_triton)
    others = *placed(on_triton, tensors[2:]), kl_mask.to(on_triton)
    args = (*student, *others, 2.0, "jsd", 0.3, 1.0, 0.5, *counts, -100, 37, 1.0, 2.0, 5, None, True, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.red.linear_kd.default, args, test_utils=checks)
