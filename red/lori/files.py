"""A latent model on disk: a plain Hugging Face folder (model and tokenizer), and beside it lori.json and lori.safetensors (the projection).

    model, tokenizer, facts = red.lori.load("run/student")

Other tools read the folder as an ordinary causal language model; only the latent steps need red.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from red.errors import REDError
from red.files import atomic_write_json, atomic_write_safetensors, require_existing
from red.sharing.licences import carry, terms_of
from red.lori.data import BOT, EOT, TARGETS
from red.lori.model import LatentModel

FACTS, WEIGHTS = "lori.json", "lori.safetensors"


@dataclass(frozen=True)
class Facts:
    """How a model is asked: what `lori.json` holds."""

    target: str  # latent, explicit or none
    latent_steps: int
    projection: bool
    answer_prefix: str
    preset: str = ""
    version: int = 1


def save(folder: str | Path, model: LatentModel, tokenizer: PreTrainedTokenizerBase | None, facts: Facts, *, plain: PreTrainedModel | None = None,
         teacher: str | Path | None = None) -> Path:
    """Write the folder; `lori.json` comes last, so that a folder which has it is whole.

    Args:
        plain: the model to write instead of `model.model`, such as one with its adapters merged.
        teacher: its folder or name on the hub: licence and notices are copied from there, and README.md names it (`red.sharing.licences`). None: neither.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    (plain or model.model).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.projection is not None:
        atomic_write_safetensors(folder / WEIGHTS, {name: value.detach().contiguous() for name, value in model.projection.state_dict().items()})
    if teacher:
        carry(terms_of(teacher), folder, hidden_size=model.config.hidden_size)
    atomic_write_json(folder / FACTS, facts.__dict__)
    return folder


def load(folder: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> tuple[LatentModel, PreTrainedTokenizerBase, Facts]:
    """A saved latent model in eval mode, its tokenizer, and how to ask it.

    Raises:
        REDError: the folder is missing, or is not one that `save` finished.
    """
    folder = require_existing(folder, "The latent model")
    if not (folder / FACTS).is_file():
        raise REDError(f"{folder} has no {FACTS}: red.lori did not write it, or was stopped while it did. Give the student folder of `red lori`.")
    read = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    try:
        facts = Facts(**read)
    except TypeError as error:
        raise REDError(f"{folder / FACTS} is not of this version of red: {error}.") from error
    if facts.version != 1 or facts.target not in TARGETS:
        raise REDError(f"{folder / FACTS} has version={facts.version}, target={facts.target!r}; this red reads version 1 with {', '.join(TARGETS)}. "
                       "Update red.")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if facts.target == "latent" and tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids([BOT, EOT]):
        raise REDError(f"The tokenizer in {folder} does not know {BOT} and {EOT}. Save the tokenizer that the model was trained with.")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model = LatentModel(plain, latent_steps=facts.latent_steps, projection=facts.projection)
    if model.projection is not None:
        weights = require_existing(folder / WEIGHTS, "The projection")
        model.projection.load_state_dict(load_file(weights))
    return model.to(device).eval(), tokenizer, facts  # pyrefly: ignore[bad-return] - a tokenizer is not None
