"""What the full study found (benchmarks/starts.py writes it beside this file): learning rates, the best other start, tokens to 90 %."""

from __future__ import annotations

import json
from pathlib import Path

from red.errors import REDError

FILE = Path(__file__).with_name("learning_rates.json")


def load() -> dict:
    """`{"rates": {start: rate}, "rates_rule", "best_other", "best_other_rule", "tokens_to_90": {start: {…}}, "steps", …}`."""
    if not FILE.is_file():
        raise REDError(f"{FILE} is missing: the learning rate of each start comes from it. Write it with "
                       "`python benchmarks/starts.py --stage sweep`, or reinstall red-distill.")
    return json.loads(FILE.read_text())


def rate(known: dict, start: str) -> float:
    """The swept learning rate of a start."""
    if start not in known["rates"]:
        raise REDError(f"start={start!r} has no swept learning rate; known are {', '.join(known['rates'])}. Give it one with "
                       f"--learning_rate {start}=2e-3, or sweep with `python benchmarks/starts.py --stage sweep`.")
    return known["rates"][start]
