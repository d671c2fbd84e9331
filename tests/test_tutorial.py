"""docs/tutorial.md, followed to the letter: its files are written, its commands and code are run, with fewer steps than it says.

    python tests/test_tutorial.py FOLDER      the whole length, with its output
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = {"max_steps": 4, "canary_steps": 2, "erank_steps": 2, "logging_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4}


def blocks() -> list[tuple[str, str]]:
    """`(language, text)` of the page's fenced blocks that say one, in order."""
    return re.findall(r"^```(python|yaml|shell)\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def follow(short: bool) -> list[str]:
    """Run the page in the current folder; returns the commands."""
    from red.cli import main

    commands = []
    for language, text in blocks():
        if language == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), {})  # noqa: S102 - the page is in this repository
        elif language == "yaml":
            for name, value in SHORT.items() if short else ():
                text, found = re.subn(rf"^{name}: \S+", f"{name}: {value}", text, flags=re.MULTILINE)
                assert found == 1, name
            Path(re.match(r"# (\S+)\n", text).group(1)).write_text(text)
        else:
            for line in text.splitlines():
                assert line.startswith("red "), line
                arguments = shlex.split(line)[1:]
                if short:
                    arguments = [{"run/checkpoint-30": "run/checkpoint-2"}.get(word, word) for word in arguments]
                if arguments[0] == "eval" and importlib.util.find_spec("lm_eval") is None:
                    arguments[arguments.index("questions.jsonl")] = "none"
                print("$", line, flush=True)
                assert main(arguments) == 0, line
                commands.append(line.split()[1])
    return commands


def test_the_tutorial_works(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert follow(short=True) == ["doctor", "plan", "distill", "distill", "eval", "erank", "export"]
    said = capfd.readouterr().out
    assert "none red" in said and "canary/share" in said and "erank/share" in said and "KL(teacher‖student)" in said and "layer 4" in said
    assert "reloaded: largest difference of logits" in said and "? k :" in said, "the student answers in transformers' pipeline"
    assert json.loads((tmp_path / "run/student/config.json").read_text())["hidden_size"] == 32
    for name in ("run/student/README.md", "run/student/model.safetensors", "student-bf16/model.safetensors", "erank.svg"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_the_page_shows_what_its_commands_print():
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    assert "<!-- output" not in page and all(f"red {name}" in page for name in ("doctor", "plan", "distill", "eval", "erank", "export"))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    os.chdir(sys.argv[1])
    follow(short=False)
