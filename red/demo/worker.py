"""A child process of red.demo.parallel: `python -m red.demo.worker JOB.json RESULT.json` trains one student on one thread.

Each measurement is a line on stdout that begins with EVENT; the result is a JSON file; a failure is a traceback on stderr.
"""

from __future__ import annotations

import json
import sys

EVENT = "@red-demo "


def main(job_file: str, result_file: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    from red.demo.experiment import StudentRun, run_student
    from red.report.provenance import write_json

    with open(job_file) as file:
        job = json.load(file)

    def report(entry: dict) -> None:
        print(EVENT + json.dumps(entry), flush=True)  # NaN stays NaN between our own processes

    result = run_student(StudentRun(**job.pop("run")), on_evaluation=report, **job)
    write_json(result_file, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
