"""The example's problems: follow a table of eight numbers for one to five hops.

    question   5 2 0 6 3 0 7 3 1 4 6 1 4 7 2 5 , 3 2 :        each pair says where a number leads; start at 3, two hops
    steps      3 0    0 6
    answer     6

The table is one cycle through all eight numbers, its pairs in random order, so no number comes twice and guessing is right once in seven. Two layers
can look up where the word before them leads; whoever wants to know more has to write that down and look again, or to take a latent step.
"""

from __future__ import annotations

import itertools
import random

from red.example import split_of
from red.lori.data import BOT, EOT, Row

NUMBERS = 8
HOPS = (1, 2, 3, 4, 5)
ANSWER_PREFIX = "="


def problems(split: str, count: int, seed: int = 0) -> list[Row]:
    """`count` problems of a split ("train", "validation", "test"; disjoint by the hash of the question), every number of hops equally often."""
    rng, rows = random.Random(f"hops {split} {seed}"), []
    while len(rows) < count:
        row = _draw(rng, HOPS[len(rows) % len(HOPS)])
        if split_of(row.question) == split:
            rows.append(row)
    return rows


def build_tokenizer():
    """One id per word, `<bos>` in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", BOT, EOT, "=", ":", ",", *map(str, range(NUMBERS))]
    ids = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
                                        model_max_length=128, clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])
    tokenizer.add_tokens([BOT, EOT], special_tokens=True)
    return tokenizer


def _draw(rng: random.Random, hops: int) -> Row:
    cycle = rng.sample(range(NUMBERS), NUMBERS)
    follows = {number: cycle[(place + 1) % NUMBERS] for place, number in enumerate(cycle)}
    pairs = rng.sample(cycle, NUMBERS)
    path = [rng.randrange(NUMBERS)]
    for _ in range(hops):
        path.append(follows[path[-1]])
    table = " ".join(f"{number} {follows[number]}" for number in pairs)
    return Row(f"{table} , {path[0]} {hops} :", tuple(f"{a} {b}" for a, b in itertools.pairwise(path)), str(path[-1]))
