"""`red erank`: several models side by side, on the screen, as JSON and as a plot; refusals before any model is read."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from red.cli import main
from red.erank import hidden_erank
from red.erank_report import ModelRanks, figure, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher):
    """Two models of different width and depth with their tokenizer, and a text."""
    from tiny_models import build_tiny_tokenizer

    folder = tmp_path_factory.mktemp("erank")
    for name, settings in (("wide", {}), ("narrow", dict(hidden_size=16, num_hidden_layers=3))):
        tiny_teacher("llama", **settings).save_pretrained(folder / name)
        build_tiny_tokenizer().save_pretrained(folder / name)
    documents = [" ".join(f"w{4 + (7 * row + place * place) % 60}" for place in range(5 + row % 20)) for row in range(60)]
    (folder / "corpus.txt").write_text("\n".join(documents))
    return folder


def refused(capsys, *arguments) -> str:
    assert main(["erank", *map(str, arguments)]) == 2
    return capsys.readouterr().err.rpartition("red: ")[2]


def test_one_model_prints_bars(folder, capsys):
    assert main(["erank", str(folder / "wide"), "--data", str(folder / "corpus.txt"), "--max-tokens", "200"]) == 0
    said = capsys.readouterr()
    assert "Effective rank of" in said.out and "█" in said.out and "200 tokens" in said.out
    assert "documents" in said.err, "the progress bar"


def test_two_models_stand_side_by_side(folder, tmp_path, capsys, tiny_teacher, tiny_tokenizer):
    models = [str(folder / "wide"), str(folder / "narrow")]
    arguments = ["erank", *models, "--data", str(folder / "corpus.txt"), "--max-tokens", "200", "--output", str(tmp_path / "report.json"), "--plot", str(tmp_path / "erank.svg")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["data"] == str(folder / "corpus.txt") and list(found["models"]) == models
    wide, narrow = found["models"].values()
    assert (wide["hidden_size"], narrow["hidden_size"], wide["tokens"], narrow["tokens"]) == (32, 16, 200, 200)
    assert len(wide["erank"]) == 3 and len(narrow["erank"]) == 4
    texts = [tiny_tokenizer(line)["input_ids"] + [tiny_tokenizer.eos_token_id] for line in (folder / "corpus.txt").read_text().splitlines()]
    assert wide["erank"] == pytest.approx(hidden_erank(tiny_teacher("llama"), None, texts, max_tokens=200), rel=1e-4)
    line = next(line for line in printed.splitlines() if "layer 1" in line)
    assert re.findall(r"[\d.]+%?", line.split("layer 1")[1]) == [f"{wide['erank'][1]:.1f}", f"{narrow['erank'][1]:.1f}", f"{narrow['erank'][1] / wide['erank'][1]:.0%}"]
    assert "layer 3" in printed and "layer 4" not in printed
    drawing = (tmp_path / "erank.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg") and "wide (width 32)" in drawing and "narrow (width 16)" in drawing
    assert "nothing is overwritten" in refused(capsys, *arguments[1:])
    assert "--plot=" in refused(capsys, *models, "--data", folder / "corpus.txt", "--plot", tmp_path / "erank.svg")


def test_json_is_the_old_name_of_output(folder, tmp_path):
    assert main(["erank", str(folder / "wide"), "--data", str(folder / "corpus.txt"), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["models"]


def test_only_labelled_tokens_count(folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{4 + i} w5 w6", "completion": f" w{30 + i} w{40 - i}"}) for i in range(12)))
    assert main(["erank", str(folder / "wide"), "--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "a.json")]) == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())["models"].values()
    assert found["tokens"] == 36, "two words and the end of each, no prompt"


def test_refusals(folder, tmp_path, capsys):
    data = ("--data", folder / "corpus.txt")
    assert "did you mean" in refused(capsys, folder / "wide", "--data", folder / "corpus.tx")
    assert "at least 2 tokens" in refused(capsys, folder / "wide", *data, "--max-tokens", "1")
    assert "ends in .svg" in refused(capsys, folder / "wide", *data, "--plot", tmp_path / "erank.png")
    assert "named twice" in refused(capsys, folder / "wide", folder / "wide", *data)
    assert not list(tmp_path.iterdir())


def test_a_collapsed_model_and_other_numbers_of_tokens_are_said():
    found = [ModelRanks("a/student", 8, 100, [4.0, 2.0]), ModelRanks("b/student", 8, 90, [math.nan, 1.0])]
    text = table(found)
    assert "a/student" in text and "b/student" in text and "none" in text and "collapsed" in text and "50%" in text and "cannot be compared" in text
    assert "collapsed" not in table(found[:1] + [ModelRanks("c", 8, 100, [2.0, 2.0])])
    assert found[1].as_json()["erank"] == [None, 1.0]
    assert "<svg" in figure(found)
