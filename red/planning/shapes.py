"""The shapes of some well-known teachers, so that they can be planned for, or built with random weights, without their weights or a network.

    config = AutoConfig.for_model(**SHAPES["Llama-3.2-3B"])

Public facts of the models' own config.json files: what decides sizes, times and the rotary embedding; tokens' ids and generation settings are left out.
The instruction-tuned models have the shapes of their base models.
"""

from __future__ import annotations

from typing import Any


def _llama3(factor: float, **sizes: Any) -> dict[str, Any]:
    rope = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_theta=500000.0)
    return dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
                rope_parameters=rope, tie_word_embeddings=False) | sizes


def _qwen(model_type: str, **sizes: Any) -> dict[str, Any]:
    return dict(model_type=model_type, vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
                rope_parameters=dict(rope_type="default", rope_theta=1000000.0), tie_word_embeddings=True) | sizes


def _layers(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int | None = None) -> dict[str, int]:
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads)
    return sizes if kv_heads is None else {**sizes, "num_key_value_heads": kv_heads}


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
                       rope_parameters=dict(rope_type="default", rope_theta=10000.0), **_layers(32, 4096, 11008, 32, 32)),
    "Llama-3.2-1B": _llama3(32.0, **_layers(16, 2048, 8192, 32), head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama3(32.0, **_layers(28, 3072, 8192, 24), tie_word_embeddings=True),
    "Llama-3.1-8B": _llama3(8.0, **_layers(32, 4096, 14336, 32)),
    "Llama-3.1-70B": _llama3(8.0, **_layers(80, 8192, 28672, 64)),
    "Qwen2.5-0.5B": _qwen("qwen2", **_layers(24, 896, 4864, 14, 2)),
    "Qwen2.5-1.5B": _qwen("qwen2", **_layers(28, 1536, 8960, 12, 2)),
    "Qwen2.5-3B": _qwen("qwen2", **_layers(36, 2048, 11008, 16, 2)),
    "Qwen2.5-7B": _qwen("qwen2", **_layers(28, 3584, 18944, 28, 4), vocab_size=152064, tie_word_embeddings=False),
    "Qwen2.5-72B": _qwen("qwen2", **_layers(80, 8192, 29568, 64, 8), vocab_size=152064, tie_word_embeddings=False),
    "Qwen3-0.6B": _qwen("qwen3", **_layers(28, 1024, 3072, 16, 8), head_dim=128, max_position_embeddings=40960),
    "Qwen3-4B": _qwen("qwen3", **_layers(36, 2560, 9728, 32, 8), head_dim=128, max_position_embeddings=40960),
    "Qwen3-8B": _qwen("qwen3", **_layers(36, 4096, 12288, 32, 8), head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False),
    "Qwen3-32B": _qwen("qwen3", **_layers(64, 5120, 25600, 64, 8), head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False),
}


def known_shape(name: str) -> dict[str, Any] | None:
    """The shape of a teacher's name: with or without an organisation and `-Instruct`, in any case; None if it is not in the table, or is a path."""
    if name.startswith((".", "/")) or name.count("/") > 1:
        return None
    wanted = name.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    return next((shape for known, shape in SHAPES.items() if known.lower() == wanted), None)
