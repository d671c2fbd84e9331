"""LoRA adapters of the student, by the `peft` package where it is installed: for models too big to train whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from red.errors import REDError
from red.lori.config import LoRiConfig


def with_adapters(model: PreTrainedModel, args: LoRiConfig) -> PreTrainedModel:
    """The model with LoRA adapters as `args` says, its embedding trained along (it has the new tokens); the model itself where `lora_rank` is 0.

    Raises:
        REDError: `peft` is not installed.
    """
    if not args.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise REDError(f"lora_rank={args.lora_rank} needs the `peft` package. Run: pip install peft; or set lora_rank=0 to train all weights.") from error
    modules = args.lora_target_modules if args.lora_target_modules == "all-linear" else args.lora_target_modules.split(",")
    wrapped = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=modules, task_type="CAUSAL_LM"))
    for table in (wrapped.get_input_embeddings(), wrapped.get_output_embeddings()):
        if table is not None and not hasattr(table, "base_layer"):
            table.weight.requires_grad_(True)
    return wrapped  # pyrefly: ignore[bad-return] - it behaves as one


@contextmanager
def merged(model) -> Iterator[PreTrainedModel]:
    """The plain model with its adapters multiplied in while the context is open; as it was afterwards."""
    if not hasattr(model, "merge_adapter"):
        yield model
        return
    import copy

    yield copy.deepcopy(model).merge_and_unload()
