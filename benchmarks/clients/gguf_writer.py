"""A small converter of a Llama or Qwen2 checkpoint to GGUF, with the `gguf` package: enough to show that a student loads in llama.cpp.

For models with a byte-pair or sentencepiece tokenizer use llama.cpp's own convert_hf_to_gguf.py, which writes the same fields; it cannot be had from
the package index, and it knows no tokenizer of whole words, which the embedded example has. Here the words become a vocabulary that is
matched greedily with the blank in front of each word ("rwkv" in llama.cpp): text of known words then gets the same ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(folder: Path, output: Path) -> None:
    """fp32 weights, config and vocabulary of the checkpoint in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    kind, heads, head_dim = config["model_type"], config["num_attention_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(output, kind)
    writer.add_name("student")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)  # a student's is not hidden_size // heads
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, folder, config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        values = tensor.float()
        if module in OUTER:
            target = OUTER[module]
        else:
            _, _, layer, inner = module.split(".", 3)
            target = f"blk.{layer}.{NAMES[inner]}"
            if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                values = _interleaved(values, heads if inner.endswith("q_proj") else config["num_key_value_heads"])
        writer.add_tensor(f"{target}.{part}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbouring channels of a Llama's q and k, transformers channel i and i + head_dim / 2: rows (and biases) change places."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    words, special = tokenizer.convert_ids_to_tokens(range(config["vocab_size"])), set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([word if word in special else f" {word}" for word in words])
    writer.add_token_types(np.array([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words], dtype=np.int32).tolist())
    for role in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{role}_token_id")(getattr(tokenizer, f"{role}_token_id"))
    writer.add_add_bos_token(True)
