"""The teacher in float8, emulated: products against float64, only within a step, and what it changes on an embedded teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_training import make_trainer, tokenised
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from red.training import float8
from red.errors import REDError
from red.example import documents, teacher_path, tokenized


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_against_float64(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40, bias=bias), torch.randn(3, 17, 96) * torch.logspace(-4, 3, 17)[:, None]
    x[1, 5] = 0  # a row without a scale
    rounded = []
    for value in (x.detach().double().flatten(0, 1), layer.weight.detach().double()):  # by hand: 3 bits behind the point, from 2^-6 on; below, steps of 2^-9
        scale = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        exponent = (value / scale).abs().clamp(min=2.0**-6).log2().floor()
        step = torch.exp2(exponent - 3)
        rounded.append(((value / scale) / step).round() * step * scale)
    expected = rounded[0] @ rounded[1].T + (layer.bias.detach().double() if bias else 0)
    exact = layer.weight.detach().double()
    layer.__class__ = float8.Float8Linear
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (3, 17, 40) and found.dtype == torch.float32
    bound = x.double().abs() @ exact.abs().T
    error = (found.double() - expected.view_as(found)).abs()
    assert float((error / (bound + 1e-9)).max()) < 1e-3, "but for ties that float32's quotient rounds another way"
    error = (found.double() - (x.double() @ exact.T + (layer.bias.double() if bias else 0))).norm() / bound.norm()
    assert 1e-4 < float(error.detach()) < 0.02


def test_only_within_a_step(tiny_teacher, tmp_path):
    """Losses of the steps differ a little from plain ones, evaluations with the same masters do not, and the teacher is what it was."""
    teacher = tiny_teacher(attention_bias=True)
    kinds = [type(module) for module in teacher.modules()]
    found = []
    for on in (False, True):
        trainer = make_trainer(teacher, tmp_path / str(on), eval_data=tokenised(4, seed=3), teacher_fp8=on, max_steps=1)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        found.append((before, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)))
        assert [type(module) for module in teacher.modules()] == kinds
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1] == pytest.approx(found[0][1], rel=0.02)


def test_refused(tiny_teacher, monkeypatch):
    cuda = torch.device("cuda")
    float8.check(tiny_teacher(), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(REDError, match=r"compute capability 9.0 or newer, and this one has \(8, 0\)"):
        float8.check(tiny_teacher(), cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(REDError, match="this one is torch.float32"):
        float8.check(tiny_teacher(), cuda)
    with pytest.raises(REDError, match=r"q_proj is \[24, 32\]"):
        float8.check(tiny_teacher(head_dim=6, dtype=torch.bfloat16), cuda)
    float8.check(tiny_teacher(dtype=torch.bfloat16), cuda)


def test_what_it_changes_on_an_embedded_teacher(tmp_path, capsys):
    """KL(teacher ‖ teacher in float8) beside that in bfloat16, on its own text, and the parts of the loss over some steps; printed. Small teachers are sensitive."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32).eval()
    data = tokenized(documents(0), AutoTokenizer.from_pretrained(teacher_path()), 3000)
    ids = torch.tensor([token for row in data for token in row["input_ids"]])[:2048].view(16, 128)

    @torch.no_grad()
    def log_p(model):
        return log_softmax(model(ids).logits.double(), -1)

    plain, bf16 = log_p(teacher), log_p(copy.deepcopy(teacher).bfloat16())
    with float8.layers(teacher):
        narrow = log_p(teacher)
    divergences = [float(kl_div(found, plain, log_target=True, reduction="sum") / ids.numel()) for found in (bf16, narrow)]
    parts = []
    for on in (False, True):
        trainer = make_trainer(teacher, tmp_path / str(on), data, hidden_size=64, max_length=128, per_device_train_batch_size=4, logging_steps=4, learning_rate=1e-3,
                               teacher_fp8=on)
        trainer.train()
        parts.append([trainer.state.log_history[0][key] for key in ("loss", "ce", "kl", "tap_mse")])
    with capsys.disabled():
        print(f"\nKL from float32, nats a token: bfloat16 {divergences[0]:.4f}, float8 {divergences[1]:.4f}; loss, ce, kl, tap_mse {parts[0]} -> {parts[1]}")
    assert divergences[0] < divergences[1] < 0.3
    assert parts[1] == pytest.approx(parts[0], rel=0.1) and parts[1] != parts[0]
