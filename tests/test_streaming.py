"""Streams: the same rows as packing everything before, in an order that workers do not change, and gone on with in the middle without reading again."""

from __future__ import annotations

import json

import pytest
import torch

from red.data.loading import load_examples, pack, save_examples
from red.errors import REDError
from red.data.sources import FileSource
from red.data.streaming import PackedStream

LENGTH = 16


class Counted:
    """Texts that can be read again and again, and how many were."""

    def __init__(self, texts):
        self.texts, self.read = texts, 0

    def __iter__(self):
        for text in self.texts:
            self.read += 1
            yield text


def words(count: int, longest: int = 30) -> list[str]:
    """Documents that begin with their number, in 5 words, and have up to `longest` more: with 30 some are longer than a row, with 10 none."""
    lengths = torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{4 + int(digit)}" for digit in f"{number:05d}") + "".join(f" w{14 + number % 50}" for _ in range(length))
            for number, length in enumerate(lengths)]


def write(path, texts) -> object:
    """The texts as a file of the kind that the name says: one JSON object a line, one text a line, or between blank lines."""
    lines = [json.dumps({"text": text}) for text in texts] if path.suffix == ".jsonl" else texts
    path.write_text({"lines.txt": "\n", "paragraphs.txt": "\n \n\n"}.get(path.name, "\n").join(lines) + "\n")
    return path


def sources(tmp_path, texts) -> dict:
    datasets = pytest.importorskip("datasets")
    names = {name: write(tmp_path / name, texts) for name in ("rows.jsonl", "lines.txt", "paragraphs.txt")}
    halves = [write(tmp_path / f"{half}.jsonl", part) for half, part in (("a", texts[:170]), ("b", texts[170:]))]
    table = datasets.Dataset.from_dict({"text": texts})
    table.save_to_disk(tmp_path / "saved")
    return {**names, "saved": tmp_path / "saved", "table": table, "list": texts, "object": Counted(texts),
            "hub": datasets.load_dataset("json", data_files=list(map(str, halves)), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))}


def stream_of(source, tokenizer, **settings) -> PackedStream:
    return PackedStream(source, tokenizer, **{**dict(vocab_size=64, max_length=LENGTH), **settings})


def take(stream: PackedStream, count: int) -> tuple[list[dict], object]:
    """The next rows and the place after them."""
    rows, place, iterator = [], stream.start, stream.rows()
    for _ in range(count):
        row, place = next(iterator)
        rows.append(row)
    iterator.close()
    return rows, place


def equal(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(mine[key], other[key]) for mine, other in zip(ours, theirs, strict=True) for key in other)


def documents(rows) -> list[tuple[int, ...]]:
    """All pieces of documents in the rows, in order."""
    found = []
    for row in rows:
        ids, positions = row["input_ids"][row["token_mask"]].tolist(), row["position_ids"][row["token_mask"]].tolist()
        for token, position in zip(ids, positions, strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return [tuple(piece) for piece in found]


def test_every_source_streams_the_rows_that_packing_everything_gives(tmp_path, tiny_tokenizer):
    texts = words(400)
    packed = pack(load_examples(texts, tiny_tokenizer), LENGTH, pad_token_id=0)
    whole = [packed[index] for index in range(len(packed))]
    for name, source in sources(tmp_path, texts).items():
        stream = stream_of(source, tiny_tokenizer)
        assert equal(stream.first(10**6), whole), name
        rows, place = take(stream, len(whole) + 20)
        assert equal(rows[:len(whole) - 1], whole[:-1]), name
        assert place.number == 1, "a stream begins again at its end"
        assert documents(rows)[len(documents(whole)):][:9] == documents(whole)[:9]
        assert equal(stream.first(5), whole[:5]), "whatever was read before"


@pytest.mark.parametrize("name, content, expected", [
    ("lines.txt", "a\nbé\n\nccc\r\nd", ["a", "bé", "ccc", "d"]),
    ("lines.jsonl", '"a"\n\n{"b": 1}\n"ccc"', ["a", {"b": 1}, "ccc"]),
    ("paragraphs.txt", "\n\na\nb\n\n \n\nccc\r\n\r\nd\ne\n", ["a\nb", "ccc", "d\ne"]),
    ("one.txt", "a\nb\n\n", ["a", "b"]),
])
def test_a_document_belongs_to_one_block_wherever_the_blocks_are_cut(tmp_path, tiny_tokenizer, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    source = FileSource(tmp_path / name, tiny_tokenizer)
    source.paragraphs = name == "paragraphs.txt"
    for size in range(1, len(content.encode()) + 2):
        source.bytes = size
        found = [document for block in range(-(-source.size // size)) for document in source.documents(block)]
        assert [document.strip() if isinstance(document, str) else document for document in found] == expected, size


@pytest.mark.parametrize("name", ["rows.jsonl", "hub"])
def test_workers_change_nothing(tmp_path, tiny_tokenizer, name):
    source = sources(tmp_path, words(450))[name]
    alone, place = take(stream_of(source, tiny_tokenizer), 1000)
    shared, other = take(stream_of(source, tiny_tokenizer, num_workers=3), 1000)
    assert place.number >= 1 and equal(shared, alone) and other == place


def test_ranks_take_disjoint_shares_that_are_everything(tmp_path, tiny_tokenizer):
    texts = words(450, longest=10)
    whole = sorted(documents(stream_of(texts, tiny_tokenizer).first(10**6)))
    for name, source in sources(tmp_path, texts).items():
        shares = []
        for rank in range(3):
            stream, rows = stream_of(source, tiny_tokenizer, rank=rank, world_size=3), []
            for row, place in stream.rows():
                rows.append(row)
                if place.number:  # the last row may hold documents of the next pass
                    break
            shares.append(documents(rows))
            assert len(shares[-1]) > 50, name
        assert set(whole) == set(shares[0]) | set(shares[1]) | set(shares[2])
        assert sum(len(set(share)) for share in shares) <= len(whole) + 3 * LENGTH, f"{name}: nothing twice but what the last rows hold of the next pass"


@pytest.mark.parametrize("name", ["rows.jsonl", "paragraphs.txt", "saved", "hub", "object"])
def test_a_stream_goes_on_where_it_was(tmp_path, tiny_tokenizer, name):
    source = sources(tmp_path, words(400))[name]
    undisturbed, _ = take(stream_of(source, tiny_tokenizer), 900)
    state, rows = None, []
    for count in (0, 7, 200, 1, 0, 500, 192):  # beyond the end of a pass too
        stream = stream_of(source, tiny_tokenizer)
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        more, place = take(stream, count)
        rows += more
        state = stream.state_dict([place])
        assert len(state["layouts"]) == 1
    assert equal(rows, undisturbed)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (3, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("name, apart", [("rows.jsonl", False), ("rows.jsonl", True), ("hub", False)])
def test_a_stream_goes_on_at_another_number_of_ranks(tmp_path, tiny_tokenizer, monkeypatch, name, apart, worlds):
    """Whatever each had read: at the end every document has been read, and none twice. With ranks far apart, and little read between two changes, a state has to remember several."""
    if apart:  # some forty blocks
        monkeypatch.setattr("red.data.sources.SMALLEST", 512)
    texts = words(450, longest=10)
    source = sources(tmp_path, texts)[name]
    whole, state, seen, remembered = documents(stream_of(source, tiny_tokenizer).first(10**6)), None, [], 0
    for turn, world in enumerate(worlds):
        places = []
        for rank in range(world):
            stream = stream_of(source, tiny_tokenizer, rank=rank, world_size=world)
            if state is not None:
                stream.load_state_dict(state)
            if turn < len(worlds) - 1:
                rows, place = take(stream, 20 + 5 * rank if not apart else (2, 90, 9)[rank] if turn == 0 else 1 + rank)
            else:  # the last one reads to the end
                rows = []
                for row, place in stream.rows():
                    if place.number:
                        break
                    rows.append(row)
            seen += documents(rows)
            places.append(place)
        state = stream.state_dict(places)
        remembered = max(remembered, len(state["layouts"]))
    assert remembered > 1 or not apart or len(worlds) < 4
    assert len(seen) == len(set(seen)), "nothing twice"
    assert set(seen) <= set(whole) and len(set(whole) - set(seen)) <= worlds[-1] * LENGTH, "all but each rank's last row, which holds the next pass too"


def test_a_resumed_file_is_read_from_there_on(tmp_path, tiny_tokenizer, monkeypatch):
    """Blocks before the place are not touched; of a data set no more than one block is read again."""
    path, touched, real = write(tmp_path / "rows.jsonl", words(400)), [], FileSource.documents
    monkeypatch.setattr(FileSource, "documents", lambda self, block: (touched.append(block), real(self, block))[1])
    stream = stream_of(path, tiny_tokenizer)
    _, place = take(stream, 300)
    touched.clear()
    again = stream_of(path, tiny_tokenizer)
    again.load_state_dict(stream.state_dict([place]))
    take(again, 100)
    assert place.block > 1 and touched[0] == place.block and touched == sorted(set(touched))

    datasets = pytest.importorskip("datasets")
    counted = Counted(words(400))
    source = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in counted))
    stream = stream_of(source, tiny_tokenizer)
    _, place = take(stream, 300)
    state = stream.state_dict([place])
    assert state["source"]["examples_iterable"]["shard_example_idx"] == place.block * 64


# ---- what is refused ----

@pytest.mark.parametrize("source, message", [
    (["w5 w6"] * 3, "fewer blocks than there are processes .2."),
    (iter(["w5"]), "A list_iterator can be read only once"),
    ([7], "Example 0 is a int"),
    (["w5", {"input_ids": [5, 99]}], "Example 1 has the id 99 at token 1, outside the teacher's vocabulary"),
    ([{"body": "w5"}], "Example 0 has the columns body; red reads 'text'"),
    ({"train": []}, "not a sequence of examples"),
    (["", " "] * 300, "no tokens for this process in a whole pass"),
])
def test_what_a_stream_refuses(tiny_tokenizer, source, message):
    with pytest.raises(REDError, match=message):
        take(stream_of(source, tiny_tokenizer, rank=1 if message.startswith("fewer") else 0, world_size=2), 400)


def test_what_a_file_that_streams_must_be(tmp_path, tiny_tokenizer):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(REDError, match="empty.txt' is empty"):
        stream_of(tmp_path / "empty.txt", tiny_tokenizer)
    with pytest.raises(REDError, match="does not exist; did you mean '.*empty.txt'"):
        stream_of(tmp_path / "emty.txt", tiny_tokenizer)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w5"}\n' * 900 + "{oops\n")
    with pytest.raises(REDError, match="the line at byte 13500 is not JSON"):
        stream_of(path, tiny_tokenizer).first(10**6)
    with pytest.raises(REDError, match="the line at byte 13500 is not JSON"):  # not as a worker's traceback
        take(stream_of(path, tiny_tokenizer, num_workers=2), 10**6)
    path.write_text('{"text": " "}\n')
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 9)
    for read in (lambda: stream_of(tmp_path / "latin.txt", tiny_tokenizer).first(1), lambda: load_examples(tmp_path / "latin.txt", tiny_tokenizer)):
        with pytest.raises(REDError, match="latin.txt.* (cannot be read as text|is not UTF-8)"):
            read()
    (tmp_path / "latin.jsonl").write_bytes('{"text": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(REDError, match="latin.jsonl, line 1 is not JSON: .*utf-8"):
        load_examples(tmp_path / "latin.jsonl", tiny_tokenizer)
    with pytest.raises(REDError, match="The stream is empty"):
        stream_of(path, tiny_tokenizer).first(3)
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="w9")
    save_examples(path, load_examples(["w5"], tiny_tokenizer), tiny_tokenizer)
    with pytest.raises(REDError, match="tokenised by another tokenizer"):
        stream_of(path, other)
    assert documents(stream_of(path, tiny_tokenizer).first(9)) == [(5, 2)]
