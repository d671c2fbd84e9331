"""GSM8k-Aug as it is published, with rows of our own: parsed, trained on, answered and compared as numbers. The data set itself has not been tried."""

from __future__ import annotations

import json

import pytest
from tiny_models import VOCAB

from red.cli import main
from red.lori import accuracy, load, load_rows

QUESTIONS = ("Ann has 3 bags of 4 apples and eats 2. How many are left?", "A shirt costs $1,200.50 and a hat half of it. What do both cost?", "Tom walks 6 km in 2 hours. How far in 5?",
             "Out of 600 employees, 30% got a rise. How many did not?")
STEPS = (("<<3*4=12>>", "<<12-2=10>>"), ("<<1200.50/2=600.25>>", "<<1200.50+600.25=1800.75>>"), ("<<6/2=3>>", "<<3*5=15>>"), ("<<600*30/100=180>>", "<<600-180=420>>"))
ANSWERS = ("10", "1800.75", "15", "420")
LISTS = [{"question": question, "steps": list(steps), "answer": answer} for question, steps, answer in zip(QUESTIONS, STEPS, ANSWERS, strict=True)]  # steps as a list of texts
TEXTS = [{"question": question, "cot": " ".join(steps), "answer": answer} for question, steps, answer in zip(QUESTIONS, STEPS, ANSWERS, strict=True)]  # or all in one


def character_tokenizer():
    """A token for each character that such rows have, lower case."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-*/=<>.,?%$:"]
    words += [f"spare{index}" for index in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=256)


@pytest.mark.parametrize(("rows", "column"), [(LISTS, "steps"), (TEXTS, "cot")], ids=["a list of steps", "steps in one text"])
def test_the_published_rows_train(rows, column, tiny_teacher, tmp_path, capsys):
    tiny_teacher(max_position_embeddings=256).save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_rows(tmp_path / "rows.jsonl", steps_column=column)
    assert [(row.question, row.steps, row.answer) for row in read] == list(zip(QUESTIONS, STEPS, ANSWERS, strict=True))
    arguments = {"teacher_model_name_or_path": tmp_path / "teacher", "train_file": tmp_path / "rows.jsonl", "steps_column": column, "output_dir": tmp_path / "run", "max_steps": 2,
                 "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    assert main(["lori", *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    assert "rationale" in capsys.readouterr().out
    index = json.loads((tmp_path / "run" / "trajectories" / "trajectories.json").read_text())
    assert index["tokens"] == sum(len(f" {step}") for steps in STEPS for step in steps)
    model, tokenizer, facts = load(tmp_path / "run" / "student")
    assert set(accuracy(model, tokenizer, read, facts, max_new_tokens=4)["accuracy_by_steps"]) == {"2"} and facts.latent_steps == 5
