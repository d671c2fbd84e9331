"""`red erank`: the effective rank of several models' hidden states on the same text, side by side as a table, a plot and JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from red.errors import REDError
from red.files import atomic_write_json, atomic_write_text, require_existing, require_place_for

PLOTS = (".svg",)  # what --plot writes


@dataclass
class ModelRanks:
    """What one model has: eRank at the embedding and after each layer, NaN where there is no spectrum."""

    name: str
    hidden_size: int
    tokens: int  # rows of the matrices whose rank it is
    erank: list[float]

    def as_json(self) -> dict:
        return {"hidden_size": self.hidden_size, "tokens": self.tokens, "erank": [value if math.isfinite(value) else None for value in self.erank]}


def report(models: Sequence[str], data: str, *, text_column: str = "text", max_tokens: int = 4000, output: str | None = None, plot: str | None = None,
           quiet: bool = False) -> list[ModelRanks]:
    """Measure every model on the same text, print the table, and write what was asked for.

    Args:
        models: folders or names on the hub; a model's own tokenizer reads the text.
        data: what `red.data.loading.load_examples` reads.
        max_tokens: tokens whose states are counted; an eRank grows with them.
        output: JSON to write; plot: SVG to write. Neither may exist.
        quiet: no progress bar.

    Raises:
        REDError: bad input, before any model is read.
    """
    if max_tokens < 2:
        raise REDError(f"--max-tokens={max_tokens}: an effective rank needs at least 2 tokens.")
    require_existing(data, "The data path")
    for option, path in (("output", output), ("plot", plot)):
        if path and Path(path).exists():
            raise REDError(f"--{option}={path!r} exists and nothing is overwritten. Choose another name, or move it away.")
        if path:
            require_place_for(path, f"--{option}")
    if plot and Path(plot).suffix not in PLOTS:
        raise REDError(f"--plot={plot!r}: a plot is an SVG. Choose a name that ends in .svg.")
    twice = [name for name in models if models.count(name) > 1]
    if twice:
        raise REDError(f"The model {twice[0]!r} is named twice. Name each model once.")

    found = [measure(name, data, text_column=text_column, max_tokens=max_tokens, quiet=quiet) for name in models]
    print(table(found))
    if output:
        atomic_write_json(output, {"data": str(data), "models": {one.name: one.as_json() for one in found}})
    if plot:
        atomic_write_text(plot, figure(found))
    return found


def measure(name: str, data: str, *, text_column: str, max_tokens: int, quiet: bool) -> ModelRanks:
    """One model's ranks, with a bar over the documents on stderr."""
    import torch
    from tqdm.auto import tqdm

    from red.data.loading import check_examples, load_examples
    from red.distillation import _tokenizer_beside
    from red.erank import hidden_erank
    from red.data.packing import IGNORE
    from red.prepare import load_teacher

    model = load_teacher(name).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = _tokenizer_beside(name)
    examples = load_examples(data, tokenizer, text_column=text_column, max_length=getattr(model.config, "max_position_embeddings", None))
    check_examples(examples, tokenizer, model.config.vocab_size)
    documents = tokens = 0
    for example in examples:
        if tokens >= max_tokens:
            break
        documents += 1
        tokens += sum(int(label) != IGNORE for label in example.get("labels", example["input_ids"]))
    with tqdm(desc=name, total=documents, unit=" documents", disable=quiet, leave=False, file=sys.stderr) as bar:
        values = hidden_erank(model, tokenizer, examples[:documents], max_tokens=max_tokens, on_progress=bar.update)
    return ModelRanks(name, model.config.hidden_size, min(tokens, max_tokens), values)


def table(found: Sequence[ModelRanks]) -> str:
    """One model: eRank, share of the width and a bar a layer. Several: a column a model, with its share of the first one's."""
    if len(found) == 1:
        from red.erank import erank_table

        (one,) = found
        return erank_table(one.name, one.erank, one.hidden_size, one.tokens)
    names = _short([one.name for one in found])
    widths = [max(len(name), 14) for name in names]
    lines = [f"Effective rank of {len(found)} models, and its share of {names[0]}'s", ""]
    lines += [f"{label:>12}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for label, cells in (
        ("", names), ("hidden size", [one.hidden_size for one in found]), ("tokens", [one.tokens for one in found]))]
    lines.append("")
    for layer in range(max(len(one.erank) for one in found)):
        cells = [_cell(one, found[0], layer) for one in found]
        lines.append(f"{'embedding' if layer == 0 else f'layer {layer}':>12}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    if len({one.tokens for one in found}) > 1:
        lines += ["", "The models read different numbers of tokens, and an eRank grows with them: these columns cannot be compared."]
    if any(math.isnan(value) for one in found for value in one.erank):
        lines += ["", "none: all states are equal or not finite: collapsed"]
    return "\n".join(lines)


def _cell(one: ModelRanks, first: ModelRanks, layer: int) -> str:
    if layer >= len(one.erank):
        return ""
    value = one.erank[layer]
    if math.isnan(value):
        return "none" + " " * 6
    base = first.erank[layer] if layer < len(first.erank) else math.nan
    return f"{value:.1f}" + ("" if one is first else " " * 6 if math.isnan(base) else f" {value / base:>5.0%}")


def _short(names: Sequence[str]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    for parts in range(1, 1 + max(len(Path(name).parts) for name in names)):
        short = ["/".join(Path(name).parts[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def figure(found: Sequence[ModelRanks]) -> str:
    """SVG: eRank over the layers, a line a model, the first one dashed."""
    from matplotlib.ticker import MaxNLocator

    from red.report.drawing import MARKERS, ROLES, STYLE, plt, svg

    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(6.4, 3.6))
        for place, (one, name) in enumerate(zip(found, _short([one.name for one in found]), strict=True)):
            role, line = ("teacher", (0, (5, 3))) if place == 0 else (f"start{(place - 1) % 8}", "-")
            axes.plot(range(len(one.erank)), one.erank, color=ROLES[role], linestyle=line, marker=MARKERS[place % len(MARKERS)], label=f"{name} (width {one.hidden_size})")
        axes.set_ylim(bottom=0)
        axes.set_title(f"effective rank, {found[0].tokens} tokens")
        axes.set_xlabel("layer (0 = embedding)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8, labelcolor=ROLES["muted"])
        return svg(drawn, "Effective rank per layer of " + ", ".join(one.name for one in found), page=False)
