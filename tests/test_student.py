"""The student as a model: config, head width, dtype, frozen parts, and what building it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_lrc import random_batch
from tiny_training import NARROW, VARIANTS, make_trainer
from transformers import AutoModelForCausalLM, Qwen2Config

from red import families, starts
from red.errors import REDError
from red.training.projections import Projections
from red.student import build_student, student_config


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_only_the_width_changes(tiny_teacher, variant):
    family, settings = VARIANTS[variant]
    teacher = tiny_teacher(family, rms_norm_eps=3e-5, **settings)
    student = build_student(teacher, NARROW)
    assert type(student) is type(teacher)
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} == {"hidden_size"}
    assert ours["hidden_size"] == NARROW and ours["head_dim"] == 8
    assert student.model.norm.variance_epsilon == 3e-5
    assert student.training == teacher.training and student.dtype == teacher.dtype
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()


@pytest.mark.parametrize("head_dim", [None, 4, 16], ids=["not in the config", "narrow heads", "wide heads"])
def test_head_width_is_the_teachers(head_dim):
    """Qwen2's config leaves head_dim out; and heads times head_dim need not be the hidden size."""
    settings = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    teacher = AutoModelForCausalLM.from_config(Qwen2Config(**settings, **({} if head_dim is None else {"head_dim": head_dim}))).eval()
    assert families.head_dim(teacher.config) == (head_dim or 8)
    student = build_student(teacher, 12)
    assert student.model.layers[0].self_attn.head_dim == (head_dim or 8) and student.config.head_dim == (head_dim or 8)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (4 * (head_dim or 8), 12)
    whole = build_student(teacher, 32)
    Projections(teacher, whole, starts.base.selection(starts.StartContext(teacher, 32), torch.arange(32)))
    ids = random_batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, teacher(ids).logits, rtol=0, atol=1e-6)


def test_building_leaves_generator_and_teacher_alone(tiny_teacher):
    teacher = tiny_teacher("qwen2")
    before, state = copy.deepcopy(teacher.state_dict()), torch.random.get_rng_state()
    student = build_student(teacher, NARROW)
    assert torch.equal(torch.random.get_rng_state(), state)
    Projections(teacher, student, starts.get("random")(starts.StartContext(teacher, NARROW)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.hidden_size == 32 and all(parameter.requires_grad for parameter in teacher.parameters())


def test_student_is_fp32_for_a_bf16_teacher(tiny_teacher, tmp_path):
    """Gradients accumulate in fp32; a bf16 teacher trains without autocast as well."""
    trainer = make_trainer(tiny_teacher(dtype=torch.bfloat16), tmp_path, max_steps=2)
    trainer.train()
    assert trainer.student.dtype == torch.float32 and trainer.teacher.dtype == torch.bfloat16
    assert all(torch.isfinite(value).all() for value in trainer.student.parameters())


def test_a_bias_that_writes_to_the_stream_is_no_frozen_part(tiny_teacher):
    """Even at full width, where its shape is the teacher's; the biases of readers are frozen at any width."""
    for width in (NARROW, 32):
        student = build_student(tiny_teacher(attention_bias=True, mlp_bias=True), width)
        trainable = {name.split(".")[-2] for name, value in student.named_parameters() if name.endswith("bias") and value.requires_grad}
        assert trainable == {"o_proj", "down_proj"}


def test_the_padding_token_learns(tiny_teacher):
    """Where pad is eos, as in many tokenizers, a zero gradient of its embedding would keep eos from being learnt."""
    student = build_student(tiny_teacher(pad_token_id=2), NARROW)
    ids = torch.tensor([[2, 5, 2, 6]])
    student(ids, labels=ids).loss.backward()
    assert student.model.embed_tokens.weight.grad[2].abs().max() > 1e-4


def test_an_unknown_family_is_refused():
    from transformers import GPT2Config

    with pytest.raises(REDError, match="model_type='gpt2' is not supported; supported are llama, mistral, qwen2, qwen3, smollm3"):
        student_config(GPT2Config(), 16)
