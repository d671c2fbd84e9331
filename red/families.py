"""Which modules of a Hugging Face decoder read the residual stream, which write to it, and where its norms are.

A *reader* (`q`, `k`, `v`, `gate`, `up`, the head) multiplies the normalised stream: its weight `[out, d]` is narrowed on the input side.
A *writer* (`o`, `down`, the embedding) adds to the stream: its weight is narrowed on the side of the stream.
Everything else (biases of readers, q/k norms, rotary embeddings) lives at widths that the student shares with its teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from red.errors import REDError

# Llama 2 and 3 are llama, Qwen2.5 is qwen2. Rotary scaling, layers without rotary angles and sliding windows are in the config, which the student shares.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_OUTPUT_NORMS = "each block's output passes a norm of its own before it reaches the residual stream"
_FUSED = "q, k and v, and gate and up, are one weight each; split them and save the model as Llama, where its rotary scaling allows"
REFUSED = {"gemma": "the embedding is scaled and the gains are 1 + weight", "gemma2": _OUTPUT_NORMS, "gemma3": _OUTPUT_NORMS, "gemma3_text": _OUTPUT_NORMS,
           "olmo2": _OUTPUT_NORMS, "olmo3": _OUTPUT_NORMS, "glm4": _OUTPUT_NORMS, "phi3": _FUSED}

# The seven taps of a layer, in the order of the data's way through it.
READERS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
WRITERS = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
TAPS = ("q", "k", "v", "o", "gate", "up", "down")
NORM_OF = {"q": "input_layernorm", "k": "input_layernorm", "v": "input_layernorm",
           "gate": "post_attention_layernorm", "up": "post_attention_layernorm"}


@dataclass(frozen=True)
class Tap:
    """One linear module of one layer: `name` is a key of READERS or WRITERS, `path` its place in the model."""

    layer: int
    name: str
    path: str

    @property
    def writes(self) -> bool:
        return self.name in WRITERS


def check_family(config: PreTrainedConfig) -> None:
    """Raise REDError unless the architecture is one whose modules this table describes."""
    if config.model_type in SUPPORTED:
        return
    experts = next((count for name in EXPERTS if (count := getattr(config, name, None))), None)
    if experts:
        why = f"A feed-forward network of {experts} experts is no gate, up and down. Take a dense teacher."
    elif config.model_type in REFUSED:
        why = f"In it {REFUSED[config.model_type]}. Take a teacher of a supported family."
    else:
        why = "Convert the teacher to one of these, or describe its modules in red/families.py."
    raise REDError(f"model_type={config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}. {why}")


def teacher_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The config of a supported teacher on the hub or in a folder; REDError if there is none, or its family is not supported."""
    looks_like_path = Path(name_or_path).is_absolute() or str(name_or_path).startswith(".")
    if looks_like_path and not Path(name_or_path).is_dir():
        raise REDError(f"The teacher folder {name_or_path} does not exist. Give a folder with config.json and safetensors, or a name on the hub.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # a damaged config comes as errors of a dozen kinds
        raise REDError(f"Cannot read the teacher {str(name_or_path)!r}: {error}{run_folder(name_or_path)}") from error
    check_family(config)
    return config


def run_folder(name_or_path: str | Path) -> str:
    """For a message about a folder that is no model: a run's folder has its model in student/."""
    student = Path(name_or_path) / "student"
    return f" It is a run's folder; did you mean {str(student)!r}?" if (student / "config.json").is_file() else ""


def taps(config: PreTrainedConfig) -> list[Tap]:
    """The `7 L` tapped linear modules, layer by layer."""
    modules = {**READERS, **WRITERS}
    return [Tap(layer, name, f"model.layers.{layer}.{modules[name]}")
            for layer in range(config.num_hidden_layers) for name in TAPS]


def norm_paths(config: PreTrainedConfig) -> list[str]:
    """The `2 L + 1` RMSNorms of the residual stream, in reading order; the last one feeds the head."""
    paths = [f"model.layers.{layer}.{norm}" for layer in range(config.num_hidden_layers)
             for norm in ("input_layernorm", "post_attention_layernorm")]
    return [*paths, "model.norm"]


def norm_path_of(tap: Tap) -> str:
    """The norm whose output a reader multiplies."""
    return f"model.layers.{tap.layer}.{NORM_OF[tap.name]}"


def head_dim(config: PreTrainedConfig) -> int:
    """`head_dim`, which Qwen2's config leaves out unless it was given."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head share one parameter."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers
