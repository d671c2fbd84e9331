"""Activation checkpointing that recomputes what is cheap: norms, activations, rotary angles, residual sums; not products, attention or taps.

Selective checkpointing of torch (`create_selective_checkpoint_contexts`) keeps the outputs of the operators in KEPT and runs the others of a layer again in its backward. `full` keeps
the layers' inputs and the teacher's tapped outputs only, and pays a second forward. Bytes alive per token and layer after a float32 forward of tests/test_checkpointing.py's model, measured on a CPU:
none 8025, cheap 5394, full 2945; of these 2560, 2560 and 2816 belong to the taps.
"""

from __future__ import annotations

import functools

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from red import families

KINDS = ("none", "cheap", "full")
KEPT = {"aten::mm", "aten::addmm",
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu", "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "red::tap_mse"}


def enable(student: PreTrainedModel, kind: str) -> None:
    """Let the student's layers recompute as `kind` says; "full" is transformers' own and set by its Trainer."""
    if kind == "cheap":
        dropout = getattr(student.config, "attention_dropout", 0.0) > 0  # else nothing draws random numbers
        student._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=dropout, context_fn=_contexts))


def recomputes(student: PreTrainedModel) -> bool:
    """Whether the backward runs layers again."""
    return student.training and any(getattr(layer, "gradient_checkpointing", False) for layer in families.decoder_layers(student))


def keeps_taps(student: PreTrainedModel) -> bool:
    """Whether layers run again without computing their taps again."""
    recompute = getattr(families.decoder_layers(student)[0], "_gradient_checkpointing_func", None)
    return recomputes(student) and getattr(recompute, "keywords", {}).get("context_fn") is _contexts


def _contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
