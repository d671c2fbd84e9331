"""The demo's report: one HTML file that loads nothing, with every number taken from the results, readable in light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from red.demo import plots, summary
from red.files import atomic_write_text
from red.report import page

TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(results: dict, path: str | Path, details: dict | None = None) -> None:
    """Write the report of a demo.

    Args:
        results: the content of results.json.
        path: the HTML file.
        details: the content of details.json; None: the parts that need it are left out.
    """
    atomic_write_text(path, render(results, details or {}))


def render(results: dict, details: dict) -> str:
    """The page as text."""
    said, headline = summary.sentences(results, details), summary.headline(results, details)
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        sentences="\n".join(f"<li>{_sentence(text)}</li>" for text in said[1:]),
        cards=_cards(results), table=page.table(*summary.table_rows(results, details)), legend=_legend(results),
        by_steps=plots.by_steps(results, details),
        exact_match=plots.over_tokens(results, "exact_match", "held-out problems solved"),
        easy=plots.over_tokens(results, "easy_accuracy", "easy text: next token right"),
        erank=plots.erank_layers(results),
        conditions=escape(" ".join(summary.conditions(details))), problem=_problem(details), facts=page.facts_table(_facts(results, details)),
    )
    return page.page(body, title=f"red demo: {headline}", kicker="red · demo", headline=headline, lead=_capital(said[0].partition(": ")[2]))


def _sentence(text: str) -> str:
    """The words before the first colon in bold, if there are few."""
    head, colon, rest = text.partition(": ")
    return f"<b>{escape(head)}.</b> {escape(_capital(rest))}" if colon and len(head.split()) <= 5 else escape(text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cards(results: dict) -> str:
    """One big number per model: what it solves, and its easy text under it."""
    roles = plots.colour_roles(list(results["starts"]))
    models = [("teacher", "teacher", results["teacher"])]
    models += [(summary.label(start), roles[start], outcome["final"]) for start, outcome in results["starts"].items()]
    return "\n".join(page.card(name, role, summary.percent(scores["exact_match"]), "of the problems solved",
                               f"easy text {summary.percent(scores['easy_accuracy'])} · eRank {summary.number(summary.mean(scores['erank']), 1)}")
                     for name, role, scores in models)


def _legend(results: dict) -> str:
    roles = plots.colour_roles(list(results["starts"]))
    entries = [("teacher", "teacher"), *((summary.label(start), roles[start]) for start in results["starts"])]
    return page.legend(entries)


def _problem(details: dict) -> str:
    if "problem" not in details:
        return ""
    problem = details["problem"]
    answer = problem["answer"].split()
    rows = [f'<tr><th>right answer</th><td><code>{escape(problem["answer"])}</code></td><td></td></tr>']
    for who, said in problem["said"].items():
        right = said.split() == answer
        mark = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
        rows.append(f"<tr><th>{escape(summary.label(who))}</th><td><code>{_marked(said.split(), answer)}</code></td><td>{mark}</td></tr>")
    return (f'<section><h2>One problem</h2><p>The first held-out problem of four steps that the teacher solves. All arithmetic is modulo 10. '
            f'RED\'s answer comes from the exported checkpoint.</p>'
            f'<p class="question"><code>{escape(problem["question"])}</code></p><div class="scroll"><table class="answers"><tbody>'
            + "\n".join(rows) + "</tbody></table></div></section>")


def _marked(said: list[str], answer: list[str]) -> str:
    """The words said, those that are not the answer's marked."""
    return " ".join(escape(word) if place < len(answer) and word == answer[place] else f"<mark>{escape(word)}</mark>"
                    for place, word in enumerate(said))


def _facts(results: dict, details: dict) -> dict[str, object]:
    facts: dict[str, object] = {"seconds for everything": f"{results['seconds']:.0f}"}
    if "device" in details:
        facts["device"] = details["device"]
    facts |= {f"learning rate, {summary.label(start)}": f"{outcome['learning_rate']:g}" for start, outcome in results["starts"].items()}
    facts |= {f"seconds of training, {summary.label(start)}": f"{seconds:.0f}" for start, seconds in details.get("train_seconds", {}).items()}
    if "best_other" in details:
        facts["how the other start was chosen"] = details["best_other"]["rule"]
    facts |= {key.replace("_", " "): value for key, value in details.get("settings", {}).items() if value not in ({}, None)}
    if "note" in details:
        facts["note"] = details["note"]
    return facts | results["versions"] | {"commit": results["commit"]}
