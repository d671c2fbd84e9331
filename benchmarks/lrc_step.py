"""The peer: an eager training step of LRC (arXiv 2505.12781) as its public code is described, in plain PyTorch on transformers' model.

Every weight of the student is a frozen teacher weight times a trainable projection, multiplied in each forward pass and differentiated by autograd:

    q, k, v      x Aᵀ W_Tᵀ          two thin products, x: [N, d'] -> [N, d] -> [N, out]
    gate, up     x (W_T A)ᵀ         merged
    o            x W_Tᵀ Bᵀ          thin, since the tap compares at the teacher's width, between the two
    down         x (B W_T)ᵀ         merged
    embedding    W_T[ids] A         the rows first
    head         x (W_T A)ᵀ         merged, dense logits

    loss = CE + KL(teacher ‖ student) at T, "batchmean" of [batch, seq, vocab] + 0.2 · Σ_layers Σ_7 taps MSE

AdamW, no weight decay, gradients clipped at norm 1; on a GPU bf16 autocast around fp32 projections. Where the description is silent (embedding, head),
the form with fewer FLOPs. Nothing of `red` runs in it; tests/test_lrc_step.py compares it with `lrc_faithful=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHAINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MERGED = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION_OUT, FFN_OUT = "self_attn.o_proj", "mlp.down_proj"
TAPPED = (*CHAINED, ATTENTION_OUT, *MERGED, FFN_OUT)
STD = 0.02  # of a random projection


class Projected(nn.Module):
    """A frozen linear module or embedding of the teacher and one trainable projection, A [d, d'] or B [d', d]. `out` is what the tap compares."""

    def __init__(self, source: nn.Module, shape: tuple[int, int]):
        super().__init__()
        bias = getattr(source, "bias", None)
        self.weight, self.bias = source.weight.detach(), None if bias is None else bias.detach()  # the teacher's, frozen: plain tensors
        self.projection = nn.Parameter(torch.empty(shape, device=source.weight.device, dtype=torch.promote_types(source.weight.dtype, torch.float32)).normal_(0, STD))
        self.out: Tensor | None = None

    def projected_bias(self) -> Tensor | None:
        return None if self.bias is None else self.projection @ self.bias.to(self.projection.dtype)


class Chained(Projected):
    def forward(self, x: Tensor) -> Tensor:
        self.out = F.linear(F.linear(x, self.projection), self.weight, self.bias)
        return self.out


class Merged(Projected):
    def forward(self, x: Tensor) -> Tensor:
        self.out = F.linear(x, matmul(self.weight, self.projection), self.bias)
        return self.out


class AttentionOut(Projected):
    def forward(self, x: Tensor) -> Tensor:
        self.out = F.linear(x, self.weight, self.bias)  # at the teacher's width
        return F.linear(self.out, self.projection)


class FFNOut(Projected):
    def forward(self, x: Tensor) -> Tensor:
        self.out = F.linear(x, matmul(self.projection, self.weight), self.projected_bias())
        return self.out


class Embedded(Projected):
    def forward(self, ids: Tensor) -> Tensor:
        return matmul(F.embedding(ids, self.weight), self.projection)


class TiedHead(nn.Module):
    """The head of a teacher whose embedding is its head: one projection for both."""

    def __init__(self, embedded: Embedded):
        super().__init__()
        object.__setattr__(self, "embedded", embedded)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, matmul(self.embedded.weight, self.embedded.projection))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """In autocast's dtype where it is on, else in the wider of the two."""
    if not torch.is_autocast_enabled(left.device.type):
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
    return left @ right


class LRCStep:
    """A teacher and its wrapped student, with the optimiser.

    Args:
        teacher: a Llama, Qwen2 or Qwen3 causal language model; frozen, its weights are referenced.
        hidden_size: the student's width.
        maps: start of the projections and gains by the name of the student's parameter (`A [d, d']`, `B [d', d]`, gain `[d']`); None: N(0, 0.02), gains 1.
        documents: whether packed documents are kept apart (transformers then builds a [B, 1, T, T] mask); False: rows are one text, attention is causal.
    """

    def __init__(self, teacher: PreTrainedModel, hidden_size: int, *, maps: dict[str, Tensor] | None = None, documents: bool = True, temperature: float = 40.0,
                 tap_weight: float = 0.2, learning_rate: float = 1e-4, max_grad_norm: float = 1.0):
        self.teacher, self.documents, self.temperature, self.tap_weight, self.max_grad_norm = teacher.eval(), documents, temperature, tap_weight, max_grad_norm
        self.student = wrapped_student(teacher, hidden_size)
        self.trainable = {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        if maps is not None:
            with torch.no_grad():
                for name, value in maps.items():
                    self.parameter(name).copy_(value)
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def parameter(self, name: str) -> nn.Parameter:
        """The projection or gain behind the student's parameter `name`."""
        projection = f"{name.removesuffix('.weight')}.projection"
        return self.trainable[projection if projection in self.trainable else name]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, ce, kl, taps) of one micro-batch of `input_ids`, `labels` and `position_ids`, each [B, T]."""
        place = {"input_ids": batch["input_ids"], "use_cache": False} | ({"position_ids": batch["position_ids"]} if self.documents else {})
        with torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.teacher.device.type == "cuda"):
            targets: list[Tensor] = []
            handles = [module.register_forward_hook(lambda _m, _a, output: targets.append(output)) for module in tapped(self.teacher)]
            with torch.no_grad():
                teacher_logits = self.teacher(**place).logits
            for handle in handles:
                handle.remove()
            logits = self.student(**place).logits
            ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            kl = F.kl_div(F.log_softmax(logits / self.temperature, -1), F.softmax(teacher_logits / self.temperature, -1), reduction="batchmean")
            taps = torch.zeros((), device=logits.device)
            for module, target in zip(tapped(self.student), targets, strict=True):
                if isinstance(module, FFNOut):
                    target = F.linear(target, module.projection)  # not detached
                taps = taps + F.mse_loss(module.out, target)
                module.out = None
        return ce + kl + self.tap_weight * taps, ce, kl, taps

    def micro_step(self, batch: dict[str, Tensor], micro_steps: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one of `micro_steps`; (ce, kl, taps), detached."""
        loss, *parts = self.loss(batch)
        (loss / micro_steps).backward()
        return tuple(part.detach() for part in parts)

    def update(self) -> Tensor:
        """Clip, step, forget the gradients; the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def tapped(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.get_submodule(name) for layer in model.model.layers for name in TAPPED]


def wrapped_student(teacher: PreTrainedModel, hidden_size: int) -> PreTrainedModel:
    """The teacher's class at width `hidden_size`, its linear modules and embedding replaced; norms start at 1, q/k norms are the teacher's."""
    d, config = teacher.config.hidden_size, copy.deepcopy(teacher.config)
    config.head_dim, config.hidden_size = teacher.model.layers[0].self_attn.head_dim, hidden_size
    config.tie_word_embeddings = False  # there is nothing left to tie: both are replaced
    with teacher.device:
        student = type(teacher)(config).to(torch.promote_types(teacher.dtype, torch.float32)).train()
    reader, writer = (d, hidden_size), (hidden_size, d)
    kinds: dict[str, tuple[Callable, tuple[int, int]]] = {
        **dict.fromkeys(CHAINED, (Chained, reader)), **dict.fromkeys(MERGED, (Merged, reader)), ATTENTION_OUT: (AttentionOut, writer), FFN_OUT: (FFNOut, writer),
    }  # fmt: skip
    for mine, layer in zip(student.model.layers, teacher.model.layers, strict=True):
        for name, (kind, shape) in kinds.items():
            parent, leaf = name.split(".")
            setattr(getattr(mine, parent), leaf, kind(layer.get_submodule(name), shape))
        for name in ("q_norm", "k_norm"):
            if hasattr(mine.self_attn, name):
                getattr(mine.self_attn, name).load_state_dict(getattr(layer.self_attn, name).state_dict())
                getattr(mine.self_attn, name).requires_grad_(False)
    embedded = Embedded(teacher.get_input_embeddings(), reader)
    student.model.embed_tokens = embedded
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    student.lm_head = TiedHead(embedded) if tied else Merged(teacher.get_output_embeddings(), reader)
    return student
