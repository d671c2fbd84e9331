"""The command line: settings are checked before anything is loaded, errors are one message, and the commands work end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from red.cli import main
from red.errors import REDError
from red.settings import build_config, convert, parse_command_line, read_yaml

SETTINGS = """
teacher_model_name_or_path: {folder}/teacher
train_file: {folder}/corpus.txt
output_dir: {folder}/run
hidden_size: 16
max_length: 32
max-steps: 9
per_device_train_batch_size: 4
learning_rate: 1e-3
save_steps: 2
use_cpu: true
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher):
    """A teacher, its tokenizer, a corpus and run.yaml."""
    from tiny_models import build_tiny_tokenizer

    folder = tmp_path_factory.mktemp("cli")
    tiny_teacher("llama").save_pretrained(folder / "teacher")
    build_tiny_tokenizer().save_pretrained(folder / "teacher")
    documents = [" ".join(f"w{4 + (7 * row + place * place) % 60}" for place in range(5 + row % 20)) for row in range(60)]
    (folder / "corpus.txt").write_text("\n".join(documents))
    (folder / "run.yaml").write_text(SETTINGS.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The folder after `red distill`; the command line wins over the file."""
    assert main(["distill", "--config", str(folder / "run.yaml"), "--max_steps=3", "--eval-file", str(folder / "corpus.txt")]) == 0
    return folder


def refused(capsys, *arguments) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    _, found, message = capsys.readouterr().err.rpartition("red: ")  # after the progress bars
    assert found and "Traceback" not in message
    return message


# ---- commands ----

def test_distill_writes_a_student_and_checkpoints(run, capsys):
    student = AutoModelForCausalLM.from_pretrained(run / "run" / "student")
    assert student.config.hidden_size == 16 and student.config.head_dim == 8
    assert {path.name for path in (run / "run").iterdir()} >= {"student", "checkpoint-2", "checkpoint-3"}
    assert "is not empty" in refused(capsys, "distill", "--config", run / "run.yaml")


def test_export_takes_model_and_tokenizer_only(run, capsys):
    assert main(["export", str(run / "run" / "checkpoint-2"), "--out", str(run / "exported"), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert {path.name for path in (run / "exported").iterdir()} == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                                                    "tokenizer_config.json"}
    assert "not empty" in refused(capsys, "export", run / "run" / "checkpoint-2", "--out", run / "exported")
    message = refused(capsys, "export", run / "run", "--out", run / "other")
    assert "no config.json" in message and "checkpoint-2" in message


def test_demo_passes_on_what_was_said(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("red.demo.run_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert main(["demo"]) == 0
    assert main(["demo", "--output-dir", "here", "--steps", "3", "--starts", "random", "pca", "--overwrite"]) == 0
    assert main(["demo", "--learning-rate", "pca=2e-3", "random=1e-3"]) == 0
    assert calls == [(("runs/demo",), {"overwrite": False}), (("here",), {"overwrite": True, "steps": 3, "starts": ["random", "pca"]}),
                     (("runs/demo",), {"overwrite": False, "learning_rates": {"pca": 2e-3, "random": 1e-3}})]
    assert "expected START=RATE" in refused(capsys, "demo", "--learning_rate", "2e-3")


def test_interruption_says_what_is_kept(run, monkeypatch, capsys):
    def interrupted(**kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("red.distillation.distill", interrupted)
    assert main(["distill", "--config", str(run / "run.yaml")]) == 130
    message = capsys.readouterr().err
    assert "checkpoint-3" in message and "--resume" in message
    assert main(["distill", "--config", str(run / "run.yaml"), "--output_dir", str(run / "new")]) == 130
    assert "nothing is kept" in capsys.readouterr().err


# ---- refusals ----

@pytest.mark.parametrize("arguments, message", [
    (["--hidden_size", "15"], "hidden_size=15 is not a multiple of num_attention_heads=4; the nearest are 12 and 16"),
    (["--hidden_size", "32"], "not below the teacher's 32"),
    (["--learning_rat", "1"], "Unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
    (["--hidden_size", "wide"], "hidden_size='wide' is text; expected a whole number"),
    (["--start", "activatoin"], "start='activatoin'"),
    (["--train_file", "corpis.txt"], "train_file 'corpis.txt' does not exist"),
    (["--max_length", "5000"], "less than one sequence of max_length=5000"),
    (["--optim", "adamm"], "adamm is not a valid OptimizerNames"),
    (["--divergence", "l2"], "divergence='l2'"),
    (["--config", "no.yaml"], "config file 'no.yaml' does not exist"),
])
def test_bad_settings_are_refused_before_training(arguments, message, folder, capsys):
    given = ["--config", folder / "run.yaml", "--output_dir", folder / "refused", *arguments]
    assert message in refused(capsys, "distill", *given)
    assert not (folder / "refused").exists(), "nothing is written"


def test_other_commands_refuse_unknown_options_and_missing_files(folder, capsys):
    assert "does not know '--stepz'" in refused(capsys, "demo", "--stepz", "3")
    out = ("demo", "--output_dir", folder / "demo")
    assert "steps=0" in refused(capsys, *out, "--steps", "0") and "steps=-1" in refused(capsys, *out, "--steps", "-1")
    assert "processes=0" in refused(capsys, *out, "--processes", "0") and not (folder / "demo").exists()
    assert "does not exist" in refused(capsys, "export", folder / "nothing", "--out", folder / "out")
    assert "did you mean --steps?" in refused(capsys, "demo", "--step", "3")
    assert "There is no command 'distil'; did you mean red distill?" in refused(capsys, "distil")
    assert "Missing option '--data'" in refused(capsys, "erank", folder / "teacher") and "not a valid int" in refused(capsys, *out, "--steps", "x")


# ---- help ----

def test_help_needs_no_heavy_import():
    code = "import sys, red.cli; red.cli.main(['-h']); red.cli.main(['eval', '-h']); print([name for name in ('torch', 'transformers', 'numpy', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines()[-1] == "[]"


def test_distill_help_lists_every_own_setting(capsys):
    from red.config import REDConfig

    assert main(["distill", "-h"]) == 0
    text = capsys.readouterr().out
    assert "TrainingArguments" in text
    for name in REDConfig.__annotations__:
        assert text.count(f"--{name} ") >= 1 or f"--{name}\n" in text, name
    assert "--learning_rate                Peak" in text and "[0.0001]" in text


# ---- settings ----

def test_command_line_forms():
    assert parse_command_line(["--a", "1", "--b-c=2=3", "--d", "--e", "-1", "--f", "x", "y", "--a=4"]) == {
        "a": "4", "b_c": "2=3", "d": "true", "e": "-1", "f": ["x", "y"]}
    with pytest.raises(REDError, match="belongs to no setting"):
        parse_command_line(["-a", "1"])


@pytest.mark.parametrize("value, hint, expected", [
    ("1e-4", float, 1e-4), (1, float, 1.0), ("1e3", int, 1000), ("12345678901234567891", int, 12345678901234567891), (7, int, 7), (7.0, int, 7),
    ("true", bool, True), ("No", bool, False), (True, bool, True), ("x", str, "x"), (Path("x"), str, "x"), ("none", str | None, "none"),
    (None, str | None, None), ("none", float | None, None), ("a,b", list[str], ["a", "b"]), (["a"], str | list[str], ["a"]), ("a", str | list[str], "a"),
    ('{"a": 1}', dict, {"a": 1}), ({"a": 1}, dict | str | None, {"a": 1}), ("true", str | bool, True), ("all", str | bool, "all"),
])
def test_values_take_the_type_of_their_field(value, hint, expected):
    found = convert("x", value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("value, hint, message", [
    ("abc", float, "x='abc' is text; expected a number"), ("1.5", int, "expected a whole number"), (True, int, "is a bool; expected a whole number"),
    (5, str, "is a int; expected text"), ("maybe", bool, "true or false"), (None, int, "is a NoneType"), ("inf", int, "whole number"),
    ("nan", float, "a number"), ([1], float | None, "a number or none"), (3, bool, "true or false"),
])
def test_values_of_the_wrong_type_are_named(value, hint, message):
    with pytest.raises(REDError, match=message):
        convert("x", value, hint)


def test_yaml_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning-rate: 1e-4\npacking: false\n")
    assert read_yaml(file) == {"learning_rate": "1e-4", "packing": False}
    file.write_text("")
    assert read_yaml(file) == {}
    file.write_text("- a\n- b\n")
    with pytest.raises(REDError, match="it holds a list"):
        read_yaml(file)
    file.write_text("a: [1\nb: 2")
    with pytest.raises(REDError, match=r"(?s)is not YAML.*line 2"):
        read_yaml(file)


def test_build_config(tmp_path):
    config = build_config({"output_dir": tmp_path, "learning_rate": "3e-4", "hidden_size": "1536", "report_to": "none", "packing": "no",
                           "lr_scheduler_type": "cosine", "use_cpu": True})
    assert (config.learning_rate, config.hidden_size, config.packing, config.lr_scheduler_type) == (3e-4, 1536, False, "cosine")
    with pytest.raises(REDError, match="did you mean 'temperature'"):
        build_config({"temprature": 2})
    with pytest.raises(REDError, match="Unknown setting 'qqqq'; see `red distill -h`"):
        build_config({"qqqq": 2})
    with pytest.raises(REDError, match="settings do not go together"):
        build_config({"output_dir": str(tmp_path), "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch", "use_cpu": True})
