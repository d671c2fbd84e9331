"""The options of a training step on a GPU: each trains as the plain step does, split products, and no wait. Skipped where no GPU is."""

from __future__ import annotations

import pytest
import torch
from tiny_training import REDTrainer, make_trainer
from transformers import TrainerCallback

from red.training.precision import product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_split_products_equal_float64():
    """Two bf16 products with float32 accumulation, both orders, and the same with the weight transposed, as pull-back multiplies."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(300, 520, generator=generator).bfloat16().cuda(), torch.randn(520, 136, generator=generator).cuda()
    for a, b in ((weight, x), (x.T, weight.T), (weight.T, torch.randn(300, 64, generator=generator).cuda())):
        bound = a.double().abs() @ b.double().abs()
        assert float(((product(a, b).double() - a.double() @ b.double()).abs() / bound).max()) < 2**-16


def logs_of(teacher, folder, **settings):
    trainer = make_trainer(teacher, folder, use_cpu=False, bf16=True, max_steps=6, gradient_accumulation_steps=2, learning_rate=1e-3, **settings)
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "kl", "tap_mse") if "kl" in entry]


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "cheap"}, {"checkpointing": "full"}, {"compile_layers": True}, {"packed_attention": "model"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_step_option_trains_alike(tiny_teacher, tmp_path, family, settings):
    """bf16 teacher and student on the GPU, each option against float32 weights under autocast with the models' own attention."""
    teacher = tiny_teacher(family, dtype=torch.bfloat16)
    plain = logs_of(teacher, tmp_path / "plain", student_dtype="float32", packed_attention="model")
    assert logs_of(teacher, tmp_path / "option", **settings) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "cheap"}, {"start": "random", "tap_target": "projected"}], ids=str)
def test_a_step_does_not_wait_for_the_gpu(tiny_teacher, tmp_path, settings):
    """torch raises where the host would synchronise; the first steps tune kernels and bring constants over. Once a step the guard reads its flags, and may."""
    class Guarded(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if state.global_step >= 2 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(tiny_teacher(dtype=torch.bfloat16), tmp_path, use_cpu=False, bf16=True, trainer_class=REDTrainer, max_steps=5, logging_steps=100,
                           gradient_accumulation_steps=2, callbacks=[Guarded()], **settings)
    read, reads = trainer.guard.on_pre_optimizer_step, []

    def reading(*args, **kwargs):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        reads.append(read(*args, **kwargs))
        torch.cuda.set_sync_debug_mode(mode)

    trainer.guard.on_pre_optimizer_step = reading
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 5 == len(reads)
