"""From a trained student to a plain Hugging Face checkpoint that other tools load: written aside, proved in a fresh process, then put in place."""

from __future__ import annotations

import copy
import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from red import families
from red.errors import REDError
from red.files import atomic_write_safetensors, require_empty_output, sync
from red.sharing.licences import carry, terms_of
from red.sharing.preflight import probe, probe_tokenizer, run_preflight

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the preflight found (None where it was not run)."""

    path: Path
    model_type: str
    dtype: str
    tied: bool
    parameters: int  # a tied embedding counts once
    bytes: int  # of all files
    max_abs_logit_difference: float | None  # between the student in memory and the reloaded checkpoint
    generated: list[int] | None  # ids that the reloaded checkpoint generated

    def __str__(self) -> str:
        checked = "not reloaded" if self.generated is None else f"reloaded: largest difference of logits {self.max_abs_logit_difference:.2g}"
        return f"{self.path}: {self.model_type}, {self.parameters:,} parameters, {self.dtype}, {self.bytes / 1e6:.1f} MB; {checked}"


def check_width(config: PreTrainedConfig, hidden_size: int) -> None:
    """Refuse a student's width that cannot be built or is no reduction; before any training.

    Args:
        config: the teacher's.
        hidden_size: the student's `d'`.

    Raises:
        REDError: naming the nearest widths that will do.
    """
    heads, teacher = config.num_attention_heads, config.hidden_size
    widest = (teacher - 1) // heads * heads
    if widest < heads:
        raise REDError(f"The teacher's hidden_size={teacher} has no smaller multiple of num_attention_heads={heads}: it cannot be made narrower.")
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
        raise REDError(f"hidden_size={hidden_size!r} is no width. Give a multiple of num_attention_heads={heads} from {heads} to {widest}, "
                       f"such as {max(heads, teacher // 2 // heads * heads)}.")
    if hidden_size >= teacher:
        raise REDError(f"hidden_size={hidden_size} is not below the teacher's {teacher}: a student is narrower than its teacher. "
                       f"Give a multiple of num_attention_heads={heads}, at most {widest}.")
    if hidden_size % heads:
        below = hidden_size // heads * heads
        near = [width for width in (below, below + heads) if heads <= width <= widest]
        raise REDError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={heads}; "
                       f"the nearest {'are' if len(near) == 2 else 'is'} {' and '.join(map(str, near))}")


def export(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, output_dir: str | Path, *, dtype: torch.dtype | str | None = None,
           verify: bool = True, as_llama: bool = False, teacher: str | Path | None = None) -> ExportReport:
    """Write the student with its tokenizer and generation settings, reload it in a fresh process, and compare.

    Args:
        student: a causal language model of a supported family (`red.families.SUPPORTED`); it is not changed.
        tokenizer: saved beside it; None where there is none.
        output_dir: must be missing or empty. It appears only when everything has succeeded.
        dtype: of the weights, cast once from the student's own; None keeps that.
        verify: False leaves the reloading out.
        as_llama: write a Qwen2 student as a Llama with q/k/v biases and a zero o bias: for engines whose Qwen2 code takes
            hidden_size // heads for the head width and ignores head_dim.
        teacher: its folder or name on the hub: licence and notices are copied from there, and README.md names it (`red.sharing.licences`). None: neither.

    Raises:
        REDError: unusable folder or dtype, weights that are not finite, or a checkpoint that does not reload to the same logits.
    """
    output_dir = require_empty_output(output_dir)
    model = _plain_copy(student, export_dtype(dtype, student.dtype), as_llama)
    aside = output_dir.absolute().parent / f".{output_dir.absolute().name}.{secrets.token_hex(4)}.tmp"
    reference = aside.with_suffix(".safetensors")
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if teacher:
            carry(terms_of(teacher), aside, hidden_size=model.config.hidden_size)
        found = _verify(model, tokenizer, aside, reference) if verify else {}
        size = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
        for file in aside.rglob("*"):
            if file.is_file():
                shutil.copymode(aside / "config.json", file)  # safetensors writes for the owner's eyes only
            sync(file)
        require_empty_output(output_dir)  # the place may have changed meanwhile
        aside.replace(output_dir)  # onto nothing or an empty folder: one rename
        sync(output_dir.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        reference.unlink(missing_ok=True)
    if model.config.model_type == "qwen2" and model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size:
        # seen in vLLM 0.32 and llama.cpp of November 2026: docs/clients
        logger.warning(f"{output_dir} is right in transformers, but some engines take hidden_size // num_attention_heads for a Qwen2's head_dim: vLLM's own Qwen2 "
                       "loads it without a word and computes something else (its --model-impl transformers is right), llama.cpp refuses it. For them "
                       "export it as a Llama: as_llama=True, or red export ... --as_llama.")
    return ExportReport(output_dir, model.config.model_type, str(model.dtype).removeprefix("torch."), families.is_tied(model), model.num_parameters(),
                        size, found.get("max_abs_logit_difference"), found.get("generated"))


def _verify(model: PreTrainedModel, tokenizer, folder: Path, reference: Path) -> dict:
    expected = {"dtype": str(model.dtype), "tied": str(families.is_tied(model))}
    if tokenizer is not None:
        expected["tokenizer"] = json.dumps(probe_tokenizer(tokenizer))
    atomic_write_safetensors(reference, probe(model), metadata=expected)
    found = run_preflight(folder, reference)
    if "error" in found:
        raise REDError(f"The checkpoint was written, and failed its preflight: {found['error']}. Nothing was left at the target; "
                       "the student in memory and the trainer's own checkpoints are untouched.")
    return found


def export_dtype(wanted: torch.dtype | str | None, own: torch.dtype = torch.float32) -> torch.dtype:
    """What `dtype=` of an export means, None being `own`; REDError for what is no dtype of weights."""
    names = ("float32", "bfloat16", "float16", "float64")
    wanted = own if wanted is None else wanted
    dtype = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or dtype not in [getattr(torch, name) for name in names]:
        raise REDError(f"dtype={wanted!r} cannot be exported; use one of {', '.join(names)}.")
    return dtype


def _plain_copy(student: PreTrainedModel, dtype: torch.dtype, as_llama: bool) -> PreTrainedModel:
    """A new model on the CPU of the student's class (or Llama) and dtype: no hooks, no bound forward, a config that tells the truth."""
    families.check_family(student.config)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in student.state_dict().items()}
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise REDError(f"{broken[0]} has values that are not finite in {dtype}{f', and so have {len(broken) - 1} more tensors' if broken[1:] else ''}. "
                       "The training diverged (lower the learning rate), or the dtype's range is too small (use bfloat16 or float32).")
    config = copy.deepcopy(student.config)
    config.head_dim = families.head_dim(config)
    config.tie_word_embeddings = families.is_tied(student)
    config.auto_map = None  # transformers' own class is written, so no remote code may be asked for
    del config.auto_map
    model_class = type(student)
    if as_llama and config.model_type != "llama":
        config, model_class = _llama_config(config), LlamaForCausalLM
        for layer in range(config.num_hidden_layers):
            state[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size, dtype=dtype)
    config.dtype = dtype
    config._attn_implementation = None  # the default, as in the fresh process: the student's own may want a GPU
    with init_empty_weights():  # parameters come from `state`; buffers such as rotary frequencies are computed
        model = model_class(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(student.generation_config)
    return model.eval()


def _llama_config(config: PreTrainedConfig) -> LlamaConfig:
    """Qwen2 is Llama with biases on q, k and v; Llama's `attention_bias` adds one on o, which is zero then."""
    if config.model_type != "qwen2":
        raise REDError(f"as_llama=True: a {config.model_type} model cannot be written as Llama (only Qwen2 can; Qwen3 normalises q and k). Leave it out.")
    if getattr(config, "use_sliding_window", False):
        raise REDError("as_llama=True: this Qwen2 model uses sliding-window attention, which Llama has not. Leave as_llama out.")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
            "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
            "tie_word_embeddings", "rope_parameters", "attention_dropout")
    return LlamaConfig(**{name: getattr(config, name) for name in same}, attention_bias=True, mlp_bias=False)
