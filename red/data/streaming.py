"""Text of any size, read, tokenised and packed while the training runs, in an order that is the same every time.

The source is cut into blocks of documents (`red.data.sources`). Rank r of W takes the blocks whose number leaves r when divided by W; its worker k of K
tokenises every K-th of them, and the training process packs them in order: the rows depend on the source, the tokenizer, max_length and W, but not on K.
At its end the source begins again. A `Place` says where a row's successor begins; the places of all ranks are a stream's state, from which the
run goes on at any number of ranks: no document is lost or read twice, and nothing before those places is read at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from red.data import loading as data
from red.errors import REDError
from red.files import atomic_write_json
from red.data.packing import pack, split
from red.data.sources import open_source

STREAM_FILE = "stream.json"  # in a checkpoint
PLACE = "place"  # a batch's key, taken out before the step
AHEAD = 8  # blocks that each worker has ready: hundreds of thousands of tokens


@dataclass(frozen=True)
class Place:
    """Where a rank's next row begins."""

    number: int  # of the pass over the source
    block: int
    piece: int  # of the block; a document longer than max_length has several
    source: dict | None = None  # the source's own state at that block

    @property
    def key(self) -> tuple[int, int, int]:
        return self.number, self.block, self.piece


@dataclass(frozen=True)
class Block:
    """Tokenised documents in pieces of at most max_length tokens, and where they come from."""

    number: int
    block: int
    pieces: list[dict]
    source: dict | None


class PackedStream(IterableDataset):
    """Packed rows without end; iterating yields what `PackedDataset` holds, `input_ids`, `labels`, `position_ids`, `token_mask`, each [max_length].

    Args:
        source: a path to .txt, .jsonl or a saved data set; a `datasets.Dataset` or IterableDataset; or an iterable, of what `red.data.loading.load_examples` reads.
        tokenizer: the teacher's; may be None where the examples are tokenised.
        vocab_size: rows of the teacher's embedding.
        rank, world_size: this process takes its share of all rows.
        num_workers: processes that read and tokenise; 0 does it in this one.

    Raises:
        REDError: as `red.data.loading.load_examples` and `red.data.loading.check_examples`, when the text in question is read.
    """

    def __init__(self, source, tokenizer=None, *, vocab_size: int, max_length: int, pad_token_id: int = 0, text_column: str = "text",
                 assistant_only_loss: bool = False, rank: int = 0, world_size: int = 1, num_workers: int = 0):
        self.source, self.tokenizer, self.vocab_size = open_source(source, tokenizer), tokenizer, vocab_size
        self.max_length, self.pad_token_id = max_length, pad_token_id
        self.reading = {"text_column": text_column, "assistant_only_loss": assistant_only_loss}
        self.rank, self.world_size, self.num_workers = rank, world_size, min(num_workers, self.source.most_workers or num_workers)
        self.layouts: list[list[tuple[int, int, int]]] = []  # of the state: the places of all ranks; earlier ones of another world size before them
        self.state: dict | None = None  # the source's, at the least of the last layout

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row, _ in self.rows():
            yield row

    def rows(self) -> Iterator[tuple[dict[str, Tensor], Place | None]]:
        """This rank's rows from the loaded state on, each with the place where the next one begins."""
        blocks = _Blocks(self, self.rank, self.world_size, self.layouts, self.state)
        loader = DataLoader(blocks, batch_size=None, collate_fn=_same, num_workers=self.num_workers, worker_init_fn=_quiet,
                            prefetch_factor=AHEAD if self.num_workers else None,
                            generator=torch.Generator())  # its own: a resumed run must not draw from the model's once more
        return self._packed(loader, self.layouts)

    def first(self, samples: int) -> list[dict[str, Tensor]]:
        """The first rows of the text, the same on every rank, whatever was read before; fewer where there are fewer."""
        rows = [row for row, _ in islice(self._packed(_Blocks(self, 0, 1, [], None, once=True), []), samples)]
        if not rows:
            raise REDError("The stream is empty: no document has a token. Give text, or check the file and the name of its column.")
        return rows

    def _packed(self, blocks, layouts: list) -> Iterator[tuple[dict[str, Tensor], Place | None]]:
        begun = {place[:2]: place[2] for place in sorted(place for layout in layouts for place in layout)}  # the first piece to take of a block
        pending, free, latest = [], self.max_length, None  # latest: the last pass that had tokens
        for block in blocks:
            if isinstance(block, REDError):
                raise block
            if block.pieces or latest is None:
                latest = block.number
            elif block.number - latest > 1:
                raise REDError("The stream has no tokens for this process in a whole pass. Give text, or check the name of its column.")
            for index in range(begun.pop((block.number, block.block), 0), len(block.pieces)):
                size = len(block.pieces[index]["input_ids"])
                if size > free:
                    yield self._row(pending), Place(block.number, block.block, index, block.source)
                    pending, free = [], self.max_length
                pending.append(block.pieces[index])
                free -= size
        if pending:
            yield self._row(pending), None

    def _row(self, pieces: list[dict]) -> dict[str, Tensor]:
        return pack(pieces, self.max_length, pad_token_id=self.pad_token_id)[0]

    @property
    def start(self) -> Place:
        """Where reading begins: the place to save when no row has been taken."""
        if not self.layouts:
            return Place(0, 0, 0)
        same = len(self.layouts[-1]) == self.world_size
        return Place(*(self.layouts[-1][self.rank] if same else (*min(self.layouts[-1])[:2], 0)), self.state)

    @property
    def facts(self) -> dict:
        """What decides the rows, and so must be the same when they go on."""
        return {**self.source.facts, "max_length": self.max_length, **self.reading,
                "tokenizer_hash": data.tokenizer_hash(self.tokenizer) if self.tokenizer is not None else None}

    def state_dict(self, places: Sequence[Place]) -> dict:
        """What strict JSON can hold of a stream whose ranks are at `places`, rank by rank."""
        layout, behind = [place.key for place in places], min(places, key=lambda place: place.key)
        earlier = [other for other in self.layouts if max(other)[:2] >= behind.key[:2] and not (  # else all of it is behind, or said by the new one
            len(other) == len(layout) and all(then <= now for then, now in zip(other, layout, strict=True)))]
        return {"facts": self.facts, "layouts": [*earlier, layout], "source": behind.source}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, by any number of ranks; REDError if the stream is another one."""
        for name, now in self.facts.items():
            if (then := state["facts"].get(name)) != now:
                raise REDError(f"The run was reading another stream: {name} was {then!r} and is {now!r}. Resume with the same text and settings, "
                               "or begin a new run.")
        layouts = [[tuple(place) for place in layout] for layout in state["layouts"]]
        if not all(layout and all(len(place) == 3 and all(type(number) is int and number >= 0 for number in place) for place in layout) for layout in layouts):
            raise ValueError("layouts must be lists of [pass, block, piece], one for each process")
        self.layouts = layouts
        self.state = state["source"]


class _Blocks(IterableDataset):
    """The tokenised blocks of one rank in order, or of one of its workers; a REDError in place of a block that could not be read."""

    def __init__(self, stream: PackedStream, rank: int, world_size: int, layouts: list, state: dict | None, once: bool = False):
        self.stream, self.rank, self.world_size, self.layouts, self.state, self.once = stream, rank, world_size, layouts, state, once

    def __iter__(self) -> Iterator[Block | REDError]:
        worker, source, taken = get_worker_info(), self.stream.source, count()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        begin, block, _ = min(self.layouts[-1]) if self.layouts else (0, 0, 0)
        state = self.state
        for number in count(begin):
            owned = []  # of this pass, by this rank
            try:
                for found, first, items, before in source.read(number, block, state, partial(self._wanted, number, owned, taken, mine, workers)):
                    yield Block(number, found, self._pieces(items, first), before)
            except REDError as error:  # raised where it is waited for: a worker's own exceptions arrive as a traceback
                yield REDError(f"{error}{source.where(owned[-1]) if owned else ''}")
                return
            if self.once:
                return
            if not owned and number > begin:
                yield REDError(f"The text has fewer blocks than there are processes ({self.world_size}), so one would train on nothing. "
                               "A text so small needs no stream: set streaming=False.")
                return
            block, state = 0, None

    def _wanted(self, number: int, owned: list, taken: Iterator[int], mine: int, workers: int, block: int) -> bool:
        if block % self.world_size != self.rank or any((number, block) < layout[block % len(layout)][:2] for layout in self.layouts):
            return False  # another rank's, or done
        owned[:] = [block]
        return next(taken) % workers == mine

    def _pieces(self, items: list, first: int) -> list[dict]:
        stream = self.stream
        examples = data.tokenise(items, stream.tokenizer, first=first, **stream.reading)
        data.check_ids(examples, stream.tokenizer, stream.vocab_size)
        return [piece for example in examples for piece in split(example, stream.max_length)]


def _same(block):
    return block


def _quiet(_: int) -> None:
    """A worker is one process of several: its tokenizer shall not start threads of its own, nor warn that it was forked."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def require_steps(rows, max_steps: int) -> None:
    """REDError where the rows are a stream, which has no end, and nothing says when the training ends."""
    if isinstance(rows, PackedStream):
        require_max_steps(max_steps)


def require_max_steps(max_steps: int) -> None:
    if max_steps <= 0:
        raise REDError(f"A stream has no end, so the training needs one: max_steps={max_steps}. Set max_steps to a number of optimiser steps.")


class _Rows(IterableDataset):
    def __init__(self, stream: PackedStream):
        self.stream = stream

    def __iter__(self):
        return self.stream.rows()


def _collate(collator, items: list[tuple[dict, Place]]) -> dict:
    return {**collator([row for row, _ in items]), PLACE: items[-1][1]}


class StreamLoading:
    """What a Trainer needs to train on a PackedStream and go on in its middle: the batches carry their place, and a checkpoint keeps all ranks'."""

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True  # the stream begins where the checkpoint says; Trainer would read and drop what lies before it
        self._place = self.train_dataset.start
        return DataLoaderShard(_Rows(self.train_dataset), device=self.args.device, batch_size=self._train_batch_size,
                               collate_fn=partial(_collate, self.data_collator), pin_memory=self.args.dataloader_pin_memory,
                               _non_blocking=self.accelerator.non_blocking, generator=torch.Generator())

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        if isinstance(self.train_dataset, PackedStream):
            for batch in batches:
                self._place = batch.pop(PLACE)
        return batches, items

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # every rank comes here
        if isinstance(self.train_dataset, PackedStream):
            places = gather_object([self._place])
            if self.args.should_save:
                atomic_write_json(Path(output_dir) / STREAM_FILE, self.train_dataset.state_dict(places))

    def load_stream(self, checkpoint: str | Path) -> None:
        """Set the stream, if there is one, to where the checkpoint was written; before its batches are asked for."""
        if not isinstance(self.train_dataset, PackedStream):
            return
        path = Path(checkpoint) / STREAM_FILE
        if not path.is_file():
            raise REDError(f"{checkpoint} has no {STREAM_FILE}: that run did not stream its text. Resume with streaming=False, or begin a new run.")
        try:
            self.train_dataset.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except REDError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise REDError(f"{path} cannot be read: {error!r}. Resume from another checkpoint.") from error
