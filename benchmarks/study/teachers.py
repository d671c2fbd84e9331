"""The teachers of the study, each a folder with a model and an embedded example's tokenizer.

    chains         the embedded one
    principal      the same function, its stream rotated into its principal basis: few channels carry most
    random basis   the same function, its stream rotated at random: all channels carry alike
    massive        one with massive activations, as large models have them
    rich           a larger one with tied embeddings, of another family, that solves five kinds of problem; its text is its own

The rotated ones are made when first needed and kept in the temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import red
from red.demo.experiment import StudentRun, teacher_and_tokenizer, training_text
from red.demo.suite import corpus_of
from red.example import TEACHERS, teacher_path

NAMES = ("chains", "principal", "random basis", "massive", "rich")
BASIS_SEED = 5


@dataclass(frozen=True)
class Teacher:
    """One teacher. `key` names it in the finished runs: a hash of the weights, and for a rotation of what it was made from, because the last bits of a
    rotation may differ between machines."""

    name: str
    folder: str
    key: str

    @property
    def width(self) -> int:
        return json.loads((Path(self.folder) / "config.json").read_text())["hidden_size"]

    @cached_property
    def corpus(self) -> str:
        """Its text's name in red.demo.suite."""
        return corpus_of(self.folder)


def find(name: str) -> Teacher:
    """The teacher of that name, or of that folder."""
    if name in ("principal", "random basis"):
        return _rotated(name, find("chains"))
    folder = teacher_path(name) if name in TEACHERS else name
    return Teacher(name if name in NAMES else Path(folder).name, folder, _hash(folder))


def _hash(folder: str) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:16]


def _rotated(name: str, source: Teacher) -> Teacher:
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    place = Path(tempfile.gettempdir()) / f"red-study-{owner}" / f"{name.replace(' ', '_')}-{source.key}"
    if not (place / "model.safetensors").is_file():
        place.parent.mkdir(mode=0o700, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=place.parent))
        _write_rotated(name, source, staging)
        try:
            os.replace(staging, place)
        except OSError:  # another process was faster
            shutil.rmtree(staging)
    return Teacher(name, str(place), f"{source.key} in its {name if name.endswith('basis') else f'{name} basis'}")


def _write_rotated(name: str, source: Teacher, folder: Path) -> None:
    model, tokenizer = teacher_and_tokenizer(source.folder, "cpu")
    if name == "principal":
        text = training_text(StudentRun(start="pca", learning_rate=0.0, seed=1000, steps=20), tokenizer)
        basis = red.principal_basis(red.calibrate(model, text, tokenizer, samples=256, max_length=112, covariance=True))
    else:
        basis = red.random_basis(model.config.hidden_size, BASIS_SEED)
    red.rotate(model, basis).save_pretrained(folder)  # fp32
    tokenizer.save_pretrained(folder)
