"""Greedy answers of a LatentModel: question, latent steps, then words until the end token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from red.evaluate import evaluating
from red.lori.model import LatentModel, positions


@dataclass(frozen=True)
class Said:
    """What was said to each prompt."""

    ids: list[list[int]]  # without the end token
    passes: int  # forward passes of the model, the prompt's included


def generate(model: LatentModel, prompt_ids: Tensor, prompt_mask: Tensor, first: Tensor, *, max_new_tokens: int, eos_ids: set[int],
             cached: bool = True) -> Said:
    """Greedy, batched, stopping when every row has ended.

    Args:
        prompt_ids, prompt_mask: [B, P] padded on the left.
        first: [B] the token that is given after the latent steps (`<eot>`), or after the prompt where there are none.
        max_new_tokens: that a row may say.
        eos_ids: tokens that end a row.
        cached: keep keys and values; without, every pass reads everything again, which is only good for comparing.
    """
    steps = _Cached if cached else _Uncached
    with evaluating(model):
        state = steps(model, prompt_ids, prompt_mask)
        passes = 1 + model.latent_steps
        token, over = first[:, None], torch.zeros(len(first), dtype=torch.bool, device=first.device)
        said: list[list[int]] = [[] for _ in first]
        for _ in range(max_new_tokens):
            token = state.next(token).argmax(-1, keepdim=True)
            passes += 1
            for place, value in enumerate(token[:, 0].tolist()):
                if value in eos_ids:
                    over[place] = True
                elif not over[place]:
                    said[place].append(value)
            if over.all():
                break
    return Said(said, passes)


class _Cached:
    """Logits of the next token with a key/value cache."""

    def __init__(self, model: LatentModel, ids: Tensor, mask: Tensor):
        self.model = model
        self.cache, self.mask, _ = model.think(ids, mask, latent_steps=model.latent_steps)

    def next(self, token: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B, 1]."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.model.model(input_ids=token, attention_mask=self.mask, position_ids=positions(self.mask)[:, -1:], past_key_values=self.cache,
                                use_cache=True).logits[:, -1]


class _Uncached:
    """The same from all input embeddings, each time anew."""

    def __init__(self, model: LatentModel, ids: Tensor, mask: Tensor):
        self.model, self.mask = model, mask
        self.inputs = model.model.get_input_embeddings()(ids)
        for _ in range(model.latent_steps):
            self._append(model.next_input(self._run().hidden_states[-1][:, -1:]))

    def next(self, token: Tensor) -> Tensor:
        self._append(self.model.model.get_input_embeddings()(token))
        return self._run().logits[:, -1]

    def _append(self, inputs: Tensor) -> None:
        self.inputs, self.mask = torch.cat([self.inputs, inputs], 1), F.pad(self.mask, (0, 1), value=1)

    def _run(self):
        return self.model.model(inputs_embeds=self.inputs, attention_mask=self.mask, position_ids=positions(self.mask), use_cache=False,
                                output_hidden_states=True)
