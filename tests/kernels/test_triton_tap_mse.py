"""The Triton kernels of tap_mse, in the interpreter or on a GPU, against the same float64 truth as the reference."""

import pytest
import torch
from op_truth import ODD, assert_near, drawn
from test_op_tap_mse import dense, problem, value_and_gradients

pytest.importorskip("triton")
from red_kernels import tap_mse
from red_kernels.triton import launch, tap_mse as kernels

LAUNCHES = [chosen.name for chosen in launch.LAUNCHES["tap_mse"]]


def check(device, student, teacher, mask, index, num_tokens=None, launches=LAUNCHES):
    truth = value_and_gradients(dense, student.double(), teacher.double(), mask, index, num_tokens)
    eager = value_and_gradients(dense, student, teacher, mask, index, num_tokens)
    placed = [None if x is None else x.to(device) for x in (student, teacher, mask, index)]
    for name in launches:
        with launch.forcing("tap_mse", name):
            actual = value_and_gradients(tap_mse, *placed, num_tokens)
        for ours, true, other in zip(actual, truth, eager, strict=True):
            assert_near(ours.cpu(), true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("teacher_width", (None, 300))
@pytest.mark.parametrize("masked", (True, False))
def test_matches_dense_autograd(on_triton, dtype, teacher_width, masked):
    student, teacher, mask, index = problem((3, 13), 151, teacher_width, dtype)
    check(on_triton, student, teacher, mask if masked else None, index)


@drawn(
    16,
    lead=((), (1,), (17,), (2, 31), (2, 3, 5)),
    width=(*ODD, 668, 1025),
    teacher_width=(None, 1, 64, 1134),
    dtypes=((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)),
    num_tokens=(None, 0.5, 40),
    seed=range(1001),
)
def test_any_shape(on_triton, lead, width, teacher_width, dtypes, num_tokens, seed):
    student, teacher, mask, index = problem(lead, width, teacher_width, seed=seed)
    check(on_triton, student.to(dtypes[0]), teacher.to(dtypes[1]), mask, index, num_tokens)


def test_strides(on_triton):
    """Rows apart, a last dimension that is not contiguous, and every second entry of an index."""
    student, teacher, mask, index = problem((6, 9), 40, 64)
    check(on_triton, student, teacher, mask, torch.stack([index, index.flip(0)], -1)[:, 0])
    apart = torch.zeros(6, 9, 97)[..., 13:53]
    turned = torch.zeros(6, 40, 9).transpose(1, 2)
    for other in (apart, turned):
        check(on_triton, other.copy_(student), teacher, mask.T.contiguous().T, index)


def test_masked_tokens_are_not_read(on_triton):
    student, teacher, mask, index = problem((3, 13), 40, 64)
    clean = value_and_gradients(tap_mse, *[x.to(on_triton) for x in (student, teacher, mask, index)])
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    dirty = value_and_gradients(tap_mse, *[x.to(on_triton) for x in (student, teacher, mask, index)])
    for ours, same in zip(dirty, clean, strict=True):
        assert torch.equal(ours, same)
    assert dirty[1].cpu()[~mask].eq(0).all()


@pytest.mark.parametrize("lead", ((3, 13), (0,)))
def test_no_valid_token_gives_zero(on_triton, lead):
    student, teacher = (torch.randn(*lead, 20, device=on_triton) for _ in range(2))
    for ours in value_and_gradients(tap_mse, student, teacher, torch.zeros(lead, dtype=torch.bool, device=on_triton), None):
        assert ours.eq(0).all()


def test_the_sum_of_many_programs(on_triton):
    """More partial sums than the last launch adds at a time."""
    partial, loss = torch.rand(2500, device=on_triton), torch.empty((), device=on_triton)
    kernels.tap_mse_finish_kernel[(1,)](partial, 2500, torch.tensor(7.0, device=on_triton), 3, loss, BLOCK=1024, num_warps=4)
    torch.testing.assert_close(loss, partial.sum() / 21)


def test_repeats_bit_for_bit(on_triton):
    given_ = [None if x is None else x.to(on_triton) for x in problem((4, 41), 300)]
    first, second = (value_and_gradients(tap_mse, *given_) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MUTATIONS = {
    "zero loss": ("tap_mse", lambda run, args: (torch.zeros((), device=args[0].device), run(*args)[1])),
    "zero gradient": ("tap_mse_backward", lambda run, args: torch.zeros_like(run(*args))),
    "mask ignored": ("tap_mse", lambda run, args: run(args[0], args[1], None, *args[3:])),
    "last channel dropped": ("tap_mse_backward", lambda run, args: run(*args) * (torch.arange(7, device=args[1].device) < 6)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(on_triton, name, monkeypatch):
    given_ = problem(teacher_width=20)
    check(on_triton, *given_)
    target, mutation = MUTATIONS[name]
    run = getattr(kernels, target)
    monkeypatch.setattr(kernels, target, lambda *args: mutation(run, args))
    with pytest.raises(AssertionError):
        check(on_triton, *given_)
