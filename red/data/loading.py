"""From what a user has (paths, data sets, texts, ids) to tokenised examples that are known to be good before anything trains.

An example is a dict with `input_ids` (int32 array), where some tokens are not to be predicted `labels` of the same length (-100 there),
and `number`, its place in the source, for messages. `red.data.packing` makes rows of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from red.data.chat import render
from red.data.packing import IGNORE, PackedDataset, collate, flatten, for_attention, pack, split
from red.data.text import check_surrogates, documents_of
from red.errors import REDError
from red.files import atomic_write_text, json_lines, nearest, require_existing

__all__ = ["IGNORE", "PackedDataset", "check_examples", "check_ids", "check_packed", "collate", "flatten", "for_attention", "load_examples", "pack", "pad_id", "save_examples", "tokenise", "tokenizer_hash"]

BATCH = 1000  # texts that are tokenised together
HASH_KEY, UTF8 = "tokenizer_hash", "Save it in UTF-8: iconv -f latin1 -t utf-8, say."


def load_examples(source, tokenizer=None, *, text_column: str = "text", max_length: int | None = None, assistant_only_loss: bool = False) -> list[dict]:
    """Read and tokenise.

    Args:
        source: one of
            a path to .txt: documents separated by blank lines; a file without blank lines holds one document a line;
            a path to .jsonl: one object a line, as the dicts below; the first line may be `{"tokenizer_hash": …}` alone;
            a path to a folder that `datasets.save_to_disk` wrote (a DatasetDict's "train" split is taken);
            a `datasets.Dataset`, or an IterableDataset that ends;
            an iterable of texts or of dicts. Dicts have `input_ids` (optionally `labels`, `attention_mask`), or `prompt` and `completion`
            (the prompt gets no loss; both are tokenised separately, as a prompt is at inference), or `messages`, which the tokenizer's chat
            template writes (`red.data.chat`), or the column `text_column`.
        tokenizer: the teacher's; may be None where every example has `input_ids`. Texts end with its eos token, where it has one.
        max_length: longer examples are cut into pieces of this many tokens; None leaves them whole.
        assistant_only_loss: of `messages`, the assistant's turns alone get a loss.

    Raises:
        REDError: a missing path, an unknown format or column, tokens of another tokenizer, examples that contradict themselves.
    """
    examples: list[dict] = []
    items, seen = _items(source, tokenizer), 0
    while chunk := list(islice(items, BATCH)):
        examples += tokenise(chunk, tokenizer, text_column, first=seen, assistant_only_loss=assistant_only_loss)
        seen += len(chunk)
    if max_length is not None:
        examples = [{**piece, "number": example["number"]} for example in examples for piece in split(example, max_length)]
    return examples


def save_examples(path: str | Path, examples: Iterable[Mapping], tokenizer) -> None:
    """Write tokenised examples as .jsonl that knows its tokenizer: `load_examples` refuses it with another one."""
    lines = [json.dumps({HASH_KEY: tokenizer_hash(tokenizer)})]
    lines += [json.dumps({key: np.asarray(value).tolist() for key, value in example.items() if key != "number"})
              for example in examples]
    atomic_write_text(path, "\n".join(lines) + "\n")


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of the vocabulary and the ids of bos, eos and unk: equal hashes mean that ids mean the same.

    The padding token is left out: people set it to eos at will, and no loss sees it.
    """
    specials = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    canonical = json.dumps([sorted(tokenizer.get_vocab().items()), specials], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def pad_id(tokenizer=None, config=None) -> int:
    """An id to pad with: the tokenizer's, else the config's, else an eos, else 0. Any would do, for no loss and no document sees it."""
    for owner in (tokenizer, config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value >= 0:
                return value
    return 0


def check_examples(examples: Sequence[Mapping], tokenizer, vocab_size: int, *, max_length: int | None = None) -> None:
    """Refuse what would train on nothing, crash in an embedding, or turn into NaN.

    Args:
        examples: what `load_examples` returned.
        tokenizer: the teacher's, or None where there is none.
        vocab_size: rows of the teacher's embedding.
        max_length: tokens of a row; None does not ask for a full one.

    Raises:
        REDError: no tokens; fewer than one row has; or what `check_ids` refuses.
    """
    total = sum(len(example["input_ids"]) for example in examples)
    if total == 0:
        raise REDError(f"The data set is empty: {len(examples)} examples, 0 tokens. Give text, or check the file and the name of its column.")
    if all(len(example["input_ids"]) < 2 for example in examples):
        raise REDError(f"None of the {len(examples)} examples has two tokens, so there is nothing to predict. Look at what the tokenizer makes of the text: "
                       "a tokenizer of another class than the one that was saved can read everything as nothing.")
    check_ids(examples, tokenizer, vocab_size)
    if max_length is not None and total < max_length:
        raise REDError(f"The data set has {total} tokens in {len(examples)} examples, less than one sequence of max_length={max_length}. "
                       f"Give more text, or set max_length to {total} or less.")


def check_ids(examples: Sequence[Mapping], tokenizer, vocab_size: int) -> None:
    """REDError on ids or labels out of range, padding among the tokens, or a tokenizer with more entries than the embedding."""
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise REDError(f"The tokenizer has {len(tokenizer)} entries but the teacher's embedding has {vocab_size}: it is not this teacher's. "
                       "Use the tokenizer that was saved with the teacher.")
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = None if pad == getattr(tokenizer, "eos_token_id", None) else pad
    for index, example in enumerate(examples):
        index = example.get("number", index)
        ids = np.asarray(example["input_ids"])
        bad = (ids < 0) | (ids >= vocab_size)
        if bad.any():
            raise REDError(f"Example {index} has the id {ids[bad][0]} at token {bad.argmax()}, outside the teacher's vocabulary of {vocab_size} "
                           f"(0 … {vocab_size - 1}). Tokenise the data with the teacher's own tokenizer.")
        labels = np.asarray(example.get("labels", ids))
        bad = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
        if bad.any():
            raise REDError(f"Example {index} has the label {labels[bad][0]} at token {bad.argmax()}: use an id below {vocab_size}, or {IGNORE} "
                           "for a token without loss.")
        if pad is not None and len(ids) > 1 and (ids[0] == pad or ids[-1] == pad):
            raise REDError(f"Example {index} is padded: it has {int((ids == pad).sum())} tokens with the id {pad} ({tokenizer.pad_token!r}). "
                           "Give its attention_mask, or remove the padding; red packs the rows itself.")


def check_packed(rows: PackedDataset, vocab_size: int) -> None:
    """REDError if a ready PackedDataset has ids or labels outside the teacher's vocabulary."""
    for what, values in (("id", rows.tokens), ("label", rows.labels[rows.labels != IGNORE])):
        bad = (values < 0) | (values >= vocab_size)
        if bad.any():
            raise REDError(f"The packed rows have the {what} {values[bad][0]}, outside the teacher's vocabulary of {vocab_size}. "
                           "Tokenise the data with the teacher's own tokenizer.")


def _items(source, tokenizer) -> Iterator:
    """Texts and dicts, one by one, from any source."""
    if isinstance(source, (str, Path)):
        source = open_path(Path(source), tokenizer)
    check_source(source, tokenizer)
    return iter(source)


def check_source(source, tokenizer) -> None:
    """REDError if it cannot be read, or is a data set that was tokenised by another tokenizer."""
    if hasattr(source, "column_names") and hasattr(source, "info"):  # a datasets.Dataset or IterableDataset
        stored = re.search(HASH_KEY + r"\W{1,3}([0-9a-f]{64})", source.info.description or "")
        check_hash(stored and stored.group(1), tokenizer, "The data set")
    elif isinstance(source, Mapping):
        raise REDError(f"The data is a dict with the keys {', '.join(map(str, source))}, not a sequence of examples. Give one of its splits, or a list of dicts.")
    elif not isinstance(source, Iterable):
        raise REDError(f"Data of type {type(source).__name__} cannot be read. Give a path, a datasets.Dataset, or an iterable of texts or dicts.")


def open_path(path: Path, tokenizer) -> Iterable:
    """What a .txt or .jsonl file or a saved data set holds; REDError where there is none of these."""
    require_existing(path, "The data path")
    if path.is_dir():
        return _saved_dataset(path)
    if path.suffix == ".txt":
        try:
            return documents_of(path.read_bytes().decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise REDError(f"{path} cannot be read as text: {error}. {UTF8}") from error
    if path.suffix == ".jsonl":
        return _json_lines(path, tokenizer)
    raise REDError(f"The data file {str(path)!r} ends in {path.suffix or 'nothing'!r}; red reads .txt, .jsonl and folders of datasets.save_to_disk. Convert it, or load it with `datasets` and pass the data set.")


def _json_lines(path: Path, tokenizer) -> Iterator:
    for _, value in json_lines(path):
        if isinstance(value, dict) and set(value) == {HASH_KEY}:
            check_hash(value[HASH_KEY], tokenizer, str(path))
        else:
            yield value


def _saved_dataset(path: Path):
    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        raise REDError(f"The folder {str(path)!r} is not a data set that datasets.save_to_disk wrote (no state.json). Name a file in it.")
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise REDError(f"{str(path)!r} is a saved data set, and reading it needs the `datasets` package. Run: pip install datasets") from error
    loaded = load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        if "train" not in loaded:
            raise REDError(f"{str(path)!r} has the splits {', '.join(loaded)}, and no train. Name one: {path / next(iter(loaded))}")
        return loaded["train"]
    return loaded


def check_hash(stored: str | None, tokenizer, what: str) -> None:
    """REDError if a hash was stored and is not this tokenizer's."""
    if stored and tokenizer is not None and stored != tokenizer_hash(tokenizer):
        raise REDError(f"{what} was tokenised by another tokenizer (hash {str(stored)[:12]}; the teacher's is {tokenizer_hash(tokenizer)[:12]}). "
                       "Tokenise its text again with the teacher's tokenizer, or give the text itself.")


def tokenise(items: list, tokenizer, text_column: str, first: int = 0, *, assistant_only_loss: bool = False) -> list[dict]:
    """One batch of texts and dicts -> examples, numbered from `first`; empty ones are left out. What `load_examples` does, batch by batch."""
    texts: list[tuple[int, str, bool]] = []  # item, text, is it the beginning of its example
    chats: dict[int, dict] = {}
    for index, item in enumerate(items):
        if not isinstance(item, (str, Mapping)):
            raise REDError(f"Example {first + index} is a {type(item).__name__}; a text or a dict is needed.")
        if isinstance(item, Mapping) and "input_ids" in item:
            continue
        if isinstance(item, Mapping) and "messages" in item:
            chats[index] = render(item["messages"], tokenizer, first + index, assistant_only_loss=assistant_only_loss, tools=item.get("tools"))
        elif assistant_only_loss:
            raise REDError(f"Example {first + index} has no messages, and assistant_only_loss asks for the assistant's turns. "
                           "Give conversations, or set assistant_only_loss=False.")
        elif isinstance(item, str):
            texts.append((index, item, True))
        else:
            texts += [(index, text, begins) for text, begins in _texts_of(item, first + index, text_column)]
    if texts and tokenizer is None:
        raise REDError(f"Example {first + texts[0][0]} is text, and there is no tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(teacher).")

    parts: dict[int, list[list[int]]] = {}
    for begins in (True, False):  # only a beginning gets the tokenizer's own bos
        chosen = [(index, text) for index, text, is_first in texts if is_first == begins]
        if chosen:
            try:
                encoded = tokenizer([text for _, text in chosen], add_special_tokens=begins, truncation=False, padding=False, verbose=False)
            except (TypeError, UnicodeError):
                for index, text in chosen:
                    check_surrogates(text, f"Example {first + index}")
                raise
            for (index, _), ids in zip(chosen, encoded["input_ids"], strict=True):
                parts.setdefault(index, []).append(ids)
    blank = parts.keys() - {index for index, text, _ in texts if text.strip()}
    examples = [{**(_finish(parts[index], tokenizer.eos_token_id) if index in parts else chats.get(index) or _given(item, first + index)),
                 "number": first + index} for index, item in enumerate(items) if index not in blank]
    return [example for example in examples if len(example["input_ids"])]


def _texts_of(item: Mapping, number: int, text_column: str) -> list[tuple[str, bool]]:
    if "prompt" in item and "completion" in item:
        texts = [(item["prompt"], True), (item["completion"], False)]
    elif text_column in item:
        texts = [(item[text_column], True)]
    else:
        like = nearest(text_column, map(str, item))
        raise REDError(f"Example {number} has the columns {', '.join(map(str, item)) or '(none)'}; red reads {text_column!r} (text_column), "
                       f"prompt and completion, messages, or input_ids.{f' Did you mean text_column={like!r}?' if like else ' Set text_column.'}")
    for text, _ in texts:
        if not isinstance(text, str):
            remedy = "Give conversations as messages." if isinstance(text, list) else "Make it a string, or leave the row out."
            raise REDError(f"Example {number} has {text!r:.60} where text is needed. {remedy}")
    return texts


def _finish(parts: list[list[int]], eos: int | None) -> dict:
    """Join a beginning and, in prompt/completion data, what follows; end with eos; mask the prompt."""
    if len(parts) == 2 and parts[0][-1:] == [eos]:  # a tokenizer that ends every text itself ended the prompt too
        parts[0].pop()
    ids = [token for part in parts for token in part]
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    ids = np.asarray(ids, np.int32)
    if len(parts) == 1:
        return {"input_ids": ids}
    labels = ids.copy()
    labels[:len(parts[0])] = IGNORE
    return {"input_ids": ids, "labels": labels}


def _given(item: Mapping, number: int) -> dict:
    """An example that is tokenised already: ids as int32, tokens that its attention_mask hides removed."""
    if item["input_ids"] is None:
        raise REDError(f"Example {number} has no input_ids (None). Give a list of integers, or leave the column out and give text.")
    example = {}
    for key in ("input_ids", "labels", "attention_mask"):
        if item.get(key) is not None:
            try:
                value = np.asarray(item[key])
            except ValueError:  # lists of different lengths in it
                value = np.empty((1, 1))
            if value.ndim != 1 or (value.size and value.dtype.kind not in "iub"):
                raise REDError(f"Example {number}: {key} must be a flat list of integers, not {value.dtype} of shape {value.shape}.")
            example[key] = value.astype(np.int64).clip(-2**31, 2**31 - 1).astype(np.int32)
    for key, value in example.items():
        if len(value) != len(example["input_ids"]):
            raise REDError(f"Example {number} has {len(example['input_ids'])} input_ids and {len(value)} {key}; both need the same length.")
    mask = example.pop("attention_mask", None)
    return example if mask is None else {key: value[mask != 0] for key, value in example.items()}
