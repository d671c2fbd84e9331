"""What the op tests share: arguments drawn at random, how close to a float64 truth is close enough, and how an op is compiled and mutated."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

ODD = (1, 2, 3, 17, 129, 151)


def drawn(count: int, **choices: Sequence):
    """Run a test `count` times, each argument drawn from its choices by one fixed seed: without hypothesis, which a borrowed GPU machine lacks."""
    generator = random.Random(0)
    return pytest.mark.parametrize(",".join(choices), [tuple(generator.choice(values) for values in choices.values()) for _ in range(count)], ids=range(count))


def errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Error relative to the truth, in the L2 norm and in the largest entry (which one wrong row cannot hide from)."""
    difference = actual.detach().double() - truth
    return (difference.norm() / truth.norm()).item(), (difference.abs().max() / truth.abs().max()).item()


def assert_near(actual: Tensor, truth: Tensor, eager: Tensor) -> None:
    """err(actual) < 2 · err(eager PyTorch with the same inputs) + rounding.

    Rounding is the accumulator's in the L2 norm; in the largest entry one more of the result's own, for a gradient that is
    rounded when made and again when multiplied by the incoming one. A truth of zeros is refused and the bound stays below
    a half, so that zeros can never pass.
    """
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert truth.norm() > 0, "a truth of zeros tests nothing"
    accumulator = 1e-12 if actual.dtype == torch.float64 else 2e-6
    rounding = (accumulator, accumulator + torch.finfo(actual.dtype).eps)
    for name, error, allowed, eps in zip(("L2", "max"), errors(actual, truth), errors(eager, truth), rounding, strict=True):
        bound = 2 * allowed + eps
        assert bound < 0.5, f"eager PyTorch is too far off ({allowed}) for the comparison to mean anything"
        assert error < bound, f"{name} error {error:.2e}, allowed {bound:.2e}"


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
