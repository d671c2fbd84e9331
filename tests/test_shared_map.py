"""The pieces of the shared map: the readers' Gramians, what a map explains, its gauge, and that the teacher's basis does not matter."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from reference_lrc import normalised, use_exact_norms
from test_fitting import EMBEDDING, NARROW, WIDTH, close, logits, streams_of, student_of, text
from tiny_models import build_tiny_model
from tiny_training import settings_of

import red
from red import starts
from red.calibration import calibrate_batches
from red.config import REDConfig
from red.families import norm_paths
from red.fitting import shared_map
from red.fitting.least_squares import sqrt_psd
from red.fitting.massive import massive_directions
from red.fitting.shared_map import balanced, explained_shares, gauge, most_explained, reader_gramians
from red.starts.base import StartContext


@pytest.fixture(scope="module")
def measured():
    """(teacher, z [points, N, d], C [points, d, d], M [points, d, d])"""
    teacher = build_tiny_model("qwen2", dtype=torch.float64)
    calibration = calibrate_batches(teacher, text(), point_covariance=True)
    z = torch.stack([normalised(point) for point in streams_of(teacher, text())])
    return teacher, z, calibration.point_covariance, torch.stack(list(reader_gramians(teacher, calibration.point_covariance)))


def shares(down, measured) -> torch.Tensor:
    _, _, covariances, gramians = measured
    return explained_shares(down, covariances, covariances @ gramians @ covariances, (gramians * covariances).sum((-2, -1)))


def orthonormal(width: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return red.random_basis(WIDTH, seed)[:, :width].to(dtype)


def projector(down: torch.Tensor) -> torch.Tensor:
    return down @ torch.linalg.pinv(down)


# ---- what the readers hear ----

@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gramians_equal_brute_force(tiny_teacher, family, tied):
    """Reader by reader over the tokens: `R Rᵀ / E|z R|²`, mean over the readers of a point; the head alone at the last."""
    teacher = tiny_teacher(family, tied=tied, dtype=torch.float64)
    found = list(reader_gramians(teacher, calibrate_batches(teacher, text(), point_covariance=True).point_covariance))
    modules, points = dict(teacher.named_modules()), streams_of(teacher, text())
    assert len(found) == len(points) == 5
    for path, gramian, point in zip(norm_paths(teacher.config), found, points, strict=True):
        root, kind = path.rpartition(".")[::2]
        names = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
        readers = [modules[f"{root}.{name}"] for name in names[kind]] if kind in names else [teacher.lm_head]
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for reader in readers:
            matrix = (reader.weight * modules[path].weight).detach().T
            total += matrix @ matrix.T / (normalised(point) @ matrix).square().sum(1).mean()
        close(gramian, total / len(readers), 1e-8, path)
        heard = (normalised(point) @ gramian * normalised(point)).sum(1).mean()
        assert float(heard) == pytest.approx(1), "E|z R|² is 1 at every point"


def test_shares_equal_a_regression(measured):
    """The variance of what the readers hear that a linear estimate from `z Q` explains."""
    _, z, _, gramians = measured
    down = orthonormal(NARROW) @ torch.diag(torch.rand(NARROW, dtype=torch.float64) + 0.5)  # any basis of the kept space
    missed = [z_i - z_i @ down @ torch.linalg.lstsq(z_i @ down, z_i).solution for z_i in z]
    expected = torch.stack([1 - (error @ gramian * error).sum() / (z_i @ gramian * z_i).sum()
                            for z_i, error, gramian in zip(z, missed, gramians, strict=True)])
    torch.testing.assert_close(shares(down, measured), expected, rtol=0, atol=2e-5)
    assert (expected < 0.9).all()


def test_more_directions_explain_more_and_all_of_them_everything(measured):
    torch.testing.assert_close(shares(orthonormal(WIDTH, 3), measured), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-4)
    columns = [shares(orthonormal(width, 3), measured) for width in range(1, WIDTH + 1)]
    assert all((more >= less - 1e-6).all() for less, more in itertools.pairwise(columns))
    assert (columns[0] < 0.5).all()


def test_balanced_keeps_what_is_heard_of_what_moves():
    """Exact where either has no more directions than are kept; between the two in general."""
    torch.manual_seed(3)
    low = [torch.randn(WIDTH, NARROW, dtype=torch.float64) @ torch.randn(NARROW, WIDTH, dtype=torch.float64) for _ in range(2)]
    full = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    for moves, hears in ((low[0], full[0]), (full[0], low[0])):
        covariance, gramian = moves.T @ moves, hears.T @ hears
        down = balanced(covariance, gramian, NARROW)
        close(down.T @ down, torch.eye(NARROW, dtype=torch.float64), 1e-10)
        share = [explained_shares(q, covariance[None], (covariance @ gramian @ covariance)[None], (covariance * gramian).sum()[None])
                 for q in (down, orthonormal(NARROW))]
        assert share[0] > 1 - 1e-5 and (moves is low[0] or share[1] < 0.95)  # 16 numbers tell the rest of a stream of rank 16
    covariance, gramian = (matrix.T @ matrix for matrix in full)
    expected = torch.linalg.eig(gramian @ covariance)  # the states of a balanced truncation
    order = expected.eigenvalues.real.argsort(descending=True)[:NARROW]
    span = expected.eigenvectors.real[:, order]
    close(projector(balanced(covariance, gramian, NARROW)), projector(span), 1e-3)
    assert torch.dist(projector(balanced(covariance, gramian, NARROW)), projector(torch.linalg.eigh(covariance).eigenvectors[:, -NARROW:])) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_survives_fewer_tokens_than_channels(dtype):
    """A covariance of fp32 products is singular and slightly indefinite then, the more so where one direction dominates."""
    z = torch.randn(60, 160) * torch.logspace(0, -1, 160)
    z[:, 3] += 40
    z = normalised(z @ torch.linalg.qr(torch.randn(160, 160)).Q)
    covariance, clean, gramian = (z.T @ z / 60).to(dtype), z.double().T @ z.double() / 60, torch.diag(torch.rand(160, dtype=dtype))
    assert torch.linalg.eigvalsh(covariance.double())[0] < -1e-7
    down = balanced(covariance, gramian, 40)
    assert down.dtype == dtype
    close(down.T @ down, torch.eye(40, dtype=dtype), 1e-5)
    heard, total = clean @ gramian.double() @ clean, (clean * gramian.double()).sum()
    found, best, drawn = (float(explained_shares(q, clean[None], heard[None], total[None])) for q in (
        torch.linalg.qr(down.double()).Q, balanced(clean, gramian.double(), 40), red.random_basis(160)[:, :40]))
    assert 1 - found < 1.01 * (1 - best) < 0.7 * (1 - drawn)


@pytest.mark.parametrize("start", ["balanced", "fitted"])
def test_a_layer_that_does_nothing_is_no_obstacle(tiny_teacher, tmp_path, start):
    """Modules of zeros, as pruning leaves them: nothing to hear at one point, nothing written at two others."""
    teacher = tiny_teacher()
    with torch.no_grad():
        for name in ("1.self_attn.q_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "0.self_attn.o_proj", "1.mlp.down_proj"):
            teacher.get_submodule(f"model.layers.{name}").weight.zero_()
    config = REDConfig(**settings_of(tmp_path, start=start, start_fit="full"))
    calibration = calibrate_batches(teacher, text(), point_covariance=True)
    student = red.start_projections(teacher, config, calibration, text()).student.eval()
    assert logits(student).isfinite().all() and (logits(student) - logits(teacher)).std() < logits(teacher).std()


# ---- the climb ----

def test_most_explained_never_ends_worse_than_it_began(measured, monkeypatch):
    def loss(down):
        return float((1 - shares(down, measured)).square().mean())

    _, _, covariances, gramians = measured
    begin, seen = orthonormal(NARROW, 5), []
    found = most_explained(begin, covariances, gramians, iterations=100, on_step=seen.append)
    assert loss(found) < 0.5 * loss(begin) and len(seen) == 100 and seen[0] == pytest.approx(float(shares(begin, measured).mean())) and seen[-1] > seen[0]
    close(found.T @ found, torch.eye(NARROW, dtype=torch.float64), 1e-10)
    assert not found.requires_grad
    free = most_explained(begin, covariances, gramians, iterations=600).requires_grad_()  # at the lowest mean square, not the highest mean
    slopes = []
    for power in (2, 1):
        gradient, = torch.autograd.grad((1 - shares(free, measured)).pow(power).mean(), free)
        slopes.append(float((gradient - projector(free.detach()) @ gradient).norm()))
    assert slopes[0] < 0.02 * slopes[1]
    silent = gramians * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])[:, None, None]  # no reader at one point
    quiet = most_explained(begin, covariances, silent, iterations=30)
    assert (shares(quiet, measured) > shares(begin, measured))[[0, 1, 3, 4]].all()
    again = most_explained(found, covariances, gramians, iterations=5)
    assert loss(again) <= loss(found) * (1 + 1e-12)
    monkeypatch.setattr(shared_map, "LEARNING_RATE", 30.0)  # leaps about: the best that was seen is kept, and the first is one of them
    best = most_explained(found, covariances, gramians, iterations=5)
    assert loss(best) <= loss(found) * (1 + 1e-12)
    torch.testing.assert_close(projector(most_explained(found, covariances, gramians, iterations=0)), projector(found))


def test_a_climb_in_fp32_is_judged_in_fp64_at_both_ends(measured, monkeypatch):
    """Where fp32 takes its noise for a climb, the begin is kept; and a caller's no_grad is no hindrance."""
    _, _, covariances, gramians = measured
    narrow, plain, begin = (covariances.float(), gramians.float()), shared_map.explained_shares, orthonormal(NARROW, 5, torch.float32)
    with torch.no_grad():
        honest = most_explained(begin, *narrow, iterations=30)
    assert (1 - shares(honest.double(), measured)).square().mean() < 0.9 * (1 - shares(begin.double(), measured)).square().mean()
    top = most_explained(honest, *narrow, iterations=100)
    # fp32 that sees the objective upside down: it only falls, and believes to climb
    monkeypatch.setattr(shared_map, "explained_shares", lambda down, *rest: plain(down, *rest) if down.dtype == torch.float64 else -plain(down, *rest))
    torch.testing.assert_close(projector(most_explained(top, *narrow, iterations=30)), projector(top), rtol=0, atol=1e-5)


def test_explained_explains_more_than_balanced_and_pca(measured):
    """By its own measure, the mean of `(1 - f)²`, in what the registered starts really keep."""
    teacher, *_ = measured
    context = StartContext(teacher, NARROW, calibrate_batches(teacher, text(), covariance=True, point_covariance=True))
    losses = {name: float((1 - shares(starts.get(name)(context).maps[EMBEDDING], measured)).square().mean()) for name in ("pca", "balanced", "explained")}
    assert losses["explained"] < 0.95 * losses["balanced"] < 0.95 * losses["pca"]


# ---- massive directions ----

def longest_of(directions, size: float, noise: float = 0.0) -> torch.Tensor:
    """[3, 16, d]: tokens of RMS 1 everywhere, and at point 1 some of RMS `size` in the span of the directions [k, d]."""
    tokens = normalised(torch.randn(3, 16, WIDTH))
    mixed = torch.randn(6, len(directions)) @ directions.float()
    tokens[1, :6] = size * normalised(normalised(mixed) + noise * torch.randn(6, WIDTH))
    return tokens


def test_massive_directions_are_those_of_the_massive_tokens():
    two, silent = orthonormal(2, 6).T, torch.zeros(3, dtype=torch.float64)  # mean logarithm of an RMS of 1
    found = massive_directions(longest_of(two, 50.0), silent)
    assert found.shape == (WIDTH, 2) and found.dtype == torch.float64
    close(projector(found), two.T @ two, 1e-6)
    close(found.T @ found, torch.eye(2, dtype=torch.float64), 1e-10)
    assert massive_directions(longest_of(two, 7.9), silent).shape == (WIDTH, 0), "long, not massive"
    assert massive_directions(longest_of(two, 50.0), silent + 2).shape == (WIDTH, 0), "all are as long"
    assert massive_directions(torch.zeros(3, 16, WIDTH), silent).shape == (WIDTH, 0)
    assert massive_directions(longest_of(two, 50.0, noise=0.02), silent).shape == (WIDTH, 2), "99 in a hundred is enough"
    assert massive_directions(longest_of(two, 50.0, noise=1.0), silent, 4).shape == (WIDTH, 4)


@pytest.mark.parametrize("name", ["balanced", "explained"])
def test_massive_directions_are_kept(measured, name):
    """Though no reader hears them; the rest explains as much as it can beside them."""
    teacher, *_ = measured
    calibration, kept = calibrate_batches(teacher, text(), point_covariance=True), orthonormal(2, 6)
    plain = starts.get(name)(StartContext(teacher, NARROW, calibration)).maps[EMBEDDING]
    calibration = dataclasses.replace(calibration, longest=longest_of(kept.T, 1000.0), mean_log_rms=torch.zeros(3, dtype=torch.float64))
    down = starts.get(name)(StartContext(teacher, NARROW, calibration)).maps[EMBEDDING]
    close(projector(down) @ kept, kept, 1e-5)
    assert (projector(plain) @ kept - kept).norm() > 0.1
    loss, free, less = (float((1 - shares(q, measured)).square().mean()) for q in (down, plain, plain[:, :-4]))
    assert free < loss < less


def test_a_climb_beside_fixed_directions(measured):
    _, _, covariances, gramians = measured
    fixed, pooled = orthonormal(3, 6), covariances.mean(0)
    begin = balanced(pooled, gramians.mean(0), NARROW, fixed)
    found = most_explained(begin, covariances, gramians, fixed=fixed, iterations=30)
    for down in (begin, found):
        assert down.shape == (WIDTH, NARROW)
        close(down.T @ down, torch.eye(NARROW, dtype=torch.float64), 1e-10)
        close(projector(down[:, :3]), projector(fixed), 1e-10)
    assert (1 - shares(found, measured)).square().mean() < 0.95 * (1 - shares(begin, measured)).square().mean()


# ---- the gauge ----

def test_the_gauge_keeps_lengths_and_the_estimate(measured):
    _, z, covariances, _ = measured
    x, covariance, down = z[2], covariances[2], orthonormal(NARROW, 8)
    estimate = torch.linalg.lstsq(x @ down, x).solution  # O
    for turn in (torch.eye(NARROW, dtype=torch.float64), torch.randn(NARROW, NARROW, dtype=torch.float64)):  # any basis of the kept space
        found, up = gauge(down @ turn, covariance)
        close(found @ up, down @ estimate, 1e-3)
        torch.testing.assert_close((x @ found).norm(dim=1), (x @ found @ up).norm(dim=1))
        close(projector(found), projector(down), 1e-8)
    assert ((x @ down).norm(dim=1) / (x @ down @ estimate).norm(dim=1) - 1).abs().max() > 0.01, "without it they differ"
    root = sqrt_psd(covariance)
    close(root @ root, covariance, 1e-10)
    close(root, root.T, 1e-12)


@pytest.mark.parametrize("family, name", [("llama", "balanced"), ("qwen2", "explained"), ("qwen3", "balanced")])
def test_full_width_is_the_teacher(tiny_teacher, monkeypatch, family, name):
    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(family, dtype=torch.float64)
    start = starts.get(name)(StartContext(teacher, WIDTH, calibrate_batches(teacher, text(), covariance=True, point_covariance=True)))
    torch.testing.assert_close(logits(student_of(teacher, start.maps)), logits(teacher), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, start, tolerance", [("llama", "balanced", 1e-6), ("qwen2", "balanced", 1e-6), ("qwen3", "balanced", 1e-6),
                                                      ("qwen2", "fitted", 5e-3)])  # the climb ends near one optimum, by two ways
def test_the_teachers_basis_does_not_matter(tiny_teacher, monkeypatch, tmp_path, family, start, tolerance):
    """A rotated teacher of the same function gives a student of the same function; a selection of channels does not."""
    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(family, dtype=torch.float64, rms_norm_eps=1e-12)
    turned = red.rotate(teacher, red.random_basis(WIDTH, seed=2))
    torch.testing.assert_close(logits(turned), logits(teacher), rtol=0, atol=1e-10)
    found = {}
    for name, fit in ((start, "full"), ("activation", "none")):
        for model in (teacher, turned):
            config = REDConfig(**settings_of(tmp_path, start=name, start_fit=fit))
            calibration = calibrate_batches(model, text(), point_covariance=True)
            found.setdefault(name, []).append(logits(red.start_projections(model, config, calibration, text()).student.eval()))
    torch.testing.assert_close(*found[start], rtol=0, atol=tolerance)
    assert (found["activation"][0] - found["activation"][1]).abs().max() > 1
