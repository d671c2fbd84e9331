"""The starts: complete maps, exactness at full width, what each promises, seeds, and the norm scale. (The registry: test_start_registry.py.)"""

from __future__ import annotations

import importlib
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from reference_lrc import documents, normalised, random_batch, streams, use_exact_norms
from tiny_training import settings_of

from red import starts
from red.calibration import calibrate_batches as calibrate
from red.config import REDConfig
from red.fitting.shared_map import most_explained
from red.prepare import start_projections
from red.training.projections import Projections
from red.starts.base import StartContext
from red.student import build_student

WIDTH, NARROW = 32, 16
NAMES = ("activation", "activation_lstsq", "balanced", "explained", "orthogonal", "orthogonal_shared", "pca", "random", "random_selection")
SELECTIONS = ("activation", "activation_lstsq", "random_selection")
VARIANTS = {"llama": {}, "llama-biases": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}


@pytest.fixture(autouse=True)
def _short_climb(monkeypatch):
    """What the climb reaches is test_shared_map.py's."""
    monkeypatch.setattr("red.starts.explained.most_explained", partial(most_explained, iterations=5))


def batches(count: int = 2) -> list[dict]:
    return [random_batch(4, 16, seed=seed) for seed in range(count)]


def context_of(teacher, width: int = NARROW, **settings) -> StartContext:
    return StartContext(teacher, width, calibrate(teacher, batches(), point_covariance=True), **settings)


def student_of(teacher, name: str, width: int = NARROW, **settings):
    student = build_student(teacher, width)
    start = starts.get(name)(context_of(teacher, width, **settings))
    return student, Projections(teacher, student, start)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_batch(4, 16, seed=9)["input_ids"]).logits


def test_all_expected_starts_are_registered():
    assert set(NAMES) <= set(starts.names())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", NAMES)
def test_every_start_maps_every_parameter(tiny_teacher, name, variant, tied):
    teacher = tiny_teacher(variant.partition("-")[0], tied=tied, **VARIANTS[variant])
    expected = {}
    for key, value in teacher.named_parameters():  # a tied head is no parameter of its own
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            expected[key] = (NARROW, WIDTH)
        elif value.dim() == 2:
            expected[key] = (WIDTH, NARROW)
        elif key.endswith("norm.weight") and "q_norm" not in key and "k_norm" not in key:
            expected[key] = (NARROW,)
    start = starts.get(name)(context_of(teacher))
    assert {key: tuple(value.shape) for key, value in start.maps.items()} == expected
    assert all(value.isfinite().all() for value in start.maps.values())
    assert (start.channels is not None) == (name in SELECTIONS)
    student = build_student(teacher, NARROW)
    Projections(teacher, student, start)
    assert logits(student).isfinite().all()
    assert student.config.hidden_size == NARROW and student.config.head_dim == 8
    assert student.config.tie_word_embeddings == tied
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("norm_scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_full_width_identity_is_the_teacher(tiny_teacher, variant, norm_scale, tied):
    """Keeping all channels changes nothing; the norm scale is then exactly 1."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        teacher = tiny_teacher(variant.partition("-")[0], tied=tied, dtype=dtype, **VARIANTS[variant])
        reference = logits(teacher)
        assert reference.std() > 0.3, "logits near zero would make any model look right"
        for name in SELECTIONS:
            student, projections = student_of(teacher, name, WIDTH, norm_scale=norm_scale)
            assert torch.equal(projections.channels, torch.arange(WIDTH))
            torch.testing.assert_close(logits(student), reference, rtol=0, atol=tolerance, msg=f"{name} {dtype}")


@pytest.mark.parametrize("name", ["pca", "orthogonal_shared"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_full_width_rotation_is_the_teacher(tiny_teacher, variant, name, monkeypatch):
    """A rotated stream with the gains folded into the readers computes the same function (untied models)."""
    use_exact_norms(monkeypatch)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        teacher = tiny_teacher(variant.partition("-")[0], dtype=dtype, **VARIANTS[variant])
        student, _ = student_of(teacher, name, WIDTH)
        torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=tolerance)


@torch.no_grad()
def strong_channels(teacher, channels: torch.Tensor, factor: float = 8.0):
    """Make the stream's `channels` stronger: what everything writes to them grows."""
    teacher.get_input_embeddings().weight[:, channels] *= factor
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight[channels] *= factor
        layer.mlp.down_proj.weight[channels] *= factor
    return teacher


def test_activation_keeps_the_most_active_channels(tiny_teacher, family):
    strong = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))[:NARROW].sort().values
    teacher = strong_channels(tiny_teacher(family), strong)
    _, projections = student_of(teacher, "activation")
    assert torch.equal(projections.channels, strong)
    plain = tiny_teacher(family)  # without a strong set, the top of the scores all the same
    context = context_of(plain)
    order = context.calibration.scores.numpy().argsort()[::-1][:NARROW].copy()
    assert torch.equal(starts.get("activation")(context).channels, torch.from_numpy(order).sort().values)
    assert not torch.equal(starts.get("random_selection")(context).channels, starts.get("activation")(context).channels)


def linear_stream(teacher, kept: torch.Tensor, share: float = 0.5):
    """Make every dropped channel a linear function of the kept ones: what is written is `u R`, with `R` the identity on `kept` and
    `share` times a rotation elsewhere. So the dropped part has a constant share of the norm, and the norm scale is exact too."""
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(NARROW, NARROW, generator=generator, dtype=torch.float64))
    dropped = torch.tensor([channel for channel in range(WIDTH) if channel not in set(kept.tolist())])
    with torch.no_grad():
        weights = [teacher.get_input_embeddings().weight.T]
        for layer in teacher.model.layers:
            weights += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
        for weight in weights:  # [d, ...]
            weight[dropped] = (share * rotation).to(weight.dtype).T @ weight[kept]
    return teacher, dropped


def test_lstsq_is_lossless_where_the_dropped_follow_from_the_kept(tiny_teacher, family, monkeypatch):
    monkeypatch.setattr(importlib.import_module("red.starts.activation_lstsq"), "RIDGE", 1e-13)
    kept = torch.arange(0, WIDTH, 2)
    use_exact_norms(monkeypatch)
    # the norm scale does not scale eps: with the usual one the logits would differ by 1e-4
    teacher, _ = linear_stream(tiny_teacher(family, dtype=torch.float64, rms_norm_eps=1e-13), kept, share=0.1)
    predicted, projections = student_of(teacher, "activation_lstsq")
    assert torch.equal(projections.channels, kept)
    torch.testing.assert_close(logits(predicted), logits(teacher), rtol=0, atol=1e-7)
    selected, _ = student_of(teacher, "activation")
    assert (logits(selected) - logits(teacher)).abs().max() > 0.1, "without the prediction the dropped channels are missed"


def test_lstsq_solves_the_least_squares_problem(tiny_teacher):
    """`O` against numpy's lstsq over all normalised tokens at all 2L + 1 points; the ridge costs a few 1e-4."""
    teacher = tiny_teacher(dtype=torch.float64)
    context = context_of(teacher, norm_scale=False)
    start = starts.get("activation_lstsq")(context)
    rows = torch.cat([normalised(point) for batch in batches() for text in documents(batch) for point in streams(teacher, text)])
    kept = start.channels
    dropped = torch.tensor([channel for channel in range(WIDTH) if channel not in set(kept.tolist())])
    solution, *_ = np.linalg.lstsq(rows[:, kept].numpy(), rows[:, dropped].numpy(), rcond=None)
    gain = teacher.model.layers[1].post_attention_layernorm.weight.detach()
    reader = start.maps["model.layers.1.mlp.up_proj.weight"] / gain[:, None]  # Oᵀ [d, d']
    np.testing.assert_allclose(reader[dropped].T.numpy(), solution, rtol=0, atol=2e-3)
    assert abs(solution).max() > 0.1
    torch.testing.assert_close(reader[kept], torch.eye(NARROW, dtype=torch.float64))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        value = start.maps[name] if "embed" in name else start.maps[name].T
        assert torch.equal(value, torch.eye(WIDTH, dtype=torch.float64)[:, kept]), name
    assert torch.equal(start.maps["model.norm.weight"], torch.ones(NARROW, dtype=torch.float64))


@pytest.mark.parametrize("name", ["orthogonal", "orthogonal_shared", "pca"])
def test_orthonormal_maps(tiny_teacher, name):
    teacher = tiny_teacher()
    context = context_of(teacher)
    start = starts.get(name)(context)
    eye = torch.eye(NARROW, dtype=torch.float64)
    norms = dict(context.readers())
    downs = []
    for key, value in start.maps.items():
        if value.dim() == 2:
            down = value.T if value.shape == (NARROW, WIDTH) else value
            down = down / context.gain(norms[key])[:, None] if key in norms else down
            torch.testing.assert_close(down.T @ down, eye, atol=1e-10, rtol=0, msg=key)
            downs.append(down)
    same = [torch.allclose(one, other) for one, other in combinations(downs, 2)]
    assert not any(same) if name == "orthogonal" else all(same)
    if name == "pca":  # no other map of this width keeps more of the second moment
        kept = torch.trace(downs[0].T @ context.calibration.covariance @ downs[0])
        best = torch.linalg.eigvalsh(context.calibration.covariance).flip(0)[:NARROW].sum()
        torch.testing.assert_close(kept, best)


@pytest.mark.parametrize("name", ["orthogonal", "orthogonal_shared"])
def test_a_tied_head_takes_the_nearest_diagonal_gain(tiny_teacher, name):
    """`downᵀ diag(g) down` is what a head that cannot fold would need; a norm has only a diagonal."""
    teacher = tiny_teacher(tied=True)
    maps = starts.get(name)(StartContext(teacher, NARROW)).maps
    down, gain = maps["model.embed_tokens.weight"], teacher.model.norm.weight.detach().double()
    needed = down.T @ torch.diag(gain) @ down
    torch.testing.assert_close(maps["model.norm.weight"], needed.diagonal(), rtol=1e-10, atol=0)
    assert torch.equal(maps["model.layers.0.input_layernorm.weight"], torch.ones(NARROW, dtype=torch.float64))


def test_gaussian_start(tiny_teacher):
    """LRC: independent N(0, std²) maps and gains of one, whatever the teacher's."""
    for std in (0.02, 0.1):
        start = starts.get("random")(StartContext(tiny_teacher(), NARROW, std=std))
        matrices = [value for value in start.maps.values() if value.dim() == 2]
        everything = torch.cat([value.flatten() for value in matrices])
        assert float(everything.std()) == pytest.approx(std, rel=0.05) and abs(float(everything.mean())) < 0.05 * std
        assert len({value.flatten()[0].item() for value in matrices}) == len(matrices) == 16
        assert all(torch.equal(value, torch.ones_like(value)) for value in start.maps.values() if value.dim() == 1)


@pytest.mark.parametrize("name", NAMES)
def test_seed(tiny_teacher, name):
    """Equal seeds give equal maps, whatever the global generator did; unequal ones differ only where the start is random."""
    teacher = tiny_teacher()
    context = partial(StartContext, teacher, NARROW, calibrate(teacher, batches(), point_covariance=True))
    first = starts.get(name)(context(seed=1)).maps
    torch.manual_seed(123)
    again, other = (starts.get(name)(context(seed=seed)).maps for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    random = name in ("random", "orthogonal", "orthogonal_shared", "random_selection")
    changed = [key for key in first if first[key].dim() == 2 and not torch.equal(first[key], other[key])]
    assert len(changed) == (16 if random else 0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_norm_scale_equals_brute_force(tiny_teacher, family, tied):
    """Gains are `g_G · sqrt(mean over tokens and kept channels of z²)`, norm by norm, in reading order."""
    teacher = tiny_teacher(family, tied=tied, dtype=torch.float64)
    scaled, plain = (starts.get("activation")(context_of(teacher, norm_scale=on)) for on in (True, False))
    points = [streams(teacher, text) for batch in batches() for text in documents(batch)]
    norms = [f"model.layers.{layer}.{norm}.weight" for layer in range(2) for norm in ("input_layernorm", "post_attention_layernorm")]
    kept, parameters = scaled.channels, dict(teacher.named_parameters())
    for index, name in enumerate([*norms, "model.norm.weight"]):
        z = torch.cat([normalised(document[index]) for document in points])
        scale = z[:, kept].square().mean().sqrt()
        gain = parameters[name].detach()[kept]
        torch.testing.assert_close(plain.maps[name], gain, rtol=1e-12, atol=0)
        torch.testing.assert_close(scaled.maps[name], scale * gain, rtol=1e-9, atol=0)
        assert abs(float(scale) - 1) > 1e-3


def test_norm_scale_of_a_shared_map_equals_brute_force(tiny_teacher):
    teacher = tiny_teacher(dtype=torch.float64)
    start = starts.get("pca")(context_of(teacher))
    rows = torch.cat([normalised(point) for batch in batches() for text in documents(batch) for point in streams(teacher, text)])
    scale = (rows @ start.maps["model.embed_tokens.weight"]).square().mean().sqrt()
    for name, value in start.maps.items():
        if value.dim() == 1:
            torch.testing.assert_close(value, scale * torch.ones(NARROW, dtype=torch.float64), rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["activation_lstsq", "balanced", "orthogonal", "pca", "random"])
def test_every_start_can_be_fitted(tiny_teacher, tmp_path, name, tied):
    """And comes nearer to the teacher by it, on other text; on little text the writers would learn it by heart."""
    teacher, text = tiny_teacher("qwen3", tied=tied), [random_batch(16, 24, seed=seed) for seed in range(4)]
    calibration, errors = calibrate(teacher, text, point_covariance=True), []
    for fit in ("none", "readers", "full"):
        student = start_projections(teacher, REDConfig(**settings_of(tmp_path, start=name, start_fit=fit)), calibration, text).student.eval()
        errors.append(float((logits(student).log_softmax(-1) - logits(teacher).log_softmax(-1)).square().mean()))
    assert all(error < 100 for error in errors) and errors[2] < errors[0]
