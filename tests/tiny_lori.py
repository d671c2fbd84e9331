"""What LoRi's tests share: problems of a random table, a tokenizer that knows their numbers, and settings of a tiny run."""

from __future__ import annotations

import random

import torch
from tiny_models import VOCAB

from red.lori.data import Row

PREFIX = "answer :"


def number_tokenizer():
    """A word-level tokenizer of 64 words: specials, the numbers 0 … 39, and a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "answer", ":", "from", "table", *map(str, range(40)), *(f"w{index}" for index in range(16))]
    assert len(words) == VOCAB
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=256)


def table_rows(count: int = 12, seed: int = 0, most: int = 4) -> list[Row]:
    """Problems whose questions and rationales have different lengths."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        steps = [str(rng.randrange(40)) for _ in range(rng.randint(1, most))]
        question = " ".join(["table", *(str(rng.randrange(40)) for _ in range(rng.randint(1, 6)))])
        rows.append(Row(question, tuple(steps), steps[-1]))
    return rows


def settings_of(output_dir, **changes) -> dict:
    """LoRiConfig's fields for a tiny, quiet run on the CPU."""
    return {**dict(output_dir=str(output_dir), answer_prefix=PREFIX, latent_steps=3, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
                   lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True), **changes}


def distil_tiny(teacher, folder, rows=None, **settings):
    """red.distill(method="lori") of a teacher (or its folder) on `rows`; settings are LoRiConfig's and distill's."""
    import red

    names = ("resume", "callbacks", "eval_data", "student")
    given = {name: settings.pop(name) for name in names if name in settings}
    return red.distill(teacher, table_rows() if rows is None else rows, tokenizer=number_tokenizer(), method="lori", **given, **settings_of(folder, **settings))


def weights(result) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in result.model.named_parameters()}


def logged(result, *keys) -> list[list[float]]:
    return [[entry[key] for key in keys] for entry in result.trainer.state.log_history if "loss" in entry]
