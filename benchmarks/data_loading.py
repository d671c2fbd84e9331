"""How fast rows come to the training: `python benchmarks/data_loading.py --out FILE` prints a table and writes JSON. No GPU, no network.

The text is Python's own standard library one file a document; the tokenizer a byte-level BPE of 32 768 entries that is
trained on a part of it, or what --tokenizer names. A training that reads 25 000 tokens/s needs 12 rows of 2048 tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from red.data.loading import collate, load_examples, pack
from red.files import atomic_write_json
from red.data.streaming import PackedStream
from red.data.token_cache import cached

LENGTH, BATCH = 2048, 3
NEEDED = 25_000  # tokens/s of one GPU


def documents() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [text for path in files if (text := path.read_text(encoding="utf-8", errors="ignore")).strip()]


def byte_level_bpe(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """32 768 entries, split as GPT-2's."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=32768, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")


def rate(rows: Iterable[dict], seconds: float) -> float:
    """Tokens a second after the first batch, over at most `seconds`."""
    iterator = iter(rows)
    next(iterator)
    tokens, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds and (batch := next(iterator, None)) is not None:
        tokens += int(batch["token_mask"].sum())
    return tokens / spent


def waiting(rows: Iterable[dict], seconds: float) -> tuple[float, float]:
    """What a GPU of NEEDED tokens a second would wait for: (share of the time, longest wait in seconds), after the first batch."""
    iterator = iter(rows)
    next(iterator)
    waits, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        batch = next(iterator)
        waits.append(time.perf_counter() - asked)
        time.sleep(batch["input_ids"].numel() / NEEDED)  # its step
    return sum(waits) / (time.perf_counter() - began), max(waits)


def batches(rows, workers: int) -> DataLoader:
    return DataLoader(rows, batch_size=BATCH, num_workers=workers, collate_fn=collate)


def timed(work: Callable):
    """(what it returns, seconds of this process on a core: others on the machine do not count)"""
    began = time.process_time()
    return work(), time.process_time() - began


def measure(texts: list[str], tokenizer, folder: Path, workers: list[int], seconds: float) -> list[dict]:
    """One row of the table each: what, tokens a second, and how often that is what a GPU needs; of streams also how long that GPU waits."""
    found = []

    def note(what: str, tokens: float, waits: tuple[float, float] | None = None) -> None:
        found.append({"what": what, "tokens_per_second": round(tokens), "times_needed": round(tokens / NEEDED, 1),
                      **({} if waits is None else {"waiting_share": round(waits[0], 4), "longest_wait_seconds": round(waits[1], 4)})})
        waited = "" if waits is None else f"   a GPU waits {waits[0]:.1%} of its time, {waits[1]:.2f} s at most"
        print(f"{what:<52} {tokens:>14,.0f} tokens/s {tokens / NEEDED:>10.1f} x{waited}", flush=True)

    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in texts), encoding="utf-8")
    examples, spent = timed(lambda: load_examples(text, tokenizer))
    tokens = sum(len(example["input_ids"]) for example in examples)
    note("reading and tokenising everything before training", tokens / spent)
    rows, spent = timed(lambda: pack(examples, LENGTH, pad_token_id=0))
    note("packing it", tokens / spent)
    kept = folder / "kept"
    kept.mkdir()
    cached(lambda: rows, text, tokenizer, kept)
    again = cached(lambda: rows, text, tokenizer, kept)
    for name, packed in (("packed rows in memory", rows), ("packed rows of the token cache", again)):
        for count in workers:
            note(f"{name}, {count} workers", rate(batches(packed, count), seconds))
    for count in workers:
        stream = PackedStream(text, tokenizer, vocab_size=len(tokenizer), max_length=LENGTH, num_workers=count)
        note(f"a stream of the same file, {count} workers", rate(batches(stream, 0), seconds), waiting(batches(stream, 0), 2 * seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write JSON here")
    parser.add_argument("--tokenizer", help="a tokenizer's name or folder instead of the one that is trained")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--documents", type=int, help="take the first so many only")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core, as a worker has
    torch.set_num_threads(1)
    texts = documents()[:options.documents]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else byte_level_bpe(texts[::5])
    with tempfile.TemporaryDirectory() as folder:
        found = measure(texts, tokenizer, Path(folder), options.workers, options.seconds)
    if options.out:
        atomic_write_json(options.out, {"vocabulary": len(tokenizer), "max_length": LENGTH, "batch": BATCH, "needed": NEEDED, "cores": os.cpu_count(),
                                        "bytes": sum(map(len, texts)), "rows": found})


if __name__ == "__main__":
    main()
