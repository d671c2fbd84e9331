"""What the step benchmark runs: sizes of a distillation, and the rungs of the ladder, each one optimisation more than the rung before.

A rung whose option this checkout, or this machine, does not have is left out and says why.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from red.config import REDConfig
from red.planning.shapes import SHAPES

GIB = 2**30


@dataclass(frozen=True)
class Size:
    teacher: dict[str, Any]  # a transformers config
    width: int  # the student's
    rows: int  # of a micro-batch
    length: int  # tokens of a row
    micro_steps: int = 8  # of an optimiser step
    documents: int = 4  # packed into a row, of random lengths

    @property
    def tokens(self) -> int:
        """Of an optimiser step."""
        return self.rows * self.length * self.micro_steps


def _llama(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Heads of 64 and the usual FFN of 8/3 of the width, in multiples of 32."""
    return dict(model_type="llama", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
                intermediate_size=-(-8 * hidden // 96) * 32, vocab_size=vocabulary, tie_word_embeddings=False)  # fmt: skip


SIZES = {
    "llama-3.2-3b": Size(SHAPES["Llama-3.2-3B"], 1536, 3, 2048),
    "256": Size(_llama(256, 4, 4096), 128, 4, 256),
    "1024": Size(_llama(1024, 8, 32000), 512, 2, 256),
    "tiny": Size(_llama(128, 2, 256), 64, 2, 32, micro_steps=2),
}


@dataclass(frozen=True)
class Rung:
    name: str
    why: str  # what it changes, and what that should save
    settings: dict[str, Any] = field(default_factory=dict)  # REDConfig's, on top of the rung before
    environment: dict[str, str] = field(default_factory=dict)  # the same
    gpu: bool = False  # means nothing on a CPU
    peer: bool = False
    documents: bool = True  # kept apart
    rows: int | None = None  # of a micro-batch, where not the size's
    apart: bool = False  # the rungs after it do not stand on it
    split_products: bool = False


LADDER = [
    Rung("LRC", "the peer: eager, projections in every forward pass, dense logits", peer=True),
    Rung("LRC, one text a row", "the peer without a document mask: attention may run its causal kernel. Another function, and what an unpacked loader would give it",
         peer=True, documents=False, gpu=True),
    Rung("red, plain", "projections on the optimiser's side: products once a step, not once a micro-step. A PyTorch loss in chunks, float32 student under autocast, "
         "float32 products, targets that are products", dict(tap_target="projected", student_dtype="float32", packed_attention="model", checkpointing="none", compile_layers=False),
         {"RED_BACKEND": "torch"}),
    Rung("+ fused losses", "linear_kd and tap_mse in Triton: five passes over bf16 logits instead of some thirty over fp32 ones", environment={"RED_BACKEND": "auto"}, gpu=True),
    Rung("+ gathered targets", "the two output taps gather channels of the teacher's output, as a selection start allows, instead of multiplying it by B",
         dict(tap_target="gather")),
    Rung("+ varlen attention", "documents by their bounds: no [B, 1, T, T] mask, and no scores outside a document", dict(packed_attention="varlen"), gpu=True),
    Rung("+ bf16 student", "no fp32 weights to cast in every micro-step, and a bf16 residual stream; gradients still add up in fp32", dict(student_dtype="bfloat16"), gpu=True),
    Rung("+ split products", "pull-back and push-forward as two bf16 products instead of one in fp32", gpu=True, split_products=True),
    Rung("+ compiled layers", "norms, rotary embedding, activation and residual additions in one pass each", dict(compile_layers=True), gpu=True),
    Rung("least memory", "two rows instead of three, and every layer computed again in the backward pass", dict(compile_layers=False, checkpointing="full"),
         rows=2, gpu=True, apart=True),
    Rung("cheap recomputation", "two rows; norms, activations and rotary embeddings computed again, no product", dict(compile_layers=False, checkpointing="cheap"),
         rows=2, gpu=True, apart=True),
]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A rung with everything that it stands on."""

    rung: Rung
    settings: dict[str, Any]
    environment: dict[str, str]
    split_products: bool
    why_not: str | None  # why it is left out


def setups(gpu: bool, complete: bool = False) -> list[Setup]:
    """Every rung of the ladder on a GPU or a CPU; what a rung below could not turn on stays off above it. `complete`: as if nothing were missing."""
    known = {one.name for one in dataclasses.fields(REDConfig)} | ({name for rung in LADDER for name in rung.settings} if complete else set())
    found, settings, environment, split = [], {}, {}, False
    for rung in LADDER:
        missing = [name for name in rung.settings if name not in known]
        why_not = None
        if rung.gpu and not gpu:
            why_not = "on a GPU only"
        elif missing and len(missing) == len(rung.settings):
            why_not = f"REDConfig has no {', '.join(missing)}"
        elif rung.split_products and importlib.util.find_spec("red.training.precision") is None:
            why_not = "red has no split products"
        elif rung.settings.get("packed_attention") == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
            why_not = f"torch {torch.__version__} has no varlen attention"
        why_not = None if complete else why_not
        on = {name: value for name, value in rung.settings.items() if name in known}
        here = Setup(rung, settings | on, environment | rung.environment, split or rung.split_products, why_not)
        found.append(here)
        if why_not is None and not rung.apart and not rung.peer:
            settings, environment, split = here.settings, here.environment, here.split_products
    return found
