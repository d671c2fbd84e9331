"""Documents into rows of one length, so that no document sees another, and rows into batches.

A row is `input_ids [T]`, `labels [T]` (-100: not predicted), `position_ids [T]` (from 0 in every document) and `token_mask [T]` (False:
padding). transformers builds a block-diagonal causal mask from the position ids, for any batch size, with sdpa, eager and FlexAttention,
if and only if the model is called with `attention_mask=None` and `use_cache=False` (with a cache it takes the row for one document).
FlashAttention reads position ids of one row only: `flatten` makes one row of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from red.errors import REDError

IGNORE = -100


class PackedDataset(Dataset):
    """Rows of `length` tokens, made when asked for; the documents lie in two flat int32 arrays.

    Args:
        tokens: [N] all documents, one after the other.
        labels: [N] the label of each token, IGNORE where none.
        bounds: [documents + 1] where each document begins; the last entry is N.
        rows: [rows + 1] the first document of each row; the last entry is the number of documents.
        length: T.
        pad_token_id: what stands at padding; no loss and no document sees it.
    """

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, bounds: np.ndarray, rows: np.ndarray, length: int, pad_token_id: int):
        self.tokens, self.labels, self.bounds, self.rows = tokens, labels, bounds, rows
        self.length, self.pad_token_id = length, pad_token_id

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return len(self.tokens)

    @property
    def fill(self) -> float:
        """The share of all positions that is not padding."""
        return self.num_tokens / (len(self) * self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # ends a for loop over the rows
        index %= len(self)
        bounds = self.bounds[self.rows[index]:self.rows[index + 1] + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        used = end - start
        input_ids = torch.full((self.length,), self.pad_token_id)
        labels = torch.full((self.length,), IGNORE)
        input_ids[:used] = torch.from_numpy(self.tokens[start:end])
        labels[:used] = torch.from_numpy(self.labels[start:end])
        # padding counts from 0 as well: that makes it a document of its own, which no other sees
        position_ids = torch.arange(self.length)
        for begin in [*(bounds[:-1] - start).tolist(), used]:
            position_ids[begin:] = torch.arange(self.length - begin)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "token_mask": torch.arange(self.length) < used}


def split(example: dict, max_length: int) -> list[dict]:
    """The example in pieces of at most `max_length` tokens, each a document of its own; keys `input_ids` and, where given, `labels`."""
    keys = [key for key in ("input_ids", "labels") if example.get(key) is not None]
    return [{key: example[key][start:start + max_length] for key in keys} for start in range(0, len(example["input_ids"]), max_length)]


def pack(examples: Sequence[dict], max_length: int, *, pad_token_id: int, packing: bool = True) -> PackedDataset:
    """Put documents into rows, in order: the next one goes into the row where it fits whole, else into a new row.

    A document longer than `max_length` becomes several. The first token of each document has no label: nothing before it predicts it.

    Args:
        examples: what `red.data.loading.load_examples` returns: `input_ids`, and `labels` where they differ from them.
        max_length: T, the length of a row.
        packing: False puts one document in a row, padded on the right to the longest document, at most `max_length`.

    Raises:
        REDError: no example has a token.
    """
    tokens, labels, lengths, rows, free = [], [], [], [0], max_length
    for example in examples:
        for piece in split(example, max_length):
            ids = np.asarray(piece["input_ids"], np.int32)
            targets = np.array(piece.get("labels", ids), np.int32)  # a copy: the first label goes
            targets[0] = IGNORE
            if lengths and (len(ids) > free or not packing):
                rows.append(len(lengths))
                free = max_length
            free -= len(ids)
            tokens.append(ids)
            labels.append(targets)
            lengths.append(len(ids))
    if not lengths:
        raise REDError("The data set is empty: no example has a token. Give text, or check the name of its column.")
    rows.append(len(lengths))
    length = max_length if packing else max(lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return PackedDataset(np.concatenate(tokens), np.concatenate(labels), bounds, np.asarray(rows), length, pad_token_id)


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length -> a batch of `[B, T]` tensors."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def for_attention(batch: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The batch as the model's attention keeps documents apart: flattened for FlashAttention, else as it is."""
    return flatten(batch) if "flash" in (getattr(config, "_attn_implementation", None) or "") else batch


def flatten(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch `[B, T]` as one row `[1, B * T]`: the position ids keep the documents apart, also for FlashAttention, which ignores them
    in batches of several rows."""
    return {key: value.reshape(1, -1) for key, value in batch.items()}
