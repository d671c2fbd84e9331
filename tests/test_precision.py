"""Narrow weights and wide sums: split products against float64, and gradients of a bfloat16 student accumulated in float32."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import random_batch
from tiny_training import make_trainer, masters, settings_of
from torch import Tensor

from red.config import REDConfig
from red.errors import REDError
from red.training.precision import product, split_product


def error(found: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error of an entry, relative to Σ |a| |b| there."""
    a, b = a.double(), b.double()
    return float(((found.double() - a @ b).abs() / (a.abs() @ b.abs())).max())


@pytest.mark.parametrize("first", [True, False], ids=["weight first", "weight second"])
def test_split_product_against_float64(first):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(67, 129, generator=generator).bfloat16()
    x = torch.randn(129, 41, generator=generator) * torch.logspace(-6, 6, 41)
    weight, x = (weight, x) if first else (weight.T, x.T)
    a, b = (weight, x) if first else (x, weight)
    found = split_product(a, b)
    assert found.dtype == torch.float32 and error(found, a, b) < 2**-17
    rounded = split_product(*((a, b.bfloat16().float()) if first else (a.bfloat16().float(), b)))
    assert error(rounded, a, b) > 2**-13, "one bfloat16 product would miss the bound"


def test_product_takes_the_wider_dtype():
    a, b = torch.randn(5, 7), torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(product(a, b), a.double() @ b) and torch.equal(product(b.T, a.T.bfloat16()), b.T @ a.T.bfloat16().double())


def one_step(teacher, folder, **settings):
    trainer = make_trainer(teacher, folder, max_steps=2, gradient_accumulation_steps=3, **settings)
    trainer.train()
    return masters(trainer)


def test_steps_through_split_products(tiny_teacher, tmp_path, monkeypatch):
    """A bfloat16 teacher, as on a GPU: both products of a step split, against true float32 products."""
    teacher, calls = tiny_teacher(attention_bias=True, mlp_bias=True, dtype=torch.bfloat16), []
    expected = one_step(teacher, tmp_path / "plain", start="random", adam_epsilon=1e-3)

    def split(a, b):
        calls.append({a.dtype, b.dtype})
        return split_product(a, b)

    monkeypatch.setattr("red.training.projections.product", split)
    for name, value in one_step(teacher, tmp_path / "split", start="random", adam_epsilon=1e-3).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)
    assert len(calls) == 16 * 5 and all(found == {torch.bfloat16, torch.float32} for found in calls)  # the start, and 2 steps there and back


MICRO_BATCHES = 24


def gradients(trainer, *, accumulate: bool) -> dict[str, list[Tensor]]:
    """The student's gradients of many micro-batches: summed by autograd, or one by one."""
    trainer.student.train()
    found = {}
    for seed in range(MICRO_BATCHES):
        trainer.compute_loss(trainer.student, random_batch(2, 16, seed=seed)).backward()
        if not accumulate or seed == MICRO_BATCHES - 1:
            for name, weight in trainer.student.named_parameters():
                if weight.grad is not None:
                    found.setdefault(name, []).append(weight.grad)
                    weight.grad = None
    return found


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_bf16_student_accumulates_in_float32(tiny_teacher, tmp_path, family):
    """Against the float64 sum of the micro-batches' own gradients; a bfloat16 sum of the same misses by a hundred times."""
    teacher = tiny_teacher(family, **({"attention_bias": True} if family == "llama" else {"tied": True}))
    trainer = make_trainer(teacher, tmp_path, student_dtype="bfloat16", start="random")
    assert trainer.student.dtype == torch.bfloat16 and {master.dtype for master in trainer.projections.parameters()} == {torch.float32}
    single, summed = gradients(trainer, accumulate=False), gradients(trainer, accumulate=True)
    trained = [factor.name for factor in trainer.projections] + [name for name in summed if name.endswith("o_proj.bias")]
    assert set(trained) == set(summed)
    for name, parts in single.items():
        truth = torch.stack(parts).double().sum(0)
        narrow = torch.zeros_like(truth, dtype=torch.bfloat16)
        for part in parts:
            narrow += part.bfloat16()
        (wide,) = summed[name]
        misses = [float((value.double() - truth).norm() / truth.norm()) for value in (wide, narrow)]
        assert wide.dtype == torch.float32 and misses[0] < 2e-6 < 1e-3 < misses[1], (name, misses)


def test_a_bf16_student_trains_as_the_float32_one(tiny_teacher, tmp_path):
    """To bfloat16's rounding of weights and activations; masters and moments stay float32, and so does what a checkpoint holds."""
    settings = dict(start="random", max_steps=12, learning_rate=3e-3, logging_steps=6, gradient_accumulation_steps=2)
    logs = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(tiny_teacher(), tmp_path / dtype, student_dtype=dtype, **settings)
        before = masters(trainer)
        trainer.train()
        assert str(trainer.student.dtype) == f"torch.{dtype}"
        assert all(value.dtype == torch.float32 and not torch.equal(value, before[name]) for name, value in masters(trainer).items())
        logs.append([entry[key] for entry in trainer.state.log_history for key in ("loss", "kl", "tap_mse") if "kl" in entry])
    assert logs[1] == pytest.approx(logs[0], rel=0.02) and logs[1] != logs[0]


def test_auto_is_float32_without_a_gpu(tiny_teacher, tmp_path):
    assert make_trainer(tiny_teacher(dtype=torch.bfloat16), tmp_path).student.dtype == torch.float32
    assert make_trainer(tiny_teacher(dtype=torch.float64), tmp_path).student.dtype == torch.float64


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(REDError, match="student_dtype='float16': use auto, float32 or bfloat16"):
        REDConfig(**settings_of(tmp_path, student_dtype="float16"))
    monkeypatch.setattr(REDConfig, "world_size", property(lambda self: 2))
    assert REDConfig(**settings_of(tmp_path)).student_dtype == "auto"
    with pytest.raises(REDError, match="data parallel"):
        REDConfig(**settings_of(tmp_path, student_dtype="bfloat16"))
