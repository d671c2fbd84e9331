"""Where a stream's text comes from, in blocks of documents that have a number and can be read from any of them on.

A source has `facts` (what must not change before a run is resumed), `most_workers`, `where(block)` for messages, and

    read(number, start, state, wanted) -> (block, number of its first document, documents, state) …

the blocks of pass `number` from block `start` on for which `wanted(block)` is true; it is asked once for each block, in order. `state` is what the
source needs to begin at `start` without reading what lies before it, and what is yielded is that of the block yielded.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from red.data import loading as data
from red.data.text import BLANK_LINES
from red.errors import REDError
from red.files import require_existing

DOCUMENTS = 64  # in a block of a data set
SMALLEST, LARGEST = 2**12, 2**18  # bytes of a file's block; a file has about 1024 until they reach the largest, some 60 000 tokens
Read = Iterator[tuple[int, int, list, Any]]


def open_source(source, tokenizer):
    """The source of a path, a data set or anything that can be iterated over again.

    Raises:
        REDError: a missing path, an unknown format, tokens of another tokenizer, or an iterator, which can be read only once.
    """
    if isinstance(source, (str, Path)):
        path = require_existing(source, "The data path")
        if path.is_file() and path.suffix in (".txt", ".jsonl"):
            return FileSource(path, tokenizer)
        source = data.open_path(path, tokenizer)  # a saved data set, or the message that names what red reads
    if isinstance(source, Iterator):
        raise REDError(f"A {type(source).__name__} can be read only once, and a stream begins again at its end and when a run is resumed. "
                       "Give a list, a data set (datasets.IterableDataset.from_generator), or an object whose __iter__ begins anew.")
    data.check_source(source, tokenizer)
    if hasattr(source, "to_iterable_dataset"):  # a datasets.Dataset, read where it lies on the disk
        source = source.to_iterable_dataset()
    return DatasetSource(source) if hasattr(source, "load_state_dict") and hasattr(source, "iter") else IterableSource(source)


def named_dataset(name: str | None, split: str, *, streaming: bool = False):
    """`datasets.load_dataset`; None without a name.

    Raises:
        REDError: `datasets` is not installed, or does not get it: no such name or split, no network, no permission.
    """
    if name is None:
        return None
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise REDError(f"dataset_name={name!r} needs the `datasets` package. Run: pip install datasets") from error
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # each of a kind of its own
        raise REDError(f"dataset_name={name!r} cannot be loaded: {error}. Look at the name and at dataset_split={split!r}; or load it yourself and pass the data set.") from error


class FileSource:
    """A .jsonl or .txt file, read by byte ranges: any block is found at once, and a document belongs to the block in which it begins.

    A .txt file has documents between blank lines if its first 256 KiB have a blank line, else one a line.
    """

    most_workers = None

    def __init__(self, path: Path, tokenizer):
        self.path, self.size = path, path.stat().st_size
        if not self.size:
            raise REDError(f"The data file {str(path)!r} is empty. Give a file with text.")
        self.bytes = min(LARGEST, max(SMALLEST, self.size // 1024))
        self.blocks = -(-self.size // self.bytes)
        self.facts = {"file": path.name, "bytes": self.size}
        with path.open("rb") as file:
            head = file.read(LARGEST).removeprefix(codecs.BOM_UTF8).strip()
        self.json = path.suffix == ".jsonl"
        self.paragraphs = not self.json and re.search(BLANK_LINES.pattern.encode(), head) is not None
        if self.json and isinstance(first := self._parsed(head.split(b"\n")[0], 0) if b"\n" in head else None, dict) and set(first) == {data.HASH_KEY}:
            data.check_hash(first[data.HASH_KEY], tokenizer, str(path))

    def where(self, block: int) -> str:
        return f" Examples are counted from byte {block * self.bytes} of {self.path}."

    def read(self, number: int, start: int, state, wanted: Callable[[int], bool]) -> Read:
        for block in range(start, self.blocks):
            if wanted(block):
                yield block, 0, self.documents(block), None

    def documents(self, block: int) -> list:
        """The documents that begin in a block: text, or what the JSON lines hold."""
        start, end = block * self.bytes, (block + 1) * self.bytes
        with self.path.open("rb") as file:
            if self.paragraphs:
                return [self._text(document, start) for document in _paragraphs(_lines(file, start), start, end)]
            lines = [(place, line) for place, line in _until(_lines(file, start), end) if line.strip()]
        if not self.json:
            return [self._text(line, place) for place, line in lines]
        values = [self._parsed(line, place) for place, line in lines]
        return [value for value in values if not (isinstance(value, dict) and set(value) == {data.HASH_KEY})]

    def _text(self, document: bytes, place: int) -> str:
        """As `red.data.text.documents_of` has it, without the end of its last line."""
        try:
            return document.decode("utf-8" if place else "utf-8-sig").replace("\r\n", "\n").strip("\n")
        except UnicodeDecodeError as error:
            raise REDError(f"{self.path}, from byte {place} on, is not UTF-8: {error}. Convert the file.") from error

    def _parsed(self, line: bytes, place: int):
        try:
            return json.loads(self._text(line, place))
        except REDError:
            raise
        except (ValueError, RecursionError) as error:
            raise REDError(f"{self.path}, the line at byte {place} is not JSON: {error}. A .jsonl file holds one object a line.") from error


def _lines(file, start: int) -> Iterator[tuple[int, bytes]]:
    """(its place, line) from the first line on that begins at byte `start` or later."""
    if start:
        file.seek(start - 1)
        file.readline()  # the rest of a line that began before; the line break alone where one begins at `start`
    place = file.tell()
    for line in file:
        yield place, line
        place += len(line)


def _until(lines: Iterable[tuple[int, bytes]], end: int) -> Iterator[tuple[int, bytes]]:
    for place, line in lines:
        if place >= end:
            return
        yield place, line


def _paragraphs(lines: Iterable[tuple[int, bytes]], start: int, end: int) -> Iterator[bytes]:
    """Documents between blank lines; one belongs where the last blank line before it begins, the first to the beginning of the file."""
    document, mine = [], start == 0
    for place, line in lines:
        if line.strip():
            if mine:
                document.append(line)
            elif place >= end:
                return
            continue
        if document:
            yield b"".join(document)
            document = []
        if place >= end:
            return
        mine = True
    if document:
        yield b"".join(document)


class DatasetSource:
    """A `datasets.IterableDataset`, which says itself where it is and begins there again. Every reader reads all of it and leaves out what others take.

    `iter(batch_size)` and not plain iteration, which in a worker of a DataLoader would read that worker's shards only.
    """

    most_workers = None

    def __init__(self, dataset):
        self.dataset = dataset
        self.facts = {"data set": sorted(dataset.column_names or []), "shards": dataset.num_shards}

    def where(self, block: int) -> str:
        return ""

    def read(self, number: int, start: int, state, wanted: Callable[[int], bool]) -> Read:
        self.dataset.load_state_dict(state)  # None: from the beginning
        block = start if state else 0
        for columns in self.dataset.iter(batch_size=DOCUMENTS):
            if block >= start and wanted(block):
                yield block, block * DOCUMENTS, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], state
            state = self.dataset.state_dict()
            block += 1


class IterableSource:
    """Anything with an `__iter__` that begins anew. It has no state: to begin at a block, the documents before it are read and dropped."""

    most_workers = 1  # one that asks which worker it is in, as torch's IterableDatasets do, must find itself alone
    facts: dict = {}

    def __init__(self, items: Iterable):
        self.items = items

    def where(self, block: int) -> str:
        return ""

    def read(self, number: int, start: int, state, wanted: Callable[[int], bool]) -> Read:
        items, block = iter(self.items), 0
        while documents := list(islice(items, DOCUMENTS)):
            if block >= start and wanted(block):
                yield block, block * DOCUMENTS, documents, None
            block += 1
