"""tap_mse against dense float64 autograd over the valid tokens."""

import pytest
import torch
from op_truth import ODD, assert_near, compiled, drawn, leaf

from red_kernels import reference, tap_mse


def problem(lead=(3, 5), width=7, teacher_width=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    mask = torch.rand(lead, generator=g) < 0.6
    mask.view(-1)[0] = True  # one valid token at least
    index = None if teacher_width is None else torch.randint(0, teacher_width, (width,), generator=g)
    return draw(*lead, width), draw(*lead, teacher_width or width), mask, index


def dense(student, teacher, mask=None, *, index=None, num_tokens=None):
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    if index is not None:
        teacher = teacher[..., index]
    tokens = student.numel() / student.shape[-1]
    up = lambda x: x if x.dtype == torch.float64 else x.float()  # noqa: E731
    return torch.nn.functional.mse_loss(up(student), up(teacher)) * (tokens / (num_tokens or max(tokens, 1)))


def value_and_gradients(function, student, teacher, mask, index, num_tokens=None):
    student, teacher = leaf(student), leaf(teacher)
    loss = function(student, teacher, mask, index=index, num_tokens=num_tokens)
    (3.0 * loss).backward()
    return [loss.detach(), student.grad, teacher.grad]


def check(student, teacher, mask, index, num_tokens=None):
    truth = value_and_gradients(dense, student.double(), teacher.double(), mask, index, num_tokens)
    eager = value_and_gradients(dense, student, teacher, mask, index, num_tokens)
    actual = value_and_gradients(tap_mse, student, teacher, mask, index, num_tokens)
    for ours, true, other in zip(actual, truth, eager, strict=True):
        assert_near(ours, true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("teacher_width", (None, 20))
@pytest.mark.parametrize("masked", (True, False))
def test_matches_dense_autograd(dtype, teacher_width, masked):
    student, teacher, mask, index = problem(teacher_width=teacher_width, dtype=dtype)
    check(student, teacher, mask if masked else None, index)


@drawn(
    16,
    lead=((), (1,), (17,), (2, 151), (2, 3, 5)),
    width=(*ODD, 668),
    teacher_width=(None, 1, 64, 1134),
    num_tokens=(None, 0.5, 40),
    seed=range(1001),
)
def test_any_shape(lead, width, teacher_width, num_tokens, seed):
    check(*problem(lead, width, teacher_width, seed=seed), num_tokens)


def test_value_of_a_large_tap():
    """Two million squares: a running float32 sum drifts by about 1e-4 (`vector_norm` on a CPU does), a pairwise one does not."""
    student, teacher, *_ = problem((4096,), 512)
    truth = (student.double() - teacher.double()).square().mean()
    torch.testing.assert_close(tap_mse(student, teacher).double(), truth, rtol=1e-6, atol=0)


def test_invalid_tokens_are_exactly_nothing():
    student, teacher, mask, index = problem(teacher_width=20)
    clean = value_and_gradients(tap_mse, student, teacher, mask, index)
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    dirty = value_and_gradients(tap_mse, student, teacher, mask, index)
    for ours, same in zip(dirty, clean, strict=True):
        assert torch.equal(ours, same)
    assert (~mask).sum() > 1 and dirty[1][~mask].eq(0).all() and dirty[2][~mask].eq(0).all()


def test_channels_outside_the_index_are_not_read():
    student, teacher, mask, _ = problem(width=3, teacher_width=6)
    teacher[..., 3:] = float("nan")
    _, grad_student, grad_teacher = value_and_gradients(tap_mse, student, teacher, mask, torch.arange(3))
    assert grad_student.isfinite().all() and grad_teacher[..., 3:].eq(0).all()


def test_no_valid_token_gives_zero():
    student, teacher, mask, _ = problem()
    for count in (None, torch.zeros(())):
        for ours in value_and_gradients(tap_mse, student, teacher, torch.zeros_like(mask), None, count):
            assert ours.eq(0).all()


@pytest.mark.parametrize("as_tensor", (False, True))
def test_micro_batches_with_the_global_count_add_up(as_tensor):
    student, teacher, mask, index = problem((8, 5), teacher_width=20, dtype=torch.float64)
    whole = value_and_gradients(tap_mse, student, teacher, mask, index)
    count = mask.sum() if as_tensor else mask.sum().item()
    parts = [value_and_gradients(tap_mse, student[b], teacher[b], mask[b], index, count) for b in torch.arange(8).split(2)]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    for position in (1, 2):
        torch.testing.assert_close(torch.cat([part[position] for part in parts]), whole[position])


def test_bf16_student_of_a_float32_teacher():
    student, teacher, mask, index = problem(dtype=torch.bfloat16)
    teacher = teacher.float()
    loss, grad_student, grad_teacher = value_and_gradients(tap_mse, student, teacher, mask, index)
    assert (loss.dtype, grad_student.dtype, grad_teacher.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    check(student, teacher, mask, index)


def test_difference_is_only_kept_for_a_gradient(monkeypatch):
    student, teacher, mask, _ = problem()
    sizes, run = [], reference.tap_mse

    def spy(*args):
        out = run(*args)
        sizes.append(out[1].numel())
        return out

    monkeypatch.setattr(reference, "tap_mse", spy)
    assert not tap_mse(student, teacher, mask).requires_grad
    with torch.no_grad():
        tap_mse(leaf(student), teacher, mask)
    tap_mse(leaf(student), teacher, mask)
    assert sizes == [0, 0, student.numel()]


@pytest.mark.parametrize("teacher_width", (None, 3))
def test_gradcheck(teacher_width):
    student, teacher, mask, index = problem((2, 3), 4, teacher_width, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, t: tap_mse(s, t, mask, index=index, num_tokens=5), (leaf(student), leaf(teacher)))


@pytest.mark.parametrize("teacher_width", (None, 20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(teacher_width, dtype):
    student, teacher, mask, index = problem(teacher_width=teacher_width, dtype=dtype)
    args = leaf(student), leaf(teacher), mask, index, torch.tensor(4.0), True
    torch.library.opcheck(torch.ops.red.tap_mse.default, args)
    torch.library.opcheck(torch.ops.red.tap_mse.default, (student, teacher, None, index, torch.tensor(4.0), False))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, teacher)]  # a trace expects the strides that the op gives
    torch.library.opcheck(torch.ops.red.tap_mse.default, (*map(leaf, turned), mask, index, torch.tensor(4.0), True), test_utils="test_faketensor")


def test_compiles_whole():
    student, teacher, mask, index = problem(teacher_width=20)
    function = compiled(tap_mse)
    for each_mask, count in ((mask, None), (None, None), (mask, torch.tensor(3.0))):
        args = student, teacher, each_mask, index, count
        for ours, eager in zip(value_and_gradients(function, *args), value_and_gradients(tap_mse, *args), strict=True):
            torch.testing.assert_close(ours, eager)


MUTATIONS = {
    "zero loss": ("tap_mse", lambda run, args: (torch.zeros(()), run(*args)[1])),
    "zero gradient": ("tap_mse_backward", lambda run, args: torch.zeros_like(run(*args))),
    "zero scattered gradient": ("gather_backward", lambda run, args: torch.zeros_like(run(*args))),
    "mask ignored": ("tap_mse", lambda run, args: run(args[0], args[1], None, *args[3:])),
    "index ignored": ("tap_mse", lambda run, args: run(*args[:3], torch.arange(7), *args[4:])),
    "num_tokens ignored": ("tap_mse", lambda run, args: run(*args[:4], torch.ones(()), args[5])),
    "incoming gradient ignored": ("tap_mse_backward", lambda run, args: run(torch.ones(()), *args[1:])),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    given_ = problem(teacher_width=20)
    check(*given_)
    target, mutation = MUTATIONS[name]
    run = getattr(reference, target)
    monkeypatch.setattr(reference, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(*given_)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(teacher=torch.zeros(3, 5, 9)), ValueError, "student has width 7, teacher 9; give index"),
        (dict(teacher=torch.zeros(3, 4, 7)), ValueError, "teacher must have shape"),
        (dict(mask=torch.ones(3, 5)), TypeError, "mask must have dtype torch.bool"),
        (dict(mask=torch.ones(3).bool()), ValueError, "mask must have shape"),
        (dict(index=torch.arange(6)), ValueError, r"index must have shape \[w\] = \[7\], got \[6\]"),
        (dict(index=torch.arange(7).int()), TypeError, "index must have dtype torch.int64"),
        (dict(index=torch.tensor([0, 1, 2, 7, 4, 5, 6])), ValueError, r"index\[3\] = 7 is out of range; expected 0 to 6"),
        (dict(student=torch.zeros(3, 5, 7).int()), TypeError, "student must have a floating dtype"),
        (dict(num_tokens=-1), ValueError, "num_tokens must be positive, got -1"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    student, teacher, mask, _ = problem()
    with pytest.raises(error, match=message):
        tap_mse(**dict(student=student, teacher=teacher, mask=mask) | change)
