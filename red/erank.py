"""Effective rank of a model's residual stream, layer by layer: how many directions its hidden states really use.

The stream is read where it is, at the entry of the first layer and at the exit of each: transformers' last `hidden_states` entry
would be the one after the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from red import families
from red.data.loading import pad_id
from red.errors import REDError
from red.evaluate import Item, encode, evaluating, pad
from red_kernels import erank_estimate

LAYERS_BYTES = 2**28  # of float32 states that are looked at together: 16 layers of 4096 tokens of 1024 channels


def hidden_erank(model, tokenizer, texts: Sequence[Item], *, max_tokens: int = 4000, batch_size: int = 32,
                 on_progress: Callable[[int], object] | None = None) -> list[float]:
    """eRank (Roy & Vetterli 2007, "The effective rank"; see `red_kernels.erank`) at the embedding and after each of the L layers.

    Args:
        model: a causal language model of a supported family.
        tokenizer: its tokenizer; may be None if `texts` are lists of ids.
        texts: texts, lists of ids, or dicts with "input_ids". Where a dict has "labels", only tokens whose label is not -100 count, so
            that the eRank of answers can be had without that of the questions.
        max_tokens: rows of the matrix whose rank is taken; the first ones count. An eRank is below this number and grows with it:
            compare only at equal text.
        batch_size: documents that are read together.
        on_progress: called with the number of documents after each batch.

    Returns:
        `L + 1` numbers between 1 and the hidden size; NaN where the states have no spectrum (all equal, or not finite).
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    rows = []
    found = 0
    for ids, counted in encode(tokenizer, texts, max_length=limit):
        if found >= max_tokens:
            break
        rows.append((ids, counted))
        found += sum(counted)
    if found < 2:
        raise REDError(f"The text has {found} tokens that count: an effective rank needs at least 2. Give more text.")
    streams: list[list[Tensor]] = []
    with evaluating(model), _watching(model) as seen:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids, mask = pad([row for row, _ in part], model, pad_id(tokenizer), side="right")
            keep = torch.zeros_like(mask, dtype=torch.bool)
            for row, (_, counted) in enumerate(part):
                keep[row, : len(counted)] = torch.tensor(counted, device=keep.device)
            seen.clear()
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)  # without the head: logits are not needed
            streams.append([state[keep] for state in seen])
            if on_progress:
                on_progress(len(part))
    return _eranks([torch.cat(layer)[:max_tokens] for layer in zip(*streams, strict=True)])


def stream_eranks(model, batch: dict[str, Tensor], *, max_tokens: int) -> list[float]:
    """`hidden_erank` of one packed batch (`red.data.packing`), on the model's device: its first `max_tokens` tokens that are not padding."""
    with evaluating(model), _watching(model) as seen:
        model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    keep = batch["token_mask"]
    return _eranks([state[keep][:max_tokens] for state in seen])


def _eranks(states: Sequence[Tensor]) -> list[float]:
    """eRank of states [tokens, d] of every layer, NaN where there is no spectrum. Wide models are estimated to 1 % (`red_kernels.erank_estimate`), a few layers at a time."""
    at_once = max(1, LAYERS_BYTES // (states[0].numel() * 4))
    found = [erank_estimate(torch.stack(states[first : first + at_once]).float(), invalid="nan").erank for first in range(0, len(states), at_once)]
    return torch.cat(found).tolist()


def erank_table(name: str, values: Sequence[float], hidden_size: int, tokens: int) -> str:
    """The eRank per layer as text: a line per layer, its share of the width, and a bar."""
    lines = [f"Effective rank of {name} (hidden size {hidden_size}, {tokens} tokens)", "", f"{'layer':>9}  {'eRank':>7}  {'of width':>8}"]
    for layer, value in enumerate(values):
        label = "embedding" if layer == 0 else str(layer)
        if math.isfinite(value):
            share = value / hidden_size
            lines.append(f"{label:>9}  {value:7.1f}  {share:8.1%}  {'█' * max(1, round(40 * share))}")
        else:
            lines.append(f"{label:>9}  {'none':>7}  {'':>8}  all states are equal or not finite: collapsed")
    return "\n".join(lines)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, the list fills with the stream's L + 1 states [B, T, d] of each forward pass; the reader empties it."""
    seen: list[Tensor] = []
    layers = families.decoder_layers(model)

    def before(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    def after(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True), *(layer.register_forward_hook(after) for layer in layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
