"""`red eval`: its options, and what it does with them."""

from __future__ import annotations

from pathlib import Path

import click

from red.commands import Command
from red.errors import REDError
from red.files import require_existing, require_place_for

@click.command("eval", cls=Command, short_help="a student beside its teacher: tasks, divergence, speed and memory")
@click.argument("student")
@click.option("--against", required=True, metavar="TEACHER", help="folder or name on the hub")
@click.option("--tasks", "--task", "tasks", multiple=True, metavar="TASK ...",
              help="red_chains, red_easy_text, red_easy_cloze; a .jsonl file of problems; any name of lm-evaluation-harness; or none [red's own]")
@click.option("--data", metavar="FILE", help="held-out text for the divergence: .txt, .jsonl or a saved data set [no divergence]")
@click.option("--text_column", default="text", metavar="NAME", help="column that holds the text [text]")
@click.option("--max_length", type=int, default=2048, metavar="N", help="longer documents are read in pieces of N tokens [2048]")
@click.option("--limit", type=int, metavar="N", help="the first N problems of each task and documents of the data [all]")
@click.option("--num_fewshot", type=int, metavar="N", help="examples in front of each problem [each task's own number]")
@click.option("--chat", is_flag=True, help="ask in the models' chat template")
@click.option("--batch_size", type=int, default=16, metavar="N", help="problems or documents that are read together [16]")
@click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 [auto: a GPU if there is one]")
@click.option("--dtype", default="auto", metavar="DTYPE", help="auto, float32, bfloat16, float16 [auto: bfloat16 on a GPU]")
@click.option("--no_speed", is_flag=True, help="leave speed and memory out")
@click.option("--output", "--json", "output", metavar="PATH", help="write everything here too, as JSON")
def evaluate(student, against, tasks, data, no_speed, output, **given) -> None:
    """Print a student beside its teacher: tasks with 95 % intervals of the difference, KL(teacher‖student) on held-out text, speed and memory of
    generation, parameters.

      red eval run/student --against path/to/teacher --data held_out.txt
      red eval run/student --against path/to/teacher --tasks questions.jsonl --output scores.json
      red eval run/student --against path/to/teacher --tasks gsm8k mmlu --limit 200         fetched by name: needs a network once

    Tasks run in lm-evaluation-harness (pip install "red-distill[eval]"); the rest needs only red. A file of problems has one
    {"question": ..., "answer": ..., "steps": ...} a line: of an answer with "####", or a number alone, only the result counts, any other must be given
    word for word. Without --tasks red's own are run, which suit models that were trained on the embedded example; give others a few examples
    (--tasks red_chains --num_fewshot 4).
    """
    if output and Path(output).exists():
        raise REDError(f"--output={output!r} exists and nothing is overwritten. Choose another name, or move it away.")
    if output:
        require_place_for(output, "--output")
    if data:
        require_existing(data, "The data path")  # before a model is read

    from red.files import atomic_write_json
    from red.judge import judge

    found = judge(student, against, tasks=[] if tasks == ("none",) else list(tasks) or None, data=data, speed=not no_speed, **given)
    print(found)
    if output:
        atomic_write_json(output, found.as_json())
