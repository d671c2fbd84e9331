"""Files of a start: nothing finished is lost, and a disk that takes no more says so."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from red.errors import REDError
from red.files import HALF_LAYERS, START_FILE, STARTS, require_empty_output
from red.fitting import resume
from red.fitting.resume import StartFolder


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
