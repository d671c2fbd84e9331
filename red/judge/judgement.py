"""What was found about a student and its teacher: as a table for people, as JSON for everything else."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from red.judge.harness import Row


@dataclass
class Judgement:
    """What `judge` returns."""

    teacher: dict  # name, model_type, hidden_size, parameters, non_embedding_parameters, dtype, and "generation" (see red.judge.speed) or None
    student: dict
    rows: list[Row]  # one for each score of each task
    divergence: dict | None  # see red.judge.kl_to_teacher
    settings: dict
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    def as_json(self) -> dict:
        """Strict JSON: what is not finite is None."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self._models(), self._tasks(), self._divergence(), *self.notes)))

    def _models(self) -> str:
        sides = (self.teacher, self.student)
        rows = [["", "teacher", "student", "student / teacher"], ["", self.teacher["name"], self.student["name"], ""]]
        counts = [("parameters", "parameters"), ("without embeddings", "non_embedding_parameters"), ("hidden size", "hidden_size")]
        rows += [[label, *(f"{side[key]:,}" for side in sides), f"{_share(sides, operator.itemgetter(key)):.3f}"] for label, key in counts]
        if all(side["generation"] for side in sides):
            for batch in self.teacher["generation"]["batches"]:
                for label, key in (("tokens/s", "tokens_per_second"), ("ms per answer", "ms_per_answer")):
                    def value(side, batch=batch, key=key):
                        return side["generation"]["batches"][batch][key]

                    rows.append([f"{label}, batch {batch}", *(f"{value(side):,.0f}" for side in sides), f"{_share(sides, value):.2f}"])
            peaks = [side["generation"]["peak_memory_bytes"] for side in sides]
            if None not in peaks:
                rows.append(["peak memory, MB", *(f"{peak / 1e6:,.1f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}"])
        text = _aligned(rows)
        if self.teacher["generation"]:
            text += f"\n(an answer: {self.teacher['generation']['answer_tokens']} tokens after {self.teacher['generation']['prompt_tokens']})"
        return text

    def _tasks(self) -> str:
        if not self.rows:
            return ""
        lines = [["task", "metric", "n", "teacher", "student", "difference", "± s.e.", "95 % interval", ""]]
        for row in self.rows:
            gap = row.difference
            interval = "" if gap.low is None else f"[{_signed(gap.low)}, {_signed(gap.high)}]"
            better = {True: "↑", False: "↓", None: " "}[row.higher_is_better]
            lines.append([row.task, f"{row.metric} {better}", str(row.n), _number(row.teacher), _number(row.student), _signed(gap.value),
                          "" if gap.stderr is None else _number(gap.stderr), interval, "" if gap.paired else "*"])
            lines += [[f"  {steps} steps", "", "", _number(first), _number(second), _signed(second - first), "", "", ""]
                      for steps, (first, second) in (row.by_steps or {}).items() if len(row.by_steps) > 1]
        text = _aligned(lines, left=2)
        if any(row.difference.paired and row.difference.stderr == 0 for row in self.rows):
            text += "\nWhere the error is 0 every item was scored alike; what differs in fewer than about 3 of n items would not be seen."
        if any(not row.difference.paired for row in self.rows):
            text += "\n* not paired over the items: the interval is too wide rather than too narrow"
        return text

    def _divergence(self) -> str:
        found = self.divergence
        if not found:
            return ""
        labels = {"kl": "KL(teacher‖student)", "teacher_loss": "teacher's loss", "student_loss": "student's loss", "agreement": "same likeliest token"}
        units = {"agreement": ""}
        lines = [f"{self.settings['data']}: {found['tokens']:,} tokens of {found['documents']:,} documents"]
        for key, label in labels.items():
            error = found[key]["stderr"]
            lines.append(f"  {label:<22}{found[key]['mean']:.4f}{'' if error is None else f' ± {error:.4f}'}{units.get(key, ' nats per token')}")
        return "\n".join(lines)


def _share(sides, value) -> float:
    return value(sides[1]) / value(sides[0])


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{_number(abs(value))}" if math.isfinite(value) else str(value)


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them from the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" if place < left else f"{cell:>{width}}" for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
