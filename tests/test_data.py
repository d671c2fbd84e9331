"""Data: what is read from where, how rows are packed, and that no document in a row sees another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from red.data.loading import IGNORE, check_examples, collate, flatten, load_examples, pack, pad_id, save_examples, tokenizer_hash
from red.errors import REDError

EOS = 2


def ids_of(examples):
    return [example["input_ids"].tolist() for example in examples]


# ---- reading ----

def test_text_file_has_documents_between_blank_lines_or_one_a_line(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("w5 w6\nw7\n\n  \nw8\n")
    assert ids_of(load_examples(file, tiny_tokenizer)) == [[5, 6, 7, EOS], [8, EOS]]
    file.write_text("w5 w6\nw7\n")
    assert ids_of(load_examples(str(file), tiny_tokenizer)) == [[5, 6, EOS], [7, EOS]]


def test_jsonl_of_texts_pairs_and_ids(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"text": "w5"}, {"prompt": "w6 w7", "completion": "w8"}, {"input_ids": [9, 10]},
                                               {"input_ids": [9, 10], "labels": [-100, 10]}])) + "\n\n")
    plain, pair, given_ids, labelled = load_examples(file, tiny_tokenizer)
    assert plain["input_ids"].tolist() == [5, EOS] and "labels" not in plain
    assert pair["input_ids"].tolist() == [6, 7, 8, EOS] and pair["labels"].tolist() == [IGNORE, IGNORE, 8, EOS]
    assert given_ids["input_ids"].tolist() == [9, 10]  # ids are taken as they are
    assert labelled["labels"].tolist() == [IGNORE, 10]


def test_datasets_and_saved_folders(tmp_path, tiny_tokenizer):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"body": ["w5 w6", "w7"]})
    expected = [[5, 6, EOS], [7, EOS]]
    assert ids_of(load_examples(data, tiny_tokenizer, text_column="body")) == expected
    assert ids_of(load_examples(data.to_iterable_dataset(), tiny_tokenizer, text_column="body")) == expected
    data.save_to_disk(tmp_path / "one")
    assert ids_of(load_examples(tmp_path / "one", tiny_tokenizer, text_column="body")) == expected
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    assert ids_of(load_examples(tmp_path / "splits", tiny_tokenizer, text_column="body")) == expected
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "other")
    with pytest.raises(REDError, match="splits test, and no train"):
        load_examples(tmp_path / "other", tiny_tokenizer)
    with pytest.raises(REDError, match="not a sequence of examples"):
        load_examples(datasets.DatasetDict({"train": data}), tiny_tokenizer)


def test_iterables_and_blank_texts(tiny_tokenizer):
    assert ids_of(load_examples((text for text in ["w5", " ", "", "w6"]), tiny_tokenizer)) == [[5, EOS], [6, EOS]]
    assert ids_of(load_examples([{"text": "w5 <eos>"}], tiny_tokenizer)) == [[5, EOS]], "eos is not doubled"
    assert ids_of(load_examples([{"input_ids": torch.tensor([7, 8])}])) == [[7, 8]], "ids need no tokenizer"


def test_only_a_beginning_gets_the_tokenizers_own_bos(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    (example,) = load_examples([{"prompt": "w5", "completion": "w6"}], tiny_tokenizer)
    assert example["input_ids"].tolist() == [1, 5, 6, EOS]
    assert example["labels"].tolist() == [IGNORE, IGNORE, 6, EOS]


def test_attention_mask_removes_padding_that_came_with_the_ids():
    (example,) = load_examples([{"input_ids": [0, 0, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [0, 0, 1, 1]}])
    assert example["input_ids"].tolist() == [5, 6] and example["labels"].tolist() == [5, 6]


def test_more_texts_than_a_batch_stay_in_order(tiny_tokenizer):
    texts = [f"w{4 + index % 60}" for index in range(2345)]
    assert ids_of(load_examples(texts, tiny_tokenizer)) == [[4 + index % 60, EOS] for index in range(2345)]


def test_max_length_cuts_into_pieces(tiny_tokenizer):
    assert ids_of(load_examples(["w5 w6 w7"], tiny_tokenizer, max_length=3)) == [[5, 6, 7], [EOS]]


@pytest.mark.parametrize("source, message", [
    (7, "type int cannot be read"),
    ([3], "Example 0 is a int"),
    (["w5", None], "Example 1 is a NoneType"),
    ([{"txt": "w5"}], r"Example 0 has the columns txt; red reads 'text'.*text_column='txt'"),
    ([{"text": ["w5"]}], r"has \['w5'\] where text is needed. Give conversations as messages"),
    ([{"text": 3}], "has 3 where text is needed. Make it a string"),
    ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
    ([{"input_ids": [[1, 2]]}], "flat list of integers"),
    ([{"input_ids": [1.5]}], "flat list of integers"),
    ({"train": []}, "keys train, not a sequence"),
])
def test_contradictory_data_is_refused(source, message, tiny_tokenizer):
    with pytest.raises(REDError, match=message):
        load_examples(source, tiny_tokenizer)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(REDError, match="there is no tokenizer"):
        load_examples(["w5"], None)


def test_missing_and_unknown_paths_are_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "corpus.txt").write_text("w5")
    with pytest.raises(REDError, match=r"'.*corpis.txt' does not exist; did you mean '.*corpus.txt'"):
        load_examples(tmp_path / "corpis.txt", tiny_tokenizer)
    with pytest.raises(REDError, match="is the part that is missing"):
        load_examples(tmp_path / "no" / "corpus.txt", tiny_tokenizer)
    with pytest.raises(REDError, match="not a data set that"):
        load_examples(tmp_path, tiny_tokenizer)
    (tmp_path / "corpus.csv").write_text("text\nw5")
    with pytest.raises(REDError, match="ends in '.csv'"):
        load_examples(tmp_path / "corpus.csv", tiny_tokenizer)
    (tmp_path / "bad.jsonl").write_text('{"text": "w5"}\n{oops\n')
    with pytest.raises(REDError, match="line 2 is not JSON"):
        load_examples(tmp_path / "bad.jsonl", tiny_tokenizer)


# ---- whose tokens ----

def test_tokenizer_hash_survives_saving_and_another_process(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    code = f"from transformers import AutoTokenizer; from red.data.loading import tokenizer_hash; print(tokenizer_hash(AutoTokenizer.from_pretrained({str(tmp_path)!r})))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == tokenizer_hash(tiny_tokenizer)


def test_tokenizer_hash_sees_vocabulary_and_specials_but_not_padding(tiny_tokenizer):
    before = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer.pad_token = "<eos>"
    assert tokenizer_hash(tiny_tokenizer) == before
    tiny_tokenizer.eos_token = "w9"
    assert tokenizer_hash(tiny_tokenizer) != before
    tiny_tokenizer.eos_token = "<eos>"
    tiny_tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tiny_tokenizer) != before


def test_data_of_another_tokenizer_is_refused(tmp_path, tiny_tokenizer):
    datasets = pytest.importorskip("datasets")
    examples = load_examples(["w5 w6", {"prompt": "w7", "completion": "w8"}], tiny_tokenizer)
    save_examples(tmp_path / "a.jsonl", examples, tiny_tokenizer)
    again = load_examples(tmp_path / "a.jsonl", tiny_tokenizer)
    assert ids_of(again) == ids_of(examples) and again[1]["labels"].tolist() == examples[1]["labels"].tolist()
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6]]})
    data.info.description = f"tokenizer_hash={tokenizer_hash(tiny_tokenizer)}"
    data.save_to_disk(tmp_path / "saved")
    assert ids_of(load_examples(tmp_path / "saved", tiny_tokenizer)) == [[5, 6]]
    tiny_tokenizer.add_tokens(["new"])
    for source in ("a.jsonl", "saved"):
        with pytest.raises(REDError, match="tokenised by another tokenizer"):
            load_examples(tmp_path / source, tiny_tokenizer)


# ---- checks ----

def example(*ids, **more):
    return {"input_ids": np.array(ids, np.int32), **more}


@pytest.mark.parametrize("examples, message", [
    ([], "empty: 0 examples"),
    ([example()], "empty: 1 examples, 0 tokens"),
    ([example(5, 6), example(7, 64)], "Example 1 has the id 64 at token 1, outside the teacher's vocabulary of 64"),
    ([example(5, -1)], "Example 0 has the id -1 at token 1"),
    ([example(5, 6, labels=np.array([5, 99]))], "Example 0 has the label 99 at token 1"),
    ([example(5, 6, 0, 0)], r"Example 0 is padded: it has 2 tokens with the id 0"),
    ([example(5, 6, 7)], "3 tokens in 1 examples, less than one sequence of max_length=8.*max_length to 3"),
])
def test_bad_examples_are_refused(examples, message, tiny_tokenizer):
    with pytest.raises(REDError, match=message):
        check_examples(examples, tiny_tokenizer, 64, max_length=8)


def test_messages_name_the_place_in_the_source(tiny_tokenizer):
    examples = load_examples(["w5 w6 w7 w8 w9", " ", {"input_ids": [5, 70]}], tiny_tokenizer, max_length=2)
    assert [example["number"] for example in examples] == [0, 0, 0, 2]
    with pytest.raises(REDError, match="Example 2 has the id 70 at token 1"):
        check_examples(examples, tiny_tokenizer, 64)


def test_good_examples_pass_and_a_bigger_tokenizer_does_not(tiny_tokenizer):
    good = [example(*range(4, 14))]
    check_examples(good, tiny_tokenizer, 64, max_length=10)
    check_examples(good, None, 64)
    with pytest.raises(REDError, match="tokenizer has 64 entries but the teacher's embedding has 60"):
        check_examples(good, tiny_tokenizer, 60)


def test_pad_id_comes_from_whoever_has_one(tiny_tokenizer):
    class Config:
        pad_token_id, eos_token_id = None, [7, 8]

    assert pad_id(tiny_tokenizer, Config) == 0 and pad_id(None, Config) == 7 and pad_id() == 0


# ---- packing ----

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=30), max_length=st.integers(2, 16), packing=st.booleans())
def test_rows_hold_every_token_once_in_order(lengths, max_length, packing):
    documents = [np.arange(100 * index, 100 * index + length, dtype=np.int32) for index, length in enumerate(lengths)]
    rows = pack([{"input_ids": ids} for ids in documents], max_length, pad_token_id=9999, packing=packing)
    batch = collate(list(rows))
    assert len({row["input_ids"].shape for row in rows}) == 1 and batch["input_ids"].shape[1] <= max_length
    kept = batch["input_ids"][batch["token_mask"]]
    assert kept.tolist() == np.concatenate(documents).tolist()
    assert (batch["input_ids"][~batch["token_mask"]] == 9999).all() and (batch["labels"][~batch["token_mask"]] == IGNORE).all()
    starts = batch["position_ids"] == 0
    assert starts[:, 0].all() and (batch["labels"][starts] == IGNORE).all()
    inside = ~starts & batch["token_mask"]
    assert (batch["labels"][inside] == batch["input_ids"][inside]).all()
    previous = batch["position_ids"][:, :-1]
    assert ((batch["position_ids"][:, 1:] == previous + 1) | starts[:, 1:]).all()
    pieces = sum(-(-length // max_length) for length in lengths)
    assert int((starts & batch["token_mask"]).sum()) == pieces, "whole documents stay whole"
    assert rows.num_tokens == sum(lengths) and 0 < rows.fill <= 1
    if not packing:
        assert len(rows) == pieces


def test_a_document_moves_to_the_next_row_when_it_does_not_fit():
    rows = pack([example(*range(10, 10 + n)) for n in (3, 4, 2, 9)], 8, pad_token_id=0)
    assert [row["position_ids"].tolist() for row in rows] == [
        [0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert rows[-1]["token_mask"].tolist() == [True] + 7 * [False]


def test_pack_keeps_given_labels_and_the_callers_arrays():
    labels = np.array([5, IGNORE, 7], np.int32)
    (row,) = pack([example(5, 6, 7, labels=labels)], 4, pad_token_id=0)
    assert row["labels"].tolist() == [IGNORE, IGNORE, 7, IGNORE] and labels[0] == 5


def test_pack_refuses_nothing():
    with pytest.raises(REDError, match="empty"):
        pack([], 8, pad_token_id=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_document_sees_another(attention, family, tiny_teacher):
    """transformers' block-diagonal mask from position ids, for a batch of several rows: packed states equal those of documents alone."""
    model = tiny_teacher(family, attn_implementation=attention)
    numbers = np.random.default_rng(0)
    documents = [numbers.integers(4, 64, length) for length in (5, 7, 1, 1, 9, 3, 16, 20, 2, 4, 11, 1)]
    batch = collate(list(pack([{"input_ids": ids} for ids in documents], 16, pad_token_id=0)))
    assert len(batch["input_ids"]) > 3

    def logits(batch):
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    with torch.no_grad():
        packed, flat = logits(batch), logits(flatten(batch)).reshape(*batch["input_ids"].shape, -1)
        for row, positions in enumerate(batch["position_ids"]):
            begins = [*(positions == 0).nonzero().flatten().tolist(), 16]
            for start, end in itertools.pairwise(begins):
                alone = model(input_ids=batch["input_ids"][row:row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flat, packed, rtol=1e-5, atol=1e-5)
        # padding never leaks, and the test above would notice a leak
        changed = {**batch, "input_ids": torch.where(batch["token_mask"], batch["input_ids"], 33)}
        torch.testing.assert_close(logits(changed)[batch["token_mask"]], packed[batch["token_mask"]], rtol=0, atol=0)
        leaking = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
        assert (leaking - packed).abs().max() > 0.1, "with a cache transformers takes the row for one document: red.data.packing says so"
