"""benchmarks/push.py: its recipes train what they say, its variations fit what they say, and its tables hold what there is."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from test_fitting import logits, text
from tiny_training import make_trainer, masters, settings_of

from benchmarks import push
from benchmarks.study import push_tables, recipes, variations
from red.calibration import calibrate_batches
from red.config import REDConfig
from red.data.packing import for_attention
from red.fitting.shared_map import most_explained, reader_gramians
from red.starts import balanced


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.student.named_parameters()}


@pytest.mark.parametrize("change, start", [(recipes.whitened, "pca"), (recipes.own_weights, "pca"), (partial(recipes.low_rank, rank=3), "activation")],
                         ids=["whitened", "own weights", "low rank"])
def test_another_parametrisation_begins_with_the_same_student_and_learns(tiny_teacher, tmp_path, change, start):
    trainer = make_trainer(tiny_teacher(), tmp_path, start=start, max_steps=2)
    before = weights(trainer)
    change(trainer)
    with torch.no_grad():
        trainer.projections.push_forward()
    after = weights(trainer)
    assert all(torch.allclose(after[name], before[name], atol=1e-4) for name in before)
    assert not trainer.taps or trainer.taps.projections["model.layers.0.mlp.down_proj.weight"].whole("master").shape == (16, 32) or start == "activation"
    begun = masters(trainer)
    trainer.train()
    trained = masters(trainer)
    assert all((trained[name] != begun[name]).any() for name in begun)


def test_a_low_rank_masters_gradient_is_the_dense_ones_in_its_factors(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path, start="activation")
    recipes.low_rank(trainer, rank=3)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        factor = trainer.projections[name]
        down, up = torch.randn(32, 3), torch.randn(3, 16)
        factor.master.data = torch.cat([down.T, up], 1)
        with torch.no_grad():
            factor.push()
        select = torch.zeros(32, 16)
        select[trainer.projections.channels, torch.arange(16)] = 1
        dense, gradient = select + down @ up, torch.randn_like(factor.weight)
        reads = factor.side == "input"
        torch.testing.assert_close(factor.weight.detach(), factor.teacher @ dense if reads else dense.T @ factor.teacher, rtol=1e-4, atol=1e-4)
        factor.weight.grad = gradient
        slope = factor.teacher.T @ gradient if reads else factor.teacher @ gradient.T
        torch.testing.assert_close(factor.pull(), torch.cat([(slope @ up.T).T, down.T @ slope], 1), rtol=1e-3, atol=1e-3)


def test_a_whitened_master_keeps_the_map(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path, start="pca")
    maps = masters(trainer)
    recipes.whitened(trainer)
    for factor in trainer.projections:
        torch.testing.assert_close(factor.whole("master").detach(), maps[factor.name], rtol=1e-3, atol=1e-3)
        if factor.side == "input":  # directions that the weight hears well it hears alike; the ridge keeps the others down
            heard = torch.linalg.svdvals(factor.teacher)
            assert heard[len(heard) // 4] > 0.97 * heard[0]


@pytest.mark.parametrize("shape, half", [("linear", 0.5), ("cosine", 0.5)])
def test_taps_fade_to_nothing(tiny_teacher, tmp_path, shape, half):
    trainer, seen = make_trainer(tiny_teacher(), tmp_path, start="pca", max_steps=4), []
    weight = trainer.args.tap_weight
    recipes.fading(trainer, shape)
    plain = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: seen.append(trainer.args.tap_weight) or plain(*args, **kwargs)
    trainer.train()
    assert seen[0] == weight and seen[2] == pytest.approx(half * weight)
    assert seen[3] == pytest.approx(weight * (0.25 if shape == "linear" else (1 + math.cos(0.75 * math.pi)) / 2))


@pytest.mark.parametrize("name, rate", [("muon", 2e-3), ("sgd", 1e-2), ("shampoo", 2e-3)])
def test_another_optimiser_trains_matrices_and_gains(tiny_teacher, tmp_path, name, rate):
    trainer = make_trainer(tiny_teacher(), tmp_path, start="pca", max_steps=3, learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0)
    recipes.optimiser(trainer, name)
    begun = masters(trainer)
    trainer.train()
    moved = {key: float((value - begun[key]).abs().max()) for key, value in masters(trainer).items()}
    assert all(moved.values())
    gains = [value for key, value in moved.items() if begun[key].dim() == 1]
    assert max(gains) < 3.1e-3, "three steps of Adam at 1e-3"
    if name != "sgd":  # of Adam's length: the root mean square of an update is a fixed share of the rate
        lengths = [float((value - begun[key]).square().mean().sqrt()) for key, value in masters(trainer).items() if value.dim() == 2]
        assert 0.1 * rate < max(lengths) < 3.1 * rate


@pytest.mark.parametrize("name", [name for name in push.VARIATIONS if not name.startswith(("writer ridge", "map refitted three", "without massive"))])
def test_a_variation_is_another_student_that_is_near_its_teacher(tiny_teacher, tmp_path, monkeypatch, name):
    monkeypatch.setattr("red.starts.explained.most_explained", partial(most_explained, iterations=10))
    monkeypatch.setattr(variations, "ITERATIONS", 10)
    teacher, batches = tiny_teacher(), text(2)
    config = REDConfig(**settings_of(tmp_path, start="fitted", hidden_size=24))
    calibration = calibrate_batches(teacher, batches, point_covariance=True)
    usual = logits(variations.usual(teacher, config, calibration, batches).eval())
    found = logits(push.VARIATIONS[name](teacher, config, calibration, batches).eval())
    far, own = (float((each - logits(teacher)).square().mean()) for each in (found, usual))
    assert (found - usual).abs().max() > 1e-4 and far < 2 * own + 1e-3, "as near as the usual one, or nearly"
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_half_of_what_is_heard_is_what_a_block_puts_out(tiny_teacher, tmp_path, monkeypatch):
    """Against the whole Jacobian of a feed-forward network at every token, relative to the stream behind it."""
    teacher, batches, given = tiny_teacher(), text(2), []
    with torch.no_grad():
        teacher.get_input_embeddings().weight[::2] *= 10  # streams of several lengths
    calibration = calibrate_batches(teacher, batches, point_covariance=True)
    points, heard = calibration.point_covariance.double(), torch.stack(list(reader_gramians(teacher, calibration.point_covariance.double())))
    monkeypatch.setattr(variations, "most_explained", lambda begin, points, gramians, **_: given.append(gramians.clone()) or begin)
    variations.heard_behind_blocks(teacher, REDConfig(**settings_of(tmp_path, start="fitted", hidden_size=24)), calibration, batches, probes=60)
    assert torch.equal(given[0][-1], heard[-1]), "behind the head there is nothing"

    def shares(gramians):
        return gramians / (gramians * points[:-1]).sum((-2, -1))[:, None, None]

    found = 2 * given[0][:-1] - shares(heard[:-1])
    layer, streams = teacher.model.layers[0], []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    expected = torch.zeros_like(found[1])
    for batch in batches:
        with torch.no_grad():
            teacher(**for_attention({name: value for name, value in batch.items() if name not in ("labels", "token_mask")}, teacher.config), use_cache=False)
        mask = batch["token_mask"].bool() if "token_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
        for x in streams.pop()[mask]:
            z = x * (x.square().mean() + teacher.config.rms_norm_eps).rsqrt()
            jacobian = torch.autograd.functional.jacobian(lambda z: layer.mlp(z * layer.post_attention_layernorm.weight), z).double()
            with torch.no_grad():
                behind = x + layer.mlp(z * layer.post_attention_layernorm.weight)
            expected += jacobian.T @ jacobian / behind.square().mean()
    handle.remove()
    expected = expected / (expected * points[1]).sum()
    assert (found[1] - expected).norm() < 0.1 * expected.norm()
    assert (found[1] - shares(heard[:-1])[1]).norm() > 0.3 * expected.norm(), "and it is something else than what its readers hear"


def test_massive_directions_are_left_out(tiny_teacher, tmp_path, monkeypatch):
    """Told of a massive direction, the usual map keeps it, the varied one does not look for it."""
    teacher, batches = tiny_teacher(), text(2)
    config = REDConfig(**settings_of(tmp_path, start="fitted", hidden_size=24))
    calibration = calibrate_batches(teacher, batches, point_covariance=True)
    calibration.longest = torch.zeros_like(calibration.longest)
    calibration.longest[2, 0, 5] = 1e4
    kept = []
    monkeypatch.setattr("red.starts.explained.massive", lambda context: kept.append(balanced.massive(context)) or kept[-1])
    for make in (variations.usual, variations.without_massive_directions):
        make(teacher, config, calibration, batches)
    assert [part.shape[1] for part in kept] == [1, 0] and abs(float(kept[0][5, 0])) == pytest.approx(1)
    assert calibration.longest.any(), "the caller's is left as it was"


def test_what_is_there_is_put_together_and_nothing_else_is_written(tmp_path):
    """With the study's own lines and no line of its own: the usual rows alone."""
    page = (push.ROOT / "docs/starts.md").read_text()
    push.main(["--no-run", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "push.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["push.json"] and (push.ROOT / "docs/starts.md").read_text() == page
    assert found["sweeps"]["chains 32"]["1"]["seeds"] == 3 and found["sweeps"]["chains 32"]["2"] is None
    usual = found["usual"]["fitted 4"]
    assert usual["seeds"] == 2 and usual["rate"] == 1e-3 and len(usual["tokens_to_90"]) == 2
    entry = {**usual, "kind": "fitted", "part": 4, "grid": [1e-3, 2e-3], "parameters": 5000, "tokens_to_90": [None, 81946]}
    shown = push_tables.trained({**found, "trained": {"Muon": entry}})
    assert "| Muon | 0.001 (edge) | 5k |" in shown and "–, 82k" in shown and "`fitted`, a quarter: as in the study" in shown
    places = {place: {"1": {**found["sweeps"][place]["1"], "seeds": seeds}, "2": None, "3": found["sweeps"][place]["1"]} for place, seeds in (("massive 48", 1), ("massive 64", 3))}
    wide, narrow = push_tables.sweeps(places).splitlines()[2:]
    assert wide.startswith("| massive | 1/2 | 49.1 ± 12.5 | 49.1 ± 12.5 | 0.069 → 0.069 |") and narrow.startswith("| massive | 3/8 | 2.1 (1 seed) | 2.1 ± 0.6 |")
    with pytest.raises(SystemExit):
        push.main(["--smoke"])
