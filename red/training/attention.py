"""Attention over packed rows without a mask: torch's variable-length FlashAttention, given where the documents begin.

sdpa keeps the documents of a row apart by a mask `[B, 1, T, T]`, which costs memory and rules out its fast kernels. `torch.nn.attention.varlen.varlen_attn` (torch 2.10 or
newer, a GPU, bfloat16 or float16) takes the documents of a batch as one list of tokens and the places where they begin. The collator finds those on the CPU; as a tensor of one shape
for most batches, so that no kernel launch waits for a count.

`packed` switches both models to it for the length of a training step, backward included, because activation checkpointing runs layers again there. Outside of it
the models' own attention is untouched: they generate, evaluate and export as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from red.config import REDConfig
from red.errors import REDError
from red.families import head_dim

try:
    from torch.nn.attention.varlen import varlen_attn as kernel
except ImportError:  # before torch 2.10
    kernel = None

VARLEN = "red_varlen"
STARTS = "document_starts"
GRAIN = 16  # documents of a row come in multiples of this, so that batches rarely differ in shape


def choose(config: REDConfig, teacher: PreTrainedModel) -> str | None:
    """The attention of a training step: VARLEN, or None for the models' own.

    Raises:
        REDError: packed_attention=varlen where it cannot be.
    """
    if config.packed_attention == "model":
        return None
    found = obstacle(config, teacher.config)
    if found and config.packed_attention == "varlen":
        raise REDError(f"packed_attention='varlen': {found}. Use packed_attention=auto, which takes the model's own attention there.")
    own = teacher.config._attn_implementation
    return None if found or (config.packed_attention == "auto" and own != "sdpa") else VARLEN


def obstacle(config: REDConfig, model: PreTrainedConfig) -> str | None:
    """Why variable-length attention cannot be used; None if it can."""
    if kernel is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; it came with 2.10"
    if config.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {config.device.type}"
    if not config.bf16:
        return "it needs bf16=True"
    if head_dim(model) % 8 or head_dim(model) > 256:
        return f"head_dim={head_dim(model)} must be a multiple of 8 up to 256"
    if getattr(model, "attention_dropout", 0.0):
        return f"the model has attention_dropout={model.attention_dropout}"
    return None


@contextmanager
def packed(implementation: str | None, *models: PreTrainedModel) -> Iterator[None]:
    """The models with this attention inside, their own again after; None changes nothing."""
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models if implementation else ():
            model.config._attn_implementation = implementation
        yield
    finally:
        for model, own in zip(models, before, strict=True):
            model.config._attn_implementation = own


def collate_with_starts(collate: Callable[[Sequence[dict]], dict[str, Tensor]]) -> Callable[[Sequence[dict]], dict[str, Tensor]]:
    """The collator, adding `document_starts` to its batches."""
    def collated(rows: Sequence[dict]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {**batch, STARTS: document_starts(batch["position_ids"])}
    return collated


def document_starts(position_ids: Tensor) -> Tensor:
    """position_ids [B, T] -> where each document of a row begins, [B, K] int32, ascending, filled up with T; K is a multiple of GRAIN."""
    length = position_ids.shape[1]
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    number = begins.cumsum(1) - 1
    width = GRAIN * -(-(int(number[:, -1].max()) + 1) // GRAIN)
    starts = torch.full((len(position_ids), width), length, dtype=torch.int32, device=position_ids.device)
    rows, places = begins.nonzero(as_tuple=True)
    starts[rows, number[rows, places]] = places.int()
    return starts


def arguments(batch: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor | int]:
    """What a model with VARLEN or FlashAttention takes beside ids and positions, in transformers' names; nothing for other attentions.

    A filling start T is the first token of the next row: a document without tokens. Nothing here waits for a GPU if the batch has `document_starts`.
    """
    implementation = config._attn_implementation or ""
    if implementation != VARLEN and "flash" not in implementation:
        return {}
    batch_size, length = batch["position_ids"].shape
    starts = batch[STARTS] if STARTS in batch else document_starts(batch["position_ids"])
    rows = torch.arange(batch_size, dtype=torch.int32, device=starts.device)[:, None] * length
    ends = torch.full((1,), batch_size * length, dtype=torch.int32, device=starts.device)
    bounds = torch.cat([(starts + rows).flatten(), ends])
    return dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=length, max_length_k=length)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,  # [B, Hkv, T, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [documents + 1] int32
    max_length_q: int | None = None,
    **_,
) -> tuple[Tensor, None]:  # [B, T, H, D]
    """Causal attention within each document, as transformers calls it; a sliding window sees the last `sliding_window` tokens, its own included."""
    if cu_seq_lens_q is None:
        raise REDError(f"{VARLEN} attention was called without the documents' bounds. Call the model outside of the training step, with its own attention.")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    batch_size, length = query.shape[0], query.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    options = {"enable_gqa": True} if TAKES_GQA else {}  # torch before 2.12 shares heads without being told
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    found = kernel(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, **options)
    return found.unflatten(0, (batch_size, length)), None


TAKES_GQA = kernel is not None and "enable_gqa" in inspect.signature(kernel).parameters
AttentionInterface.register(VARLEN, varlen_attention)  # and no mask function: transformers then makes no mask and looks at no position
