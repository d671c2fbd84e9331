"""A random teacher with the example's tokenizer, in a folder: for tests that go through files and processes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from red.example.tokenizer import build_tokenizer


def save_tiny_teacher(path: Path) -> str:
    """Write it (width 32, 2 layers) and return the folder."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
