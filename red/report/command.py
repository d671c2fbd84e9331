"""`red report`: the page of a run, made again from what lies in its folder; also of one that was killed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from red.commands import Command


@click.command("report", cls=Command, short_help="a run's report.html again: what was done, how it went, what it is worth")
@click.argument("run_dir", metavar="RUN")
@click.option("--out", metavar="FILE", help="where the page goes [RUN/report.html]")
@click.option("--card", is_flag=True, help="write README.md of RUN/student anew too; what somebody wrote into it is lost")
def command(run_dir, **given) -> None:
    """Make the report of a run again, from what lies in its folder: run.json and the last checkpoint's log, the channels of its start, and JSONs of
    red eval. RUN is the output_dir of red distill, red compress or red lori; one that was killed, or still trains, has a report too.

      red report run                              writes run/report.html
      red report run --out seen.html
      red eval run/student --against T --output run/eval.json && red report run --card      the judgement, too, in report and model card
    """
    print(report(run_dir, **given))


def report(run_dir: str | Path, *, out: str | Path | None = None, card: bool = False) -> Path:
    """Write report.html, or `out`; with `card` also README.md of run_dir/student anew. Returns the page's path; what could not be read goes to stderr.

    Raises:
        REDError: run_dir is missing or holds no run; the page cannot be written there; or `card` where there is no student.
    """
    from red.errors import REDError
    from red.files import PAGE, require_existing, require_place_for
    from red.report.card import write_card
    from red.report.report import write_page
    from red.report.run import Run

    student = Path(run_dir) / "student"
    if not require_existing(run_dir, "The run").is_dir():
        raise REDError(f"{str(run_dir)!r} is a file; a run is a folder, the output_dir of red distill, red compress or red lori.")
    place = require_place_for(out or Path(run_dir) / PAGE, "--out")
    for note in Run.load(run_dir).notes:
        print(f"red: {note}", file=sys.stderr)
    path = write_page(run_dir, place)
    if card:
        if not (student / "config.json").is_file():
            raise REDError(f"{student} is no exported student, so there is nothing to write a card for. Leave --card out.")
        write_card(run_dir, student)
    return path
