"""The starts that choose channels by something else than activation: by weights alone, and by variance."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import documents, normalised, random_batch, streams

from red import starts
from red.calibration import calibrate_batches as calibrate
from red.errors import REDError
from red.training.projections import Projections
from red.rotation import rotate
from red.starts.base import StartContext, selection
from red.starts.magnitude import weight_share
from red.student import build_student

WIDTH, NARROW = 32, 16
NAMES = ("magnitude", "variance")
VARIANTS = {"llama": {}, "llama-biases": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def batches() -> list[dict]:
    return [random_batch(4, 16, seed=seed) for seed in range(2)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_batch(4, 16, seed=9)["input_ids"]).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", NAMES)
def test_a_complete_selection(tiny_teacher, name, variant, tied):
    """Maps for every weight, the same channels everywhere, and all channels are the teacher."""
    teacher = tiny_teacher(variant.partition("-")[0], tied=tied, **VARIANTS[variant])
    calibration = calibrate(teacher, batches())
    start = starts.get(name)(StartContext(teacher, NARROW, calibration))
    expected = selection(StartContext(teacher, NARROW, calibration), start.channels)
    assert start.channels.unique().tolist() == start.channels.tolist() and len(start.channels) == NARROW
    assert start.maps.keys() == expected.maps.keys()
    assert all(torch.equal(start.maps[key], expected.maps[key]) for key in expected.maps)
    narrow = build_student(teacher, NARROW)
    assert torch.equal(Projections(teacher, narrow, start).channels, start.channels) and logits(narrow).isfinite().all()
    whole = build_student(teacher, WIDTH)
    Projections(teacher, whole, starts.get(name)(StartContext(teacher, WIDTH, calibration)))
    torch.testing.assert_close(logits(whole), logits(teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_magnitude_equals_brute_force(tiny_teacher, variant, tied):
    teacher = tiny_teacher(variant.partition("-")[0], tied=tied, dtype=torch.float64, **VARIANTS[variant])
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    modules = [("embed", teacher.model.embed_tokens.weight), ("head", teacher.lm_head.weight * teacher.model.norm.weight)]
    for layer in teacher.model.layers:
        for part, norm in ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)):
            for name, module in part.named_children():
                if name in READERS:
                    modules.append((name, module.weight * norm.weight))
                elif name in ("o_proj", "down_proj"):
                    column = [] if module.bias is None else [module.bias[:, None]]
                    modules.append((name, torch.cat([module.weight, *column], 1).T))
    assert len(modules) == 16
    for _, weight in modules:
        for channel in range(WIDTH):
            expected[channel] += (weight[:, channel].norm() / weight.norm()).detach() ** 2
    context = StartContext(teacher, NARROW)
    torch.testing.assert_close(weight_share(context), expected, rtol=1e-12, atol=0)
    assert weight_share(context).sum() == pytest.approx(16)
    assert set(starts.get("magnitude")(context).channels.tolist()) == set(expected.argsort(descending=True)[:NARROW].tolist())


def test_magnitude_sees_the_function_and_not_how_it_is_written(tiny_teacher, family):
    """Gains folded or not, head tied or a copy, a module scaled as a whole: the same shares."""
    teacher = tiny_teacher(family, tied=True, dtype=torch.float64)
    shares = weight_share(StartContext(teacher, NARROW))
    written = rotate(teacher, torch.eye(WIDTH), untie=True)
    torch.testing.assert_close(weight_share(StartContext(written, NARROW)), shares, rtol=1e-12, atol=0)
    with torch.no_grad():
        written.model.embed_tokens.weight *= 1e3
        written.model.layers[1].mlp.down_proj.weight *= 1e-3
    torch.testing.assert_close(weight_share(StartContext(written, NARROW)), shares, rtol=1e-12, atol=0)


def test_magnitude_needs_no_data(tiny_teacher):
    """A calibration changes its norm gains, not its channels; a module of zeros has no say."""
    teacher = tiny_teacher(attention_bias=True)
    blind = starts.get("magnitude")(StartContext(teacher, NARROW))
    assert torch.equal(blind.maps["model.norm.weight"], teacher.model.norm.weight.detach().double()[blind.channels])
    seeing = starts.get("magnitude")(StartContext(teacher, NARROW, calibrate(teacher, batches())))
    assert torch.equal(seeing.channels, blind.channels)
    assert not torch.equal(seeing.maps["model.norm.weight"], blind.maps["model.norm.weight"])
    with torch.no_grad():
        for parameter in teacher.model.layers[0].self_attn.o_proj.parameters():
            parameter.zero_()
    shares = weight_share(StartContext(teacher, NARROW))
    assert shares.isfinite().all() and shares.sum() == pytest.approx(15)


def test_magnitude_takes_the_strong_channels(tiny_teacher, family):
    strong = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))[:NARROW].sort().values
    teacher = tiny_teacher(family)
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[strong] *= 8
            elif weight.dim() == 2:
                weight[:, strong] *= 8
    assert torch.equal(starts.get("magnitude")(StartContext(teacher, NARROW)).channels, strong)


def test_variance_equals_brute_force(tiny_teacher, family):
    """The variance of z over all tokens, document by document, at each read point; then the mean over the points."""
    teacher = tiny_teacher(family, dtype=torch.float64)
    points = [streams(teacher, text) for batch in batches() for text in documents(batch)]
    spread = torch.stack([torch.cat([normalised(document[index]) for document in points]).var(0, correction=0) for index in range(5)]).mean(0)
    start = starts.get("variance")(StartContext(teacher, NARROW, calibrate(teacher, batches())))
    assert start.channels.tolist() == spread.argsort(descending=True)[:NARROW].sort().values.tolist()
    margin = spread.sort(descending=True).values
    assert margin[NARROW - 1] - margin[NARROW] > 1e-6, "the brute force must be able to tell the last kept from the first dropped"


def test_variance_leaves_a_large_constant_alone(tiny_teacher):
    """Channel 7 is by far the most active and never changes: RED's rule keeps it, variance does not."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, 7] = 40
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[7], layer.mlp.down_proj.weight[7] = 0, 0
    context = StartContext(teacher, NARROW, calibrate(teacher, batches()))
    assert 7 in starts.get("activation")(context).channels and 7 not in starts.get("variance")(context).channels


def test_registered_with_what_they_need(tiny_teacher):
    assert set(NAMES) <= set(starts.names())
    assert starts.get("magnitude").needs == () and starts.get("variance").needs == ("scores",)
    with pytest.raises(REDError, match="'variance' needs a calibration"):
        starts.get("variance")(StartContext(tiny_teacher(), NARROW))
