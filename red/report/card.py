"""The student's model card: README.md as the Hugging Face hub reads it, from the facts of its run and its teacher's terms (`red.sharing.licences`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from red.errors import REDError
from red.files import PAGE, atomic_write_text
from red.sharing.licences import REPOSITORY, card, terms_of
from red.report import words
from red.report.run import Run, finite_number
from red.report.units import count

# paths, names of machines and accounts, and what says nothing of the model
PRIVATE = re.compile(
    r"output_dir|logging_dir|run_name|hub_|push_to_hub|report_to|project|trackio|disable_tqdm|token_cache_dir|trajectories_dir|use_cpu|save_|logging_"
)
LATENT_CITATION = "The method is LoRi, [arXiv 2606.05315](https://arxiv.org/abs/2606.05315), reconstructed from its paper."
LATENT = ("import red.lori", "", 'model, tokenizer, facts = red.lori.load("path/to/this/folder")')


def write_card(folder: str | Path, student: str | Path) -> Path:
    """Write the card of the run in `folder` into the student's folder, which has its teacher's licence files already."""
    path = Path(student) / "README.md"
    atomic_write_text(path, model_card(Run.load(folder), student))
    return path


def model_card(run: Run, student: str | Path) -> str:
    """The card as text."""
    width = run.number("student", "hidden_size")
    if width is None:
        raise REDError(f"{run.folder} does not say what its student is, so there is nothing to write into a card.")
    terms = replace(terms_of(Path(student).absolute()), base_model=_repository(run.text("teacher", "name")))  # they were carried there
    terms = replace(terms, files=tuple(path for path in terms.files if path.name != "README.md"))
    dataset = words.setting(run, "dataset_name")
    known = {"datasets": [dataset]} if isinstance(dataset, str) and REPOSITORY.fullmatch(dataset) else {}
    tags = ["red", "distillation", *(["latent-reasoning"] if run.method == "lori" else ["width-pruning"])]
    return card(
        terms,
        int(width),
        facts={**known, "tags": tags},
        summary=md(words.done(run)),
        usage=LATENT if run.method == "lori" else None,
        citation=LATENT_CITATION if run.method == "lori" else None,
        sections=[
            "## What it is worth",
            "",
            *_table(*words.worth(run)),
            *_judged(run),
            "",
            *_report(run),
            "## How it was made",
            "",
            *_made(run),
            "## Limitations",
            "",
            *(f"* {md(text)}" for text in words.limitations(run)),
            "",
        ],
    )


def _report(run: Run) -> list[str]:
    return [f"All curves and settings: `{PAGE}` of the run, beside this folder when it was made.", ""]


def _judged(run: Run) -> list[str]:
    lines = []
    for name, judgement in run.judgements:
        heading, rows = words.judged(judgement)
        lines += ["", f"Student beside its teacher, by `red eval` ({md(name)}):", "", *_table(heading, rows)]
    return lines


def _made(run: Run) -> list[str]:
    """The settings that are not red's defaults, ready for `red distill --config`, without what belongs to a machine."""
    changed = run.get("settings", "changed")
    command = {"red": "distill"}.get(run.method, run.method)
    lines = [f"`red {md(command)} --config run.yaml` with these settings, all others at their defaults:", "", "```yaml"]
    for name, entry in changed.items() if isinstance(changed, dict) else ():
        if re.fullmatch(r"\w{1,64}", name, re.ASCII) and isinstance(entry, dict) and not PRIVATE.match(name):
            lines.append(f"{name}: {json.dumps(_without_path(name, entry.get('value')), ensure_ascii=True)}")
    data, versions = run.get("data") or {}, run.get("versions") or {}
    lines += ["```", ""]
    if isinstance(data, dict) and finite_number(data.get("tokens")):
        lines += [f"Text: {md(str(data.get('name')))}, {count(finite_number(data['tokens']))} tokens.", ""]
    if isinstance(versions, dict) and versions:
        shown = ", ".join(f"{md(str(name))} {md(str(value))}" for name, value in versions.items() if name in ("red", "torch", "transformers"))
        lines += [f"With {shown}; commit of red: {md(run.text('commit') or 'unknown')}.", ""]
    return lines


def _without_path(name: str, value):
    """Of a path, its last part: a card says nothing of the machine."""
    if isinstance(value, str) and name not in ("dataset_name",) and ("/" in value or "\\" in value):
        return (
            _repository(value)
            if name.endswith("model_name_or_path") and REPOSITORY.fullmatch(value) and not Path(value).exists()
            else re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        )
    return [_without_path(name, item) for item in value] if isinstance(value, list) else value


def _repository(name: str | None) -> str:
    """A name as the hub has them; "" for any other."""
    return name if name and REPOSITORY.fullmatch(name) else ""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(md(cell) for cell in heading) + " |", "|" + "---|" * len(heading)]
    return [*lines, *("| " + " | ".join(md(cell) for cell in row) + " |" for row in rows)] if rows else [words.NOT_MEASURED.capitalize() + "."]


def md(text: str) -> str:
    """Text that stays text in markdown: nothing in it is a link, an image, HTML, a table's edge or a new line."""
    return re.sub(r"([\\`*_\[\]<>|~$&]|(?<=www)\.)", r"\\\1", " ".join(text.split())).replace("://", ":\\//")
