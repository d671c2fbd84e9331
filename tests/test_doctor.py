"""red doctor: all is well with the embedded teacher, and each check sees what it is there for when that is broken."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from tiny_models import build_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from red.data import loading as data
from red.doctor import examination as doctor
from red.doctor import checks as doctor_checks
from red.training import losses
from red.cli import main
from red.config import REDConfig
from red.planning.costs import Sizes
from red.demo.suite import CORPORA
from red.example import teacher_path, tokenized


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(teacher_path())


@pytest.fixture(scope="module")
def examples(tokenizer):
    return tokenized(CORPORA["chains"].documents(0, "train", 0.5), tokenizer, 2000)


@pytest.fixture()
def batch(examples):
    rows = data.pack(examples, 96, pad_token_id=0)
    return data.collate([rows[0], rows[1]])


def config_of(tmp_path, **settings) -> REDConfig:
    return REDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", hidden_size=64, max_length=96, **settings)


@pytest.fixture()
def corpus(tmp_path, tokenizer, examples):
    (tmp_path / "corpus.txt").write_text("\n".join(tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples))
    return tmp_path / "corpus.txt"


def test_the_command_finds_all_well_and_writes_it(corpus, tmp_path, capsys):
    assert main(["doctor", "--teacher", teacher_path(), "--data", str(corpus), "--max-length", "96", "--use_cpu", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["name"] for finding in found] == ["weights", "vocabulary", "labels", "states", "shift", "packing", "loss", "disk", "memory"]
    assert all(finding["ok"] is True and finding["remedy"] == "" for finding in found)
    printed = capsys.readouterr().out
    assert "9 checks: none red." in printed and "\033" not in printed
    assert not (tmp_path / "run").exists()


def test_a_red_finding_is_exit_code_1_and_bad_input_2(tmp_path, corpus, capsys):
    broken = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(teacher_path()).save_pretrained(tmp_path / "broken")
    assert main(["doctor", "--teacher", str(tmp_path / "broken"), "--data", str(corpus), "--max_length", "96", "--use_cpu"]) == 1
    printed = capsys.readouterr().out
    assert "RED  weights" in printed and "layers.1.mlp.up_proj" in printed and "-> Load the teacher" in printed and "not looked at before weights is well" in printed
    assert main(["doctor", "--teacher", str(tmp_path / "broken")]) == 2 and "needs a teacher and the training text" in capsys.readouterr().err
    assert main(["doctor", "--teacher", teacher_path(), "--data", str(corpus), "--hidden_size", "63"]) == 2


def test_labels(batch):
    assert doctor_checks.labels(batch).ok
    ahead = {**batch, "labels": torch.where(losses.next_labels(batch["labels"]) >= 0, losses.next_labels(batch["labels"]), -100)}
    ahead["labels"][batch["position_ids"] == 0] = -100
    found = doctor_checks.labels(ahead)
    assert found.ok is False and "shifted already" in found.found and found.remedy
    noise = {**batch, "labels": torch.where(batch["labels"] >= 0, (batch["labels"] + 5) % 90, -100)}
    assert doctor_checks.labels(noise).ok is False
    padding = {**batch, "labels": torch.where(batch["token_mask"], batch["labels"], 0)}
    assert not batch["token_mask"].all() and "stand at padding" in doctor_checks.labels(padding).found
    first = {**batch, "labels": torch.where(batch["token_mask"], batch["input_ids"], -100)}
    assert "first token of a document" in doctor_checks.labels(first).found
    assert "no token has a label" in doctor_checks.labels({**batch, "labels": torch.full_like(batch["labels"], -100)}).found


def test_shift_sees_a_loss_that_predicts_the_token_itself(teacher, batch, monkeypatch):
    found = doctor_checks.shift(teacher, batch)
    assert found.ok, found
    monkeypatch.setattr(losses, "next_labels", lambda labels: labels)
    assert doctor_checks.shift(teacher, batch).ok is False


def test_shift_sees_text_that_the_teacher_cannot_read(tiny_teacher, teacher, batch):
    assert "does not know such text" in doctor_checks.shift(teacher, {**batch, "input_ids": batch["input_ids"] * 7 % 97, "labels": torch.where(batch["labels"] >= 0, batch["labels"] * 7 % 97, -100)}).remedy


def test_packing_sees_documents_that_see_each_other(teacher, batch, monkeypatch):
    found = doctor_checks.packing(teacher, batch)
    assert found.ok and len(doctor_checks.documents({key: value[:1] for key, value in batch.items()})) > 1
    whole = doctor_checks._states
    monkeypatch.setattr(doctor_checks, "_states", lambda model, row: whole(model, {**row, "position_ids": torch.arange(row["input_ids"].shape[1])[None]}))
    assert doctor_checks.packing(teacher, batch).ok is False
    alone = {**batch, "position_ids": torch.arange(96).expand(2, 96)}
    assert doctor_checks.packing(teacher, alone).ok is None


@pytest.mark.parametrize("divergence", ("forward", "reverse", "jsd"))
def test_loss(divergence, teacher, batch, tmp_path, monkeypatch):
    settings = config_of(tmp_path, divergence=divergence, temperature=2.0)
    assert doctor_checks.loss(teacher, batch, 64, settings).ok
    right = doctor_checks.linear_kd

    def gradient_off(hidden, head, *others, **more):  # by one part in a hundred, the loss untouched
        found = right(hidden, head, *others, **more)
        return found._replace(loss=found.loss + 0.01 * (found.loss - found.loss.detach()))

    monkeypatch.setattr(doctor_checks, "linear_kd", gradient_off)
    assert doctor_checks.loss(teacher, batch, 64, settings).ok is False


def test_loss_in_bfloat16(batch, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.bfloat16).eval()
    assert doctor_checks.loss(small, batch, 64, config_of(tmp_path)).ok and doctor_checks.shift(small, batch).ok and doctor_checks.packing(small, batch).ok


def test_vocabulary(teacher, tokenizer, examples, tiny_teacher):
    assert doctor_checks.vocabulary(teacher, tokenizer, examples).ok
    assert "outside the teacher's vocabulary" in doctor_checks.vocabulary(tiny_teacher(), None, examples).found
    other = build_tiny_tokenizer()
    assert doctor_checks.vocabulary(teacher, other, data.load_examples(["x = 3 ; ? x : 3 ;"], other)).ok is False
    other.eos_token = "w9"
    assert "ends texts with id 9" in doctor_checks.vocabulary(tiny_teacher(), other, data.load_examples(["w4 w5 w6"], other)).found


def test_states(tiny_teacher, batch):
    model = tiny_teacher()
    small = {**batch, "input_ids": batch["input_ids"] % 64}
    assert doctor_checks.states(model, small).ok
    model.model.layers[0].mlp.register_forward_hook(lambda *_: torch.full((2, 96, 32), float("inf")))
    found = doctor_checks.states(model, small)
    assert found.ok is False and "after layer 1" in found.found


def test_disk(teacher, tmp_path, monkeypatch):
    sizes, settings = Sizes.of(teacher.config), config_of(tmp_path, max_steps=100, save_steps=10, save_total_limit=3)
    found = doctor_checks.disk(sizes, settings)
    assert found.ok and "4 checkpoints" in found.found
    assert "7 checkpoints" in doctor_checks.disk(sizes, config_of(tmp_path, max_steps=-1, save_strategy="epoch", num_train_epochs=6.5)).found
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 10**6))
    found = doctor_checks.disk(sizes, settings)
    assert found.ok is False and "save_total_limit" in found.remedy


def test_memory(teacher, tmp_path):
    sizes, settings = Sizes.of(teacher.config), config_of(tmp_path)
    assert doctor_checks.memory(sizes, settings, 8 << 30).ok
    found = doctor_checks.memory(sizes, settings, 1 << 20)
    assert found.ok is False and "per_device_train_batch_size" in found.remedy


def test_the_report_has_colours_for_a_terminal_only():
    found = [doctor_checks.Finding("disk", False, "full", "Make room."), doctor_checks.Finding("loss", None, "no label")]
    assert doctor.report(found).splitlines() == ["RED  disk  full", "           -> Make room.", "--   loss  no label", "", "2 checks: 1 red, 1 not looked at."]
    assert "\033[31mRED\033[0m  disk" in doctor.report(found, colour=True)
