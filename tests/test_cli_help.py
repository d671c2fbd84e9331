"""The command line without a model: help that says everything, words that become options, the nearest name for a wrong one, completion."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from red.cli import main, red

ROOT = Path(__file__).parents[1]
COMMANDS = dict(red.commands)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def said(capsys, *arguments, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_first_page_is_a_manual(capsys):
    page = said(capsys, "-h")
    assert page == said(capsys, "--help")
    order = [page.index(f"\n  {name} ") for name in ("demo", "plan", "doctor", "distill", "eval", "compress", "erank", "export", "lori")]
    assert order == sorted(order), "in the order in which they are needed"
    assert {line.split()[0] for line in page.splitlines() if line.startswith("  ") and line.split()[0] in COMMANDS} == set(COMMANDS), "none is left out"
    for words in ("Exit codes: 0 done · 1 red doctor found something red · 2 bad input", "130 after Ctrl-C", "143 after SIGTERM", "output_dir", "_RED_COMPLETE=bash_source"):
        assert words in page, words


def test_the_manuals_example_is_a_config(capsys, tmp_path):
    import textwrap

    from red.settings import build_config, read_yaml

    page = said(capsys, "-h")
    example = page[page.index("  teacher_model_name_or_path:"):page.index("  red doctor ")]
    (tmp_path / "run.yaml").write_text(textwrap.dedent(example))
    config = build_config({**read_yaml(tmp_path / "run.yaml"), "bf16": False, "use_cpu": True})
    assert (config.hidden_size, config.learning_rate, config.max_steps) == (1536, 1e-4, 2000)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_page(name, capsys):
    page = said(capsys, name, "-h")
    assert page.startswith(f"Usage: red {name} ") and f"\n  red {name}" in page and "\n\n" in page, "synopsis, description, examples"
    for option in COMMANDS[name].params:
        for word in [] if option.param_type_name == "argument" else option.opts:
            assert word in page and option.help, word


def test_distills_page_has_every_field_with_meaning_type_and_default(capsys):
    from red.config import REDConfig

    page = " ".join(said(capsys, "distill", "-h").split())
    for field in dataclasses.fields(REDConfig):
        if field.init:
            assert page.count(f"--{field.name} ") >= 1, field.name
    assert "--max_length Tokens per training row (a whole number). [2048]" in page
    assert "--packing Put several documents into one row; they never see each other (true or false). [true]" in page
    assert "--max_steps Optimiser steps of the training" in page and "(one of no, steps, epoch, best or text). [steps]" in page
    assert page.index("--start ") < page.index("--tap_weight ") < page.index("--max_steps Optimiser") < page.index("--adam_beta1 ") < page.index("--use_liger_kernel "), "red's own, the most used, the others by name"


def test_help_comes_at_once():
    """In processor time, which a busy machine does not change; the interpreter's own start is in it."""
    before = os.times()
    for _ in range(3):
        subprocess.run([sys.executable, "-m", "red.cli", "-h"], cwd=ROOT, check=True, capture_output=True)
    after = os.times()
    assert (after.children_user + after.children_system - before.children_user - before.children_system) / 3 < 0.3


def test_several_values_one_value_and_none(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("red.judge.judge", lambda *args, **given: calls.append((args, given)) or SimpleNamespace(as_json=dict))
    assert main(["eval", "s", "--against", "t", "--tasks", "a", "b", "--limit", "3", "--task", "c", "--no-speed"]) == 0
    assert main(["eval", "--against=t", "--tasks", "none", "--max-length=7", "--", "s"]) == 0
    assert main(["eval", "s", "--against", "t"]) == 0
    assert [(args, given["tasks"], given["limit"], given["speed"], given["max_length"]) for args, given in calls] == [
        (("s", "t"), ["a", "b", "c"], 3, False, 2048), (("s", "t"), [], None, True, 7), (("s", "t"), None, None, True, 2048)]
    seen = []
    monkeypatch.setattr("red.distillation.distill", lambda **given: seen.append((given["resume"], given["config"].max_steps)) or SimpleNamespace(metrics={}, path="x"))
    settings = ["--output_dir", str(tmp_path / "run"), "--use_cpu"]
    for words in (["--resume", "--max_steps", "3"], ["--max-steps=4", "--resume"], ["--resume", "run/checkpoint-2", "--max_steps", "5"], ["--max_steps", "6"], ["--resume=a", "--seed", "-1"]):
        assert main(["distill", *settings, *words]) == 0
    assert seen == [(True, 3), (True, 4), ("run/checkpoint-2", 5), (False, 6), ("a", -1)]


@pytest.mark.parametrize("arguments, message", [
    (["distil"], "There is no command 'distil'; did you mean red distill?"), (["qqqq"], "see red -h"), ([], "See red -h"),
    (["erank", "m", "--daat", "x"], "red erank does not know '--daat'; did you mean --data?"),
    (["erank", "--data", "x"], "Missing argument 'MODEL"), (["plan", "x"], "Missing option '--hidden_size'"), (["plan", "x", "--hidden_size", "w"], "'w' is not a valid int"),
    (["export", "a", "b", "--out", "c"], "extra argument"), (["demo", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"), (["demo", "--method", "redd"], "'redd' is not one of"),
    (["distill", "--config"], "--config"), (["distill", "x"], "'x' belongs to no setting"), (["distill", "-q"], "'-q' belongs to no setting"),
])
def test_what_is_wrong_is_one_message_and_two(arguments, message, capsys):
    found = said(capsys, *arguments, code=2)
    assert message in found and found.startswith("red: ") and "Traceback" not in found and len(found.splitlines()) == 1


def test_a_file_that_ends_too_early_is_no_interruption(monkeypatch):
    def ends(*_, **__):
        raise EOFError("Ran out of input")

    monkeypatch.setattr("red.planning.planner.plan", ends)
    with pytest.raises(EOFError, match="Ran out"):
        main(["plan", "x", "--hidden_size", "8"])


def test_shell_completion():
    done = subprocess.run([sys.executable, "-c", "from red.cli import main; main()"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "_RED_COMPLETE": "bash_complete", "COMP_WORDS": "red distill --res", "COMP_CWORD": "2"})
    assert done.stdout.split() == ["plain,--resume"]
