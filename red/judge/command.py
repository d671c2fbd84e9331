"""`red eval`: its options, and what it does with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from red.errors import REDError
from red.files import require_existing

DESCRIPTION = """\
Print a student beside its teacher: tasks with 95 % intervals of the difference, KL(teacher‖student) on held-out text, speed and memory of
generation, parameters.

  red eval run/student --against path/to/teacher --data held_out.txt
  red eval run/student --against path/to/teacher --tasks questions.jsonl --output scores.json
  red eval run/student --against path/to/teacher --tasks gsm8k mmlu --limit 200         fetched by name: needs a network once

Tasks run in lm-evaluation-harness (pip install "red-distill[eval]"); the rest needs only red. A file of problems has one
{"question": ..., "answer": ..., "steps": ...} a line: of an answer with "####", or a number alone, only the result counts, any other must be given
word for word. Without --tasks red's own are run, which suit models that were trained on the embedded example; give others a few examples
(--tasks red_chains --num_fewshot 4).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="folder or name on the hub")
    parser.add_argument("--against", required=True, metavar="TEACHER", help="folder or name on the hub")
    parser.add_argument("--tasks", "--task", nargs="+", action="extend", metavar="TASK", help="red_chains, red_easy_text, red_easy_cloze; a .jsonl file of problems; any "
                        "name of lm-evaluation-harness; or none [red's own]")
    parser.add_argument("--data", metavar="FILE", help="held-out text for the divergence: .txt, .jsonl or a saved data set [no divergence]")
    parser.add_argument("--text_column", default="text", help="column that holds the text [text]")
    parser.add_argument("--max_length", type=int, default=2048, metavar="N", help="longer documents are read in pieces of N tokens [2048]")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N problems of each task and documents of the data [all]")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples in front of each problem [each task's own number]")
    parser.add_argument("--chat", action="store_true", help="ask in the models' chat template")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="problems or documents that are read together [16]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto: a GPU if there is one]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto: bfloat16 on a GPU]")
    parser.add_argument("--no_speed", action="store_true", help="leave speed and memory out")
    parser.add_argument("--output", "--json", metavar="PATH", help="write everything here too, as JSON")


def run(options: argparse.Namespace) -> None:
    if options.output and Path(options.output).exists():
        raise REDError(f"--output={options.output!r} exists and nothing is overwritten. Choose another name, or move it away.")
    if options.data:
        require_existing(options.data, "The data path")  # before a model is read
    tasks = [] if options.tasks == ["none"] else options.tasks

    from red.files import atomic_write_json
    from red.judge import judge

    found = judge(options.student, options.against, tasks=tasks, data=options.data, text_column=options.text_column, max_length=options.max_length,
                  limit=options.limit, num_fewshot=options.num_fewshot, chat=options.chat, batch_size=options.batch_size, device=options.device,
                  dtype=options.dtype, speed=not options.no_speed)
    print(found)
    if options.output:
        atomic_write_json(options.output, found.as_json())
