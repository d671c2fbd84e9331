"""The tables of benchmarks/push.py."""

from __future__ import annotations

from fractions import Fraction

from benchmarks.documents import table
from benchmarks.study import teachers


def texts(found: dict) -> dict[str, str]:
    """By the marker in docs/starts.md."""
    return {"sweeps": sweeps(found["sweeps"]), "untrained variations": untrained(found["untrained"]), "trained variations": trained(found)}


def sweeps(places: dict) -> str:
    """A teacher's widths beside each other, the widest first."""
    counts = [count for count in next(iter(places.values())) if count == "1" or any(entries[count] for entries in places.values())]
    head = ["teacher", "width", *(f"{count} sweep{'s' if count != '1' else ''}" for count in counts), "KL: reasoning", "KL: easy text", "easy perplexity"]
    rows = {}
    for place, entries in places.items():
        if sum(entry is not None for entry in entries.values()) > 1:
            name, part = _place(place)
            rows[name, -part] = [name, part, *(_percent(entries[count]) for count in counts), *(_each(entries, counts, score) for score in ("kl_reasoning", "kl_easy")),
                                 _each(entries, counts, "easy_perplexity", 2)]
    return table(head, [rows[key] for key in sorted(rows)])


def untrained(places: dict) -> str:
    head = ["teacher", "width", "variation", "seeds", "exact match", "KL: reasoning", "KL: easy text", "seconds"]
    return table(head, [[*_place(place), name, entry["seeds"], _percent(entry), f"{entry['kl_reasoning']['mean']:.3f}", f"{entry['kl_easy']['mean']:.4f}", f"{entry['seconds']['mean']:.0f}"]
                        for place, variations in places.items() for name, entry in variations.items() if entry])


def trained(found: dict) -> str:
    """Each recipe under the study's own of its start and width."""
    head = ["recipe", "rate", "trained parameters", "exact match, mean along the run", "exact match at the end, each seed, %", "tokens to 90 %, each seed", "KL: reasoning"]
    rows = []
    for place, usual in found["usual"].items():
        mine = {name: entry for name, entry in found["trained"].items() if f"{entry['kind']} {entry['part']}" == place and entry.get("seeds")}
        if mine and usual:
            start, part = place.split()
            rows += [_recipe(f"**`{start}`, {'half' if part == '2' else 'a quarter'}: as in the study**", usual, ()),
                     *(_recipe(name, entry, entry["grid"]) for name, entry in mine.items())]
    return table(head, rows)


def _place(place: str) -> tuple[str, Fraction]:
    """A place's teacher, and the part of its width."""
    name, width = place.rsplit(" ", 1)
    return name, Fraction(int(width), teachers.find(name).width)


def _recipe(name: str, entry: dict, grid) -> list:
    edge = len(grid) > 1 and entry["rate"] in (min(grid), max(grid))
    tokens = ", ".join("–" if tokens is None else f"{tokens / 1000:.0f}k" for tokens in entry["tokens_to_90"])
    return [name, f"{entry['rate']:g}{' (edge)' if edge else ''}", "" if entry["parameters"] is None else f"{entry['parameters'] / 1000:.0f}k", f"{100 * entry['along']:.1f} %",
            ", ".join(f"{100 * share:.1f}" for share in entry["exact_match"]), tokens, "–" if entry["kl_reasoning"] is None else f"{entry['kl_reasoning']:.4f}"]


def _percent(entry: dict | None) -> str:
    if entry is None:
        return "–"
    if entry["seeds"] == 1:
        return f"{100 * entry['exact_match']['mean']:.1f} (1 seed)"
    return f"{100 * entry['exact_match']['mean']:.1f} ± {100 * entry['exact_match']['std']:.1f}{'' if entry['seeds'] >= 3 else ' (2 seeds)'}"


def _each(entries: dict, counts: list[str], score: str, digits: int = 3) -> str:
    return " → ".join("–" if entries[count] is None else f"{entries[count][score]['mean']:.{digits}f}" for count in counts)
