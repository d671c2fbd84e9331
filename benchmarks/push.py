"""What brings a student of a quarter of the width nearer to its teacher: variations of the fitted start, and of its training.

    python benchmarks/push.py                              every variation
    python benchmarks/push.py --part trained --names Muon  one of them
    python benchmarks/push.py --no-run                     put together what is there
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the parts of this script, and the `red` beside it

from benchmarks.study import teachers
from benchmarks.study.lines import Lines
from benchmarks.study.pool import execute, quiet
from benchmarks.study.retrained import RECIPES, Retrained


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", nargs="+", default=list(RECIPES))
    args = parser.parse_args(words)
    quiet()
    folder = ROOT / "benchmarks/results"
    lines = Lines(folder / "push_runs.jsonl")
    found = Retrained(lines, teachers.find("chains"), folder)
    for name in args.names:
        for _ in range(2):
            print(name, execute(found.tasks(name), lines, jobs=1), flush=True)
        print(name, found.summary(found.chosen(name), found.tests(name), RECIPES[name].part), flush=True)


if __name__ == "__main__":
    main()
