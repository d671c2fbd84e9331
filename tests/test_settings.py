"""Settings from hostile YAML files: what can be meant is taken, everything else is refused in one message with key, value, line and remedy; and the commented example is the truth."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from red.cli import main
from red.commands import USEFUL, meaning
from red.config import REDConfig
from red.errors import REDError
from red.settings import Settings, build_config, check_keys, convert, field_types, gather, read_yaml

EXAMPLE = Path(__file__).parents[1] / "configs" / "distill.yaml"
BASE = "use_cpu: true\nreport_to: none\n"  # two lines
TYPES = field_types(REDConfig)


def built(tmp_path, text: str):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    settings = read_yaml(tmp_path / "run.yaml")
    return build_config(Settings({"output_dir": str(tmp_path / "run"), **settings}, places=settings.places))


def test_what_can_be_meant_is_taken(tmp_path):
    config = built(tmp_path, "\ufeff" + BASE + "learning-rate: '1e-4'\nmax_steps: 1e3\npacking: yes\nerank_stop: off\nsave_strategy: no\neval-strategy: No\nhidden_size: \"64\"\n"
                   "train_file: Bücher/日本.txt\nrun_name: \"no\"\nseed: 1_000\n")
    assert (config.learning_rate, config.max_steps, config.packing, config.erank_stop, config.hidden_size, config.seed) == (1e-4, 1000, True, False, 64, 1000)
    assert config.save_strategy == "no" and config.eval_strategy == "no" and config.train_file == "Bücher/日本.txt" and config.run_name == "no"
    anchored = built(tmp_path, BASE + "erank_floor: &half 0.5\njsd_beta: *half\n<<: {hidden_size: 32, max_steps: 5}\nmax_steps: 7\n")
    assert (anchored.erank_floor, anchored.jsd_beta, anchored.hidden_size, anchored.max_steps) == (0.5, 0.5, 32, 7)


@pytest.mark.parametrize("text, message", [
    ("hidden_size: [16]", "run.yaml, line 3: hidden_size=[16] is a list; expected a whole number."),
    ("hidden_size:\n  - 16\n  - 32", "run.yaml, line 3: hidden_size=[16, 32] is a list; expected a whole number."),
    ("learning_rate: 1e-4x", "run.yaml, line 3: learning_rate='1e-4x' is text; expected a number."),
    ("start: no", "run.yaml, line 3: start=False is a bool; expected text. Put it in quotes: YAML reads yes, no, on and off as true and false."),
    ("run_name: 2026-01-02", "line 3: run_name=datetime.date(2026, 1, 2) is a date; expected text or none. Put it in quotes."),
    ("max_steps: yes", "line 3: max_steps=True is a bool; expected a whole number."),
    ("\nmax_steps:", "line 4: max_steps=None is a NoneType; expected a whole number. Nothing stands after its colon"),
    ("training:\n  max_steps: 3\n  bf16: true", "line 3: Unknown setting 'training'; settings are flat: write max_steps, bf16 without indentation"),
    ("learning_rate:\n  value: 3", "line 3: learning_rate={'value': 3} is a dict; expected a number."),
    ("max_steps: 3\nmax_steps: 4", "run.yaml, line 4: max_steps was given in line 3 already. Keep one of them."),
    ("max-steps: 3\nseed: 1\nmax_steps: 4", "run.yaml, line 5: max_steps was given in line 3 already."),
    ("max_steps:\t3\n\tseed: 1", "Indent with spaces: YAML takes no tabs."),
    ("lerning-rate: 1", "line 3: Unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
    ("hïdden_size: 16", "line 3: Unknown setting 'hïdden_size'; did you mean 'hidden_size'?"),
    ("common: &c\n  seed: 3\n<<: *c", "line 3: Unknown setting 'common'; settings are flat: write seed"),
    ("7: 3", "line 3: '7' is no field's name."), ("yes: 3", "line 3: 'yes' is no field's name."), ("? [a]\n: 3", "is not YAML that red reads"),
    ("seed: *nothing", "is not YAML that red reads"), ("divergence: l2", "run.yaml, line 3: divergence='l2': use one of forward, reverse, jsd."),
    ("train_file: a.txt\ndataset_name: b", "run.yaml, line 4: dataset_name='b': train_file is given too; drop one of them."),
    ("---\nseed: 1\n---\nseed: 2", "is not YAML that red reads"),
], ids=lambda value: value if ":" in value and len(value) < 40 else None)
def test_what_cannot_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(REDError) as refusal:
        built(tmp_path, BASE + text + "\n")
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n"])
def test_an_empty_file_says_what_is_needed(tmp_path, text, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["distill", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    assert "distill needs a teacher and training data" in capsys.readouterr().err


def test_the_command_line_wins_and_has_no_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("hidden_size: 5\nseed: 1\n")
    given = gather(tmp_path / "run.yaml", ["--hidden-size", "wide"], {"seed": 4})
    assert given == {"hidden_size": "wide", "seed": 4} and given.places == {}
    with pytest.raises(REDError, match="^hidden_size='wide'"):
        build_config(given)
    assert main(["distill", "--config", str(tmp_path / "run.yaml"), "--eval-fil", "x"]) == 2
    assert "Unknown setting 'eval_fil'; did you mean 'eval_file'?" in capsys.readouterr().err, "options of the command are known names too"


# ---- configs/distill.yaml ----

def entries() -> dict[str, tuple[bool, object, str]]:
    """{field: (is it on, its value, the prose above it)} of the example."""
    found, prose = {}, []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if setting := re.fullmatch(r"(#?)(\w+): (.*)", line):
            assert setting[2] not in found
            found[setting[2]] = (not setting[1], yaml.safe_load(setting[3]), " ".join(prose))
            prose = []
        else:
            prose = [*prose, line[2:]] if line.startswith("# ") and not line.startswith("# --") else []
    return found


def test_the_example_has_every_setting_with_its_default_and_meaning():
    found, fields = entries(), {field.name: field for field in dataclasses.fields(REDConfig)}
    check_keys(found, fields)
    assert {"output_dir", *REDConfig.__annotations__, *USEFUL} == set(found)
    for name, (on, value, prose) in found.items():
        given = convert(name, value, TYPES[name])
        default = getattr(fields[name].default, "value", fields[name].default)
        assert on or getattr(given, "value", given) == default, f"{name}: the default is {default!r}"
        assert prose == meaning(fields[name]), name


def test_the_example_is_read_and_runs_on_what_it_says(tmp_path):
    settings = read_yaml(EXAMPLE)
    assert {"teacher_model_name_or_path", "train_file", "hidden_size", "output_dir", "max_steps"} <= settings.keys() and len(settings) < 10
    config = build_config({**settings, "bf16": False, "use_cpu": True})
    assert (config.hidden_size, config.max_steps, config.start) == (1536, 2000, "fitted")
    everything = {name: value for name, (_, value, _) in entries().items() if name not in ("bf16", "use_cpu")}
    assert build_config({**everything, "use_cpu": True}).hidden_size == 1536, "with every line on"
