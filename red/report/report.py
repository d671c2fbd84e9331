"""report.html of a run: one file that loads nothing and needs no script, every number of it from the run's own files, readable in light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from red.files import atomic_write_text
from red.report import figures, words
from red.report.page import card, facts_table, legend, page, table
from red.report.run import Run, finite_number
from red.report.units import count, duration, number, percent, ratio, size
from red.report.words import NOT_MEASURED

KINDS = {"red": "distillation", "compress": "compression", "lori": "latent reasoning"}


def write_page(folder: str | Path, path: str | Path) -> Path:
    """Write the report of the run in `folder` to `path`.

    Raises:
        REDError: the folder holds no run.
    """
    atomic_write_text(path, render(Run.load(folder)))
    return Path(path)


def render(run: Run) -> str:
    """The page as text."""
    headline = words.headline(run)
    sections = [_cards(run), _worth(run), _judged(run), _curves(run), _erank(run), _channels(run), _forecast(run), _settings(run), _provenance(run)]
    return page("\n".join(part for part in sections if part) + "\n", title=f"red: {headline}", kicker=f"red · {KINDS.get(run.method, 'run')}",
                headline=headline.replace(" %", "\u00a0%"), lead=words.done(run))


def _section(title: str, text: str, *parts: str) -> str:
    said = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{said}\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _scroll(content: str, kind: str = "") -> str:
    return f'<div class="scroll {kind}">{content}</div>' if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _folded(title: str, content: str) -> str:
    return f'<details><summary class="minor">{escape(title)}</summary>{content}</details>'


def _cards(run: Run) -> str:
    cards = []
    teacher, student = run.number("teacher", "parameters"), run.number("student", "parameters")
    if student and run.method != "lori":
        widths = f"width {number(run.number('student', 'hidden_size'))} of {number(run.number('teacher', 'hidden_size'))}"
        cards.append(card("size", "teacher", percent(ratio(student, teacher)), "of the teacher's parameters",
                          f"{count(student)} of {count(teacher)} · {widths}"))
    theirs, mine, share, first = words.canary(run)
    if share is not None:
        cards.append(card("reasoning", "start0", percent(share), "of the canary problems that the teacher solves",
                          f"student {percent(mine)}, teacher {percent(theirs)} · at the start {percent(first)} of it"))
    start, end = words.lowest_share(run, "start"), words.lowest_share(run, "end")
    if run.method != "lori" and start is not None:
        cards.append(card("effective rank", "start1", percent(start if end is None else end), "of the teacher's, at the layer where it is least",
                          "a collapsed student has less than 25 %" if run.method == "compress" else f"at the start {percent(start)}"))
    if run.method == "lori" and (losses := run.series("task")):
        cards.append(card("task loss", "start0", number(losses[-1][1]), "at the end", f"{number(losses[0][1])} at step {losses[0][0]:.0f}"))
    if seconds := words.training_seconds(run):
        tokens, rate, sessions = run.last("tokens"), words.rate(run), len(run.get("sessions"))
        small = [f"{count(rate)} tokens/s"] * bool(rate) + [f"{sessions} sessions"] * (sessions > 1)
        cards.append(card("training", "start3", duration(seconds),
                          f"{number(run.number('steps', 'done'))} steps" + (f", {count(tokens)} tokens" if tokens else ""),
                          *[" · ".join(small)] * bool(small)))
    elif run.number("measured", "start_seconds") is not None:
        cards.append(card("start", "start3", duration(run.number("measured", "start_seconds")), "calibration, map and fit",
                          f"start {words.start_name(run)}"))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _worth(run: Run) -> str:
    heading, rows = words.worth(run)
    limits = "".join(f"<li>{escape(text)}</li>" for text in words.limitations(run))
    return _section("What it is worth", "", _scroll(table(heading, rows), "fit") if rows else "", f'<ul class="says">{limits}</ul>',
                    _note(words.reloaded(run)),
                    *map(_note, run.notes))


def _judged(run: Run) -> str:
    title, parts = "Reasoning against general skill", []
    for name, judgement in run.judgements:
        drawn = figures.tasks(judgement)
        marks = f'<div class="legend">{legend([("teacher", "teacher"), ("student", "start0")])}</div>' if drawn else ""
        parts += [f"<h3>{escape(name)}</h3>", marks, _scroll(drawn, "wide"), _scroll(table(*words.judged(judgement)))]
    if drawn := figures.reasoning(run):
        parts.append(f"<p>{escape(words.FLUENT)}</p>{drawn}")
    return _section(title, "", *(parts or [_note(words.how_to_judge(run))]))


def _curves(run: Run) -> str:
    drawn = figures.curves(run)
    return _section("How the training went", words.LOGGED,
                    f'<div class="pair">{"".join(f"<div>{one}</div>" for one in drawn)}</div>') if drawn else ""


def _erank(run: Run) -> str:
    if run.method == "lori":
        return ""
    title = "How many directions the hidden states use"
    if not (run.ranks("teacher") and run.ranks("start")):
        return _section(title, "", _note(f"{NOT_MEASURED.capitalize()}: erank_steps=50 measures while it trains, red erank afterwards."))
    return _section(title, words.ranked(run), _scroll(figures.erank_layers(run), "wide"))


def _channels(run: Run) -> str:
    return _section("Which channels the student is made of", words.chosen(run), _scroll(figures.channels(run), "wide")) if run.channels else ""


def _forecast(run: Run) -> str:
    heading, rows = words.forecasts(run)
    parts, how = run.get("forecast", "training", "parts"), run.text("forecast", "training", "how") or run.text("forecast", "start", "how")
    held = {name: size(value) for name, value in parts.items() if finite_number(value)} if isinstance(parts, dict) else {}
    return _section("What was forecast, and what it took", f"The forecast: {how}." if how else "", _scroll(table(heading, rows), "how"),
                    _folded("Forecast memory, by part", facts_table(held)) if held else "") if rows else ""


def _settings(run: Run) -> str:
    changed, kept = run.get("settings", "changed"), run.get("settings", "default")
    if not isinstance(changed, dict) or not isinstance(kept, dict):
        return ""
    rows = [[name, _value(entry.get("value")), _value(entry.get("default"))] for name, entry in changed.items() if isinstance(entry, dict)]
    others = facts_table({name: _value(value) for name, value in kept.items()})
    return _section("Settings", "Those that are not at their default, in full:", _scroll(table(["", "value", "default"], rows), "words"),
                    _folded(f"The {len(kept)} others, at their defaults", others))


def _provenance(run: Run) -> str:
    facts: dict[str, object] = {}
    for side in ("teacher", "student"):
        found = run.get(side)
        if isinstance(found, dict):
            facts |= {f"{side}: {name}": _value(value) for name, value in found.items()}
    for name in ("data", "measured", "export", "metrics"):
        found = run.get(name)
        if isinstance(found, dict):
            facts |= {f"{name}: {key}": _value(value) for key, value in found.items()}
    facts |= {f"seed: {name}": _value(words.setting(run, name)) for name in ("seed", "data_seed") if words.setting(run, name) is not None}
    sessions = run.get("sessions")
    for place, session in enumerate(sessions if isinstance(sessions, list) else [], start=1):
        if isinstance(session, dict):
            facts[f"session {place}"] = ", ".join(f"{key} {_value(value)}" for key, value in session.items())
    versions = run.get("versions")
    facts |= {"began": run.text("began") or "not recorded", "device": run.text("device") or "not recorded", "processes": _value(run.get("processes"))}
    facts |= {str(name): _value(value) for name, value in versions.items()} if isinstance(versions, dict) else {}
    facts["commit of red"] = run.text("commit") or "not recorded"
    return f"<section><details><summary>Models, data, seeds and versions</summary>{facts_table(facts)}</details></section>"


def _value(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
