"""Every file that red reads, broken in every way that Hypothesis finds in a few seconds: a REDError comes out, or a result; nothing else, and no code runs.

More of the same: RED_FUZZ=50 python -m pytest tests/test_fuzz.py takes fifty times as many examples.
"""

from __future__ import annotations

import json
import pickle
import shutil
import string

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_fuzz import JSON, damaged, file, fuzz, only_red_errors, variants
from tiny_models import build_tiny_model, build_tiny_tokenizer
from tiny_training import make_trainer, settings_of, tokenised

from red.training import checkpoint_folders
from red.data import loading as data
from red.calibration import Calibration, calibrate_batches, model_hash
from red.cli import main
from red.config import REDConfig
from red.distillation import _tokenizer_beside
from red.errors import REDError
from red.families import teacher_config
from red.fitting.resume import StartFolder
from red.judge.problems import load_problems
from red.sharing.licences import terms_of
from red.data.packing import collate, pack
from red.prepare import load_teacher, start_projections
from red.settings import build_config, read_yaml
from red.data.token_cache import _read as read_cached

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def teacher():
    return build_tiny_model()


# ---- settings ----

KNOWN = sorted(field.name for field in REDConfig.__dataclass_fields__.values() if field.init)
SETTINGS = st.dictionaries(st.sampled_from(KNOWN) | st.text(string.ascii_lowercase + "-_", max_size=12), JSON, max_size=4)


@fuzz(60)
@given(content=st.binary(max_size=60) | st.text("ab:-[]{}&*!|>'\"#?,%@ \n\t", max_size=40).map(str.encode) | JSON.map(lambda value: yaml.safe_dump(value).encode("utf-8", "surrogateescape")))
def test_yaml(place, content):
    with file(place, "run.yaml", content) as path:
        found = only_red_errors(read_yaml, path)
        assert isinstance(found, (dict, REDError))


@fuzz(120)
@given(values=SETTINGS)
def test_settings(place, values):
    only_red_errors(build_config, {"output_dir": str(place / "run"), "use_cpu": True, **values})


def test_yaml_that_would_take_hours(place):
    for text in ("[" * 100_000, "{" * 100_000, "a: " * 400_000, "&a [" + "*a," * 1000 + "]", "- " * 3000):
        with file(place, "run.yaml", text.encode()) as path:
            assert isinstance(only_red_errors(read_yaml, path), REDError)


# ---- text ----

EXAMPLES = st.dictionaries(st.sampled_from(["text", "input_ids", "labels", "attention_mask", "prompt", "completion", "messages", "tools", "tokenizer_hash", "number"]),
                           JSON | st.lists(st.integers(-5, 70), max_size=6) | st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=2), max_size=4)
LINES = st.lists(EXAMPLES.map(lambda value: json.dumps(value).encode()) | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20), max_size=5).map(b"\n".join)


def read_text(path, tokenizer):
    examples = data.load_examples(path, tokenizer, max_length=8)
    data.check_examples(examples, tokenizer, 64)
    return pack(examples, 8, pad_token_id=0)[0]


@fuzz(120)
@given(content=LINES, name=st.sampled_from(["a.jsonl", "a.txt"]), chat=st.booleans())
def test_data(place, content, name, chat):
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}" if chat else None
    with file(place, name, content) as path:
        only_red_errors(read_text, path, tokenizer)


@fuzz(80)
@given(content=st.lists(st.dictionaries(st.sampled_from(["question", "answer", "steps"]), JSON | st.text(min_size=1, max_size=5)).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20),
                        max_size=4).map(b"\n".join))
def test_problems(place, content):
    with file(place, "questions.jsonl", content) as path:
        only_red_errors(load_problems, path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": ' * 50_000, b'{"input_ids": [' + b"9" * 5000 + b"]}", b"\xff\xfe", b'{"input_ids": [1e400]}', b'{"input_ids": [[1], [1, 2]]}'])
def test_json_lines_that_break_parsers(place, content):
    for name, reader in (("a.jsonl", lambda path: read_text(path, build_tiny_tokenizer())), ("b.jsonl", load_problems)):
        with file(place, name, content) as path:
            assert isinstance(only_red_errors(reader, path), REDError)


# ---- calibration, start, projections ----

@pytest.fixture(scope="module")
def calibration(place, teacher):
    rows = pack(tokenised(), 16, pad_token_id=0)
    made = calibrate_batches(teacher, [collate([rows[index] for index in range(4)])], point_covariance=True)
    made.save(place / "calibration.safetensors")
    return place / "calibration.safetensors"


def contents(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as opened:
        return load_file(path), opened.metadata()


def start_from(teacher, path, start: str):
    config = REDConfig(**settings_of(path.parent / "run", start=start, start_fit="none"))
    calibration = Calibration.load(path)
    calibration.check(teacher)
    return start_projections(teacher, config, calibration)


@fuzz(50)
@given(choice=st.data(), start=st.sampled_from(["activation", "pca", "explained"]))
def test_calibration(place, teacher, calibration, choice, start):
    path = place / "broken.safetensors"
    if choice.draw(st.booleans()):
        path.write_bytes(choice.draw(damaged(calibration.read_bytes())))
    else:
        tensors, facts = choice.draw(variants(*contents(calibration)))
        save_file(tensors, path, metadata=facts)
    only_red_errors(start_from, teacher, path, start)


@fuzz(80)
@given(choice=st.data())
def test_start(place, teacher, calibration, choice):
    whole, path = place / "whole" / "start.safetensors", place / "start.safetensors"
    if not whole.is_file():
        maps = dict(start_from(teacher, calibration, "activation").state_dict())
        StartFolder(whole.parent, "key").keep_whole(maps, model_hash(teacher))
    if choice.draw(st.booleans()):
        path.write_bytes(choice.draw(damaged(whole.read_bytes())))
    else:
        tensors, facts = choice.draw(variants(*contents(whole)))
        save_file(tensors, path, metadata=facts)
    only_red_errors(lambda: start_projections(teacher, REDConfig(**settings_of(place / "run", start=str(path)))))


@pytest.fixture(scope="module")
def run(place):
    """A trainer, and a folder with its checkpoint."""
    trainer = make_trainer(build_tiny_model(), place / "trained", save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    return trainer, place / "trained" / "checkpoint-2"


@fuzz(80)
@given(choice=st.data())
def test_projections(place, run, choice):
    trainer, checkpoint = run
    folder = place / "checkpoint-9"
    folder.mkdir(exist_ok=True)
    path = folder / "projections.safetensors"
    if choice.draw(st.booleans()):
        path.write_bytes(choice.draw(damaged((checkpoint / path.name).read_bytes())))
    else:
        tensors, facts = choice.draw(variants(*contents(checkpoint / path.name)))
        save_file(tensors, path, metadata=facts)
    only_red_errors(trainer._load_projections, folder)


@fuzz(60)
@given(manifest=JSON | st.fixed_dictionaries({"save": JSON, "files": st.dictionaries(st.sampled_from(["config.json", "../x", "/etc/passwd", "", ".", "\x00"]), JSON | st.fixed_dictionaries({"bytes": JSON, "sha256": JSON}))}))
def test_manifests(place, run, manifest):
    folder = place / "manifests" / "checkpoint-2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    only_red_errors(checkpoint_folders.last_checkpoint, folder.parent)
    assert only_red_errors(checkpoint_folders.next_save, folder.parent) is not None
    assert isinstance(checkpoint_folders.fault(folder), (str, type(None)))


@fuzz(40)
@given(facts=JSON, noise=st.binary(max_size=200))
def test_the_cache_of_tokens(place, facts, noise):
    folder = place / "cache"
    folder.mkdir(exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts))
    for name in ("tokens", "labels", "bounds", "rows"):
        (folder / f"{name}.npy").write_bytes(noise)
    assert read_cached(folder) is None


# ---- folders of models ----

@pytest.fixture(scope="module")
def model_folder(place, teacher):
    teacher.save_pretrained(place / "model")
    build_tiny_tokenizer().save_pretrained(place / "model")
    return place / "model"


@fuzz(80)
@given(choice=st.data())
def test_model_folders(place, model_folder, choice):
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    name = choice.draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"]))
    content = (folder / name).read_bytes() if (folder / name).is_file() else b"---\nlicense: mit\n---\n"
    if name.endswith(".json") and choice.draw(st.booleans()):
        known = json.loads(content)
        changed = {**known, choice.draw(st.sampled_from(sorted(known))): choice.draw(JSON)}
        (folder / name).write_text(json.dumps(changed))
    else:
        (folder / name).write_bytes(choice.draw(damaged(content)))
    only_red_errors(load_teacher, folder, "float32")
    only_red_errors(_tokenizer_beside, folder)
    only_red_errors(terms_of, folder)
    only_red_errors(teacher_config, folder)


# ---- no code of a file's is run ----

class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_not_run(place, run, tmp_path):
    trainer, checkpoint = run
    pickle.loads(pickle.dumps(Evil(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists(), "it would"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = tmp_path / f"{name}-checkpoint-2"
        shutil.copytree(checkpoint, folder)
        (folder / "manifest.json").unlink()
        torch.save({"state": Evil(tmp_path / "pwned")}, folder / name)
        other = make_trainer(build_tiny_model(), tmp_path / f"run-{name}", max_steps=3, save_strategy="no")
        error = only_red_errors(other.train, resume_from_checkpoint=str(folder))
        assert isinstance(error, REDError) and not (tmp_path / "pwned").exists()


def test_remote_code_and_pickled_weights_are_not_run(model_folder, tmp_path):
    for kind in ("code", "weights"):
        folder = tmp_path / kind
        shutil.copytree(model_folder, folder)
        if kind == "code":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}))
            (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
        else:
            (folder / "model.safetensors").unlink()
            torch.save({"model.norm.weight": Evil(tmp_path / "pwned")}, folder / "pytorch_model.bin")
        assert isinstance(only_red_errors(load_teacher, folder, "float32"), REDError) and not (tmp_path / "pwned").exists()


def test_what_is_exported_is_safetensors_and_text(run, model_folder, tmp_path):
    _, checkpoint = run
    assert any(path.suffix in (".pt", ".pth", ".bin") for path in checkpoint.iterdir())
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out"), "--tokenizer", str(model_folder)]) == 0
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".jinja", ".txt"}
