"""Export: a checkpoint that other tools load to the same logits, or nothing at all; and files that are whole or absent."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import CharDelimiterSplit
from transformers import AutoModelForCausalLM, AutoTokenizer

import red
from red.sharing import preflight
from red.errors import REDError
from red.sharing.export import check_width, export
from red.files import (atomic_write_json, atomic_write_safetensors, atomic_write_text, nearest, require_empty_output,
                       require_existing)

WIDTH = 24  # not heads * head_dim: that is what a student looks like


def logits_of(model):
    return preflight.probe(model)["logits"]


@pytest.mark.parametrize("tied", [False, True])
def test_exported_student_is_plain_and_equal(family, tied, tmp_path, tiny_model, tiny_tokenizer):
    student = tiny_model(family, tied=tied, hidden_size=WIDTH)
    student.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), student)  # as the trainer binds one
    report = export(student, tiny_tokenizer, tmp_path / "out", verify=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(loaded), logits_of(student), rtol=0, atol=1e-6)
    assert type(loaded) is type(student)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["tie_word_embeddings"], config["dtype"]) == (WIDTH, 8, tied, "float32")
    if family != "qwen2":  # transformers would take its byte-level Qwen2Tokenizer
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w6")["input_ids"] == [5, 6]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                                                    "tokenizer_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    assert report.parameters == student.num_parameters() and report.tied is tied and report.bytes > 4 * report.parameters
    assert report.max_abs_logit_difference is None and "not reloaded" in str(report)


@pytest.mark.parametrize("family, tied, dtype, as_llama", [("qwen2", True, "bfloat16", False), ("qwen3", False, None, False), ("qwen2", False, None, True)])
def test_preflight_in_a_fresh_process(family, tied, dtype, as_llama, tmp_path, tiny_model, tiny_tokenizer):
    student = tiny_model(family, tied=tied, hidden_size=WIDTH)
    tokenizer = None if family == "qwen2" and not as_llama else tiny_tokenizer
    report = export(student, tokenizer, tmp_path / "out", dtype=dtype, as_llama=as_llama)
    assert report.max_abs_logit_difference < 1e-4 and len(report.generated) == preflight.GENERATED
    assert report.dtype == (dtype or "float32") and report.model_type == ("llama" if as_llama else family)
    assert student.dtype == torch.float32, "the student is not changed"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tolerance = 0.05 if dtype else 1e-5
    torch.testing.assert_close(logits_of(loaded), logits_of(student), rtol=tolerance, atol=tolerance * logits_of(student).abs().max().item())


def test_the_fresh_process_finds_this_red_and_no_other(tmp_path, monkeypatch):
    """Also where `red` is on this process' path alone; and none of its own files stands before a package of that name, such as `evaluate`."""
    seen: list[list[str]] = []

    def run(command, env, **_):
        seen.append(env["PYTHONPATH"].split(os.pathsep))
        return types.SimpleNamespace(stdout='{"error": "seen"}', stderr="", returncode=0)

    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(preflight.subprocess, "run", run)
    assert preflight.run_preflight(tmp_path, tmp_path) == {"error": "seen"}
    assert seen == [[str(Path(red.__file__).resolve().parents[1]), "/elsewhere"]]


def test_engines_that_ignore_head_dim_are_warned_of(tmp_path, tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr("red.sharing.export.logger.warning", said.append)
    export(tiny_model("qwen2", hidden_size=WIDTH), None, tmp_path / "native", verify=False)
    (warning,) = [text for text in said if "head_dim" in text]
    assert "as_llama=True" in warning
    said.clear()
    export(tiny_model("qwen2", hidden_size=WIDTH), None, tmp_path / "llama", verify=False, as_llama=True)
    export(tiny_model("qwen3", hidden_size=WIDTH), None, tmp_path / "qwen3", verify=False)
    export(tiny_model("qwen2"), None, tmp_path / "wide", verify=False)  # 4 heads of 8 are its width of 32
    assert not [text for text in said if "head_dim" in text]


def test_what_fails_the_preflight_is_not_left(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda folder, reference: {"error": "its logits differ by 3"})
    with pytest.raises(REDError, match="failed its preflight: its logits differ by 3. Nothing was left"):
        export(tiny_model(hidden_size=WIDTH), tiny_tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage, message", [
    ("value", "logits differ by"), ("missing", "missing_keys"), ("left over", "unexpected_keys"), ("nan", "logits differ by nan"),
    ("tied", "tied is True"), ("dtype", "dtype is torch.bfloat16"), ("tokenizer", "another vocabulary"), ("reading", "reads text otherwise"),
])
def test_preflight_notices(damage, message, tmp_path, tiny_model, tiny_tokenizer):
    """Mutations of a good checkpoint; `check` is what the fresh process runs."""
    student = tiny_model("llama", hidden_size=WIDTH)
    folder, reference = tmp_path / "out", str(tmp_path / "reference.safetensors")
    export(student, tiny_tokenizer, folder, verify=False)
    save_file(preflight.probe(student), reference, {"dtype": "torch.float32", "tied": "False", "tokenizer": json.dumps(preflight.probe_tokenizer(tiny_tokenizer))})
    assert preflight.check(str(folder), reference)["max_abs_logit_difference"] < 1e-5
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if damage == "value":
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    elif damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "left over":
        weights["projection.A"] = torch.ones(2)
    elif damage == "nan":
        weights["model.norm.weight"][0] = float("nan")
    elif damage == "tied":
        config["tie_word_embeddings"] = True
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # else transformers notices and unties
    elif damage == "dtype":
        weights, config["dtype"] = {name: tensor.bfloat16() for name, tensor in weights.items()}, "bfloat16"
    elif damage == "reading":
        tiny_tokenizer.backend_tokenizer.pre_tokenizer = CharDelimiterSplit("9")
        tiny_tokenizer.save_pretrained(folder)
    else:
        tiny_tokenizer.eos_token = "w9"
        tiny_tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert message in preflight.check(str(folder), reference)["error"]


def test_a_process_that_dies_is_reported(tmp_path):
    found = preflight.run_preflight(tmp_path, tmp_path / "none.safetensors")
    assert "No such file" in found["error"] or "FileNotFound" in found["error"]


def test_the_config_tells_whether_embeddings_are_tied(tmp_path, tiny_model, tiny_tokenizer):
    """The public LRC code (arXiv 2505.12781) exports an untied student with a tied flag, and its logits are off by 140 %."""
    student = tiny_model("qwen2", tied=False, hidden_size=WIDTH)
    student.config.tie_word_embeddings = True
    export(student, tiny_tokenizer, tmp_path / "out", verify=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False


@pytest.mark.parametrize("family, overrides, message", [
    ("qwen3", {}, "a qwen3 model cannot be written as Llama"),
    ("qwen2", {"use_sliding_window": True}, "sliding-window"),
])
def test_as_llama_refuses_what_llama_has_not(family, overrides, message, tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(REDError, match=message):
        export(tiny_model(family, hidden_size=WIDTH, **overrides), tiny_tokenizer, tmp_path / "out", as_llama=True)


def test_export_refuses_nan_and_odd_dtypes_and_full_folders(tmp_path, tiny_model, tiny_tokenizer):
    student = tiny_model(hidden_size=WIDTH)
    with pytest.raises(REDError, match="dtype='int8' cannot be exported"):
        export(student, tiny_tokenizer, tmp_path / "out", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(REDError, match="is not empty .it holds thesis.tex."):
        export(student, tiny_tokenizer, tmp_path / "full")
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(REDError, match="down_proj.weight has values that are not finite in torch.float16"):
        export(student, tiny_tokenizer, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


# ---- the width ----

@pytest.mark.parametrize("width, message", [
    (1500, "hidden_size=1500 is not a multiple of num_attention_heads=24; the nearest are 1488 and 1512"),
    (3072, "hidden_size=3072 is not below the teacher's 3072.*at most 3048"),
    (4000, "not below"),
    (3060, "not a multiple of num_attention_heads=24; the nearest is 3048"),
    (5, "the nearest is 24"),
    (0, "hidden_size=0 is no width. Give a multiple of num_attention_heads=24 from 24 to 3048, such as 1536"),
    (-24, "is no width"), (1536.0, "is no width"), (True, "is no width"), (None, "is no width"),
])
def test_wrong_widths_name_right_ones(width, message):
    with pytest.raises(REDError, match=message):
        check_width(types.SimpleNamespace(hidden_size=3072, num_attention_heads=24), width)


def test_right_widths_pass():
    for width in (24, 1536, 3048):
        check_width(types.SimpleNamespace(hidden_size=3072, num_attention_heads=24), width)
    with pytest.raises(REDError, match="cannot be made narrower"):
        check_width(types.SimpleNamespace(hidden_size=8, num_attention_heads=8), 4)


# ---- files ----

def test_writes_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "a.json"
    atomic_write_json(path, {"é": 1.5, "none": None})
    assert json.loads(path.read_text()) == {"é": 1.5, "none": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, {"nan": float("nan")})
    with pytest.raises(ValueError, match="expected torch.Tensor"):
        atomic_write_safetensors(path, {"a": "no tensor"})
    assert json.loads(path.read_text()) == {"é": 1.5, "none": None}, "a failed write leaves the old file"
    atomic_write_text(path, "new")
    assert path.read_text() == "new"
    atomic_write_safetensors(tmp_path / "t.safetensors", {"a": torch.arange(3)}, metadata={"k": "v"})
    assert load_file(tmp_path / "t.safetensors")["a"].tolist() == [0, 1, 2]
    assert {file.name for file in tmp_path.rglob("*")} == {"deep", "a.json", "t.safetensors"}, "no temporary file is left"
    probe = tmp_path / "plain"
    probe.touch()
    assert path.stat().st_mode == probe.stat().st_mode


def test_output_folders(tmp_path):
    assert require_empty_output(tmp_path / "new" / "deeper") == tmp_path / "new" / "deeper"
    assert not (tmp_path / "new").exists(), "checking makes nothing"
    assert require_empty_output(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(REDError, match="is a file"):
        require_empty_output(tmp_path / "file")
    with pytest.raises(REDError, match=r"out='.*' is not empty \(it holds file\).*Or else."):
        require_empty_output(tmp_path, what="out", remedy="Or else.")
    with pytest.raises(REDError, match="cannot be made"):
        require_empty_output(tmp_path / "file" / "below")


def test_nearest_names(tmp_path):
    assert nearest("learning-rat", ["learning_rate", "max_steps"]) == "learning_rate"
    assert nearest("Max_Step", ["learning_rate", "max_steps"]) == "max_steps"
    assert nearest("zzz", ["learning_rate"]) is None
    assert require_existing(tmp_path, "x") == tmp_path
    with pytest.raises(REDError, match="holds nothing of a like name"):
        require_existing(tmp_path / "a", "The file")
