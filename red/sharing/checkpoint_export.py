"""`red export`: the student of a training checkpoint as a plain model, with its tokenizer and its teacher's licence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from red.training.checkpoints import teacher_of
from red.distillation import _tokenizer_beside
from red.errors import REDError
from red.sharing.export import ExportReport
from red.sharing.export import export as write
from red.files import require_empty_output, require_existing
from red.prepare import load_teacher


def export(checkpoint: str, *, out: str, dtype: str | None = None, as_llama: bool = False, tokenizer: str | None = None, teacher: str | None = None) -> ExportReport:
    """Write `checkpoint`, a checkpoint-N folder or any model of a supported family, to the folder `out`; see `red.sharing.export.export`.

    Args:
        dtype: None is that of the stored weights.
        tokenizer: its folder, where the checkpoint has none.
        teacher: its folder or name, whose licence goes along; None takes the one that the checkpoint names.

    Raises:
        REDError: no checkpoint or no tokenizer there; or what `red.sharing.export.export` refuses.
    """
    folder = require_existing(checkpoint, "The checkpoint")
    if not (folder / "config.json").is_file():
        inside = sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()) if folder.is_dir() else []
        hint = f"It holds {', '.join(inside)}: name one of them." if inside else "Name a checkpoint-N folder of a training run."
        raise REDError(f"{checkpoint} is not a checkpoint: it has no config.json. {hint}")
    require_empty_output(out, what="--out")
    source = require_existing(tokenizer, "The tokenizer") if tokenizer else folder
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise REDError(f"{source} has no tokenizer. Name the teacher's folder: --tokenizer PATH")
    found = _tokenizer_beside(source)
    student = load_teacher(folder.absolute(), "float32")  # exact for bf16 weights; cast once, below
    if (teacher := teacher or teacher_of(folder)) is None:
        print("red: the teacher is not known, so its licence is not carried along. Name it: --teacher PATH", file=sys.stderr)
    return write(student, found, out, dtype=dtype or _stored_dtype(folder), as_llama=as_llama, teacher=teacher)


def _stored_dtype(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype")
