"""What brings a student of a quarter of the width nearer to its teacher: variations of the fitted start, and of its training.

    python benchmarks/push.py                                        every variation
    python benchmarks/push.py --part trained --names Muon            one of them
    python benchmarks/push.py --no-run                               put together what is there

Each finished run is a line of results/push_runs.jsonl at once and is not run again. What is put together is all that is there: results/push.json, and the
tables of docs/starts.md between their markers. A recipe's rate is chosen on the validation split, figures are of the test split. The
usual start's and recipe's rows are the study's own runs (benchmarks/untrained.py, benchmarks/starts.py), of the same seeds and text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the parts of this script, and the `red` beside it

from red.files import atomic_write_text
from red.report import provenance

from benchmarks.documents import between_markers
from benchmarks.study import push_tables, teachers
from benchmarks.study.lines import Lines, write_result
from benchmarks.study.pool import execute, quiet
from benchmarks.study.refitted import SWEEPS, VARIATIONS, VARIED, Refitted
from benchmarks.study.retrained import RECIPES, Retrained
from benchmarks.study.teachers import Teacher

PARTS = ("sweeps", "untrained", "trained")
PLACES = (("chains", 32), ("massive", 64), ("rich", 40), ("rich", 80), ("rich", 60), ("massive", 48), ("chains", 48))  # the teachers and widths that are swept
FIRST = 3  # of them, before the variations of the first
RESULTS = ROOT / "benchmarks/results"
SMOKE = {"problems": 2, "easy_texts": 4, "erank_tokens": 200, "calibration_samples": 16}


def main(words: Sequence[str] | None = None) -> None:
    args = _arguments(words)
    quiet()
    folder = args.out or RESULTS
    lines, find = Lines(folder / "push_runs.jsonl"), {name: teachers.find(name) for name, _ in PLACES}
    refitted = Refitted(lines, Lines(RESULTS / "untrained_runs.jsonl"), SMOKE if args.smoke else {})
    retrained = Retrained(lines, find["chains"], RESULTS, {**SMOKE, "final_problems": 2, "rows": 2, "steps": 2} if args.smoke else {})
    failures: dict[str, str] = {}
    if not args.no_run:
        for title, tasks in _work(args, refitted, retrained, [(find[name], width) for name, width in PLACES]):
            print(f"{title}: ", end="", flush=True)
            failures |= execute(tasks, lines, jobs=args.jobs)
    found = put_together(refitted, retrained, [(find[name], width) for name, width in PLACES])
    texts = push_tables.texts(found)
    write_result(folder / "push.json", {**found, "versions": provenance.versions(), "commit": sorted(lines.commits), "device": provenance.device("cpu")})
    if args.out is None:
        page = ROOT / "docs/starts.md"
        atomic_write_text(page, between_markers(page.read_text(), texts))
    print("\n\n".join(texts.values()))
    if failures:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in failures.items()))


def _work(args: argparse.Namespace, refitted: Refitted, retrained: Retrained, places: list[tuple[Teacher, int]]) -> Iterator[tuple[str, dict]]:
    """What is to run, in its order; a recipe's tests are known when its rates are swept."""
    def sweeps(count: int, some: list[tuple[Teacher, int]]) -> Iterator[tuple[str, dict]]:
        for teacher, width in some if "sweeps" in args.part else ():
            yield f"{count} sweeps, {teacher.name} {width}", refitted.sweep_tasks(teacher, width, count)

    yield from sweeps(SWEEPS[-1], places[:FIRST])
    if "untrained" in args.part:
        for (teacher, width), names in VARIED.items():
            for name in names:
                if name in (args.names or names):
                    yield f"{name}, {teacher} {width}", refitted.tasks(name, teachers.find(teacher), width)
    for count in reversed(SWEEPS):
        yield from sweeps(count, places)
    if "trained" in args.part:
        for name in args.names or RECIPES:
            if name in RECIPES:
                yield f"{name}, rates", retrained.tasks(name)
                yield f"{name}, tests", retrained.tasks(name)


def put_together(refitted: Refitted, retrained: Retrained, places: list[tuple[Teacher, int]]) -> dict:
    """`{"sweeps": {place: {count: …}}, "untrained": {place: {name: …}}, "trained": {name: …}, "usual": {start and part: …}}` of what is there."""
    sweeps = {f"{teacher.name} {width}": {str(count): refitted.entry(teacher, width, sweeps=count) for count in SWEEPS} for teacher, width in places}
    usual = {f"{start} {part}": retrained.summary(*retrained.usual(start, part), part) for start, part in
             dict.fromkeys((recipe.start, recipe.part) for recipe in RECIPES.values())}
    untrained = {f"{teacher} {width}": {name: refitted.entry(teachers.find(teacher), width, name) for name in ("usual", *names)}
                 for (teacher, width), names in VARIED.items()}
    return {"sweeps": sweeps, "untrained": untrained,
            "trained": {name: {"kind": recipe.start, "part": recipe.part, **(retrained.summary(retrained.chosen(name), retrained.tests(name), recipe.part) or {}),
                               "grid": list(recipe.rates)} for name, recipe in RECIPES.items()}, "usual": usual}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="that is run (default: all)")
    names = [*VARIATIONS, *RECIPES]
    parser.add_argument("--names", nargs="+", choices=names, default=None, metavar="NAME", help=f"of {', '.join(map(repr, names))} (default: all)")
    parser.add_argument("--jobs", type=int, default=None, help="runs at once, one thread each (default: one per core)")
    parser.add_argument("--out", type=Path, default=None, help="folder of everything that is written (default: benchmarks/results and docs)")
    parser.add_argument("--no-run", action="store_true", help="put together what is there")
    parser.add_argument("--smoke", action="store_true", help="a few problems, two steps, to see that it runs; needs --out")
    args = parser.parse_args(words)
    if args.smoke and args.out is None:
        parser.error("--smoke needs --out: its numbers must not replace the study's")
    return args


if __name__ == "__main__":
    main()
