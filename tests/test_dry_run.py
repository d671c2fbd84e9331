"""`red distill --dry_run`: it tells what the training really does, without a weight being read or a file written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_chat import MARKED, TALK
from tiny_models import build_tiny_model, build_tiny_tokenizer
from tiny_training import make_trainer

from red.planning import dry_run
from red.planning.pace import Pace
from red.cli import main
from red.config import REDConfig
from red.data.loading import IGNORE, load_examples
from red.lori.checkpoints import STATE
from red.training.checkpoint_folders import checkpoints, seal

SETTINGS = dict(hidden_size=16, max_length=24, per_device_train_batch_size=3, learning_rate=1e-3, start="fitted", use_cpu=True, report_to="none", disable_tqdm=True,
                save_strategy="no", calibration_samples=4)


def document(row: int) -> str:
    return " ".join(f"w{4 + (7 * row + place * place) % 60}" for place in range(4 + row % 15))


@pytest.fixture()
def folder(tmp_path):
    """A teacher whose weights cannot be read, with its tokenizer, and a text."""
    build_tiny_model("llama").save_pretrained(tmp_path / "teacher")
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{4 + row} w5", "completion": f" {document(row)}"}) for row in range(50)))
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": [*TALK, {"role": "assistant", "content": f"w{40 + row}"}]}) for row in range(20)))
    (tmp_path / "text.txt").write_text("\n".join(map(document, range(60))))
    return tmp_path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def told(folder, capsys, **settings) -> str:
    """What the command prints; nothing may appear or change."""
    (config := folder / "run.json").write_text(json.dumps({**SETTINGS, "teacher_model_name_or_path": str(folder / "teacher"), "output_dir": str(folder / "run"), **settings}))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["distill", "--config", str(config), "--dry-run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "a dry run writes nothing"
    return capsys.readouterr().out


def shown(text: str) -> list[tuple[str, bool]]:
    """The words of the printed row, and whether each counts in the loss."""
    words, learnt = [], True
    for piece in re.split(r"([⟦⟧])", "".join(line.partition("│ ")[2] + " " for line in text.splitlines() if "│ " in line)):
        learnt = piece != "⟦" if piece in ("⟦", "⟧") else learnt
        words += [(word, learnt) for word in piece.split() if piece not in ("⟦", "⟧")]
    return words


@pytest.mark.parametrize("file, settings", [
    ("text.txt", {}), ("text.txt", dict(seed=5, gradient_accumulation_steps=2)), ("text.txt", dict(data_seed=3)), ("text.txt", dict(packing=False)),
    ("text.txt", dict(train_sampling_strategy="sequential")), ("pairs.jsonl", {}), ("talks.jsonl", dict(assistant_only_loss=True)), ("text.txt", dict(streaming=True)),
], ids=str)
def test_the_first_row_is_the_one_that_is_trained_on_first(folder, tmp_path, capsys, file, settings):
    settings = {"max_steps": 1, **settings}
    text = told(folder, capsys, train_file=str(folder / file), **settings)
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    given = {**SETTINGS, **settings, "start": "activation"}
    source = str(folder / file) if settings.get("streaming") else load_examples(folder / file, tokenizer, assistant_only_loss=settings.get("assistant_only_loss", False))
    trainer = make_trainer(build_tiny_model("llama"), tmp_path / "real", source, **given) if not settings.get("streaming") else _streaming(tmp_path / "real", source, tokenizer, given)
    trainer.train()
    row = {key: value[0].tolist() for key, value in trainer.seen[0].items()}
    used, words_of_row = sum(row["token_mask"]), row["input_ids"]
    words = tokenizer.convert_ids_to_tokens(row["input_ids"][:used])
    assert shown(text) == [(word, label != IGNORE) for word, label in zip(words, row["labels"][:used], strict=True)]
    assert f"a step of 3 rows of {len(words_of_row)} tokens takes about" in text and (settings.get("packing", True) or len(words_of_row) < SETTINGS["max_length"])
    assert f"{used:,} tokens and" in re.sub(r"documents? of ", "", text) and len(words) > 3
    assert f"{sum(label != IGNORE for label in row['labels'])} tokens count in the loss" in text


def _streaming(folder, source, tokenizer, given):
    from tiny_training import RecordingTrainer, settings_of

    return RecordingTrainer(build_tiny_model("llama"), REDConfig(**settings_of(folder, **given)), train_dataset=source, processing_class=tokenizer)


def test_the_plan_is_what_the_training_has(folder, tmp_path, capsys):
    text = told(folder, capsys, train_file=str(folder / "text.txt"), num_train_epochs=1.5, gradient_accumulation_steps=2, save_strategy="steps", save_steps=4)
    examples = load_examples(folder / "text.txt", build_tiny_tokenizer())
    given = {**SETTINGS, "max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "start": "activation", "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(build_tiny_model("llama"), tmp_path / "real", examples, **given)
    trainer.train()
    teacher, student = build_tiny_model("llama").num_parameters(), trainer.student.num_parameters()
    trained = sum(factor.master.numel() for factor in trainer.projections)
    rows = len(trainer.train_dataset)
    table = {line.strip().split("  ")[0]: line.split()[-3:] for line in text.splitlines() if line.startswith("  ")}
    assert table["parameters"] == [f"{teacher:,}", f"{student:,}", f"({student / teacher:.0%})"] and table["hidden size"][-2:] == ["32", "16"]
    assert f"{trained:,} parameters" in text
    assert f"{trainer.train_dataset.num_tokens:,} tokens in {rows} rows of 24" in text
    assert f"{trainer.state.global_step} steps, {trainer.state.global_step * 6 * 24:,} tokens" in text
    for words in ("fitted, start_fit=full, calibrated on the first 4 rows of 24 tokens", "s a step", "checkpoint-N every 4 steps, start.safetensors",
                  str(folder / "run" / "student"), "GiB free (cpu)"):
        assert words in text, words
    assert f"; {len(checkpoints(tmp_path / 'real'))} checkpoints of" in text and trainer.state.global_step > 4, "also where epochs say how many steps"
    text = told(folder, capsys, train_file=str(folder / "text.txt"), calibration_samples=1000)
    assert f"calibrated on the first {rows} rows of 24 tokens" in text, "no more than there are"


@pytest.mark.parametrize("rows, settings, steps", [(10, {}, 12), (10, dict(dataloader_drop_last=True), 9), (None, {}, None), (None, dict(max_steps=7), 7), (2, dict(gradient_accumulation_steps=4), 3)])
def test_steps(tmp_path, rows, settings, steps):
    assert dry_run.steps_of(REDConfig(**{**SETTINGS, "output_dir": str(tmp_path), **settings}), rows) == steps


def test_a_big_text_is_not_read_whole(folder, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "SMALLEST", 10)
    text = told(folder, capsys, train_file=str(folder / "text.txt"), token_cache_dir=str(folder / "cache"))
    assert "not counted here" in text and "3 epochs; 72 tokens a step" in text
    assert [word for word, _ in shown(text)][:4] == document(0).split()[:4], "the text's beginning"
    text = told(folder, capsys, train_file=str(folder / "text.txt"), packing=False)
    assert "s a step" in text and "3 rows of 24 tokens takes at most about" in text, "the longest document is not known"


def test_what_remains_of_a_resumed_run(folder, tmp_path, monkeypatch):
    """Against what the resumed training does; 2 h a step."""
    monkeypatch.setattr(dry_run, "step_seconds", lambda *_: Pace(7200.0, False, "by hand"))
    given = {**SETTINGS, "start": "activation", "save_strategy": "steps", "save_steps": 2, "train_file": str(folder / "text.txt"), "teacher_model_name_or_path": str(folder / "teacher")}
    examples = load_examples(folder / "text.txt", build_tiny_tokenizer())
    make_trainer(build_tiny_model("llama"), tmp_path / "run", examples, **{**given, "max_steps": 2}).train()
    longer = REDConfig(**{**given, "max_steps": 9, "output_dir": str(tmp_path / "run")})
    text = dry_run.dry_run(longer, resume=True)
    assert "9 steps, 648 tokens" in text and "; 2 are done, 7 remain; 72 tokens a step" in text and "about 18.0 h, 14.0 h of it for the steps that remain: 7.2e+03 s a step, by hand" in text
    assert "; 4 checkpoints of" in text, "after 4, 6, 8 and 9 steps"
    assert dry_run.dry_run(longer, resume=tmp_path / "run" / "checkpoint-2") == text
    resumed = make_trainer(build_tiny_model("llama"), tmp_path / "run", examples, **{**given, "max_steps": 9})
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 7
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("{")
    assert " remain" not in dry_run.dry_run(longer, resume=tmp_path / "run" / "checkpoint-2"), "a checkpoint that does not say how far it is"
    monkeypatch.setattr(dry_run, "step_seconds", lambda *_: Pace(7200.0, True, "by hand"))
    assert "at least 18.0 h" in dry_run.dry_run(longer, resume=tmp_path / "run" / "checkpoint-2")


def test_a_start_file_a_calibration_and_a_resumed_run_are_named(folder, capsys, monkeypatch):
    monkeypatch.setattr("red.planning.dry_run.Calibration.load", lambda path: None)  # tests/test_places.py has one that is refused
    (folder / "calibration.safetensors").write_text("")
    (folder / "start.safetensors").write_text("")
    config = dry_run.REDConfig(**{**SETTINGS, "teacher_model_name_or_path": str(folder / "teacher"), "train_file": str(folder / "text.txt"), "output_dir": str(folder / "run"),
                                  "start": str(folder / "start.safetensors")})
    assert f"statistics from {folder}/calibration.safetensors" in dry_run.dry_run(config, calibration=folder / "calibration.safetensors")
    assert f"start     {folder}/start.safetensors, start_fit=none" in dry_run.dry_run(config)
    (folder / "run" / "checkpoint-3").mkdir(parents=True)
    (folder / "run" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert f"goes on from {folder}/run/checkpoint-3" in dry_run.dry_run(config, resume=folder / "run" / "checkpoint-3")
    for step, save in ((9, 1), (4, 2)):  # the run went back: 4 was saved last; and 11 was cut short
        seal(_made(folder / "run" / f"checkpoint-{step}"), step=step, save=save)
    _made(folder / "run" / "checkpoint-11")
    assert f"goes on from {folder}/run/checkpoint-4\n" in dry_run.dry_run(config, resume=True)


@pytest.mark.parametrize("settings, message", [
    (dict(hidden_size=15), "hidden_size=15 is not a multiple of num_attention_heads=4"), (dict(start="pcaa"), "start='pcaa'"), (dict(streaming=True), "A stream has no end"),
    (dict(streaming=True, max_steps=3, packing=False), "packing=False pads"), (dict(output_dir="teacher"), "is not empty"), (dict(train_file=None), "needs a teacher and training data"),
    (dict(max_length=5000), "less than one sequence of max_length=5000"), (dict(text_column="body", train_file="rows.jsonl"), "columns text"),
    (dict(resume_from_checkpoint="x"), "red distill --resume"), (dict(dataset_name="x"), "train_file is given too"),
])
def test_what_training_would_refuse_is_refused(folder, capsys, settings, message):
    (folder / "rows.jsonl").write_text('{"text": "w5 w6"}\n')
    settings = {name: str(folder / value) if name in ("output_dir", "train_file") and value else value for name, value in settings.items()}
    given = {**SETTINGS, "teacher_model_name_or_path": str(folder / "teacher"), "output_dir": str(folder / "run"), "train_file": str(folder / "text.txt"), **settings}
    (folder / "run.json").write_text(json.dumps(given))
    for more in (["--dry_run"], []):  # the run itself refuses it too, before it finds that the weights cannot be read
        if more or message not in ("less than one sequence of max_length=5000", "columns text"):
            assert main(["distill", "--config", str(folder / "run.json"), *more]) == 2
            assert message in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_nothing_that_a_terminal_obeys_is_printed():
    class Letters:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    assert dry_run._marked([27, 91, 65, 10, 66], [IGNORE, 1, 1, 1, 1], Letters()) == "⟦\\x1b⟧[A\nB"
    long = dry_run._marked([97] * 2000, [1] * 2000, Letters())
    assert len(long) == dry_run.HEAD + dry_run.TAIL + 3 and " … " in long


# ---- red lori --dry_run ----

@pytest.mark.parametrize("preset, between", [("lori", "5 latent steps"), ("explicit_cot", "7 9"), ("no_cot", "nothing")])
def test_lori_tells_its_plan_and_the_first_problem(tmp_path, capsys, preset, between):
    from tiny_lori import PREFIX, number_tokenizer

    build_tiny_model("llama").save_pretrained(tmp_path / "teacher")
    number_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": "table 3", "steps": ["7", "9"], "answer": str(row)}) for row in range(10)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = ["lori", "--teacher_model_name_or_path", tmp_path / "teacher", "--train_file", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run", "--answer_prefix", PREFIX,
             "--preset", preset, "--use_cpu", "--per_device_train_batch_size", "4", "--dry-run"]
    assert main([str(word) for word in given]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    text = capsys.readouterr().out
    assert f"between   {between}\n" in text and "question  table 3\n" in text and "answer    answer : 0 <eos>" in text
    for words in ("llama, 2 layers of width 32", "10 problems, the longest of 8 tokens", "9 steps of 4 problems", f"preset {preset}: target="):
        assert words in text, words
    for more, message in ((["--answer_column", "result"], "Row 0 has no 'result'"), (["--max_length", "7"], "Row 0 has 8 tokens"), (["--rationale_layers", "9"], "rationale_layers='9': use all, or numbers from 0"),
                          (["--anchor_layers", "1,1"], "anchor_layers='1,1': use all"), (["--output_dir", tmp_path / "teacher"], "is not empty")):
        assert main([str(word) for word in [*given, *more]]) == 2
        assert message in capsys.readouterr().err
    assert main([str(word) for word in [*given, "--output_dir", tmp_path / "teacher", "--resume"]]) == 2
    assert "has no checkpoint-N folder to resume from" in capsys.readouterr().err  # as the run says
    begun = _made(tmp_path / "begun")  # ended before its first checkpoint: the run takes such a folder
    (begun / "run.json").write_text('{"format": 1}')
    _made(begun / "_saving")
    assert main([str(word) for word in [*given, "--output_dir", begun]]) == 0
    _made(begun / "checkpoint-2")
    save_file({"a": torch.zeros(1)}, begun / "checkpoint-2" / STATE, metadata={"run": json.dumps({"target": "other"})})
    seal(begun / "checkpoint-2", step=2, save=1)
    assert main([str(word) for word in [*given, "--output_dir", begun, "--resume"]]) == 2
    assert "was made with target='other'" in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, _made(begun / "checkpoint-4") / STATE, metadata={"run": "{}"})
    (begun / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    seal(begun / "checkpoint-4", step=4, save=2)
    assert main([str(word) for word in [*given, "--output_dir", begun, "--resume"]]) == 0
    text = capsys.readouterr().out
    assert f"goes on from {begun / 'checkpoint-4'}\n" in text and "9 steps of 4 problems; 4 are done, 5 remain\n" in text


def test_lori_refuses_what_its_training_would(tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "3 + 4", "steps": ["<<3+4=7>>"], "answer": "7"}\n' * 2)
    teacher = Path(dry_run.__file__).parents[1] / "lori" / "demo" / "teacher"
    words = ["lori", "--teacher_model_name_or_path", str(teacher), "--train_file", str(problems), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--dry_run"]
    assert main([*words, "--resume"]) == 2 and "has no checkpoint-N folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')  # of a run that was stopped before its first checkpoint
    assert main(words) == 0
    (tmp_path / "run" / "checkpoint-2").mkdir()
    (tmp_path / "run" / "student").mkdir()
    (tmp_path / "run" / "student" / "config.json").write_text("{}")
    assert main([*words, "--resume"]) == 2 and "This run is finished" in capsys.readouterr().err
