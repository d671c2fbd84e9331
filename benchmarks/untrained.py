"""Students before any training: what every start solves at once, and how much calibration text the fitted one needs.

    python benchmarks/untrained.py --jobs 4
    python benchmarks/untrained.py --tables main --teachers chains --widths 64 --rows fitted pca
    python benchmarks/untrained.py --no-run                          put together what is there

Each finished cell is a line of untrained_runs.jsonl at once and is not measured again. What is put together is all that is there: untrained.json,
docs/untrained.svg, and Markdown tables on stdout. A cell takes seconds; choices are made on the validation split, figures are of the test split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the parts of this script, and the `red` beside it

from red.demo.study_plot import write_untrained_figure
from red.report import provenance

from benchmarks.study import teachers, untrained_tables
from benchmarks.study.grids import Grids
from benchmarks.study.lines import Lines, write_result
from benchmarks.study.pool import execute, quiet
from benchmarks.study.rows import SEEDS, UNTRAINED_ROWS

TABLES = ("main", "size", "domain", "ridge", "autoencoder")
SHARES = (1 / 2, 3 / 8, 1 / 4)  # of the teacher's width


def main(words: Sequence[str] | None = None) -> None:
    args = _arguments(words)
    quiet()
    folder = args.out or ROOT / "benchmarks/results"
    lines = Lines(folder / "untrained_runs.jsonl")
    named = args.teachers or list(teachers.NAMES)
    everyone = teachers.NAMES if set(named) <= set(teachers.NAMES) else named  # so that a part does not replace the rest
    find = {name: teachers.find(name) for name in everyone}
    varied = next(iter(find.values()))

    asked = {find[name].name for name in named}

    def usual(teacher: teachers.Teacher) -> list[int]:
        return [round(share * teacher.width) for share in SHARES]

    def shown(teacher: teachers.Teacher) -> list[int]:
        return sorted({*usual(teacher), *(args.widths if args.widths and teacher.name in asked else ())}, reverse=True)

    whole = Grids(lines, list(find.values()), varied, shown, args.seeds, smaller=args.smaller)
    part = Grids(lines, [find[name] for name in named], varied, lambda teacher: args.widths or usual(teacher), args.seeds, args.rows, args.smaller)
    failures: dict[str, str] = {}
    if not args.no_run:
        for table in args.tables:
            print(f"{table}: ", end="")
            failures |= execute(part.tasks(table), lines, jobs=args.jobs)
            if table == "ridge":
                failures |= execute(part.chosen_tasks(), lines, jobs=args.jobs)
    found = {table: getattr(whole, table)() for table in TABLES}
    found["missing"] = {table: count for table in TABLES if (count := whole.missing(table))}
    write_result(folder / "untrained.json", {**found, "seeds": list(args.seeds), "versions": provenance.versions(), "commit": sorted(lines.commits),
                                             "put_together_at": provenance.commit(), "device": provenance.device("cpu")})
    first = next(iter(found["main"].values()))["widths"]
    if any(first.values()):
        write_untrained_figure(first, (folder if args.out else ROOT / "docs") / "untrained.svg")
    print(untrained_tables.markdown(found))
    if failures:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in failures.items()))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="that are filled (default: all)")
    parser.add_argument("--teachers", nargs="+", default=None, metavar="TEACHER", help=f"of {', '.join(map(repr, teachers.NAMES))}; or a folder (default: all)")
    parser.add_argument("--widths", nargs="+", type=int, default=None, help="of the students (default: 1/2, 3/8 and 1/4 of the teacher's)")
    parser.add_argument("--rows", nargs="+", choices=UNTRAINED_ROWS, default=UNTRAINED_ROWS, metavar="ROW", help=f"of {', '.join(map(repr, UNTRAINED_ROWS))}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the calibration text and of random starts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=None, help="cells at once, one thread each (default: one per core)")
    parser.add_argument("--out", type=Path, default=None, help="folder of everything that is written (default: benchmarks/results and docs)")
    parser.add_argument("--no-run", action="store_true", help="put together what is there")
    parser.add_argument("--smoke", action="store_true", help="a few problems a cell, to see that it runs; needs --out")
    args = parser.parse_args(words)
    args.smaller = {"problems": 2, "easy_texts": 4, "erank_tokens": 200} if args.smoke else {}
    if args.smoke and args.out is None:
        parser.error("--smoke needs --out: its numbers must not replace the study's")
    if args.out is None and set(SEEDS) - set(args.seeds):
        parser.error("fewer --seeds than all need --out: they would replace the study's results")
    return args


if __name__ == "__main__":
    main()
