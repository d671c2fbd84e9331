"""report.html of a run: one file that loads nothing and needs no script, every number of it from the run's own files, readable in light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from red.files import atomic_write_text
from red.report import figures, words
from red.report.page import card, facts_table, legend, page, table
from red.report.run import Run, finite_number
from red.report.words import NOT_MEASURED, count, duration, number, percent, size

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
    body = "\n".join(part for part in sections if part) + "\n"
    return page(body, title=f"red: {headline}", kicker=f"red · {KINDS.get(run.method, 'run')}", headline=headline.replace(" %", "\u00a0%"), lead=words.done(run))


def _section(title: str, text: str, *parts: str) -> str:
    said = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{said}\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _scroll(content: str, wide: bool = False) -> str:
    return f'<div class="scroll{" wide" * wide}">{content}</div>' if content else ""


def _cards(run: Run) -> str:
    teacher, student = run.number("teacher", "parameters"), run.number("student", "parameters")
    cards = []
    if student and run.method != "lori":
        cards.append(card("size", "teacher", percent(words.ratio(student, teacher)), "of the teacher's parameters",
                          f"{count(student)} of {count(teacher)} · width {number(run.number('student', 'hidden_size'))} of {number(run.number('teacher', 'hidden_size'))}"))
    theirs, mine, share, first = words.canary(run)
    if share is not None:
        cards.append(card("reasoning", "start0", percent(share), "of the canary problems that the teacher solves",
                          f"student {percent(mine)}, teacher {percent(theirs)} · at the start {percent(first)} of it"))
    if run.method != "lori":
        lowest = words.lowest_share(run, "end")
        lowest = lowest if lowest is not None else words.lowest_share(run, "start")
        if lowest is not None:
            cards.append(card("effective rank", "start1", percent(lowest), "of the teacher's, at the layer where it is least",
                              f"at the start {percent(words.lowest_share(run, 'start'))}" if run.method != "compress" else "a collapsed student has less than 25 %"))
    if run.method == "lori" and (losses := run.series("task")):
        cards.append(card("task loss", "start0", number(losses[-1][1]), "at the end", f"{number(losses[0][1])} at step {losses[0][0]:.0f}"))
    seconds = words.training_seconds(run)
    if seconds:
        rate, sessions = words.rate(run), run.get("sessions")
        small = " · ".join(part for part in (f"{count(rate)} tokens/s" if rate else "", f"{len(sessions)} sessions" if len(sessions) > 1 else "") if part)
        cards.append(card("training", "start3", duration(seconds), f"{number(run.number('steps', 'done'))} steps" + (f", {count(run.last('tokens'))} tokens" if run.last("tokens") else ""), small or " "))
    elif run.number("measured", "start_seconds") is not None:
        cards.append(card("start", "start3", duration(run.number("measured", "start_seconds")), "calibration, map and fit", f"start {words.start_name(run)}"))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _worth(run: Run) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    heading, rows = words.worth(run)
    apart = run.number("export", "max_abs_logit_difference")
    checked = "" if apart is None else f"The exported checkpoint was reloaded in a fresh process; its logits {f'differ by {number(apart)} at most' if apart else 'are the same'}."
    limits = "".join(f"<li>{escape(text)}</li>" for text in words.limitations(run))
    return _section("What it is worth", "", f'<div class="scroll fit">{table(heading, rows)}</div>' if rows else "", f'<ul class="says">{limits}</ul>', f'<p class="note">{escape(checked)}</p>' if checked else "", notes)


def _judged(run: Run) -> str:
    parts = []
    for name, judgement in run.judgements:
        drawn = figures.tasks(judgement)
        marks = f'<div class="legend">{legend([("teacher", "teacher"), ("student", "start0")])}</div>' if drawn else ""
        parts += [f"<h3>{escape(name)}</h3>", marks, _scroll(drawn, wide=True), _scroll(table(*words.judged(judgement)))]
    drawn = figures.reasoning(run)
    if drawn:
        parts.append("<p>Text that is easy to predict comes back long before reasoning does: a cross entropy that falls while the share of problems solved stays low is a student "
                     f"that talks fluently and cannot do its steps.</p>{drawn}")
    if not parts:
        parts.append(f'<p class="note">{NOT_MEASURED.capitalize()}: canary_steps=100 with canary_file asks while it trains; red eval STUDENT --against TEACHER --output '
                     "RUN/eval.json, then red report RUN, judges what came out.</p>" if run.method != "lori" else
                     f'<p class="note">{NOT_MEASURED.capitalize()}: red.lori.evaluate asks the student.</p>')
    return _section("Reasoning against general skill", "", *parts)


def _curves(run: Run) -> str:
    drawn = figures.curves(run)
    if not drawn:
        return ""
    return _section("How the training went", "By optimiser step; means over the steps since the line before. Axes of losses are logarithmic where the values differ much.",
                    f'<div class="pair">{"".join(f"<div>{one}</div>" for one in drawn)}</div>')


def _erank(run: Run) -> str:
    if run.method == "lori":
        return ""
    title = "How many directions the hidden states use"
    if not (run.ranks("teacher") and run.ranks("start")):
        return _section(title, "", f'<p class="note">{NOT_MEASURED.capitalize()}: erank_steps=50 measures while it trains, red erank afterwards.</p>')
    tokens, seconds = run.number("erank", "tokens"), run.number("erank", "seconds")
    text = "Effective rank of the residual stream by layer. A stream that has collapsed makes tokens look alike."
    if tokens:
        text += f" Of {tokens:,.0f} tokens of the {'held-out' if run.get('erank', 'held_out') else 'training'} text; it took {duration(seconds)}. It grows with the number of tokens: compare only at the same."
    return _section(title, text, _scroll(figures.erank_layers(run), wide=True))


def _channels(run: Run) -> str:
    if not run.channels:
        return ""
    kept = run.channels.get("kept")
    selected = run.get("channels", "selected")
    text = f"Start {words.start_name(run)}. "
    if kept is not None and selected:
        text += f"It keeps {int(kept.sum())} of {len(kept)} channels and drops the others."
    elif kept is not None:
        text += (f"It selects no channels: its stream is a mixture of all, of {kept.sum():.0f} dimensions out of {len(kept)}. Shown is the share of each channel that lies in the span of the "
                 "embedding's map.")
    return _section("Which channels the student is made of", text, _scroll(figures.channels(run), wide=True))


def _forecast(run: Run) -> str:
    heading, rows = words.forecasts(run)
    if not rows:
        return ""
    parts = run.get("forecast", "training", "parts")
    held = {name: size(value) for name, value in parts.items() if finite_number(value)} if isinstance(parts, dict) else {}
    folded = f"<details><summary class=\"minor\">Forecast memory, by part</summary>{facts_table(held)}</details>" if held else ""
    how = run.text("forecast", "training", "how") or run.text("forecast", "start", "how")
    return _section("What was forecast, and what it took", f"The forecast: {how}." if how else "", f'<div class="scroll how">{table(heading, rows)}</div>', folded)


def _settings(run: Run) -> str:
    changed, kept = run.get("settings", "changed"), run.get("settings", "default")
    if not isinstance(changed, dict) or not isinstance(kept, dict):
        return ""
    rows = [[name, _value(entry.get("value")), _value(entry.get("default"))] for name, entry in changed.items() if isinstance(entry, dict)]
    return _section("Settings", "Those that are not at their default, in full:", '<div class="scroll words">' + table(["", "value", "default"], rows) + "</div>",
                    f'<details><summary class="minor">The {len(kept)} others, at their defaults</summary>{facts_table({name: _value(value) for name, value in kept.items()})}</details>')


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
