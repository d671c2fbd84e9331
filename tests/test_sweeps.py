"""Later sweeps: documents weigh by the student's divergence in every sum, against loops over documents; whole, interrupted, and refused."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import documents, normalised, random_batch
from test_fitting import logits, ridge_solution, start_of, streams_of, student_of, text
from tiny_training import settings_of

from red.calibration import calibrate_batches, segments
from red.config import REDConfig
from red.errors import REDError
from red.fitting import fit_maps, fit_student
from red.fitting.fit import Fit
from red.fitting.sweeps import FLOOR, DocumentWeights
from red.starting import start_maps


def weighted(batches: list[dict], seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{**batch, "token_weight": torch.rand(batch["input_ids"].shape, generator=generator) * batch["token_mask"]} for batch in batches]


def tokens_weights(batches: list[dict]) -> torch.Tensor:
    """[N], in the order of `streams_of`: document by document."""
    found = []
    for batch in batches:
        ids, _ = segments(batch.get("position_ids"), batch["token_mask"].bool())
        found += [batch["token_weight"][ids == number] for number in range(int(ids.max()) + 1)]
    return torch.cat(found).double()


def config_of(folder, **changes) -> REDConfig:
    return REDConfig(**settings_of(folder, **{"start": "balanced", "start_fit": "full", **changes}))


@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen3", False), ("qwen2", True)])
def test_weights_are_the_documents_divergence_over_the_sweeps(tiny_teacher, family, tied):
    """Against the whole models, run on every document alone."""
    teacher, batches, weights, logs = tiny_teacher(family, tied=tied), text(2), DocumentWeights(), []
    for name in ("pca", "orthogonal_shared"):
        fit = fit_student(teacher, start_of(teacher, name).maps, batches)
        found = weights.update(fit)
        student = student_of(teacher, fit.maps)
        divergences, counts = [], []
        for document in [document for batch in batches for document in documents(batch)]:
            with torch.no_grad():
                expected, mine = (model(input_ids=document.view(1, -1)).logits[0].double().log_softmax(-1) for model in (teacher, student))
            divergences.append(float((expected.exp() * (expected - mine)).sum(-1).mean()))
            counts.append(len(document.view(-1)))
        divergences, counts = torch.tensor(divergences).double(), torch.tensor(counts)
        logs.append((divergences / ((divergences * counts).sum() / counts.sum()) + FLOOR).log())
        wanted = (torch.stack(logs).mean(0) / 2).exp()
        wanted = (wanted * counts.sum() / (wanted * counts).sum()).repeat_interleave(counts)
        torch.testing.assert_close(tokens_weights([{**batch, "token_weight": part} for batch, part in zip(batches, found, strict=True)]), wanted, rtol=1e-3, atol=1e-4)
        assert wanted.max() > 1.2 * wanted.min()
        assert all((part[~batch["token_mask"].bool()] == 0).all() for batch, part in zip(batches, found, strict=True))


def test_a_weight_counts_a_token_so_often(tiny_teacher):
    """Readers of the first point and second moments, by hand over the tokens."""
    teacher, batches = tiny_teacher(), weighted(text(2))
    weight = tokens_weights(batches)[:, None]
    start = start_of(teacher, "pca").maps
    z = normalised(streams_of(teacher, batches)[0])
    maps = fit_maps(teacher, start, batches)
    y = normalised(streams_of(student_of(teacher, maps), batches)[0])
    gain = teacher.model.layers[0].input_layernorm.weight.double()
    scale = maps["model.layers.0.input_layernorm.weight"][0]
    # the solver's ridge is relative to the weighted mean square, as this one's
    wanted = (ridge_solution(y * weight.sqrt(), z * weight.sqrt(), 1e-4) * gain).T / scale
    torch.testing.assert_close(maps["model.layers.0.self_attn.q_proj.weight"], wanted, rtol=1e-3, atol=1e-4)
    found = calibrate_batches(teacher, batches, point_covariance=True)
    plain = calibrate_batches(teacher, text(2), point_covariance=True)
    torch.testing.assert_close(found.point_covariance[0].double(), (z * weight).T @ z / len(z), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.mean_square, plain.mean_square) and torch.equal(found.scores, plain.scores)  # only the second moments


@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True)])
def test_a_weight_of_two_is_the_text_twice(tiny_teacher, family, tied):
    """Readers, writers and head of a whole fit."""
    teacher, batches = tiny_teacher(family, tied=tied), text(2)
    start = start_of(teacher, "pca").maps
    double = [{**batch, "token_weight": torch.full(batch["input_ids"].shape, weight)} for batch, weight in zip(batches, (1.0, 2.0), strict=True)]
    found, plain, twice = fit_maps(teacher, start, double), fit_maps(teacher, start, batches), student_of(teacher, fit_maps(teacher, start, [*batches, batches[1]]))
    torch.testing.assert_close(logits(student_of(teacher, found)), logits(twice), rtol=0, atol=1e-3)
    assert (logits(student_of(teacher, plain)) - logits(twice)).abs().max() > 0.1


def test_weights_of_one_change_nothing(tiny_teacher):
    teacher, batches = tiny_teacher(), text(2)
    start = start_of(teacher, "pca").maps
    ones = [{**batch, "token_weight": torch.ones(batch["input_ids"].shape)} for batch in batches]
    found, plain = fit_maps(teacher, start, ones), fit_maps(teacher, start, batches)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    torch.testing.assert_close(calibrate_batches(teacher, ones, covariance=True).covariance, calibrate_batches(teacher, batches, covariance=True).covariance)


@pytest.mark.parametrize("fit", ["full", "readers"])
def test_a_sweep_is_a_map_and_a_fit_with_the_weights(tiny_teacher, tmp_path, fit):
    """By hand, piece by piece; and no sweep more is what it always was."""
    teacher, batches = tiny_teacher(), text(2)
    calibration = calibrate_batches(teacher, batches, covariance=True)
    first = start_of(teacher, "balanced", batches=batches).maps
    once = fit_student(teacher, first, batches, writers=fit == "full")
    same = start_maps(teacher, config_of(tmp_path, start_fit=fit), calibration, batches).maps
    assert all(torch.equal(same[name], once.maps[name]) for name in once.maps)
    again = [{**batch, "token_weight": weight} for batch, weight in zip(batches, DocumentWeights().update(once), strict=True)]
    second = start_of(teacher, "balanced", batches=again).maps
    twice = fit_maps(teacher, second, again, writers=fit == "full")
    found = start_maps(teacher, config_of(tmp_path, start_fit=fit, fit_sweeps=2), calibration, batches).maps
    assert all(torch.equal(found[name], twice[name]) for name in twice)
    assert (logits(student_of(teacher, found)) - logits(student_of(teacher, same))).abs().max() > 1e-3


def test_an_interrupted_sweep_goes_on(tiny_teacher, tmp_path, monkeypatch):
    teacher, batches, fitted = tiny_teacher(), text(2), []
    calibration = calibrate_batches(teacher, batches, covariance=True)
    config = config_of(tmp_path, fit_sweeps=2)
    whole = start_maps(teacher, config, calibration, batches).maps
    plain = Fit.readers

    def readers(self, half):
        fitted.append(half.point)
        if len(fitted) == 7:  # of four a sweep
            raise KeyboardInterrupt
        return plain(self, half)

    monkeypatch.setattr(Fit, "readers", readers)
    with pytest.raises(KeyboardInterrupt):
        start_maps(teacher, config, calibration, batches, tmp_path)
    found = start_maps(teacher, config, calibration, batches, tmp_path).maps
    assert fitted == [0, 1, 2, 3, 0, 1, 2, 2, 3] and all(torch.equal(found[name], whole[name]) for name in whole)
    fitted.clear()
    start_maps(teacher, config_of(tmp_path, fit_sweeps=1), calibration, batches, tmp_path)
    assert fitted == [0, 1, 2, 3]  # another number of sweeps is another start


@pytest.mark.parametrize("count", [0, -1])
def test_no_sweep_is_refused(tmp_path, count):
    with pytest.raises(REDError, match="fit_sweeps"):
        config_of(tmp_path, fit_sweeps=count)


def test_later_sweeps_lower_the_divergence_where_documents_differ(tiny_teacher, tmp_path):
    """Half of the documents repeat one word: easy, and half of all tokens. Its mean over the others must fall."""
    teacher, hard = tiny_teacher(), [random_batch(8, 16, seed=seed) for seed in range(2)]
    easy = [{**batch, "input_ids": torch.full_like(batch["input_ids"], 7)} for batch in hard]
    batches = [*hard, *easy]
    calibration = calibrate_batches(teacher, batches, covariance=True)

    def divergence(maps) -> float:
        student = student_of(teacher, maps)
        with torch.no_grad():
            parts = [[model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids")).logits[batch["token_mask"].bool()].log_softmax(-1)
                      for model in (teacher, student)] for batch in hard]
        return sum(float((expected.exp() * (expected - found)).sum()) for expected, found in parts)

    found = [divergence(start_maps(teacher, config_of(tmp_path, fit_sweeps=count), calibration, batches).maps) for count in (1, 2)]
    assert found[1] < found[0]
