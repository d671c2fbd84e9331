"""The embedded example: a corpus made on the spot, a word tokenizer, and a 0.8 M-parameter teacher that solves it.

    teacher = AutoModelForCausalLM.from_pretrained(teacher_path())
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())

Nothing is downloaded. `red.evaluate` measures a model on the held-out problems.
"""

from importlib.resources import files

from red.errors import REDError
from red.example.corpus import (
    SPLITS,
    Document,
    Problem,
    documents,
    easy_documents,
    easy_perplexity_limit,
    problems,
    split_of,
    tokenized,
)

__all__ = [
    "SPLITS",
    "TEACHERS",
    "Document",
    "Problem",
    "documents",
    "easy_documents",
    "easy_perplexity_limit",
    "problems",
    "split_of",
    "teacher_path",
    "tokenized",
]


TEACHERS = {  # name -> (folder here, the script that made it, how long that takes on one thread)
    "chains": ("teacher", "train_teacher", "20 minutes"),
    "massive": ("massive", "train_massive", "10 minutes"),
    "rich": ("rich", "train_rich --size small", "an hour"),
}


def teacher_path(name: str = "chains") -> str:
    """The folder of an embedded teacher: config, bf16 weights (1.6 to 3.1 MB), tokenizer, and how it was made (`training.json`).

    Args:
        name: "chains", trained from scratch on the corpus; "massive", the same one given massive activations, outlier channels
            and an attention sink as large language models have (`red.example.train_massive`); "rich", a Qwen3 with tied embeddings that solves
            five kinds of problem (`red.example.rich_corpus`, `red.example.train_rich`).

    Raises:
        REDError: no such teacher.
        FileNotFoundError: its weights are not there.
    """
    if name not in TEACHERS:
        raise REDError(f"name={name!r} is no embedded teacher; use one of {', '.join(map(repr, TEACHERS))}.")
    place, script, duration = TEACHERS[name]
    folder = files(__package__) / place
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {folder}: install red with its package data, or train the teacher again with "
            f"`python -m red.example.{script} --out {folder}` (about {duration} on one thread)"
        )
    return str(folder)
