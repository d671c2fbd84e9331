"""The tied head: the gain and the basis with which the embedding's own map reads best."""

from __future__ import annotations

import pytest
import torch

from red.fitting.fit import turned
from red.fitting.tied import tied_basis, tied_gain

WORDS, WIDE, NARROW, TOKENS = 50, 12, 5, 400


@pytest.fixture()
def problem():
    """(embedding [V, d], Q [d, d'], wanted [d, d'], y [N, d']) in fp64; y correlated, wanted not a multiple of Q."""
    draw = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return normal(WORDS, WIDE), normal(WIDE, NARROW), normal(WIDE, NARROW), normal(TOKENS, NARROW) @ normal(NARROW, NARROW)


def error(embedding, down, gain, wanted, y, rotation=None) -> float:
    """The mean squared error of the logits' differences, token by token, of a student that is turned first."""
    rotation = torch.eye(NARROW, dtype=torch.float64) if rotation is None else rotation
    difference = (y @ rotation * gain) @ (down @ rotation).T @ embedding.T - y @ wanted.T @ embedding.T
    return float((difference - difference.mean(1, keepdim=True)).square().sum(1).mean())


def test_the_gain_is_the_best_one(problem):
    embedding, down, wanted, y = problem
    gain = tied_gain(embedding, down, wanted, y.T @ y / TOKENS)
    best = error(embedding, down, gain, wanted, y)
    for channel in range(NARROW):
        for step in (-1e-3, 1e-3):
            moved = gain.clone()
            moved[channel] += step
            assert error(embedding, down, moved, wanted, y) > best


def test_the_basis_is_the_best_one_and_beats_the_gain(problem):
    embedding, down, wanted, y = problem
    second = y.T @ y / TOKENS
    rotation, gain = tied_basis(embedding, down, wanted, second)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(NARROW, dtype=torch.float64))

    def of(symmetric):
        values, vectors = torch.linalg.eigh(symmetric)
        return error(embedding, down, values, wanted, y, vectors)

    best = error(embedding, down, gain, wanted, y, rotation)
    symmetric = rotation @ torch.diag(gain) @ rotation.T
    assert of(symmetric) == pytest.approx(best, rel=1e-9)
    draw = torch.Generator().manual_seed(4)
    for _ in range(20):
        step = torch.randn(NARROW, NARROW, generator=draw, dtype=torch.float64)
        assert of(symmetric + 1e-3 * (step + step.T)) > best
    alone = tied_gain(embedding, down, wanted, second)
    assert best < 0.9 * error(embedding, down, alone, wanted, y)


def test_a_head_that_the_embedding_can_be_is_found_exactly(problem):
    embedding, down, _, y = problem
    draw = torch.Generator().manual_seed(5)
    symmetric = torch.randn(NARROW, NARROW, generator=draw, dtype=torch.float64)
    symmetric = symmetric + symmetric.T  # indefinite: gains may be negative
    wanted = down @ symmetric
    rotation, gain = tied_basis(embedding, down, wanted, y.T @ y / TOKENS)
    torch.testing.assert_close(rotation @ torch.diag(gain) @ rotation.T, symmetric, rtol=1e-6, atol=1e-6)


def test_turning_the_student_changes_no_function(tiny_teacher):
    """A student with constant gains, turned: the same logits."""
    from red.training.projections import Projections
    from red.starts import StartContext, StartMaps, get
    from red.student import build_student

    teacher = tiny_teacher("qwen3", dtype=torch.float64)
    maps = get("orthogonal_shared")(StartContext(teacher, 16)).maps
    draw = torch.Generator().manual_seed(6)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64)).Q
    ids = torch.arange(20).view(2, 10)
    logits = [Projections(teacher, build_student(teacher, 16), StartMaps(found)).student(input_ids=ids).logits for found in (maps, turned(maps, rotation))]
    assert logits[0].std() > 0.01
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
