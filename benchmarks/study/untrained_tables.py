"""Markdown tables of students before any training."""

from __future__ import annotations

from collections.abc import Mapping

from red.demo.suite import by_kind
from red.demo.summary import label, number, percent


def markdown(found: dict) -> str:
    """All tables that have a cell, with what it takes to read them."""
    parts = []
    for teacher, entry in found["main"].items():
        parts += [f"## Teacher {teacher!r}, students of width {width}, untrained\n\n{main(rows, entry['teacher'])}"
                  for width, rows in entry["widths"].items() if rows]
    parts += [f"## `fitted` of width {width}, by the length of its calibration text\n\n{varied(rows, 'rows')}" for width, rows in found["size"].items() if rows]
    parts += [f"## `fitted` of width {width}, by the kind of its calibration text\n\n{varied(rows, 'text')}" for width, rows in found["domain"].items() if rows]
    parts += [f"## `fitted` of width {width}, by its ridges\n\n{ridge(entry)}" for width, entry in found["ridge"].items()
              if any(score is not None for row in entry["validation"].values() for score in row.values())]
    parts += [f"## The linear auto-encoder on the states of {teacher!r}, width {width}\n\n{autoencoder(rows)}"
              for teacher, widths in found["autoencoder"].items() for width, rows in widths.items()]
    said = ["Mean ± standard deviation over the calibration seeds. Test split, but for the choice of the ridges. KL(teacher‖student) in nats per token. eRank from "
            "the embedding to the last layer. Seconds of calibration and start on one thread, beside other work."]
    if found["missing"]:
        said.append("Not measured yet: " + ", ".join(f"{count} cells of {table}" for table, count in found["missing"].items()) + ".")
    return "\n\n".join([*parts, "\n".join(f"* {text}" for text in said)])


def main(rows: Mapping[str, dict], teacher: dict | None) -> str:
    """One teacher and width, what solves most first."""
    steps = next(iter(rows.values()))["exact_match_by_steps"]
    by = "by steps" if len(by_kind(steps)) == len(steps) else "by kind"
    lines = _head(["start", "seeds", "exact match", f"{by} ({', '.join(by_kind(steps))})", "easy accuracy", "easy perplexity", "KL: easy", "KL: reasoning",
                   "eRank by layer", "seconds"])
    if teacher is not None:
        lines.append(_line(["teacher", "", percent(teacher["exact_match"]), _shares(teacher["exact_match_by_steps"]), percent(teacher["easy_accuracy"]),
                            number(teacher["easy_perplexity"]), "", "", _numbers(teacher["erank"]), ""]))
    for row in sorted(rows, key=lambda row: (-rows[row]["exact_match"]["mean"], rows[row]["kl_reasoning"]["mean"] or float("inf"))):
        entry = rows[row]
        lines.append(_line([label(row), entry["seeds"], _percent(entry["exact_match"]), _shares(entry["exact_match_by_steps"]), _percent(entry["easy_accuracy"]),
                            number(entry["easy_perplexity"]["mean"]), _number(entry["kl_easy"]), _number(entry["kl_reasoning"]), _numbers(entry["erank"]),
                            number(entry["seconds"]["mean"], 1)]))
    return "\n".join(lines)


def varied(rows: Mapping[str, dict], what: str) -> str:
    """The fitted start by one thing about its calibration."""
    lines = _head([what, "seeds", "tokens", "tokens per parameter of the student", "exact match", "easy accuracy", "KL: easy", "KL: reasoning", "seconds"])
    for name, entry in rows.items():
        tokens = entry["calibration_tokens"]["mean"]
        lines.append(_line([name, entry["seeds"], f"{tokens:,.0f}", f"{tokens / entry['parameters']:.2g}", _percent(entry["exact_match"]),
                            _percent(entry["easy_accuracy"]), _number(entry["kl_easy"]), _number(entry["kl_reasoning"]), number(entry["seconds"]["mean"], 1)]))
    return "\n".join(lines)


def ridge(entry: dict) -> str:
    """Exact match on the validation split over both ridges, and what the choice is worth on the test split."""
    writers = list(next(iter(entry["validation"].values())))
    lines = _head(["validation: reader ridge ↓, writer ridge →", *writers])
    lines += [_line([reader, *(percent(scores[writer]) for writer in writers)]) for reader, scores in entry["validation"].items()]
    for name, options in (("default", entry["default_options"]), ("chosen", entry["options"])):
        if scores := entry.get(name):
            lines.append(f"\nTest, {name} ({options['fit_reader_ridge']:g}, {options['fit_writer_ridge']:g}): exact match {_percent(scores['exact_match'])}, "
                         f"KL on reasoning {_number(scores['kl_reasoning'])}.")
    return "\n".join(lines)


def autoencoder(rows: Mapping[str, dict]) -> str:
    """Share of the energy that is lost and eRank of the reconstruction, along the training of the two maps."""
    first = next(iter(rows.values()))
    lines = _head(["start", *(f"lost at step {step}" for step in first["steps"]), *(f"eRank at step {step}" for step in first["steps"])])
    lines.append(_line(["the states themselves", *("" for _ in first["steps"]), number(first["teacher_erank"], 1), *("" for _ in first["steps"][1:])]))
    for row in sorted(rows, key=lambda row: rows[row]["loss"][1]):
        lines.append(_line([label(row), *(f"{loss:.4f}" for loss in rows[row]["loss"]), *(number(value, 1) for value in rows[row]["erank"])]))
    return "\n".join(lines)


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(entry: dict) -> str:
    return "–" if entry["mean"] is None else f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f} %"


def _number(entry: dict) -> str:
    return "–" if entry["mean"] is None else f"{entry['mean']:.3f} ± {entry['std']:.3f}"


def _numbers(values: list) -> str:
    return ", ".join(number(value, 1) for value in values)


def _shares(by_steps: Mapping[str, float]) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in by_kind(by_steps).values())
