"""A causal language model that thinks in K latent steps between question and answer: the last hidden state becomes the next input, no word is chosen.

    question + <bot> ──> h_0 ──> projection ──> z_1 ──> h_1 ──> … ──> z_K ──> h_K      then <eot> + answer, read with the same key/value cache

The mechanics are CODI's (arXiv 2502.21074: projection Dropout, Linear, GELU, Linear, LayerNorm; gradients through all steps); without a projection the hidden
state itself is fed back, as in COCONUT (arXiv 2412.06769). With `latent_steps=0` it is the plain model, so the baselines with and without an explicit chain of
thought run through the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from red.errors import REDError
from red.lori.data import BOT, EOT


@dataclass(frozen=True)
class Thought:
    """What one pass of a LatentModel gives. States are transformers' `hidden_states`: embedding, layers, the last one after the final norm."""

    logits: Tensor  # [B, N, V] of the target's tokens
    target_states: tuple[Tensor, ...] | None  # L+1 of [B, N, d]
    latent_states: Tensor | None  # [B, L+1, K, d]; None with K = 0


class LatentModel(nn.Module):
    """A Hugging Face causal language model, its projection, and how many latent steps it takes.

    Args:
        model: any causal language model with `inputs_embeds`, `past_key_values` and `output_hidden_states`.
        latent_steps: K; 0 makes it the plain model.
        projection: put the projection between hidden state and next input; False feeds the state back as it is.
        dropout: of the projection, while training.
    """

    def __init__(self, model: PreTrainedModel, *, latent_steps: int = 5, projection: bool = True, dropout: float = 0.0):
        super().__init__()
        if latent_steps < 0:
            raise REDError(f"latent_steps={latent_steps}: must not be negative; 0 thinks without latent steps.")
        self.model, self.latent_steps = model, latent_steps
        self.projection = build_projection(model, dropout) if projection and latent_steps else None

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, target_ids: Tensor, target_mask: Tensor, *, latent_steps: int | None = None,
                with_states: bool = False) -> Thought:
        """Logits of every target token, given the prompt, the latent steps and the target's tokens before it.

        Args:
            prompt_ids, prompt_mask: [B, P] padded on the left (mask 0); ends with the token that starts the latent steps.
            target_ids, target_mask: [B, N] padded on the right.
            latent_steps: another number of them than the model's own K; 0 is the plain model.
            with_states: also return the hidden states.

        Logits at n say what comes after target token n; the first target token is given (see `red.lori.batch`).
        """
        latent_steps = self.latent_steps if latent_steps is None else latent_steps
        if not latent_steps:
            ids, mask = torch.cat([prompt_ids, target_ids], 1), torch.cat([prompt_mask, target_mask], 1)
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, output_hidden_states=with_states)
            start = prompt_ids.shape[1]
            return Thought(out.logits[:, start:], tuple(h[:, start:] for h in out.hidden_states) if with_states else None, None)
        cache, mask, states = self.think(prompt_ids, prompt_mask, latent_steps=latent_steps, with_states=with_states)
        mask = torch.cat([mask, target_mask], 1)
        out = self.model(input_ids=target_ids, attention_mask=mask, position_ids=positions(mask)[:, -target_ids.shape[1]:], past_key_values=cache,
                         use_cache=True, output_hidden_states=with_states)
        return Thought(out.logits, out.hidden_states, states)

    def think(self, prompt_ids: Tensor, prompt_mask: Tensor, *, latent_steps: int, with_states: bool = False) -> tuple[DynamicCache, Tensor, Tensor | None]:
        """Read the prompt and take the latent steps: the cache, the mask [B, P + K] of what is in it, and the steps' states [B, L+1, K, d]."""
        cache, mask = DynamicCache(config=self.config), prompt_mask
        out = self.model(input_ids=prompt_ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True,
                         output_hidden_states=True, logits_to_keep=1)
        hidden, states = out.hidden_states[-1][:, -1:], []
        for _ in range(latent_steps):
            mask = F.pad(mask, (0, 1), value=1)
            out = self.model(inputs_embeds=self.next_input(hidden), attention_mask=mask, position_ids=positions(mask)[:, -1:], past_key_values=cache,
                             use_cache=True, output_hidden_states=True, logits_to_keep=1)
            hidden = out.hidden_states[-1]
            if with_states:
                states.append(torch.stack(out.hidden_states, 1))
        return cache, mask, torch.cat(states, 2) if states else None

    def next_input(self, hidden: Tensor) -> Tensor:
        """The next input embedding [B, 1, d] of the last hidden state [B, 1, d]."""
        if self.projection is None:
            return hidden
        return self.projection(hidden.to(self.projection[-1].weight.dtype)).to(hidden.dtype)  # a projection in float32 serves a model in bfloat16 too


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, N] that count what the mask lets through, so that padding on the left moves nothing."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def build_projection(model: PreTrainedModel, dropout: float) -> nn.Sequential:
    """CODI's projection; its LayerNorm starts at the scale of the embeddings, so that a first thought looks like a word."""
    weight = model.get_input_embeddings().weight
    width = weight.shape[1]
    built = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
    nn.init.constant_(built[-1].weight, float(weight.detach().float().std()))
    return built.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32) if weight.is_cpu else weight.dtype)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """Ids of BOT and EOT, or None twice where the tokenizer does not know them."""
    known = tokenizer.get_vocab()
    return (known[BOT], known[EOT]) if BOT in known and EOT in known else (None, None)


def add_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of BOT and EOT, which begin and end the latent steps, added to tokenizer and model where they are missing.

    New rows of the embedding (and of the head) are drawn with the old rows' standard deviation from torch's generator.
    """
    tokenizer.add_tokens([BOT, EOT], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([BOT, EOT])
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= old:  # many models have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables = {id(module.weight): module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
        with torch.no_grad():
            for table in tables.values():
                table[old:] = torch.randn_like(table[old:]) * table[:old].float().std().to(table.dtype)
    return tuple(ids)  # pyrefly: ignore[bad-return]
