"""The embedded example: a corpus made on the spot, a word tokenizer, and a 0.8 M-parameter teacher that solves it.

    teacher = AutoModelForCausalLM.from_pretrained(teacher_path())
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())

Nothing is downloaded. `red.evaluate` measures a model on the held-out problems.
"""

from importlib.resources import files

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


def teacher_path() -> str:
    """The folder of the embedded teacher: config, bf16 weights (1.6 MB), tokenizer, and how it was made (`training.json`)."""
    folder = files(__package__) / "teacher"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {folder}: install red with its package data, or train the teacher again with "
            f"`python -m red.example.train_teacher --out {folder}` (about 20 minutes on one thread)"
        )
    return str(folder)
