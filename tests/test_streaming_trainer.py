"""Training on a stream: what is seen, in one process and in two, and that a resumed run goes on where the checkpoint was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_lrc import documents
from tiny_training import fork_two_processes, make_trainer, masters
from transformers import TrainerCallback

from red.training.checkpoint_folders import MANIFEST
from red.errors import REDError
from red.prepare import calibration_batches
from red.data.sources import FileSource
from red.data.streaming import STREAM_FILE, PackedStream

SETTINGS = dict(max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3, streaming=True)


class Interrupt(TrainerCallback):
    """Ends the process' training like Ctrl-C, in the middle of step 5."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def pieces(batches) -> list[tuple[int, ...]]:
    """All documents of the batches."""
    return [tuple(document.tolist()) for batch in batches for document in documents(batch)]


def ids_file(path, count: int = 700):
    """Documents that are tokenised already: a trainer of them needs no tokenizer."""
    rows = [[4 + int(digit) for digit in f"{number:05d}"] + [14 + number % 50] * (number % 10) for number in range(count)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_bit_for_bit_without_reading_again(tiny_teacher, tmp_path, monkeypatch, workers):
    """Interrupted two steps after a checkpoint: the resumed run sees the micro-batches that an undisturbed one sees, and ends in the same weights."""
    path, touched, real = ids_file(tmp_path / "rows.jsonl"), [], FileSource.documents
    monkeypatch.setattr(FileSource, "documents", lambda self, block: (touched.append(block), real(self, block))[1])

    def trainer(folder: str, callbacks=None):
        return make_trainer(tiny_teacher(attention_dropout=0.1), tmp_path / folder, path, callbacks=callbacks, dataloader_num_workers=workers, **SETTINGS)

    whole = trainer("whole")
    whole.train()
    assert len(whole.seen) == 12 and all(set(batch) == {"input_ids", "labels", "position_ids", "token_mask", "document_starts"} for batch in whole.seen)
    (calibration,) = calibration_batches(whole.train_dataset, 4)
    for key, value in calibration.items():
        assert torch.equal(value, torch.cat([whole.seen[0][key], whole.seen[1][key]])), "what is calibrated on is trained on too"

    with pytest.raises(KeyboardInterrupt):
        trainer("broken", [Interrupt()]).train()
    torch.manual_seed(99)
    resumed = trainer("broken")
    touched.clear()
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 6 and all(torch.equal(mine[key], other[key]) for mine, other in zip(resumed.seen, whole.seen[6:], strict=True) for key in other)
    for name, value in masters(whole).items():
        assert torch.equal(masters(resumed)[name], value), name
    (layout,) = json.loads((tmp_path / "broken" / "checkpoint-3" / STREAM_FILE).read_text())["layouts"]
    if not workers:  # else it is they who read
        assert touched == list(range(layout[0][1], touched[-1] + 1))


def test_a_data_set_that_streams(tiny_teacher, tmp_path):
    """An IterableDataset is streamed without being asked to, and with what datasets does to it."""
    datasets = pytest.importorskip("datasets")
    ids_file(tmp_path / "rows.jsonl")
    data = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    data = data.filter(lambda row: len(row["input_ids"]) > 6).shuffle(seed=0, buffer_size=50)
    trainer = make_trainer(tiny_teacher(), tmp_path / "run", data, max_steps=3)
    trainer.train()
    assert isinstance(trainer.train_dataset, PackedStream) and len({tuple(batch["input_ids"][0].tolist()) for batch in trainer.seen}) == 3


def two_processes(folder: Path) -> None:
    """What each of two processes runs: 3 steps, and what it saw."""
    from tiny_models import build_tiny_model

    trainer = make_trainer(build_tiny_model(), f"{folder}/run", f"{folder}/rows.jsonl", **{**SETTINGS, "max_steps": 3})
    trainer.train()
    torch.save(trainer.seen, f"{folder}/seen-{trainer.args.process_index}.pt")


def test_two_processes_stream_and_one_goes_on(tiny_teacher, tmp_path):
    ids_file(tmp_path / "rows.jsonl")
    fork_two_processes(two_processes, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert len(json.loads((checkpoint / STREAM_FILE).read_text())["layouts"][0]) == 2
    resumed = make_trainer(tiny_teacher(), tmp_path / "run", tmp_path / "rows.jsonl", **SETTINGS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    before = [batch for rank in (0, 1) for batch in torch.load(tmp_path / f"seen-{rank}.pt")]
    assert (len(before), len(resumed.seen)) == (3 * 2 * 2, 3 * 2)
    earlier, later = pieces(before), pieces(resumed.seen)
    assert len(earlier + later) == len(set(earlier + later)), "no document twice"
    whole = pieces([{key: value[None] for key, value in row.items()} for row in resumed.train_dataset.first(10**6)])
    reached = max(whole.index(piece) for piece in later)
    assert set(whole[:reached]) <= set(earlier + later), "and none left out"


def test_settings_that_do_not_go_with_a_stream(tiny_teacher, tmp_path):
    path = ids_file(tmp_path / "rows.jsonl")
    with pytest.raises(REDError, match="max_steps=-1. Set max_steps"):
        make_trainer(tiny_teacher(), tmp_path / "run", path, streaming=True, max_steps=-1)
    with pytest.raises(REDError, match="packing=False pads"):
        make_trainer(tiny_teacher(), tmp_path / "run", path, streaming=True, packing=False)
    with pytest.raises(REDError, match="rank 1 of 2 was given to process 0 of 1.*world_size=args.world_size"):
        make_trainer(tiny_teacher(), tmp_path / "run", PackedStream(path, vocab_size=64, max_length=16, rank=1, world_size=2), max_steps=2)
    make_trainer(tiny_teacher(), tmp_path / "run", path, **{**SETTINGS, "max_steps": 3}).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    with path.open("a") as file:
        file.write('{"input_ids": [5, 6]}\n')
    with pytest.raises(REDError, match="reading another stream: bytes was"):
        make_trainer(tiny_teacher(), tmp_path / "run", path, **SETTINGS).train(resume_from_checkpoint=str(checkpoint))
    for name in (STREAM_FILE, MANIFEST):  # as a run without a stream would be
        (checkpoint / name).unlink()
    with pytest.raises(REDError, match="that run did not stream its text"):
        make_trainer(tiny_teacher(), tmp_path / "run", path, **SETTINGS).train(resume_from_checkpoint=str(checkpoint))
