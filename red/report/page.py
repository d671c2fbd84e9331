"""What the pages of red share: one file that loads nothing, light and dark; and cells, tables and cards, with everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from red.report.drawing import PALETTE

STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: clamp(26px, 4vw, 40px); line-height: 1.15; letter-spacing: -0.02em; margin: 6px 0 14px; max-width: 24em; text-wrap: balance; }
h2 { font-size: 20px; margin: 0 0 6px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
.kicker { color: var(--start0); font-weight: 700; font-size: 13px; letter-spacing: 0.08em; text-transform: uppercase; margin: 0; }
.lead { font-size: 18px; color: var(--muted); max-width: 56em; margin: 0; }
section { background: var(--panel); border: 1px solid var(--grid); border-radius: 12px; padding: 22px 24px; margin-top: 20px; }
section > p { color: var(--muted); margin: 0 0 14px; max-width: 64em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 28px; }
.card { background: var(--panel); border: 1px solid var(--grid); border-top: 4px solid var(--accent); border-radius: 12px; padding: 14px 18px 16px; }
.card p { margin: 0; color: var(--muted); font-size: 14px; }
.card .big { font-size: 36px; line-height: 1.25; font-weight: 700; letter-spacing: -0.02em; color: var(--accent); font-variant-numeric: tabular-nums; }
.card .small { margin-top: 8px; padding-top: 8px; border-top: 1px solid var(--grid); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 7px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: 12.5px; }
tbody th { text-align: left; font-weight: 600; padding-left: 0; }
tbody tr:last-child > * { border-bottom: 0; }
.note { font-size: 13px; color: var(--muted); margin: 10px 0 0; }
ul.says { margin: 0; padding-left: 1.1em; }
ul.says li { margin: 7px 0; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; font-size: 14px; color: var(--muted); margin: 0 0 10px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 20px 32px; align-items: end; }
.wide svg { min-width: 640px; }
svg { width: 100%; height: auto; display: block; margin: 0 auto; }
.answers td, .answers th { text-align: left; }
code { font: 14px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.question { color: var(--ink); }
mark { background: var(--badbg); color: var(--bad); border-radius: 3px; padding: 0 3px; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
details summary { cursor: pointer; font-weight: 600; font-size: 20px; }
details summary.minor { font-size: 15px; margin-top: 14px; }
thead th:first-child { text-align: left; padding-left: 0; }
.fit tbody th, .words tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
.words th { text-align: left; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.how td:last-child, .how th:last-child { text-align: left; white-space: normal; min-width: 16em; }
section h3 { margin: 14px 0 6px; overflow-wrap: anywhere; }
details table { margin-top: 12px; } details td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
details th { width: 18em; font-weight: 500; color: var(--muted); }
@media (max-width: 600px) {
  main { padding: 24px 12px 48px; } section { padding: 16px 14px; }
  th, td { padding: 6px 4px; } table { font-size: 12.5px; }
  .fit td, .fit thead th, .how td, .how th, .how thead th { white-space: normal; }
  .fit tbody th { min-width: 6em; } .how td:last-child, .how th:last-child { min-width: 5em; } .wide svg { min-width: 480px; } details th { width: auto; }
}
"""
SMALL = ' class="small"'
PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<p class="kicker">$kicker</p>
<h1>$headline</h1>
<p class="lead">$lead</p>
$body</main>
</body>
</html>
""")


def page(body: str, *, title: str, kicker: str, headline: str, lead: str) -> str:
    """The whole page. `body` is HTML; the others are plain text."""
    words = {name: escape(text) for name, text in (("title", title), ("kicker", kicker), ("headline", headline), ("lead", lead))}
    return PAGE.substitute(style=_colours() + STYLE, body=body, **words)


def _colours() -> str:
    """The palette as CSS variables, for both themes."""
    light, dark = (" ".join(f"--{role}: {colours[theme]};" for role, colours in PALETTE.items()) for theme in (0, 1))
    return (
        f":root {{ --page: #f6f7f9; --panel: #ffffff; {light} --good: #12733f; --bad: #b3261e; --badbg: #fbe3e1; }}\n"
        "@media (prefers-color-scheme: dark) {\n"
        f"  :root {{ --page: #14161a; --panel: #1c1f25; {dark} --good: #5fd08f; --bad: #ff8a80; --badbg: #4a2220; }}\n}}\n"
    )


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text in, a table whose first column names the rows out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    body = "\n".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for tag, cell in zip(["th", *["td"] * len(row)], row, strict=False)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def facts_table(facts: Mapping[str, object]) -> str:
    """A name and a value a line."""
    lines = "\n".join(f"<tr><th>{escape(str(name))}</th><td>{escape(plain(value))}</td></tr>" for name, value in facts.items())
    return f'<table><tbody>\n{lines}\n</tbody></table>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names and the roles of their colours (`red.report.drawing.PALETTE`)."""
    return "".join(f'<span><i style="background: var(--{role})"></i>{escape(name)}</span>' for name, role in entries)


def card(name: str, role: str, big: str, *lines: str) -> str:
    """One big number; the last of several lines stands apart."""
    last = len(lines) - 1
    said = [f"<p{SMALL if place and place == last else ''}>{escape(line)}</p>" for place, line in enumerate(lines)]
    return f'<div class="card" style="--accent: var(--{role})"><h3>{escape(name)}</h3><p class="big">{escape(big)}</p>{"".join(said)}</div>'


def plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
