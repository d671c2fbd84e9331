"""LoRi's mathematics against numpy: HOSVD factors, statistics that do not see a trajectory's length, losses and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from red.errors import REDError
from red.lori import losses, statistics
from red.lori.subspace import GramStream, fit_subspace, rank_of


def trajectories(count: int = 5, depth: int = 4, width: int = 9, dtype=torch.float64) -> list[torch.Tensor]:
    """States [L+1, T, d] of different lengths with decaying spectra in both modes."""
    layers = torch.linalg.qr(torch.randn(depth, depth, dtype=dtype))[0] * 0.5 ** torch.arange(depth)
    channels = torch.linalg.qr(torch.randn(width, width, dtype=dtype))[0] * 0.6 ** torch.arange(width)
    return [torch.einsum("la,atc,dc->ltd", layers, torch.randn(depth, 3 + 2 * index, width, dtype=dtype), channels) for index in range(count)]


def numpy_hosvd(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left singular vectors and squared singular values of the unfoldings of [L+1, N, d] along its first and last mode."""
    depth, _, width = states.shape
    left, first, _ = np.linalg.svd(states.reshape(depth, -1), full_matrices=False)
    right, second, _ = np.linalg.svd(np.moveaxis(states, 2, 0).reshape(width, -1), full_matrices=False)
    return left, first**2, right, second**2


@pytest.mark.parametrize("normalize", [False, True])
def test_factors_equal_numpys_hosvd(normalize):
    found = trajectories()
    subspace, spectrum = fit_subspace(GramStream().extend(found), rank_layers=2, rank_channels=4, normalize_layers=normalize)
    pooled = torch.cat(found, 1).numpy()
    if normalize:
        rms = np.sqrt((pooled**2).mean((1, 2)))
        np.testing.assert_allclose(subspace.scale, rms, rtol=1e-5)
        pooled = pooled / rms[:, None, None]
    left, first, right, second = numpy_hosvd(pooled)
    np.testing.assert_allclose(spectrum.layers, first, rtol=1e-9)
    np.testing.assert_allclose(spectrum.channels, second, rtol=1e-9)
    for factor, truth in ((subspace.layers, left[:, :2]), (subspace.channels, right[:, :4])):
        factor = factor.double().numpy()
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-6)
        np.testing.assert_allclose(np.abs((factor * truth).sum(0)), 1, atol=1e-6)  # equal but for the sign
    g = subspace.coordinates(found[2])
    truth = np.einsum("ltd,la,dc->tac", found[2].numpy() / subspace.scale.double().numpy()[:, None, None], subspace.layers.double().numpy(), subspace.channels.double().numpy())
    np.testing.assert_allclose(g, truth.reshape(len(g), -1), atol=1e-12)
    assert subspace.size == 8 == g.shape[1]


def test_a_stream_is_the_same_in_any_pieces_and_order():
    found = trajectories()
    whole = GramStream().extend([torch.cat(found, 1)])
    pieces = GramStream().extend(part for one in reversed(found) for part in one.split(2, 1))
    for first, second in zip(whole.grams(), pieces.grams(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert whole.tokens == pieces.tokens == sum(one.shape[1] for one in found)


def test_the_energy_decides_the_ranks():
    eigenvalues = torch.tensor([6.0, 3.0, 0.5, 0.5])
    assert [rank_of(eigenvalues, energy) for energy in (0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 2, 2, 3, 4]
    found = GramStream().extend(trajectories())
    subspace, spectrum = fit_subspace(found, energy=0.9)
    assert (subspace.layers.shape[1], subspace.channels.shape[1]) == spectrum.ranks(0.9)
    kept = spectrum.channels[: subspace.channels.shape[1]].sum() / spectrum.channels.sum()
    assert 0.9 <= kept < 1 and subspace.channels.shape[1] < 9


@pytest.mark.parametrize("chosen", [(1, 2), (0,)])
def test_layers_that_are_left_out(chosen):
    """Factors and coordinates are those of the chosen layers alone, and what the others hold changes nothing."""
    found = trajectories()
    subspace, spectrum = fit_subspace(GramStream().extend(found), rank_layers=1, rank_channels=4, chosen=chosen)
    alone, its = fit_subspace(GramStream().extend(states[list(chosen)] for states in found), rank_layers=1, rank_channels=4)
    torch.testing.assert_close(spectrum.channels, its.channels, rtol=1e-9, atol=1e-12)
    g, expected = subspace.coordinates(found[2]), alone.coordinates(found[2][list(chosen)])
    torch.testing.assert_close(g.abs(), expected.abs(), rtol=1e-5, atol=1e-6)  # a factor's sign is open
    others = [layer for layer in range(4) if layer not in chosen]
    changed = found[2].index_fill(0, torch.tensor(others), 7.0)
    assert torch.equal(subspace.coordinates(changed), g) and not torch.equal(changed, found[2])
    with pytest.raises(REDError, match=f"rank_layers={len(chosen) + 1}: must lie between 1 and {len(chosen)}, the layers that count"):
        fit_subspace(GramStream().extend(found), rank_layers=len(chosen) + 1, chosen=chosen)


@pytest.mark.parametrize(("settings", "message"), [(dict(energy=0.0), "energy=0.0"), (dict(rank_layers=9), "rank_layers=9: must lie between 1 and 4"),
                                                   (dict(rank_channels=0), "rank_channels=0")])
def test_wrong_ranks_are_refused(settings, message):
    with pytest.raises(REDError, match=message):
        fit_subspace(GramStream().extend(trajectories()), **settings)


def test_trajectories_that_cannot_be_are_refused():
    with pytest.raises(REDError, match="no rationale tokens"):
        fit_subspace(GramStream())
    with pytest.raises(REDError, match="different models"):
        GramStream().extend([torch.ones(3, 2, 4), torch.ones(3, 2, 5)])
    with pytest.raises(REDError, match="NaN or infinite"):
        fit_subspace(GramStream().extend([torch.full((3, 2, 4), torch.nan)]))


def points(count: int, length: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, length, size, dtype=torch.float64), torch.ones(count, length, dtype=torch.bool)


@pytest.mark.parametrize("centred", [True, False])
def test_statistics_do_not_see_length_order_or_padding(centred):
    g, mask = points(3, 4)
    mean, moment = statistics.means(g, mask), statistics.second_moments(g, mask, centred=centred)
    deviation = g - g.mean(1, keepdim=True) if centred else g
    torch.testing.assert_close(mean, g.mean(1))
    torch.testing.assert_close(moment, torch.einsum("bti,btj->bij", deviation, deviation) / 4)
    poisoned = torch.cat([g.repeat(1, 3, 1).flip(1), torch.full((3, 2, 6), torch.nan, dtype=g.dtype)], 1)
    longer = torch.arange(14).expand(3, 14) < 12
    torch.testing.assert_close(statistics.means(poisoned, longer), mean)
    torch.testing.assert_close(statistics.second_moments(poisoned, longer, centred=centred), moment)


@pytest.mark.parametrize("centred", [True, False])
def test_the_distance_of_moments_never_forms_them(centred):
    (a, mask_a), (b, mask_b) = points(3, 4), points(3, 7)
    expected = (statistics.second_moments(a, mask_a, centred=centred) - statistics.second_moments(b, mask_b, centred=centred)).square().sum((1, 2))
    found = statistics.squared_distance(statistics.points(a, mask_a, centred=centred), statistics.points(b, mask_b, centred=centred))
    torch.testing.assert_close(found, expected)


def scales_of(g: torch.Tensor) -> losses.Scales:
    stream = losses.ScaleStream()
    for one in g:
        stream.add(one)
    return stream.scales()


def test_scales_are_those_of_the_definition():
    g, mask = points(5, 4)
    scales = scales_of(g)
    mean = g.mean(1)
    assert scales.first == pytest.approx(float((mean - mean.mean(0)).square().sum(1).mean()))
    for centred, found in ((True, scales.centred), (False, scales.raw)):
        assert found == pytest.approx(float(statistics.second_moments(g, mask, centred=centred).square().sum((1, 2)).mean()))


@pytest.mark.parametrize("centred", [True, False])
def test_the_rationale_loss(centred):
    """By hand; 0 for the same trajectory said twice; free of units; the second order sees what the mean does not."""
    (s, mask_s), (t, mask_t) = points(3, 3), points(3, 5)
    scales = scales_of(t)
    moments = [statistics.second_moments(g, mask, centred=centred) for g, mask in ((s, mask_s), (t, mask_t))]
    second = scales.centred if centred else scales.raw
    expected = (s.mean(1) - t.mean(1)).square().sum(1).mean() / scales.first + 0.3 * (moments[0] - moments[1]).square().sum((1, 2)).mean() / second
    arguments = dict(second_order_weight=0.3, centred=centred)
    torch.testing.assert_close(losses.rationale_loss(s, mask_s, t, mask_t, scales, **arguments), expected)
    torch.testing.assert_close(losses.rationale_loss(7 * s, mask_s, 7 * t, mask_t, scales_of(7 * t), **arguments), expected)
    twice = torch.cat([t, t], 1)
    assert float(losses.rationale_loss(twice, torch.ones(3, 10, dtype=torch.bool), t, mask_t, scales, **arguments)) < 1e-12
    wider = t.mean(1, keepdim=True) + 2 * (t - t.mean(1, keepdim=True))
    assert float(losses.rationale_loss(wider, mask_t, t, mask_t, scales, second_order_weight=0.0)) < 1e-12
    assert float(losses.rationale_loss(wider, mask_t, t, mask_t, scales, second_order_weight=1.0)) > 0.5


def test_the_anchor_loss():
    student, teacher, std = torch.randn(4, 3, 6), torch.randn(4, 3, 6), torch.tensor([0.5, 1.0, 4.0])
    expected = sum((student[:, layer] - teacher[:, layer]).abs().mean() / std[layer] for layer in range(3)) / 3
    torch.testing.assert_close(losses.anchor_loss(student, teacher, std), expected)
    assert losses.anchor_loss(teacher, teacher, std) == 0 == losses.anchor_loss(teacher, teacher, std, distance="mse")
    with pytest.raises(REDError, match="anchor_distance='l3'"):
        losses.anchor_loss(student, teacher, std, distance="l3")


@pytest.mark.parametrize("centred", [True, False])
def test_gradients(centred):
    """Analytic against numeric in float64; none reaches the teacher."""
    s, t = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    mask_s, mask_t = torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    scales = losses.Scales(1.3, 0.7, 0.9)
    torch.autograd.gradcheck(lambda x: losses.rationale_loss(x, mask_s, t.detach(), mask_t, scales, centred=centred), s)
    torch.autograd.gradcheck(lambda x: losses.anchor_loss(x, t.detach()[:, :3], torch.tensor([1.0, 2.0, 0.5]), distance="mse"), s)
    losses.rationale_loss(s, mask_s, t, mask_t, scales).backward()
    losses.anchor_loss(s, t[:, :3], torch.ones(3)).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
