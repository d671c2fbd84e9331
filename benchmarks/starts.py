"""Every start under one trainer, one grid of learning rates and the same text, for several teachers and widths.

    python benchmarks/starts.py --jobs 4                                          the whole study
    python benchmarks/starts.py --teachers chains --widths 64 32 --rows fitted pca a part of it
    python benchmarks/starts.py --no-run                                          put together what is there

For every teacher, width and row: each rate with one seed, judged on the validation split, chooses the rate of the row; then five seeds at that rate
are reported on the test split. Who does not reach 90 % of the teacher's exact match in the first horizon is swept and run again with a longer one, a
schedule of its own.

Each finished run is a line of starts*_runs.jsonl at once and is not run again, so any part may be run at any time, and an interrupted study goes on
where it was. What is put together is always all that is there: starts*.json (starts.json is the embedded teacher at half its width; the others are
named by teacher and width), docs/*.svg, the tables on stdout, and red/demo/learning_rates.json, which the demo reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the parts of this script, and the `red` beside it

from red.demo import known
from red.demo.study_plot import write_starts_figure, write_widths_figure
from red.report import provenance

from benchmarks.study import teachers
from benchmarks.study.assembled import assembled, shipped
from benchmarks.study.lines import Lines, write_result
from benchmarks.study.pool import quiet
from benchmarks.study.rows import GRID, HORIZONS, ROWS, SEEDS
from benchmarks.study.schedule import execute
from benchmarks.study.tables import markdown, two_by_two
from benchmarks.study.trained import Study, results_file

RESULTS = ROOT / "benchmarks/results"
SHARES = (1 / 2, 3 / 8, 1 / 4)  # of the teacher's width
SMOKE = {"problems": 2, "final_problems": 2, "easy_texts": 4, "erank_tokens": 200, "rows": 2, "calibration_samples": 4}


def main(words: Sequence[str] | None = None) -> None:
    args = _arguments(words)
    quiet()
    folder = args.out or RESULTS
    studies = [study for name in args.teachers for study in _studies(name, args, folder)]
    failures = {}
    if not args.no_run:
        horizons = {id(study): study.horizons for study in studies}
        for study in studies:
            study.refine, study.horizons = args.refine, [steps for steps in study.horizons if steps in args.horizons]
        failures = execute(studies, args.rows, args.seeds, stage=args.stage, jobs=args.jobs)
        for study in studies:
            study.refine, study.horizons = False, horizons[id(study)]
    for study in studies:
        _put_together(study, folder, args)
    _figures(folder, args)
    if failures:
        raise SystemExit("\n".join(f"{name} failed:\n{trace}" for name, trace in failures.items()))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=list(teachers.NAMES), metavar="TEACHER",
                        help=f"of {', '.join(map(repr, teachers.NAMES))}; or a folder (default: all)")
    parser.add_argument("--widths", nargs="+", type=int, default=None, help="of the students (default: 1/2, 3/8 and 1/4 of the teacher's)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="that are run and put together (default: %(default)s)")
    parser.add_argument("--horizons", nargs="+", type=int, default=list(HORIZONS), help="optimiser steps, of %(default)s")
    parser.add_argument("--stage", choices=("sweep", "all"), default="all", help="sweep: choose the rates only")
    parser.add_argument("--jobs", type=int, default=None, help="runs at once, one thread each (default: one per core)")
    parser.add_argument("--out", type=Path, default=None, help="folder of everything that is written (default: benchmarks/results, docs and red/demo)")
    parser.add_argument("--no-run", action="store_true", help="put together what is there")
    parser.add_argument("--refine", action="store_true", help="run those of the test split again that were not measured at the early steps")
    parser.add_argument("--smoke", metavar="TEACHER", default=None, help="three rows, one rate, one seed and four steps on this teacher, to see that it "
                        "runs; needs --out")
    args = parser.parse_args(words)
    args.grid, args.sizes, args.all_horizons = GRID, {}, HORIZONS
    if args.smoke:
        if args.out is None:
            parser.error("--smoke needs --out: its numbers must not replace the study's")
        args.rows, args.seeds, args.grid, args.sizes = ["activation", "random", "pca"], [0], GRID[:1], SMOKE
        args.teachers, args.horizons, args.all_horizons = [args.smoke], (2, 4), (2, 4)
    if args.out is None and set(SEEDS) - set(args.seeds):
        parser.error("fewer --seeds than all need --out: they would replace the study's results")
    return args


def _studies(name: str, args: argparse.Namespace, folder: Path) -> list[Study]:
    teacher = teachers.find(name)
    found = []
    for width in args.widths or ([teacher.width // 2] if args.smoke else [round(share * teacher.width) for share in SHARES]):
        result = results_file(folder, teacher.name, width, 2 * width == teacher.width)
        found.append(Study(teacher, width, Lines(result.with_name(f"{result.stem}_runs.jsonl")), args.sizes, args.grid, args.all_horizons))
    return found


def _put_together(study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Write what there is of a study and print its table; nothing for one of which no run has finished."""
    if not study.lines.done:
        return print(f"\n## {study.name}\n\nNo run has finished.")
    found = assembled(study, args.seeds)
    result = results_file(folder, study.teacher.name, study.width, 2 * study.width == study.teacher.width)
    write_result(result, found)
    if found["sweep"] and (result.name == "starts.json" or args.smoke):
        provenance.write_json(folder / "learning_rates.json" if args.out else known.FILE, shipped(found))
    print(f"\n## {study.name}\n\n{markdown(found)}")
    if paper := two_by_two(found):
        print(f"\nStart against temperature:\n\n{paper}")


def _figures(folder: Path, args: argparse.Namespace) -> None:
    """Pictures of the embedded teacher, whatever was run now."""
    place = folder if args.out else ROOT / "docs"
    studies = [json.loads(file.read_text()) for file in sorted(folder.glob("starts*.json"))]
    own = sorted((found for found in studies if found["rows"] and found.get("teacher_name") == ("chains" if not args.smoke else Path(args.smoke).name)),
                 key=lambda found: -found["width"])
    if own:
        write_starts_figure(own[0], place / "starts.svg")
        write_widths_figure(own, place / "widths.svg")


if __name__ == "__main__":
    main()
