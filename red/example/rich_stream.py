"""The text that the rich teacher trains on: stages from copying and short chains to the full mix, in chunks of packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from red.example.corpus import tokenized
from red.example.rich_corpus import SHARES, documents
from red.example.rich_model import SIZES, build_rich_tokenizer
from red.example.train_teacher import QUESTION_WEIGHT, ROW

CHUNK_STEPS = 32  # steps whose text is made together
OPEN_ROWS = 64


@dataclass(frozen=True)
class Stage:
    """A part of the training: `part` of its steps, `shares` and `longest` of `documents`."""

    part: float
    shares: dict[str, float]
    longest: dict[str, int]


STAGES = [
    Stage(0.10, {"chain": 0.35, "shuffled": 0.10, "lookup": 0.10, "copy": 0.25, "easy": 0.20}, {"chain": 3, "shuffled": 3, "lookup": 2}),
    Stage(0.25, {"chain": 0.35, "shuffled": 0.20, "lookup": 0.20, "copy": 0.10, "easy": 0.15}, {"chain": 4, "shuffled": 4}),
    Stage(0.10, {"chain": 0.25, "shuffled": 0.25, "lookup": 0.20, "copy": 0.05, "easy": 0.25}, {}),
    Stage(0.16, {"chain": 0.15, "shuffled": 0.20, "lookup": 0.50, "copy": 0.05, "easy": 0.10}, {}),
    Stage(0.19, {"chain": 0.12, "shuffled": 0.18, "lookup": 0.15, "facts": 0.40, "copy": 0.05, "easy": 0.10}, {}),
    Stage(0.20, SHARES, {}),
]


def steps_of(size: str, tokens: int | None = None) -> int:
    """How many steps a training of `tokens` tokens (None: the size's own) has."""
    return (tokens or SIZES[size].tokens) // (SIZES[size].rows * ROW)


class Chunks(Dataset):
    """The training text: chunk `n` is `(input_ids, position_ids, weights)`, each [CHUNK_STEPS * rows, ROW], for steps from
    `n * CHUNK_STEPS` on. `weights` is the loss weight of *predicting* a token, 0 for `<bos>` and padding; positions restart at 0
    with each document, which lies whole in its row."""

    def __init__(self, size: str, seed: int, steps: int, first: int = 0):
        self.size, self.seed, self.steps, self.first = size, seed, steps, first
        self.tokenizer = build_rich_tokenizer()

    def __len__(self) -> int:
        return -(-self.steps // CHUNK_STEPS) - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        number = self.first + index
        if index >= len(self):
            raise IndexError(number)
        stage = stage_at(number * CHUNK_STEPS / self.steps)
        stream = documents(
            self.seed * 1_000_000 + number, level=SIZES[self.size].level, shares=stage.shares, longest=stage.longest
        )
        return _packed(stream, CHUNK_STEPS * SIZES[self.size].rows, self.tokenizer)


def stage_at(done: float) -> Stage:
    """The stage when `done`, from 0 up to 1, of the training is behind."""
    for stage in STAGES:
        done -= stage.part
        if done < -1e-9:
            return stage
    return STAGES[-1]


def _packed(stream, count: int, tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """`count` rows, each document in the fullest of `OPEN_ROWS` rows that has room (97 % full)."""
    pad = tokenizer.pad_token_id
    done: list[tuple[list[int], list[int], list[float]]] = []
    opened: list[tuple[list[int], list[int], list[float]]] = []
    while len(done) < count:
        ((ids, labels),) = [(row["input_ids"], row["labels"]) for row in tokenized([next(stream)], tokenizer, 1)]
        fitting = [row for row in opened if len(row[0]) + len(ids) <= ROW]
        if fitting:
            row = max(fitting, key=lambda row: len(row[0]))
        else:
            if len(opened) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda i: len(opened[i][0]))
                done.append(opened.pop(fullest))
            opened.append(row := ([], [], []))
        row[0].extend(ids)
        row[1].extend(range(len(ids)))
        row[2].extend([0.0] + [QUESTION_WEIGHT if label == -100 else 1.0 for label in labels[1:]])
    for ids, positions, weights in done:
        spare = ROW - len(ids)
        ids += [pad] * spare
        positions += range(spare)
        weights += [0.0] * spare
    ids, positions, weights = (torch.tensor([row[part] for row in done]) for part in range(3))
    return ids, positions, weights
