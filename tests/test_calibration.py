"""Calibration against a brute force that runs every document alone, in float64, and keeps all states."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from reference_lrc import MODULES, documents, normalised, random_batch, streams, watching
from safetensors import safe_open
from safetensors.torch import save_file

from red.calibration import LONGEST, Calibration, model_hash
from red.calibration import calibrate_batches as calibrate
from red.errors import REDError

WIDTH, LAYERS = 32, 2
TENSORS = ("scores", "mean", "mean_square", "mean_log_rms", "longest", "tap_square", "covariance", "point_covariance")


def brute_force(teacher, batches, tap: str):
    """(scores, streams [2L+1, N, d], pooled covariance, sequences, tokens) by RED's definition, document by document."""
    texts = [document for batch in batches for document in documents(batch)]
    norms = [layer_norm for layer in teacher.model.layers for layer_norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(teacher.model.norm)
    means, rows = [], []
    for text in texts:
        points = streams(teacher, text)
        rows.append(torch.stack(points))  # [2L+1, T, d]
        if tap == "residual":
            seen = points[::2]
        else:
            seen = [point / (point.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.detach()
                    for point, norm in zip(points, norms, strict=True)]
        means.append(torch.stack([point.abs().mean(0) for point in seen]))
    scores = torch.stack(means).norm(dim=0).mean(0)  # L2 over the sequences, then the mean over the points
    x = torch.cat(rows, 1)
    z = normalised(x)
    covariance = torch.einsum("ptc,ptd->cd", z, z) / (z.shape[0] * z.shape[1])
    return scores, x, covariance, len(texts), z.shape[1]


def plain_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """One document in a row, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.randint(3, 64, size, generator=generator), 0)
    return {"input_ids": ids, "position_ids": torch.arange(size[1]).repeat(size[0], 1), "token_mask": mask}


BATCHES = {
    "packed": lambda: [random_batch(3, 12, seed=1), random_batch(2, 9, seed=2)],
    "ragged": lambda: [plain_batch([7, 3, 1, 9], seed=3), plain_batch([5], seed=4), plain_batch([2, 2], seed=5)],
}


@pytest.mark.parametrize("tap", ["residual", "norm"])
@pytest.mark.parametrize("kind", sorted(BATCHES))
def test_equals_brute_force(tiny_teacher, family, kind, tap):
    teacher, batches = tiny_teacher(family, dtype=torch.float64), BATCHES[kind]()
    scores, x, covariance, sequences, tokens = brute_force(teacher, batches, tap)
    z, rms = normalised(x), x.square().mean(-1).sqrt()
    found = calibrate(teacher, batches, tap=tap, point_covariance=True)
    assert (found.sequences, found.tokens, found.tap) == (sequences, tokens, tap)
    torch.testing.assert_close(found.scores, scores, rtol=1e-6, atol=0)  # channel_stats returns float32
    torch.testing.assert_close(found.mean_square, z.square().mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.mean, z.mean(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.covariance, covariance, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.point_covariance, z.transpose(1, 2) @ z / tokens, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.mean_log_rms, rms.log().mean(1), rtol=0, atol=1e-9)
    for longest, point, lengths in zip(found.longest.double(), x, rms, strict=True):
        expected = torch.zeros(LONGEST, WIDTH, dtype=torch.float64)  # of a short text, the rest stays zero
        expected[: min(LONGEST, tokens)] = point[lengths.argsort(descending=True)[:LONGEST]]
        torch.testing.assert_close(longest, expected, rtol=0, atol=1e-6)
    assert found.mean.abs().max() > 0.1 and torch.dist(found.point_covariance[0], found.point_covariance[-1]) > 1, "points differ"
    for index, name in enumerate(MODULES):
        for layer in range(LAYERS):
            outputs = []
            for text in (text for batch in batches for text in documents(batch)):
                with watching(teacher) as seen, torch.no_grad():
                    teacher(text[None])
                outputs.append(seen[layer, name][1][0])
            expected = torch.cat(outputs).square().mean()
            torch.testing.assert_close(found.tap_square[layer, index], expected, rtol=1e-6, atol=0, msg=f"layer {layer}, {name}")
    # the mean square of a row divided by its RMS is 1: that is what makes the norm scale 1 at full width
    torch.testing.assert_close(found.mean_square.mean(1), torch.ones(2 * LAYERS + 1, dtype=torch.float64), rtol=1e-10, atol=0)


def test_float32_teacher_is_as_good_as_float32_allows(tiny_teacher):
    teacher, batches = tiny_teacher(), BATCHES["packed"]()
    scores, x, covariance, *_ = brute_force(copy.deepcopy(teacher).double(), batches, "residual")
    z = normalised(x)
    found = calibrate(teacher, batches, point_covariance=True)
    torch.testing.assert_close(found.scores, scores, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.mean_square, z.square().mean(1), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found.mean, z.mean(1), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.covariance, covariance, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.point_covariance.double(), z.transpose(1, 2) @ z / z.shape[1], rtol=0, atol=2e-5)
    assert found.mean.dtype == torch.float64 and found.point_covariance.dtype == torch.float32


@pytest.mark.parametrize("tap", ["residual", "norm"])
def test_padding_never_counts(tiny_teacher, tap):
    """Whatever stands at padding, and however much of it there is."""
    teacher, batch = tiny_teacher(), random_batch(3, 12)
    reference = calibrate(teacher, [batch], tap=tap, point_covariance=True)
    other = {**batch, "input_ids": torch.where(batch["token_mask"], batch["input_ids"], 63)}
    padding = torch.full((3, 4), 0)
    longer = {"input_ids": torch.cat([batch["input_ids"], padding + 17], 1), "position_ids": torch.cat([batch["position_ids"], padding], 1),
              "token_mask": torch.cat([batch["token_mask"], padding.bool()], 1)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    for changed in (other, longer, {**other, "token_mask": batch["token_mask"].long()}):
        found = calibrate(teacher, [changed], tap=tap, point_covariance=True)
        assert (found.sequences, found.tokens) == (reference.sequences, reference.tokens)
        for name in TENSORS:
            torch.testing.assert_close(getattr(found, name), getattr(reference, name), rtol=1e-5, atol=1e-6, msg=name)


def test_a_row_of_padding_alone_is_not_a_sequence(tiny_teacher):
    teacher, batch = tiny_teacher(), plain_batch([6, 4])
    padded = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in batch.items()}
    found, reference = calibrate(teacher, [padded]), calibrate(teacher, [batch])
    assert found.sequences == reference.sequences == 2
    torch.testing.assert_close(found.scores, reference.scores, rtol=1e-6, atol=0)


def test_the_split_into_batches_does_not_matter(tiny_teacher):
    teacher, batch = tiny_teacher(dtype=torch.float64), random_batch(6, 12)
    whole = calibrate(teacher, [batch], point_covariance=True)
    for size in (1, 2, 4):
        parts = [{key: value[start:start + size] for key, value in batch.items()} for start in range(0, 6, size)]
        found = calibrate(teacher, iter(parts), point_covariance=True)
        assert (found.sequences, found.tokens) == (whole.sequences, whole.tokens)
        for name in TENSORS:
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-9, msg=name)


def test_defaults_without_positions_and_mask(tiny_teacher):
    """Bare ids: every row is one sequence, every token counts."""
    teacher, batch = tiny_teacher(), plain_batch([8, 8])
    found, reference = calibrate(teacher, [{"input_ids": batch["input_ids"]}]), calibrate(teacher, [batch])
    assert (found.sequences, found.tokens) == (2, 16)
    torch.testing.assert_close(found.scores, reference.scores)
    assert found.covariance is None and found.point_covariance is None
    assert calibrate(teacher, [batch], covariance=True).point_covariance is None


def test_leaves_the_teacher_as_it_was(tiny_teacher):
    teacher = tiny_teacher().train()
    hooks = sum(len(module._forward_hooks) for module in teacher.modules())
    calibrate(teacher, [random_batch()])
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(IndexError):
        calibrate(teacher, [{"input_ids": torch.full((1, 3), 64)}])  # beyond the vocabulary
    assert sum(len(module._forward_hooks) for module in teacher.modules()) == hooks and teacher.training


def test_memory_does_not_grow_with_the_text(tiny_teacher):
    """Between two batches, and after the last, no tensor as large as one batch's states is alive."""
    teacher, rows, length = tiny_teacher(), 40, 50
    held = []

    def big() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.numel() >= rows * length * WIDTH)

    def stream():
        for _ in range(2):
            held.append(big())
            yield {"input_ids": torch.randint(3, 64, (rows, length))}

    before = big()
    result = calibrate(teacher, stream(), covariance=True)
    assert held == [before] * 2 and big() == before
    assert result.tokens == 2 * rows * length


@pytest.mark.parametrize("covariances", [{}, {"covariance": True}, {"point_covariance": True}], ids=["neither", "pooled", "points"])
def test_round_trip(tiny_teacher, tmp_path, covariances):
    teacher = tiny_teacher()
    saved = calibrate(teacher, [random_batch()], tap="norm", tokenizer_hash="abc", **covariances)
    saved.save(tmp_path / "deep" / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "deep" / "calibration.safetensors")
    assert vars(loaded).keys() == vars(saved).keys()
    for key, value in vars(saved).items():
        same = torch.equal(getattr(loaded, key), value) if isinstance(value, torch.Tensor) else getattr(loaded, key) == value
        assert same, key
    loaded.check(teacher, "abc")
    loaded.check(teacher)  # the tokenizer is not always known


@pytest.mark.parametrize("lacking", ["longest", "mean"])
def test_a_file_of_an_earlier_red_is_refused(tiny_teacher, tmp_path, lacking):
    calibrate(tiny_teacher(), [random_batch()]).save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        tensors, facts = {key: file.get_tensor(key) for key in file.keys() if key not in ("longest", lacking)}, file.metadata()
    save_file(tensors, tmp_path / "old.safetensors", metadata=facts)
    with pytest.raises(REDError, match="old.safetensors is a calibration of an earlier red and lacks statistics. Make it again"):
        Calibration.load(tmp_path / "old.safetensors")


def test_another_model_or_tokenizer_is_refused(tiny_teacher):
    teacher = tiny_teacher()
    calibration = calibrate(teacher, [random_batch()], tokenizer_hash="a" * 20)
    with pytest.raises(REDError, match="another tokenizer.*aaaaaaaaaaaa.*bbbbbbbbbbbb.*Calibrate"):
        calibration.check(teacher, "b" * 20)
    other = tiny_teacher(seed=1)
    with pytest.raises(REDError, match=f"another model.*{model_hash(teacher)[:12]}.*{model_hash(other)[:12]}.*Calibrate"):
        calibration.check(other)


def test_hash_is_of_the_weights(tiny_teacher):
    teacher = tiny_teacher()
    bf16 = copy.deepcopy(teacher).bfloat16()
    assert model_hash(teacher) == model_hash(tiny_teacher()) != model_hash(tiny_teacher(seed=1))
    assert model_hash(bf16) == model_hash(copy.deepcopy(bf16).float()), "one checkpoint has one hash, in bf16 and in fp32"
    with torch.no_grad():
        teacher.model.norm.weight[0] += 1e-3
    assert model_hash(teacher) != model_hash(tiny_teacher())


@pytest.mark.parametrize("tap", ["residual", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_with_its_place(tiny_teacher, tap, value):
    """Channel 7 of what the last layer writes: point 2 of the residual tap."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight[7] = value
    place = "point 2, channel 7" if tap == "residual" else "point 4"
    with pytest.raises(REDError, match=f"NaN or infinite at {place}.*(fp32|bf16)"):
        calibrate(teacher, [random_batch()], tap=tap)


def test_bad_input_is_refused(tiny_teacher, tmp_path):
    teacher, batch = tiny_teacher(), random_batch()
    with pytest.raises(REDError, match="tap='middle'.*residual"):
        calibrate(teacher, [batch], tap="middle")
    with pytest.raises(REDError, match="no token"):
        calibrate(teacher, [])
    with pytest.raises(REDError, match="no token"):
        calibrate(teacher, [{**batch, "token_mask": torch.zeros_like(batch["token_mask"])}])
    with pytest.raises(REDError, match="no calibration file"):
        Calibration.load(tmp_path / "missing.safetensors")
    save_file({"scores": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no safetensors at all, and long enough for a header length")
    for name in ("other", "text"):
        with pytest.raises(REDError, match=f"{name}.safetensors.*not a calibration"):
            Calibration.load(tmp_path / f"{name}.safetensors")


def test_model_hash_of_a_parameter_beyond_the_integers_of_float32():
    """2^24 elements and more: an index computed in fp32 would run past the end."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(3072 * 8192, dtype=torch.bfloat16))
    before = model_hash(model)
    with torch.no_grad():
        model.weight[-1] = 1.0
    assert model_hash(model) != before
