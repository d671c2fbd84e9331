"""report.html and the model card: every number from the run's files, nothing loaded, and nothing in them that a hostile name could do."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from red.cli import main
from red.errors import REDError
from red.report.drawing import plt
from red.report.card import md, model_card, write_card
from red.report.report import render
from red.report.run import Run, thinned
from red.report.units import count, duration, size
from red.report.words import canary, forecasts, judged, worth

EVIL = '<script>alert("x")</script><img src=http://evil/x.png onerror=alert(1)> & $a$ `b` [c](http://evil) | d\n# e'
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "p", "h1", "h2", "h3", "div", "section", "table", "thead", "tbody", "tr", "th",
        "td", "ul", "li", "details",
        "summary", "span", "i", "svg", "g", "path", "defs", "use", "text", "tspan", "image", "rect", "clippath", "line", "circle"}


def facts(**changes) -> dict:
    steps = range(10, 60, 10)
    history = [{"step": step, "loss": 5 - step / 20, "ce": 3 - step / 30, "kl": 1 / step, "tap_mse": 2.5, "grad_norm": 1.25,
                "learning_rate": 1e-4 * (60 - step),
                "tokens": 1000 * step, "tokens_per_second": 4321.0 + step} for step in steps]
    history += [{"step": 0, "canary/teacher": 0.8}, *({"step": step, "canary/student": 0.2 + step / 100,
                                                       "canary/share": 0.25 + step / 80} for step in (0, 20, 40, 40, 50))]
    history += [{"step": step, "erank/share": 0.5 + step / 1000} for step in (0, 25, 50)]
    return {"format": 1, "method": "red", "state": "finished", "began": "2026-01-02T03:04:05+00:00",
            "versions": {"red": "0.1.0", "torch": "2.13.0"}, "commit": "abcdef",
            "device": "cpu: made up", "processes": 2, "teacher": {"name": "organisation/teacher", "parameters": 2_000_000, "hidden_size": 128,
                                                            "teacher_hash": "0123"},
            "student": {"name": None, "parameters": 500_000, "hidden_size": 64},
            "data": {"name": "corpus.txt", "tokens": 777_777, "tokens_sha256": "fedc"},
            "settings": {"changed": {"learning_rate": {"value": 0.004, "default": 0.0001},
                                     "train_file": {"value": "/home/me/secret/corpus.txt", "default": None}},
                         "default": {"seed": 42, "adam_beta2": 0.999, "canary_samples": 64, "start": "fitted"}},
            "channels": {"start": "fitted", "selected": False}, "metrics": {"train_loss": 3.25}, "export": {"max_abs_logit_difference": 0.0},
            "steps": {"done": 50, "planned": 50},
            "erank": {"teacher": [20.0, 10.0, None], "start": [9.0, 7.5, 3.0], "end": [16.0, 9.0, 4.0], "tokens": 1024, "held_out": True,
                      "seconds": 0.5},
            "forecast": {"start": {"seconds": 10.0, "how": "by counting"},
                         "training": {"step_seconds": 0.5, "step_tokens": 2000, "bytes": 2**30, "parts": {"teacher": 2**20}, "how": "by shapes"}},
            "measured": {"start_seconds": 15.0, "peak_bytes": 3 * 2**29, "peak_of": "a scale", "canary_problems": 64},
            "sessions": [{"began": "then", "from_step": 0, "to_step": 30, "seconds": 60.0},
                         {"began": "later", "from_step": 20, "to_step": 50, "seconds": 75.0}],
            "history": history, **changes}


JUDGED = {"teacher": {"name": "t"}, "student": {"name": "s"}, "divergence": {"kl": {"mean": 0.0625, "stderr": 0.1}, "tokens": 5000},
          "rows": [{"task": "red_chains", "metric": "exact_match", "n": 400, "teacher": 0.95, "student": 0.8125,
                    "difference": {"value": -0.1375, "low": -0.2, "high": -0.075}},
                   {"task": EVIL, "metric": "acc", "n": 100, "teacher": 0.5, "student": 0.4375,
                    "difference": {"value": -0.0625, "low": None, "high": None}}]}


@pytest.fixture()
def folder(tmp_path):
    def make(found=None, judgement=JUDGED, channels=True):
        (tmp_path / "run.json").write_text(json.dumps(facts() if found is None else found))
        if judgement:
            (tmp_path / "eval.json").write_text(json.dumps(judgement))
        if channels:
            generator = np.random.default_rng(0)
            save_file({"kept": generator.random(300).astype("f4"), "scores": generator.random(300).astype("f4") + 0.1,
                       "mean_square": generator.random((5, 300)).astype("f4")},
                      tmp_path / "channels.safetensors")
        return tmp_path

    return make


@pytest.fixture()
def no_pictures(monkeypatch):
    """Drawing them takes seconds."""
    monkeypatch.setattr("red.report.figures.svg", lambda figure, description: plt.close(figure) or f"<svg>{description}</svg>")


class Reader(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.events, self.shown = set(), [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.events += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.shown.append(data)


def evil_everywhere(value):
    """Every text of a record, names of settings and versions included, said by somebody who means harm."""
    if isinstance(value, dict):
        keep = ("format", "method", "state", "history")
        more = {EVIL: EVIL} if "torch" in value or "seed" in value else {}
        return {name: item if name in keep else evil_everywhere(item) for name, item in value.items()} | more
    return [evil_everywhere(item) for item in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("evil", [False, True])
def test_the_page_loads_nothing_and_runs_nothing(folder, evil):
    page = render(Run.load(folder(evil_everywhere(facts()) if evil else None)))
    read = Reader(page)
    assert read.tags <= TAGS, read.tags - TAGS
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in read.links) and not read.events
    style = page[page.index("<style>"):page.index("</style>")]
    assert "http" not in style and "@import" not in page and not re.search(r"url\((?!#)", page)
    used, defined = re.findall(r"var\(--([a-z0-9]+)\)", page), re.findall(r"--([a-z0-9]+):", page)
    assert "prefers-color-scheme: dark" in page and set(used) <= set(defined)
    identities = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(identities) == len(set(identities)) and page.count("<svg") == page.count("</svg>") == 11
    if evil:
        assert "<script>alert" in "".join(read.shown)  # as text


def test_the_page_says_what_the_files_say(folder, no_pictures):
    shown = " ".join(Reader(render(Run.load(folder()))).shown)
    for text in ("organisation/teacher", "25.0 %", "87.5 %", "70.0 %", "80.0 %", "45.0 %", "2 min", "50 steps", "50 k tokens", "2 sessions",
                 "corpus.txt", "777777", "fedc",
                 "0123", "0.004", "0.0001", "0.999", "42", "made up", "2 ×", "abcdef", "2.13.0", "1.00 GiB", "1.50 GiB", "1.5 ×", "by shapes",
                 "a scale", "3.25",
                 "2026-01-02", "red_chains", "0.8125", "-0.2 to -0.075", "0.0625", "held-out text", "its logits are the same"):
        assert text in shown or text.replace(" ", "\u00a0") in shown, text


@pytest.mark.parametrize("path", [("teacher", "parameters"), ("student", "hidden_size"), ("erank", "end", 1), ("erank", "teacher", 0),
                                  ("history", 0, "loss"), ("history", 2, "kl"), ("history", 4, "tokens_per_second"), ("history", 7, "canary/share"),
                                  ("settings", "changed", "learning_rate", "value"), ("forecast", "training", "bytes"),
                                  ("measured", "start_seconds"), ("sessions", 1, "seconds"), ("steps", "done"), ("metrics", "train_loss")])
def test_another_number_makes_another_page(folder, path):
    found = facts()
    before = Run.load(folder(found, None, channels=False))
    changed = copy.deepcopy(found)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = place[path[-1]] * 0.7 + 0.05
    after = Run.load(folder(changed, None, channels=False))
    assert _everything(after) != _everything(before)


def _everything(run: Run) -> str:
    """What the page's words and curves are made of: drawing it twice for every number would take half a minute."""
    from unittest.mock import patch

    ranks = patch("red.report.figures.erank_layers", lambda run: str([run.ranks(which) for which in ("teacher", "start", "end")]))
    with patch("red.report.figures._curve", lambda *about: f"<p>{about}</p>"), ranks:
        return render(run)


def test_tables_are_right(folder):
    run = Run.load(folder())
    assert canary(run) == (0.8, 0.7, 0.875, 0.25) and [step for step, _ in run.series("canary/share")] == [0, 20, 40, 50]
    table = {row[0]: row[1:] for row in worth(run)[1]}
    assert table["canary: problems solved, of 64"] == ["80.0 %", "20.0 %", "70.0 %"]
    assert table["effective rank, lowest share of the teacher's"] == ["100.0 %", "45.0 %", "80.0 %"]
    assert table["training loss"] == ["–", "4.5 (step 10)", "2.5"]
    beside = {row[0]: row[1:4] for row in forecasts(run)[1]}
    assert beside["calibration and start"] == ["10 s", "15 s", "1.5 ×"] and beside["peak memory"] == ["1.00 GiB", "1.50 GiB", "1.5 ×"]
    assert beside["a step"] == ["500 ms", duration(1000 / 4351), "0.46 ×"] and beside["tokens a second"] == ["4,000", "4,351", "1.1 ×"]
    assert judged(JUDGED)[1][0] == ["red_chains", "exact_match", "400", "0.95", "0.8125", "-0.1375", "-0.2 to -0.075"]
    assert (count(1.25e9), count(812), count(None), size(2**20)) == ("1.25 B", "812", "–", "1.0 MiB")
    assert (duration(0.25), duration(3600), duration(9000)) == ("250 ms", "60 min", "2.5 h")
    points = [(step, step) for step in range(10_001)]
    assert thinned(points)[0] == (0, 0) and thinned(points)[-1] == (10_000, 10_000) and len(thinned(points)) <= 502


def test_what_was_not_measured_is_said(folder):
    found = facts(history=[], erank={}, measured={}, forecast={}, sessions=[], export={}, state="running")
    shown = " ".join(Reader(render(Run.load(folder(found, None, channels=False)))).shown)
    assert "not measured: canary_steps=100" in shown and "not measured: erank_steps=50" in shown and "was not finished" in shown
    assert "Its reasoning has not been measured." in shown and "What was forecast" not in shown and "How the training went" not in shown


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000,
                                  '{"history": 3, "sessions": 4, "settings": [], "erank": {"teacher": "x"}, "teacher": 5}',
                                  '{"history": [1, {"step": "x", "loss": []}, {"step": 1e400, "loss": NaN}], "sessions": [7, {"seconds": "x"}]}',
                                  '{"settings": {"changed": {"a": 1}, "default": {"b": {}}}, "measured": {"start_seconds": 1}, "versions": 3}',
                                  '{"method": ["x"], "steps": {"done": true}, "forecast": {"start": 1, "training": [2]}, "data": 4}'])
def test_a_damaged_record_is_no_crash(folder, text):
    place = folder(judgement={"rows": [3, {}, {"difference": {}, "teacher": 1e400}], "teacher": {}, "student": {}, "divergence": 3})
    (place / "run.json").write_text(text)
    (place / "channels.safetensors").write_bytes(b"nothing of the kind")
    try:
        page = render(Run.load(place))
    except REDError as error:
        assert "no run of red" in str(error)
    else:
        assert "channels.safetensors cannot be read" in page


@pytest.fixture()
def student(tmp_path):
    place = tmp_path / "student"
    place.mkdir()
    (place / "config.json").write_text("{}")
    return place


@pytest.mark.parametrize("licence", ["apache-2.0", "llama3.2", None])
def test_the_card_is_valid(folder, student, licence):
    if licence:
        (student / "README.md").write_text(f"---\nlicense: {licence}\n---\n# before\n")
        (student / "LICENSE").write_text("The terms.")
    found = facts()
    found["settings"]["changed"]["dataset_name"] = {"value": "organisation/data", "default": None}
    write_card(folder(found), student)
    card = ModelCard.load(student / "README.md")
    assert card.data.base_model == "organisation/teacher" and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["organisation/data"]
    assert card.data.license == licence and card.data.pipeline_tag == "text-generation" and "language" not in card.data.to_dict()
    assert ("[LICENSE](LICENSE)" in card.text) == bool(licence) and ("Built with Llama." in card.text) == (licence == "llama3.2")
    assert "| canary: problems solved, of 64 | 80.0 % | 20.0 % | 70.0 % |" in card.text
    assert "learning_rate: 0.004" in card.text and "secret" not in card.text
    shown = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert shown == {"learning_rate": 0.004, "train_file": "corpus.txt", "dataset_name": "organisation/data"}
    for text in ("## What it is worth", "## Limitations", "## Licence", "## Citation", "2605.29327", "AutoModelForCausalLM", "red\\_chains",
                 "778 k tokens"):
        assert text in card.text, text


def test_nothing_hostile_gets_into_the_card(folder, student):
    found = evil_everywhere(facts())
    found["settings"]["changed"][EVIL] = {"value": 1, "default": 2}
    text = model_card(Run.load(folder(found)), student)
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}  # a name that is none is left out
    fenced = body.split("```yaml\n")[1].split("\n```")[0]
    assert all(re.fullmatch(r"\w+: .*", line) for line in fenced.splitlines()) and isinstance(yaml.safe_load(fenced), dict)
    from markdown_it import MarkdownIt

    prose = body.replace(fenced, "")
    html = MarkdownIt("commonmark").enable("table").render(prose)
    allowed = {"https://arxiv.org/abs/2605.29327", "https://arxiv.org/abs/2505.12781"}
    assert set(re.findall(r'(?:href|src)="([^"]+)"', html)) <= allowed and not re.search(r"<(script|img)", html)
    assert md("a\n# b | c <d>") == "a # b \\| c \\<d\\>"


def test_the_command(folder, student, tmp_path, capsys, no_pictures):
    place = folder()
    assert main(["report", str(place), "--out", str(tmp_path / "seen.html"), "--card"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "seen.html") and (tmp_path / "seen.html").read_text() == render(Run.load(place))
    assert "organisation/teacher" in (student / "README.md").read_text()
    assert main(["report", str(place)]) == 0 and (place / "report.html").is_file()
    assert not capsys.readouterr().err
    (place / "channels.safetensors").write_bytes(b"torn")
    assert main(["report", str(place)]) == 0 and "channels.safetensors cannot be read" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2 and "no run of red" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    (student / "config.json").unlink()
    assert main(["report", str(place), "--card"]) == 2


def test_a_canary_whose_teacher_solves_nothing_says_nothing(folder):
    found = facts(history=[{"step": 0, "canary/teacher": 0.0}, *({"step": step, "canary/student": 0.0} for step in (0, 20))])
    found["measured"]["canary_problems"] = 8  # the file had no more, whatever canary_samples asks for
    shown = render(Run.load(folder(found, judgement=None)))
    assert "canary: problems solved, of 8<" in shown
    assert shown.count("its teacher solves none of the canary&#x27;s problems") == 2 and "canary_steps=100" not in shown and "Its reasoning has not been measured." not in shown


def test_what_was_only_compressed_is_told_of_no_canary(folder):
    shown = render(Run.load(folder(facts(method="compress", history=[]), judgement=None)))
    assert "not measured: red eval" in shown and "canary_steps" not in shown


def test_the_last_of_an_unfinished_run_is_not_called_its_end(folder):
    assert "student, last" in render(Run.load(folder(facts(state="running")))) and "student, end" in render(Run.load(folder()))
