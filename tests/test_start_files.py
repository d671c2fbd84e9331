"""Files of a start: nothing finished is lost, and a disk that takes no more says so."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import random_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fitting import start_of, text
from tiny_training import settings_of

from red import starting
from red.calibration import calibrate_batches
from red.config import REDConfig
from red.errors import REDError
from red.files import HALF_LAYERS, START_FILE, STARTS, require_empty_output
from red.fitting import fit_maps, resume
from red.fitting.resume import StartFolder, read_start


def maps(value: float) -> dict[str, torch.Tensor]:
    return {"model.embed_tokens.weight": torch.full((4, 2), value, dtype=torch.float64)}


def test_a_finished_start_of_other_settings_is_moved_aside(tmp_path):
    StartFolder(tmp_path, "a" * 64).keep_whole(maps(1.0), "teacher")
    other = StartFolder(tmp_path, "b" * 64)
    assert other.whole() is None
    other.keep_whole(maps(2.0), "teacher")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start.aaaaaaaaaaaa.safetensors", START_FILE]
    with safe_open(tmp_path / "start.aaaaaaaaaaaa.safetensors", "pt") as file:
        assert file.metadata()["key"] == "a" * 64 and torch.equal(file.get_tensor("model.embed_tokens.weight"), maps(1.0)["model.embed_tokens.weight"])
    assert torch.equal(other.whole()["model.embed_tokens.weight"], maps(2.0)["model.embed_tokens.weight"])
    other.keep_whole(maps(3.0), "teacher")  # the same key: the same start
    assert len(list(tmp_path.iterdir())) == 2
    require_empty_output(tmp_path, ignoring=STARTS)


def test_what_a_kill_left_does_not_block_the_folder(tmp_path):
    (tmp_path / HALF_LAYERS).mkdir()
    (tmp_path / f".{START_FILE}.0a1b2c3d.tmp").touch()
    require_empty_output(tmp_path, ignoring=STARTS)
    (tmp_path / "student").mkdir()
    with pytest.raises(REDError, match="not empty .it holds student"):
        require_empty_output(tmp_path, ignoring=STARTS)


def test_a_full_disk_is_an_error_of_ours_and_keeps_what_was_there(tmp_path, monkeypatch):
    folder = StartFolder(tmp_path, "a" * 64)
    folder.begin(torch.ones(4, 2))
    folder.keep_half_layer(0, maps(1.0))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "atomic_write_safetensors", full)
    with pytest.raises(REDError, match="001.safetensors cannot be written.*No space left.*same command goes on"):
        folder.keep_half_layer(1, maps(1.0))
    assert torch.equal(folder.half_layer(0)["model.embed_tokens.weight"], maps(1.0)["model.embed_tokens.weight"])


# ---- maps that several modules share ----

@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True)])
def test_one_map_of_a_point_is_one_tensor_in_the_file(tiny_teacher, tmp_path, family, tied):
    """Of 7 maps a layer four are different ones; what is read is what was written, under every name."""
    teacher = tiny_teacher(family, tied=tied)
    maps = fit_maps(teacher, start_of(teacher, "pca").maps, text(1))
    StartFolder(tmp_path, "key").keep_whole(maps, "hash")
    stored = load_file(tmp_path / START_FILE)
    assert len([name for name in stored if "layers.0" in name and stored[name].dim() == 2]) == 4
    found = read_start(tmp_path / START_FILE, "hash")
    assert found.keys() == maps.keys() and all(torch.equal(found[name], maps[name]) for name in maps)
    assert StartFolder(tmp_path, "key").whole().keys() == maps.keys()


def test_a_start_file_of_before_is_read_and_one_of_later_refused(tiny_teacher, tmp_path):
    maps = {name: value.clone().contiguous() for name, value in start_of(tiny_teacher(), "pca").maps.items()}
    facts = {"key": "key", "teacher_hash": "hash"}
    save_file(maps, tmp_path / START_FILE, metadata=facts)
    found = read_start(tmp_path / START_FILE, "hash")
    assert found.keys() == maps.keys() and all(torch.equal(found[name], maps[name]) for name in maps)
    for bad, message in (({"format": "3"}, "format '3', and this red reads up to 2"), ({"same": "{"}, "cannot be read"), ({"same": "[1]"}, "damaged"),
                         ({"same": '{"a": "b"}'}, "damaged"), ({"same": '{"a": 1}'}, "damaged"), ({"same": '{"model.norm.weight": "lm_head.weight"}'}, "damaged")):
        save_file(maps, tmp_path / START_FILE, metadata={**facts, **bad})
        with pytest.raises(REDError, match=message):
            read_start(tmp_path / START_FILE, "hash")
        assert StartFolder(tmp_path, "key").whole() is None  # it is fitted again


@pytest.mark.parametrize("rows, warns", [(1, True), (8, False)])
def test_too_little_text_for_a_fit_is_said(tiny_teacher, tmp_path, monkeypatch, rows, warns):
    """20 tokens of each of 32 channels are 640."""
    said, batches = [], [random_batch(8, 96, seed=1)]
    batches = [{name: value[:rows] for name, value in batches[0].items()}]
    tokens = int(batches[0]["token_mask"].sum())
    assert (tokens < 640) == warns
    monkeypatch.setattr(starting.logger, "warning", said.append)
    config = REDConfig(**settings_of(tmp_path, start="pca", start_fit="full"))
    starting.start_maps(tiny_teacher(), config, calibrate_batches(tiny_teacher(), batches, covariance=True), batches)
    assert len(said) == warns and all(f"{tokens:,} tokens, {tokens / 32:.1f} for each of the teacher's 32 channels" in line for line in said)
