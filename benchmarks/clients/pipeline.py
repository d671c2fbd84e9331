"""A student in transformers' text-generation pipeline: `python -m benchmarks.clients.pipeline FOLDER` after benchmarks.clients.students."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers
from transformers import pipeline


def main(folder: Path) -> None:
    reference = json.loads((folder / "reference.json").read_text())
    print(f"transformers {transformers.__version__}, pipeline('text-generation', model='{folder / 'llama'}')\n")
    say = pipeline("text-generation", model=str(folder / "llama"), device="cpu")
    right = 0
    for question, answer in zip(reference["questions"], reference["answers"], strict=True):
        (said,) = say(question, max_new_tokens=40, do_sample=False, return_full_text=False)
        text = said["generated_text"].strip()
        right += text == answer
        print(f"{question}\n  -> {text}   [{'right' if text == answer else 'wrong: ' + answer}]")
    print(f"\n{right} of {len(reference['questions'])} answers are right, word for word")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
