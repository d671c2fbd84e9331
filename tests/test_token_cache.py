"""Kept tokens: the same rows without tokenising, another name for everything that decides them, and no harm from a broken one."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from tiny_training import make_trainer, settings_of

from red.data import token_cache
from red.config import REDConfig
from red.data.loading import load_examples, pack
from red.prepare import pack_rows


@pytest.fixture()
def tokenised(monkeypatch):
    """Keep texts of any size; and a list that grows by one for every text that is tokenised."""
    from red.data import loading as data

    calls, real = [], data.load_examples
    monkeypatch.setattr(token_cache, "SMALLEST", 0)
    monkeypatch.setattr(data, "load_examples", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    return calls


@pytest.fixture()
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"w{4 + number % 60} " * (number % 9 + 1) + "\n" for number in range(200)))
    return path


@pytest.fixture()
def read(tiny_teacher, tiny_tokenizer, tmp_path):
    def read(source, tokenizer=None, **changes):
        config = REDConfig(**settings_of(tmp_path / "run", **{"token_cache_dir": str(tmp_path / "kept"), **changes}))
        return pack_rows(source, tokenizer or tiny_tokenizer, tiny_teacher(), config)
    return read


def equal(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(mine[key], other[key]) for mine, other in zip(ours, theirs, strict=True) for key in other)


def test_the_second_time_the_tokens_are_there(text, read, tokenised, tmp_path, tiny_tokenizer):
    truth = pack(load_examples(text, tiny_tokenizer), 16, pad_token_id=0)
    first, second = read(text), read(str(text))
    assert len(tokenised) == 1 and equal(first, truth) and equal(second, truth)
    assert all(isinstance(getattr(second, name), np.memmap) for name in token_cache.ARRAYS)
    second.tokens[0] = 63  # a write stays in this process
    assert equal(read(text), truth) and len(tokenised) == 1
    (place,) = [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()]
    assert sorted(file.name for file in place.iterdir()) == ["bounds.npy", "facts.json", "labels.npy", "rows.npy", "tokens.npy"], "nothing pickled"


def test_whatever_decides_the_rows_names_them(text, read, tokenised, tiny_tokenizer):
    read(text)
    for changes in (dict(max_length=12), dict(packing=False), dict(text_column="body")):
        read(text, **changes)
        read(text, **changes)
    assert len(tokenised) == 4
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="w9")
    read(text, other)
    assert len(tokenised) == 5, "another eos"
    from tokenizers.normalizers import Lowercase

    same_ids = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    same_ids.backend_tokenizer.normalizer = Lowercase()
    read(text, same_ids)
    assert len(tokenised) == 6, "the same vocabulary read otherwise"
    state = text.stat()
    text.write_text(text.read_text().replace("w4 ", "w5 "))
    os.utime(text, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert equal(read(text), pack(load_examples(text, tiny_tokenizer), 16, pad_token_id=0)) and len(tokenised) == 7


def test_data_sets_are_known_by_their_fingerprint(read, tokenised):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["w5 w6"] * 50})
    read(data)
    read(data)
    assert len(tokenised) == 1
    read(data.select(range(40)))
    assert len(tokenised) == 2


@pytest.mark.parametrize("harm", [
    lambda place: (place / "tokens.npy").write_bytes((place / "tokens.npy").read_bytes()[:-40]),
    lambda place: (place / "rows.npy").write_bytes(b"no array"),
    lambda place: (place / "labels.npy").unlink(),
    lambda place: (place / "facts.json").write_text("{"),
    lambda place: np.save(place / "bounds.npy", np.zeros(7, np.int64)),
], ids=["cut short", "no array", "missing", "facts", "bounds"])
def test_a_broken_cache_is_made_again(text, read, tokenised, tmp_path, tiny_tokenizer, harm):
    read(text)
    (place,) = [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()]
    harm(place)
    truth = pack(load_examples(text, tiny_tokenizer), 16, pad_token_id=0)
    assert equal(read(text), truth) and len(tokenised) == 2
    assert equal(read(text), truth) and len(tokenised) == 2, "whole again"


def test_what_is_not_kept(text, read, tokenised, tmp_path, monkeypatch):
    for source, changes in ((text, dict(token_cache_dir="none")), (["w5 w6 w7"] * 20, {})):
        read(source, **changes)
        read(source, **changes)
    assert len(tokenised) == 4 and not (tmp_path / "kept").exists()
    (tmp_path / "kept").write_text("a file where a folder should be")
    assert len(read(text)) > 10, "no cache is no reason to stop"
    (tmp_path / "kept").unlink()
    monkeypatch.setattr(token_cache, "SMALLEST", 2**24)
    read(text)
    assert not (tmp_path / "kept").exists(), "a small text"


def test_nothing_half_written_is_left(text, read, tokenised, tmp_path, monkeypatch):
    """A full disk: the run goes on with the rows in memory."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(read(text)) > 10
    assert not [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()]


def test_one_process_tokenises_and_the_others_wait(text, tmp_path, tokenised):
    """Two threads stand for two processes: the lock is a file's either way."""
    from concurrent.futures import ThreadPoolExecutor

    made = []

    def build():
        time.sleep(0.2)
        made.append(1)
        return pack([{"input_ids": list(range(5))}] * 9, 16, pad_token_id=0)

    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(lambda _: token_cache.cached(build, text, None, tmp_path / "kept", max_length=16), range(3)))
    assert len(made) == 1 and all(equal(found, rows[0]) for found in rows)


def test_training_from_kept_tokens(tiny_teacher, tmp_path, tokenised):
    """The same losses from memory and from the files."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [5 + number % 50] * 9}) + "\n" for number in range(40)))

    def losses(folder, **changes):
        trainer = make_trainer(tiny_teacher(), tmp_path / folder, path, max_steps=2, **changes)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses("plain", token_cache_dir="none")
    assert losses("made", token_cache_dir=str(tmp_path / "kept")) == losses("kept", token_cache_dir=str(tmp_path / "kept")) == expected
    assert len(tokenised) == 2
