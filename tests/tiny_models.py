"""The models and the tokenizer of the tests: tiny, random, of every supported family. No network, fixed seeds."""

from __future__ import annotations

import torch

FAMILIES = ("llama", "qwen2", "qwen3")  # that every test of a family runs; tests/test_families.py has all, in their variants
VOCAB = 64


def build_tiny_model(family: str = "llama", *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random model of `family`: vocabulary 64, hidden 32, 2 layers, 4 heads of 8, 2 kv heads, FFN 48, in eval mode.

    Biases and norm gains are random too: zeros and ones would hide a mistake in how they are carried over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=tied,
                    bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="sdpa")
    settings |= overrides
    if settings["head_dim"] is None:  # configs of many families leave it out
        del settings["head_dim"]
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:  # the default 0.02 makes logits so small that a wrong model looks right
                    parameter.normal_(0, 0.15)
    return model.to(dtype).eval()


def build_tiny_tokenizer():
    """A word-level PreTrainedTokenizerFast of 64 words: <pad> 0, <bos> 1, <eos> 2, <unk> 3, w4 … w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{index}" for index in range(4, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", model_max_length=256)
