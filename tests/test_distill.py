"""red.distill end to end on a tiny teacher, from every kind of data; and bad input, refused before anything trains or is written."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build_tiny_tokenizer
from tiny_training import settings_of, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import red
from red.config import REDConfig
from red.errors import REDError
from red.data.packing import pack


def texts(count: int = 24) -> list[str]:
    return [" ".join(f"w{4 + (7 * index + 5 * word) % 60}" for word in range(4 + index % 8)) for index in range(count)]


@pytest.fixture()
def teacher_folder(tiny_teacher, tiny_tokenizer, tmp_path):
    folder = tmp_path / "teacher"
    tiny_teacher().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def quick(output_dir, **changes) -> dict:
    return settings_of(output_dir, max_steps=2, **changes)


SOURCES = {
    "text file": lambda folder: _write(folder / "text.txt", "\n\n".join(texts())),
    "jsonl file": lambda folder: _write(folder / "text.jsonl", "\n".join(json.dumps({"text": text}) for text in texts())),
    "texts": lambda folder: texts(),
    "generator": lambda folder: iter(texts()),
    "tokenised": lambda folder: tokenised(),
}


def _write(path, content: str):
    path.write_text(content)
    return path


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_end_to_end(teacher_folder, tmp_path, monkeypatch, source):
    """The result is a plain, narrower checkpoint that transformers loads, with the tokenizer and with the student's logits."""
    if source != "text file":  # the fresh process of the preflight takes seconds; once is enough here, test_export.py does the rest
        monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    result = red.distill(str(teacher_folder), SOURCES[source](tmp_path), tokenizer=None, **quick(tmp_path / "run"))
    assert result.path == tmp_path / "run" / "student"
    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    assert loaded.config.model_type == "llama" and loaded.config.hidden_size == 16 and loaded.config.head_dim == 8
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.student.eval()(ids).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(result.path)("w4 w5")["input_ids"] == [4, 5]
    assert result.metrics["train_loss"] > 0 and result.trainer.state.global_step == 2


def test_config_object_calibration_file_and_eval_data(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    teacher = tiny_teacher()
    red.calibrate(teacher, texts(), tiny_tokenizer, samples=3, max_length=16).save(tmp_path / "calibration.safetensors")
    result = red.distill(teacher, texts(), tokenizer=tiny_tokenizer, eval_data=texts(5), calibration=tmp_path / "calibration.safetensors",
                         config=REDConfig(**quick(tmp_path / "run")))
    assert 0 < result.metrics["eval_loss"] < 20
    scores = red.Calibration.load(tmp_path / "calibration.safetensors").scores
    assert result.trainer.projections.channels.tolist() == scores.topk(16).indices.sort().values.tolist()


def test_resume(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    """resume=True goes on from the last checkpoint, and not after the end."""
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    settings = quick(tmp_path / "run", save_strategy="steps", save_steps=1)
    first = red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings)
    with pytest.raises(REDError, match="student.*not empty.*finished"):
        red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, resume=True, **settings)
    (tmp_path / "run" / "student").rename(tmp_path / "elsewhere")
    second = red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, resume=True, **{**settings, "max_steps": 3})
    assert second.trainer.state.global_step == 3
    assert not torch.equal(second.student.lm_head.weight, first.student.lm_head.weight)
    with pytest.raises(REDError, match="no checkpoint-N folder to resume from"):
        red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, resume=True, **quick(tmp_path / "other"))


def folder_of(config, tmp_path):
    config.save_pretrained(tmp_path / "foreign")
    return str(tmp_path / "foreign")


def broken(model, value=float("nan")):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    return model


def saved(model, tmp):
    """A folder with the model and the tests' tokenizer."""
    model.save_pretrained(tmp / "teacher")
    build_tiny_tokenizer().save_pretrained(tmp / "teacher")
    return tmp / "teacher"


def other_tokenizer(words=96):
    """With 96 words larger than a vocabulary of 64, with 60 as large, and always with other words than the tests' own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"v{index}" for index in range(words))]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")),
                                   eos_token="<eos>", unk_token="<unk>")


# what is wrong: (change of the call, from the factory of teachers and tmp_path; what the message must say)
BAD = {
    "unknown family": (lambda teacher, tmp: dict(teacher=folder_of(GPT2Config(n_layer=1, n_head=2, n_embd=8), tmp)), "model_type='gpt2' is not supported.*llama"),
    "no multiple of the heads": (lambda teacher, tmp: dict(hidden_size=18), "hidden_size=18 is not a multiple of num_attention_heads=4; the nearest are 16 and 20"),
    "as wide as the teacher": (lambda teacher, tmp: dict(hidden_size=32), "hidden_size=32 is not below the teacher's 32.*at most 28"),
    "wider than the teacher": (lambda teacher, tmp: dict(hidden_size=64), "hidden_size=64 is not below the teacher's 32.*at most 28"),
    "no width": (lambda teacher, tmp: dict(hidden_size=0), "hidden_size=0 is no width.*multiple of num_attention_heads=4"),
    "unknown start": (lambda teacher, tmp: dict(start="activaton"), "start='activaton' is unknown.*Did you mean 'activation'"),
    "missing file": (lambda teacher, tmp: dict(train_data=str(_write(tmp / "corpus.txt", "w4")).replace("corpus", "corpsu")), "corpsu.txt' does not exist.*corpus.txt"),
    "missing teacher": (lambda teacher, tmp: dict(teacher=str(tmp / "nowhere")), "teacher folder .*nowhere does not exist"),
    "ids out of range": (lambda teacher, tmp: dict(train_data=[{"input_ids": [5, 6, 64, 7] * 6}]), "Example 0 has the id 64 .*vocabulary of 64"),
    "negative ids": (lambda teacher, tmp: dict(train_data=[{"input_ids": [5, -1] * 10}]), "Example 0 has the id -1 .*vocabulary of 64"),
    "labels out of range": (lambda teacher, tmp: dict(train_data=[{"input_ids": [5] * 20, "labels": [64] * 20}]), "Example 0 has the label 64"),
    "empty data": (lambda teacher, tmp: dict(train_data=[]), "data set is empty"),
    "empty file": (lambda teacher, tmp: dict(train_data=_write(tmp / "empty.txt", "")), "data set is empty"),
    "blank texts": (lambda teacher, tmp: dict(train_data=["", "  "]), "data set is empty"),
    "too little text": (lambda teacher, tmp: dict(train_data=["w4 w5"]), "3 tokens .*less than one sequence of max_length=16.*max_length to 3"),
    "NaN in the teacher": (lambda teacher, tmp: dict(teacher=broken(teacher())), "down_proj.weight has NaN or infinite values"),
    "NaN in the teacher of a random start": (lambda teacher, tmp: dict(teacher=broken(teacher()), start="random"), "NaN or infinite"),
    "another vocabulary": (lambda teacher, tmp: dict(tokenizer=other_tokenizer()), "tokenizer has 100 entries but the teacher's embedding has 64"),
    "another tokenizer of the same size": (lambda teacher, tmp: dict(teacher=saved(teacher(), tmp), tokenizer=other_tokenizer(60)), "given tokenizer is not the teacher's"),
    "packed rows of another vocabulary": (lambda teacher, tmp: dict(train_data=pack([{"input_ids": [5, 70] * 10}], 16, pad_token_id=0)), "packed rows have the id 70"),
    "FSDP": (lambda teacher, tmp: dict(fsdp="full_shard"), "fsdp shards over processes, and there is one"),
    "unknown reduction": (lambda teacher, tmp: dict(kl_reduction="mean"), "kl_reduction='mean': use token or sequence"),
    "no dtype": (lambda teacher, tmp: dict(teacher=saved(teacher(), tmp), tokenizer=None, teacher_dtype="nn"), "teacher_dtype='nn' is no dtype"),
    "no tokenizer": (lambda teacher, tmp: dict(tokenizer=None), "module needs its tokenizer"),
    "no data": (lambda teacher, tmp: dict(train_data=None), "needs a teacher and training data"),
    "config and settings": (lambda teacher, tmp: dict(config=REDConfig(**quick(tmp / "run"))), "config or settings, not both.*'hidden_size'"),
    "unknown setting": (lambda teacher, tmp: dict(hiden_size=16), "Unknown setting 'hiden_size'; did you mean 'hidden_size'"),
    "wrong type": (lambda teacher, tmp: dict(max_steps="many"), "max_steps='many' is text; expected a whole number"),
    "negative weight": (lambda teacher, tmp: dict(kl_weight=-1.0), "kl_weight=-1.0: must not be negative"),
    "temperature": (lambda teacher, tmp: dict(temperature=0.0), "temperature=0.0: must be above 0"),
    "unknown divergence": (lambda teacher, tmp: dict(divergence="both"), "divergence='both': use one of forward, reverse, jsd"),
    "gather without a selection": (lambda teacher, tmp: dict(start="random", tap_target="gather"), "tap_target='gather' needs a start that selects channels"),
    "unknown target": (lambda teacher, tmp: dict(tap_target="middle"), "tap_target='middle': use one of auto"),
    "faithful with another target": (lambda teacher, tmp: dict(lrc_faithful=True, tap_target="projected"), "tap_target='projected'.*lrc_faithful"),
    "label smoothing": (lambda teacher, tmp: dict(label_smoothing_factor=0.1), "label_smoothing_factor=0.1: must be 0"),
    "dropped columns": (lambda teacher, tmp: dict(remove_unused_columns=True), "remove_unused_columns=True: must stay False"),
    "fp16": (lambda teacher, tmp: dict(fp16=True), "fp16=True.*bf16"),
    "missing calibration": (lambda teacher, tmp: dict(calibration=tmp / "none.safetensors"), "no calibration file .*none.safetensors"),
    "calibration of another model": (lambda teacher, tmp: dict(calibration=red.calibrate(teacher(seed=1), [{"input_ids": [5, 5, 5, 5]}])), "another model"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_refused(tiny_teacher, tiny_tokenizer, tmp_path, case):
    make, message = BAD[case]
    call = {**dict(teacher=tiny_teacher(), train_data=texts(), tokenizer=tiny_tokenizer), **quick(tmp_path / "run"), **make(tiny_teacher, tmp_path)}
    with pytest.raises(REDError, match=f"(?s){message}"):
        red.distill(**call)
    assert not (tmp_path / "run").exists(), "nothing may be written"


def test_missing_tokenizer_beside_the_teacher(tiny_teacher, tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    with pytest.raises(REDError, match="(?s)no tokenizer that can be read beside the model.*Save the tokenizer in that folder"):
        red.distill(tmp_path / "teacher", texts(), **quick(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_output_folder_is_refused_and_kept(tiny_teacher, tiny_tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(REDError, match="output_dir=.*run' is not empty .*precious.txt.*nothing is overwritten"):
        red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **quick(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"] and (tmp_path / "run" / "precious.txt").read_text() == "mine"
