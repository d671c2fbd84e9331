"""erank against the singular values of the normalised rows in float64: every test in PyTorch, and in the compiled extension where it is built."""

import math

import pytest
import torch
from op_truth import assert_near, compiled, drawn

from red_kernels import backend, erank, erank_spectrum, extension, reference


@pytest.fixture(autouse=True, params=("torch", "extension"))
def chosen(request, monkeypatch):
    if request.param == "extension" and extension.why_not():
        pytest.skip(extension.why_not())
    monkeypatch.setenv("RED_BACKEND", "torch" if request.param == "torch" else "auto")
    assert backend.select("erank", torch.zeros(2, 2)) == request.param
    return request.param


def by_svd(x):
    """(eRank, λ descending) of one matrix [N, d] with the valid rows only: λ are the squared singular values."""
    x = x.double() - x.double().mean(0)
    rows = torch.stack([row / row.norm() if row.norm() > 1e-10 else torch.zeros_like(row) for row in x])
    eigenvalues = torch.linalg.svdvals(rows) ** 2
    r = eigenvalues / eigenvalues.sum()
    r = r[r > 1e-14]
    return torch.tensor(math.exp(-sum(p * math.log(p) for p in r.tolist())), dtype=torch.float64), eigenvalues


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(x, mask=None):
    matrix = x if mask is None else x[mask]
    value, eigenvalues = by_svd(matrix)
    actual = erank_spectrum(x, mask)
    assert actual.shape == (min(x.shape),) and actual.dtype == torch.float64 and (actual.diff() <= 0).all()
    assert_near(actual[: len(eigenvalues)], eigenvalues, eigenvalues)
    assert actual[len(eigenvalues) :].abs().sum() < 1e-10
    assert erank(x, mask).dtype == torch.float64
    assert_near(erank(x, mask), value, value)


CASES = {
    "tall": draw(50, 8),
    "wide": draw(7, 30),
    "square": draw(12, 12),
    "two rows": draw(2, 5),
    "one channel": draw(9, 1),
    "rank deficient": draw(40, 3) @ draw(3, 16, seed=1),
    "one dominant direction": draw(60, 1) * 1e4 + draw(60, 10, seed=1) * 1e-3,
    "far from the origin": (draw(30, 6) + 1e3).float().double(),
    "repeated eigenvalues": torch.cat([torch.eye(6), -torch.eye(6)]).double(),
    "one row at the mean": torch.cat([draw(4, 5), -draw(4, 5), torch.zeros(1, 5).double()]),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_svd(name):
    check(CASES[name])


@pytest.mark.parametrize("scale", (2.0**-700, 2.0**700))
def test_squares_beyond_float64(scale):
    assert torch.equal(erank_spectrum(draw(20, 5) * scale), erank_spectrum(draw(20, 5)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_input_is_taken_as_it_is(dtype):
    check(draw(33, 9).to(dtype))


def test_known_values():
    torch.testing.assert_close(erank(CASES["repeated eigenvalues"]), torch.tensor(6.0).double())
    simplex = torch.eye(7)  # N orthonormal rows, centred: N-1 equal eigenvalues
    torch.testing.assert_close(erank(simplex), torch.tensor(6.0).double())
    torch.testing.assert_close(erank(draw(2, 5)), torch.tensor(1.0).double())
    assert erank(CASES["one dominant direction"]) < 1.001


@drawn(16, n=range(2, 41), d=range(1, 41), rank=range(1, 11), masked=(False, True), seed=range(1001))
def test_any_shape(n, d, rank, masked, seed):
    x = draw(n, rank, seed=seed) @ draw(rank, d, seed=seed + 1)
    mask = None
    if masked:
        mask = draw(n, seed=seed + 2) > 0
        mask[:2] = True
    check(x, mask)
    count = n if mask is None else mask.sum()
    assert 1 - 1e-9 <= erank(x, mask) <= min(count - 1, d, rank) + 1e-9


def test_masked_rows_may_hold_anything():
    x, mask = draw(2, 3, 10, 4), draw(2, 3, 10, seed=1) > -0.5
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    assert (~mask).any() and torch.equal(erank(poisoned, mask), erank(x, mask))
    assert torch.equal(erank_spectrum(poisoned, mask), erank_spectrum(x, mask))
    for a in range(2):
        for b in range(3):
            check(poisoned[a, b], mask[a, b])
            value = by_svd(x[a, b][mask[a, b]])[0]
            assert_near(erank(poisoned, mask)[a, b], value, value)


INVALID = {
    "NaN": (draw(5, 4).index_fill(0, torch.tensor(3), float("nan")), None, "holds NaN or Inf in a valid row"),
    "inf": (draw(5, 4).index_fill(0, torch.tensor(3), -float("inf")), None, "holds NaN or Inf in a valid row"),
    "one row": (draw(1, 4), None, r"too few valid rows \(1\); at least 2"),
    "one valid row": (draw(5, 4), torch.arange(5) == 2, r"too few valid rows \(1\)"),
    "no valid row": (draw(5, 4), torch.zeros(5).bool(), r"too few valid rows \(0\)"),
    "zeros": (torch.zeros(5, 4), None, "all zero once centred"),
    "constant, float64 rounding": (torch.full((3, 4), 0.1).double() * draw(4), None, "all zero once centred"),
    "constant, float32": (torch.full((1000, 4), 0.1), None, "all zero once centred"),
}


@pytest.mark.parametrize("name", INVALID)
def test_without_a_spectrum(name):
    x, mask, reason = INVALID[name]
    with pytest.raises(ValueError, match=f"the matrix of x .* {reason}"):
        erank(x, mask)
    assert erank(x, mask, invalid="nan").isnan()


def test_the_invalid_matrix_is_named_and_the_others_survive():
    x = draw(2, 3, 10, 4)
    x[1, 2, 5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"erank: matrix \[1, 2\] of x \[2, 3, 10, 4\] holds NaN"):
        erank(x)
    with pytest.raises(ValueError, match=r"erank_spectrum: matrix \[1, 2\]"):
        erank_spectrum(x)
    value = erank(x, invalid="nan")
    assert value.isnan().sum() == 1 and value[1, 2].isnan() and torch.equal(value[0], erank(x[0]))


def test_spectrum_of_equal_rows_is_zero():
    assert erank_spectrum(torch.full((3, 4), 0.1)).eq(0).all()


def test_is_not_differentiable():
    x = draw(5, 4).requires_grad_()
    assert not erank(x).requires_grad and not erank_spectrum(x).requires_grad


def test_opcheck():
    x, mask = draw(2, 9, 4), draw(2, 9, seed=1) > -1
    for each in (mask, None):
        torch.library.opcheck(torch.ops.red.erank.default, (x, each, "nan"))
        torch.library.opcheck(torch.ops.red.erank.default, (x.float(), each, "raise"))
        torch.library.opcheck(torch.ops.red.erank_spectrum.default, (x, each))


def test_compiles_whole():
    x, mask = draw(2, 9, 4), draw(2, 9, seed=1) > -1
    for function in (erank, erank_spectrum):
        assert torch.equal(compiled(function)(x, mask), function(x, mask))


SPECTRUM, NORMALISED, ERANK = reference.spectrum, reference.normalised_rows, reference.erank
MUTATIONS = {
    "zero spectrum": ("spectrum", lambda rows: torch.zeros_like(SPECTRUM(rows))),
    "singular values": ("spectrum", lambda rows: SPECTRUM(rows).sqrt()),
    "rows not normalised": ("spectrum", lambda rows: SPECTRUM(rows * torch.arange(1, rows.shape[-2] + 1)[:, None])),
    "one direction": ("spectrum", lambda rows: torch.eye(min(rows.shape))[0].double()),
    "zero erank": ("erank", lambda x, mask, precision: (torch.zeros(()).double(), *ERANK(x, mask)[1:])),
    "mask ignored": ("normalised_rows", lambda x, mask: NORMALISED(x, None)),
}


RUN = extension._run
MUTATIONS_OF_THE_EXTENSION = {
    "zero spectrum": lambda x, mask, precision: (lambda value, found, *rest: (value, found * 0, *rest))(*RUN(x, mask, precision)),
    "zero erank": lambda x, mask, precision: (RUN(x, mask, precision)[0] * 0, *RUN(x, mask, precision)[1:]),
    "mask ignored": lambda x, mask, precision: RUN(x, None, precision),
    "float32": lambda x, mask, precision: RUN(x, mask, "float32"),
}


@pytest.mark.parametrize("name", sorted({*MUTATIONS, *MUTATIONS_OF_THE_EXTENSION}))
def test_mutations_are_caught(name, chosen, monkeypatch):
    x, mask = draw(12, 5), torch.arange(12) < 9
    check(x, mask)
    if chosen == "extension":
        monkeypatch.setattr(extension, "_run", MUTATIONS_OF_THE_EXTENSION.get(name, MUTATIONS_OF_THE_EXTENSION["zero spectrum"]))
    else:
        monkeypatch.setattr(reference, *MUTATIONS.get(name, MUTATIONS["zero spectrum"]))
    with pytest.raises(AssertionError):
        check(x, mask)


LIST = [draw(9, 5), draw(3, 5, seed=1), draw(40, 5, seed=2)]


def test_a_list_of_different_heights():
    found, spectra = erank(LIST), erank_spectrum(LIST)
    assert found.shape == (3,) and [len(spectrum) for spectrum in spectra] == [5, 3, 5]
    for matrix, value, spectrum in zip(LIST, found, spectra, strict=True):
        truth, eigenvalues = by_svd(matrix)
        assert_near(value, truth, truth)
        assert_near(spectrum, eigenvalues, eigenvalues)


@pytest.mark.parametrize(
    ("matrices", "mask", "message"),
    (
        ([], None, "the list of matrices is empty"),
        ([draw(4, 5), draw(4, 6)], None, r"of one d, dtype and device; number 0 and number 1 are \[4, 5\] .* and \[4, 6\]"),
        ([draw(4, 5), draw(4, 5).float()], None, "float64 on cpu and .* torch.float32"),
        ([draw(4)], None, "must hold matrices"),
        (LIST, torch.ones(3, 40).bool(), "takes no mask"),
        ([draw(4, 5), draw(1, 5)], None, r"matrix \[1\] of x .* too few valid rows \(1\)"),
    ),
)
def test_a_wrong_list_is_named(matrices, mask, message):
    with pytest.raises(ValueError, match=message):
        erank(matrices, mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.zeros(5)), ValueError, r"x must have shape \[..., N, d\]"),
        (dict(x=torch.zeros(5, 0)), ValueError, "of at least 1, got"),
        (dict(x=torch.zeros(5, 4).int()), TypeError, "x must have a floating dtype"),
        (dict(mask=torch.ones(5)), TypeError, "mask must have dtype torch.bool"),
        (dict(mask=torch.ones(4).bool()), ValueError, "mask must have shape"),
        (dict(precision="half"), ValueError, "precision='half'; expected 'float64' or 'float32'"),
        (dict(invalid="ignore"), ValueError, "invalid='ignore'; expected 'raise' or 'nan'"),
    ),
)
def test_errors_name_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        erank(**dict(x=draw(5, 4)) | change)
