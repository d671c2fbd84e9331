"""The forecast of a step's time on a CPU: from a timed layer, near to what a step takes, where a large product's rate alone is far too low."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_tiny_model
from tiny_training import make_trainer, settings_of
from transformers import AutoConfig, TrainerCallback

from red.config import REDConfig
from red.planning import costs, pace
from red.planning.costs import Sizes
from red.planning.shapes import SHAPES

LARGER = dict(hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4, head_dim=16, num_hidden_layers=4)


class Clock(TrainerCallback):
    def __init__(self):
        self.taken: list[float] = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.taken.append(time.perf_counter() - self.began)


def test_a_small_model_takes_about_that_long(tmp_path):
    teacher, clock = build_tiny_model(**LARGER), Clock()
    settings = dict(hidden_size=64, max_length=64, per_device_train_batch_size=2)
    rows = [{"input_ids": torch.randint(3, 64, (16,)).tolist()} for _ in range(96)]
    trainer = make_trainer(teacher, tmp_path, rows, callbacks=[clock], max_steps=10, **settings)
    trainer.train()
    tries = [pace.step_seconds(teacher.config, trainer.args, 64) for _ in range(5)]  # the machine may have other work now and then
    found, floor, how = sorted(tries)[2]
    real = statistics.median(clock.taken[2:])
    assert found / 4 < real < found * 4 and "timed" in how and not floor, (tries, clock.taken)
    flops = costs.flops(Sizes.of(teacher.config), 64, context=64, sharing=128, tap_target="projected").total * 128
    assert flops / pace.measured_rate("cpu") < found / 2, "products alone, at a large one's rate, are next to nothing here"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_every_family_and_nothing_is_drawn(family, tmp_path):
    if family in ("mistral", "smollm3"):
        shape = AutoConfig.for_model(family, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64, pad_token_id=0)
    else:
        shape = build_tiny_model(family).config
    before, was = shape.to_dict(), torch.random.get_rng_state()
    seconds, *_ = pace.step_seconds(shape, REDConfig(**settings_of(tmp_path)), 16)
    assert 0 < seconds < 60 and shape.to_dict() == before and torch.equal(torch.random.get_rng_state(), was)


def test_what_makes_it_longer(tmp_path, monkeypatch):
    """A layer's seconds by hand: 2 rows at once, of the teacher forward, of the student forward and backward."""
    monkeypatch.setattr(pace, "_layer_seconds", lambda config, rows, length, grad, bf16: 3.0 * rows if grad else 1.0 * rows)
    monkeypatch.setattr(pace, "measured_rate", lambda *_, **__: 1e30)
    shape = build_tiny_model(num_hidden_layers=3).config
    for more, seconds in (({}, 3 * (1 + 3) * 2), (dict(gradient_accumulation_steps=5), 5 * 3 * 4 * 2), (dict(checkpointing="full"), 3 * (1 + 3 + 1) * 2)):
        assert pace.step_seconds(shape, REDConfig(**settings_of(tmp_path, **more)), 16)[0] == pytest.approx(seconds), more
    monkeypatch.setattr(pace, "measured_rate", lambda *_, **__: 1.0)
    sizes, outside = Sizes.of(shape), pace.step_seconds(shape, REDConfig(**settings_of(tmp_path)), 16)[0] - 24
    counted = costs.flops(sizes, 16, context=16, sharing=32, tap_target="projected")
    inside = 2 * sizes.layers * sizes.layer + 6 * sizes.layers * sizes.narrowed(16).layer
    assert outside == pytest.approx(32 * (counted.total - counted.attention - inside)), "what is not inside the layers is counted"


def test_large_layers_and_gpus_are_counted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pace, "measured_rate", lambda device, dtype: asked.append(dtype) or 1e12)
    monkeypatch.setattr(pace, "_layer_seconds", lambda *_, **__: pytest.fail("timed"))
    shape = AutoConfig.for_model(**SHAPES["Llama-3.2-1B"])
    flops = 2 * 64 * costs.flops(Sizes.of(shape), 1024, context=64, sharing=128, tap_target="projected").total
    seconds, floor, how = pace.step_seconds(shape, REDConfig(**settings_of(tmp_path, hidden_size=1024)), 64)
    assert seconds == pytest.approx(flops / 1e12) and floor and "products alone" in how
    gpu = SimpleNamespace(device=torch.device("cuda"), bf16=True, hidden_size=1024, per_device_train_batch_size=2, gradient_accumulation_steps=1, checkpointing="none")
    seconds, floor, how = pace.step_seconds(shape, gpu, 64)
    assert not floor
    assert seconds == pytest.approx(flops / 1e12 / 0.4) and "40% (assumed)" in how and asked == [torch.float32, torch.bfloat16]
