"""What Sphinx is told about this documentation: pictures for light and dark, docstrings, and the table of a settings class.

The pages are written for a forge's reader first: `<picture>` chooses by the reader's system there. The site has a button of its own, so both pictures become
images that furo shows in one theme each; and as images Sphinx checks that they exist.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

PICTURE = re.compile(r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>')


def pictures(app, document: str, source: list[str]) -> None:
    """`<picture>` → two images, one for each theme."""
    def both(found) -> str:
        return "\n".join(f"```{{image}} {found[theme]}\n:alt: {found['alt']}\n:class: only-{theme}\n```\n" for theme in ("light", "dark"))

    if not document.startswith("notebooks/"):
        source[0] = PICTURE.sub(both, source[0])


def docstrings(app, what, name, thing, options, lines: list[str]) -> None:
    """From our docstrings, which are read as text, to reStructuredText: code and formulas become blocks, and shapes and fields are added from the comments beside them."""
    lines[:] = _blocks(lines)
    beside = _comments(thing) if what in ("function", "method", "class") else []
    if beside:
        width = max(len(word) for word, _ in beside)
        lines[1:1] = ["", ".. code-block:: text", "", *(f"    {word.ljust(width)}   {comment}" for word, comment in beside), ""]


def _blocks(lines: list[str]) -> list[str]:
    """An indented paragraph after text is code or a formula, and so is what stands under `Example:`; `::` says that. Elsewhere * and | mean themselves."""
    made: list[str] = []
    section = code = False  # in a section of Google's style, whose indented lines are napoleon's; in a block of code
    for place, line in enumerate(lines):
        indented, before = line.startswith("    "), lines[place - 1] if place else ""
        if line.strip() and not indented:
            code, section = False, bool(re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes):", line))
        if indented and not code and not section and (before == "Example:" or not before.strip()):
            made += ["", "::", ""]
            code = True
        made.append(line if code else "".join(part if part.startswith("`") else re.sub(r"([*|])", r"\\\1", part) for part in re.split(r"(`[^`]*`)", line)))
    return made


def _comments(thing) -> list[tuple[str, str]]:
    """`(name, comment)` of a function's arguments and result, or of a class's fields, as in `x: Tensor,  # [B, T, D]`."""
    if not (thing := inspect.unwrap(thing)).__module__.startswith("red"):
        return []
    source = inspect.getsource(thing)
    if inspect.isclass(thing):
        return [(field, comment) for field, comment in re.findall(r"^    (\w+): [^#\n]*#:? (.+)$", source, re.MULTILINE) if field in thing.__annotations__]
    head = source.partition('"""')[0]
    return [*re.findall(r"^    (\w+): [^#\n]*,  # (.+)$", head, re.MULTILINE), *(("→", comment) for comment in re.findall(r"^\) -> [^#\n]*:  # (.+)$", head, re.MULTILINE))]


def public_name(app, environment, node, content):
    """A class is documented under its public name, `red.REDConfig`, and annotations name its module, `red.config.REDConfig`."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    for home in ("red", "red.lori", "red_kernels"):
        if module.startswith(home) and module != home and name in importlib.import_module(home).__all__:
            return environment.get_domain("py").resolve_xref(environment, node["refdoc"], app.builder, node["reftype"], f"{home}.{name}", node, content)
    return None


class Settings(SphinxDirective):
    """```{settings} red.config.REDConfig```: a table of the fields that the dataclass declares or redefines, from their `help`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        found = getattr(importlib.import_module(module), name)
        own = found.__annotations__
        fields = {field.name: field for field in dataclasses.fields(found)}
        rows = [f"| `{name}` | `{own[name]}` | {_default(fields[name])} | {_cell(fields[name].metadata.get('help', ''))} |" for name in own]
        self.env.note_dependency(importlib.import_module(module).__file__)
        parent = nodes.section()
        self.state.nested_parse(StringList(["| setting | type | default | |", "|---|---|---|---|", *(row.replace(" | None`", " \\| None`") for row in rows)]), self.content_offset, parent)
        return parent.children


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`" if field.default != "" else "`''`"
    return f"`{field.default_factory()!r}`" if field.default_factory is not dataclasses.MISSING else "must be given"


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_])", r"\\\1", text)


def setup(app) -> dict:
    app.connect("source-read", pictures)
    app.connect("autodoc-process-docstring", docstrings, priority=100)  # before napoleon
    app.connect("missing-reference", public_name)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
