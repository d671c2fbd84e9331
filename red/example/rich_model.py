"""The rich corpus's teacher before training: its sizes, its tokenizer and the untrained Qwen3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from red.example.rich_corpus import VOCABULARY
from red.example.tokenizer import SPECIAL_TOKENS, build_tokenizer


@dataclass(frozen=True)
class Size:
    """A model, its text and its training. `tokens` counts padding too: steps x rows x `ROW`."""

    level: str
    hidden_size: int
    layers: int
    heads: int  # twice as many as key/value heads
    head_dim: int
    intermediate_size: int
    tokens: int
    rows: int  # of one step
    lr: float  # AdamW's peak
    muon_lr: float


SIZES = {
    "tiny": Size("small", 32, 2, 2, 16, 64, tokens=100_000, rows=4, lr=3e-3, muon_lr=0.02),
    "small": Size("small", 160, 5, 4, 40, 480, tokens=14_000_000, rows=16, lr=3e-3, muon_lr=0.02),
    "full": Size("full", 512, 8, 8, 64, 1536, tokens=250_000_000, rows=256, lr=2e-3, muon_lr=0.02),
}


def build_rich_tokenizer() -> PreTrainedTokenizerFast:
    """`build_tokenizer` with the rich corpus's words; the ids of the words that both have are the same."""
    tokenizer = build_tokenizer()
    ids = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *VOCABULARY])}
    tokenizer.backend_tokenizer.model = models.WordLevel(ids, unk_token="<unk>")
    return tokenizer


def build_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """An untrained teacher of one of `SIZES`, fp32 on the CPU."""
    torch.manual_seed(seed)
    shape = SIZES[size]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        head_dim=shape.head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword] - of every configuration
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:  # the head too: logits of about one half
                weight.normal_(std=0.5 * shape.hidden_size**-0.5)
            elif weight.dim() == 2:  # 1/sqrt(inputs); what writes into the residual stream starts smaller, by its depth
                depth = 2 * shape.layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                weight.normal_(std=(weight.shape[1] * depth) ** -0.5)
    return model
