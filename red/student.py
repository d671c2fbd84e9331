"""The student: the teacher's own Hugging Face class with a smaller `hidden_size` and an explicit `head_dim`."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from red import families


def student_config(config: PreTrainedConfig, hidden_size: int) -> PreTrainedConfig:
    """The teacher's config at width `hidden_size`; heads, head_dim, FFN width, depth, eps and rope stay the teacher's."""
    families.check_family(config)
    narrow = copy.deepcopy(config)
    narrow.head_dim = families.head_dim(config)  # else it would be derived from the new width
    narrow.hidden_size = hidden_size
    return narrow


def build_student(teacher: PreTrainedModel, hidden_size: int, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """An untrained student of plain parameters on the teacher's device; its projections fill in the weights.

    What has no side on the residual stream (biases of readers, q/k norms) is the teacher's and frozen.

    Args:
        teacher: a causal language model of a supported family (`red.families.SUPPORTED`).
        hidden_size: the student's width `d'`.
        dtype: dtype of the student's parameters; the teacher's if None.
    """
    device, dtype = teacher.device, dtype or teacher.dtype
    config = student_config(teacher.config, hidden_size)
    with torch.random.fork_rng(devices=[]):  # the throw-away initialisation must not move the caller's generator
        student = type(teacher)(config).to(device=device, dtype=dtype)  # pyrefly: ignore[missing-argument]
    # torch keeps the gradient of `padding_idx` at zero; where pad is eos, as in many tokenizers, eos would never learn
    student.get_input_embeddings().padding_idx = None
    student.generation_config = copy.deepcopy(teacher.generation_config)
    _share_small_tensors(teacher, student)
    return student.train(teacher.training)


@torch.no_grad()
def _share_small_tensors(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copy and freeze every parameter that the residual width does not touch."""
    source = dict(teacher.named_parameters())
    stream_norms = {f"{path}.weight" for path in families.norm_paths(teacher.config)}
    for name, parameter in student.named_parameters():
        if parameter.dim() == 1 and name not in stream_norms and parameter.shape == source[name].shape and not _writes_bias(name):
            parameter.copy_(source[name])
            parameter.requires_grad_(False)


def _writes_bias(name: str) -> bool:
    """A writer's bias adds to the stream, so its projection narrows it with the weight."""
    return name.endswith(tuple(f"{module}.bias" for module in families.WRITERS.values()))
