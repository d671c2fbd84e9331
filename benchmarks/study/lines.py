"""Finished results, one line of JSON each, appended and synced at once: an interrupted study goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

from red.files import atomic_write_text
from red.report import provenance

DIGITS = 7
WIDTH = 150  # of a line of a result file


class Lines:
    """A file of `{"key", "result", "commit"}`. A line that an interruption cut short does not count; of two lines with one key, the later."""

    def __init__(self, file: Path):
        self.file = file
        self.done: dict[str, dict] = {}
        self.commits: set[str] = set()  # of the results that were asked for
        text = file.read_text() if file.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.done[entry["key"]] = entry
        self.cut = bool(text) and not text.endswith("\n")

    def get(self, key: str) -> dict | None:
        """The result, if it is there."""
        entry = self.done.get(key)
        if entry is None:
            return None
        self.commits.add(entry["commit"])
        return entry["result"]

    def add(self, key: str, result: dict) -> None:
        line = json.dumps({"key": key, "result": rounded(provenance.finite(result)), "commit": provenance.commit()}) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as file:
            file.write(("\n" if self.cut else "") + line)  # so that it does not continue a line that was cut short
            file.flush()
            os.fsync(file.fileno())
        self.cut = False
        self.done[key] = json.loads(line)


def rounded(value):
    """The same value with DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def write_result(path: Path, value: dict) -> None:
    """Strict JSON, whole or absent; what fits into a line stands on one."""
    atomic_write_text(path, _pretty(rounded(provenance.finite(value)), "") + "\n")


def _pretty(value, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(flat) + len(indent) <= WIDTH or not isinstance(value, (dict, list)):
        return flat
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_pretty(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
