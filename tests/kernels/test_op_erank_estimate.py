"""erank_estimate against the exact value in float64: inside its own error, for known spectra, shapes, dtypes and masks."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from red_kernels import erank, erank_estimate
from red_kernels.erank_estimate import BLOCK, unit_rows

module = sys.modules["red_kernels.erank_estimate"]
INDEX = torch.arange(1, 321).double()
SPECTRA = {
    "1/√i": INDEX**-0.5,
    "1/i": INDEX**-1,
    "i^-1.2": INDEX**-1.2,
    "i^-1.5": INDEX**-1.5,
    "i^-2": INDEX**-2,
    "i^-3": INDEX**-3,
    "flat": torch.ones(320),
    "one dominant direction": torch.cat([torch.tensor([1600.0]), INDEX[1:] ** -0.3]),
    "exponential 20": torch.exp(-INDEX / 20),
    "exponential 120": torch.exp(-INDEX / 120),
    "rank 3": torch.ones(3),
    "rank 150": torch.ones(150),
}
SMALL = dict(directions=64, probes=32, steps=12, tolerance=None)  # what fits matrices small enough for a test


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(rows, width, spectrum, seed=0):
    """Gaussian rows [rows, width] whose covariance has this spectrum in a random basis."""
    spectrum = spectrum[: min(len(spectrum), width)]
    basis = torch.linalg.qr(draw(width, len(spectrum), seed=seed + 1)).Q
    return draw(rows, len(spectrum), seed=seed) * (spectrum / spectrum.sum()).sqrt() @ basis.mT


@pytest.fixture(scope="module")
def many():
    """(matrices [12, 420, 320] float32, their eRank)"""
    x = torch.stack([matrix(420, 320, spectrum, seed) for seed, spectrum in enumerate(SPECTRA.values())]).float()
    return x, erank(x)


@pytest.fixture(scope="module")
def measured(many):
    """Estimates and errors [seeds, 12]: 25 seeds of 12 spectra are 300 cases."""
    found = [erank_estimate(many[0], seed=seed, **SMALL) for seed in range(25)]
    return torch.stack([one.erank for one in found]), torch.stack([one.error for one in found])


def covered(value, error, truth):
    return ((value - truth).abs() <= error).double().mean().item()


def test_the_error_covers_the_truth(many, measured):
    value, error = measured
    truth = many[1]
    assert truth.min() < 3.2 and truth.max() > 150
    assert covered(value, error, truth) >= 0.95, "300 cases"
    worst = ((value - truth).abs() <= error).double().mean(0)
    assert worst.min() >= 0.8, dict(zip(SPECTRA, worst.tolist(), strict=True))  # of 25 each
    assert (error <= 0.03 * truth).all(), (error / truth).amax(0)


def test_the_error_is_no_larger_than_it_must_be(many, measured):
    """A quarter of it would not do where sampling makes it, so a mutation that shrinks it is caught."""
    value, error = measured
    sampled = (error / many[1]).median(0).values > 1e-3
    assert sampled.sum() >= 6
    assert covered(value[:, sampled], error[:, sampled] / 4, many[1][sampled]) < 0.95


@pytest.mark.parametrize("name", ("_sampled", "_block_quadrature", "_line"))
def test_mutations_are_caught(name, many, monkeypatch):
    """A part that is zero puts the estimate outside its error; without the line it stays inside, and the error is several times as large."""
    plain = erank_estimate(many[0], **SMALL)
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: tuple(part * 0 for part in original(*given)))
    value, error = erank_estimate(many[0], **SMALL)
    if name == "_line":
        assert (error > 2 * plain.error).sum() >= 6
    else:
        assert covered(value, error, many[1]) < 0.5


@pytest.mark.parametrize("shape", ((200, 700), (700, 200), (257, 401), (300, 300)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_shapes_and_dtypes(shape, dtype):
    x = matrix(*shape, INDEX[:180] ** -1).to(dtype)
    value, error = erank_estimate(x, **SMALL)
    assert value.dtype == error.dtype == torch.float64 and value.shape == error.shape == ()
    assert abs(value - erank(x)) <= error <= 0.05 * value


@pytest.mark.parametrize("wide", (False, True))
def test_masked_rows_may_hold_anything(wide):
    x = torch.stack([matrix(360, 1000 if wide else 250, INDEX[:200] ** -power, seed) for seed, power in enumerate((1.0, 0.6))]).float()
    mask = draw(2, 360, seed=5) > -0.8
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    value, error = erank_estimate(poisoned, mask, **SMALL)
    assert (~mask).any() and ((value - erank(x, mask)).abs() <= error).all() and (error <= 0.05 * value).all()
    found = erank_estimate(x, mask, **SMALL)
    assert torch.equal(found.erank, value) and torch.equal(found.error, error)
    assert ((erank(x) - erank(x, mask)).abs() > error).all(), "a mask that is ignored must be seen"


@pytest.mark.parametrize("change", (lambda x: x * 2.0**-90, lambda x: x * 2.0**90, lambda x: x + 100 * draw(1, x.shape[1]).float()), ids=("small", "large", "far"))
def test_scale_and_place(change):
    x = change(matrix(300, 200, INDEX[:200] ** -1).float())
    value, error = erank_estimate(x, **SMALL)
    assert abs(value - erank(x)) <= error


def test_unit_rows_are_those_of_the_exact_path():
    from red_kernels.reference import normalised_rows

    x = torch.cat([draw(6, 5), -draw(6, 5), torch.zeros(3, 5).double()]).float() + 1000 * draw(1, 5, seed=3).float()
    mask = torch.arange(15) != 4
    for given in (None, mask):
        rows, kept = unit_rows(x, given)
        truth = normalised_rows(x, given)[0]
        assert rows.dtype == torch.float32 and torch.equal(kept, truth.norm(dim=-1) > 0.5)
        assert (rows.double() - truth).norm() < 2e-6 * truth.norm()
    assert not unit_rows(torch.full((1000, 4), 0.1), None)[1].any()


def test_orthonormal_columns_even_of_one_direction():
    block = draw(1, 200, 1) @ draw(1, 1, BLOCK) + 1e-5 * draw(1, 200, BLOCK, seed=2)
    block = module._orthonormal(block.float())
    assert (block.mT @ block - torch.eye(BLOCK)).abs().max() < 1e-4


def test_equal_calls_are_equal_and_seeds_differ(many):
    x = many[0][:2]
    first, again, other = (erank_estimate(x, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert torch.equal(first.erank, again.erank) and (first.erank != other.erank).all()
    alone = erank_estimate(x[1], **SMALL).erank
    torch.testing.assert_close(alone, first.erank[1], rtol=1e-4, atol=0)  # products of another batch round differently
    state = torch.get_rng_state()
    erank_estimate(x, **SMALL)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_too_uncertain_is_done_again(many, monkeypatch):
    monkeypatch.setattr(module, "EXACT_BELOW", 0)
    x, truth = many
    settings = SMALL | dict(directions=48)  # so few that 320 is not small beside them
    plain = erank_estimate(x, **settings)
    limit = (plain.error / plain.erank).median().item()
    value, error = erank_estimate(x, **settings | dict(tolerance=limit))
    again = plain.error > limit * plain.erank
    assert 0 < again.sum() < len(x)
    assert torch.equal(value[again], truth[again]) and (error[again] == 0).all()
    assert torch.equal(value[~again], plain.erank[~again]) and torch.equal(error[~again], plain.error[~again])


def test_small_matrices_take_the_exact_path():
    x = draw(3, 40, 12)
    value, error = erank_estimate(x)
    assert torch.equal(value, erank(x)) and (error == 0).all()
    x = matrix(300, 200, INDEX[:200] ** -1)
    assert erank_estimate(x).error == 0 and torch.equal(erank_estimate(x, x.sum(-1) > 0).erank, erank(x, x.sum(-1) > 0))


def test_no_matrix_as_large_as_the_covariance():
    seen = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(tuple(leaf.shape[-2:]) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    with Shapes():
        erank_estimate(matrix(600, 500, INDEX**-1).float(), **SMALL)
    assert (600, 500) in seen and not [shape for shape in seen if len(shape) == 2 and min(shape) >= 500 and shape not in ((600, 500), (500, 600))]


def test_without_a_spectrum(monkeypatch):
    monkeypatch.setattr(module, "EXACT_BELOW", 0)
    settings = dict(directions=32, probes=8)
    x = draw(4, 300, 260).float()
    x[1, 5, 0] = float("nan")
    x[2] = 0.1
    mask = torch.ones(4, 300).bool()
    mask[3, 1:] = False
    with pytest.raises(ValueError, match=r"matrix \[1\] of x \[4, 300, 260\] holds NaN"):
        erank_estimate(x, mask, **settings)
    value, error = erank_estimate(x, mask, invalid="nan", **settings)
    assert value.isnan().tolist() == error.isnan().tolist() == [False, True, True, True]
    value, error = erank_estimate(x, mask, invalid="nan", **settings | dict(tolerance=None))
    assert value.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.zeros(5)), ValueError, r"erank_estimate: x must have shape \[..., N, d\]"),
        (dict(x=torch.zeros(5, 4).int()), TypeError, "x must have a floating dtype"),
        (dict(mask=torch.ones(5)), TypeError, "mask must have dtype torch.bool"),
        (dict(mask=torch.ones(4).bool()), ValueError, "mask must have shape"),
        (dict(invalid="ignore"), ValueError, "invalid='ignore'; expected 'raise' or 'nan'"),
        (dict(directions=0), ValueError, "directions must be at least 1, got 0"),
        (dict(probes=3), ValueError, "probes must be at least 4, got 3"),
        (dict(steps=2), ValueError, "steps must be at least 3, got 2"),
        (dict(tolerance=0), ValueError, "tolerance must be positive"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        erank_estimate(**dict(x=draw(5, 4)) | change)
