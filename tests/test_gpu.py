"""The same code on a GPU: ops, calibration, one objective and whole runs against the CPU's. Skipped where no GPU is."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_tiny_tokenizer
from reference_lrc import random_batch
from test_distill import quick, texts
from tiny_training import make_trainer, settings_of

import red
from red.calibration import calibrate_batches
from red.config import REDConfig
from red_kernels import channel_stats, erank, gather, linear_kd, tap_mse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().cpu().double() - truth.detach().cpu().double()).norm() / truth.detach().cpu().double().norm())


def test_ops_equal_the_cpu_in_float64():
    """fp32 on the GPU against float64 on the CPU, gradients included; TF32 is off by default and would miss these bounds."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, segments = draw(3, 41, 67), torch.randint(-1, 5, (3, 41), generator=generator)
    assert relative(channel_stats(x.float().cuda(), segments.cuda(), 5).abs_sum, channel_stats(x, segments, 5).abs_sum) < 1e-6
    index = torch.randperm(67, generator=generator)[:20]
    assert torch.equal(gather(x.float().cuda(), index.cuda()).cpu(), gather(x.float(), index))
    assert relative(erank(x.float().cuda()), erank(x)) < 1e-5

    def objective(device, dtype):
        hidden, head, wide, wide_head = (value.to(device, dtype, copy=True) for value in (kd["h"], kd["w"], kd["ht"], kd["wt"]))
        hidden.requires_grad_(), head.requires_grad_()
        found = linear_kd(hidden, head, wide, wide_head, kd["labels"].to(device), temperature=2.0, chunk_size=16)
        found.loss.backward()
        student = kd["h"].to(device, dtype, copy=True).requires_grad_()
        mse = tap_mse(student, kd["ht"].to(device, dtype), kd["mask"].to(device), index=kd["index"].to(device))
        mse.backward()
        return [found.loss, hidden.grad, head.grad, mse, student.grad]

    kd = {"h": draw(50, 24), "w": draw(97, 24), "ht": draw(50, 40), "wt": draw(97, 40), "labels": torch.randint(0, 97, (50,), generator=generator),
          "mask": torch.rand(50, generator=generator) > 0.3, "index": torch.arange(24) + 7}
    kd["labels"][::7] = -100
    for ours, truth in zip(objective("cuda", torch.float32), objective("cpu", torch.float64), strict=True):
        assert relative(ours, truth) < 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_calibration_equals_the_cpu(tiny_teacher, family):
    found = calibrate_batches(tiny_teacher(family).cuda(), [random_batch()], covariance=True)
    truth = calibrate_batches(tiny_teacher(family), [random_batch()], covariance=True)
    for name in ("scores", "mean_square", "tap_square", "covariance"):
        assert getattr(found, name).device.type == "cpu" and relative(getattr(found, name), getattr(truth, name)) < 1e-5, name


@pytest.mark.parametrize("start", ["fitted", "balanced"])
@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_a_fit_equals_the_cpu(tiny_teacher, tmp_path, family, tied, start):
    """Calibration, shared map and fit in float64 on both devices, to the norms' own fp32: the same student."""
    logits, batches, ids = [], [random_batch(8, 24, seed=seed) for seed in range(2)], torch.randint(3, 64, (4, 12))
    for device in ("cuda", "cpu"):
        teacher = tiny_teacher(family, tied=tied, dtype=torch.float64).to(device)
        config = REDConfig(**settings_of(tmp_path, start=start, start_fit="full", use_cpu=device == "cpu"))
        calibration = calibrate_batches(teacher, batches, point_covariance=True)
        projections = red.start_projections(teacher, config, calibration, batches, tmp_path / device)
        assert projections.student.device.type == device and (tmp_path / device / "start.safetensors").is_file()
        with torch.no_grad():
            logits.append(projections.student.eval()(ids.to(device)).logits)
    assert relative(*logits) < 1e-3


def test_a_fit_of_a_bf16_teacher(tiny_teacher, tmp_path):
    """As teacher_dtype=auto loads it: near the fit of the same weights in fp32 on the CPU."""
    batches, found = [random_batch(8, 24, seed=seed) for seed in range(4)], []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        teacher = tiny_teacher(dtype=torch.bfloat16).to(device, dtype)
        config = REDConfig(**settings_of(tmp_path, start="balanced", start_fit="full", use_cpu=device == "cpu"))
        student = red.start_projections(teacher, config, calibrate_batches(teacher, batches, covariance=True), batches).student.eval()
        with torch.no_grad():
            found.append(student(batches[0]["input_ids"].to(device)).logits)
    assert found[0].dtype == torch.float32 and relative(*found) < 0.03


@pytest.mark.parametrize("settings", [{}, {"start": "pca"}, {"start": "random", "lrc_faithful": True}], ids=["activation", "pca", "lrc"])
def test_a_step_equals_the_cpu(tiny_teacher, tmp_path, settings):
    """Loss and pulled-back gradients of one batch, fp32 on both."""
    results = []
    for place, use_cpu in (("gpu", False), ("cpu", True)):
        trainer = make_trainer(tiny_teacher(), tmp_path / place, use_cpu=use_cpu, **settings)
        batch = {key: value.to(trainer.args.device) for key, value in random_batch().items()}
        trainer.student.train()
        loss = trainer.compute_loss(trainer.student, batch)
        loss.backward()
        trainer.projections.pull_back()
        results.append([loss, *(master.grad for master in trainer.projections.parameters())])
        assert loss.device.type == ("cpu" if use_cpu else "cuda")
    for ours, truth in zip(*results, strict=True):
        assert relative(ours, truth) < 1e-3


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"start": "pca"}, {"start": "random", "lrc_faithful": True}], ids=["activation", "pca", "lrc"])
def test_distill_with_a_bf16_teacher(tiny_teacher, tmp_path, settings, bf16):
    """teacher_dtype=auto is bf16 on a GPU; the student's parameters are bf16 where the training computes in it, tied ones tied, and the exported student loads."""
    folder = tmp_path / "teacher"
    tiny_teacher("llama", tied=True).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    result = red.distill(str(folder), texts(), **{**quick(tmp_path / "run"), "use_cpu": False, "bf16": bf16, **settings})
    assert result.trainer.teacher.dtype == torch.bfloat16 and result.student.device.type == "cuda"
    assert result.student.dtype == (torch.bfloat16 if bf16 else torch.float32) and result.trainer.attention == ("red_varlen" if bf16 else None)
    assert 0 < result.metrics["train_loss"] < float("inf") and (result.path / "model.safetensors").is_file()
