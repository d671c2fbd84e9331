"""LoRi: a student that reasons in a few latent steps instead of writing its chain of thought (after arXiv 2606.05315).

docs/lori.md says what is the paper's and what is ours.

    result = red.distill("path/to/explicit-cot-teacher", "problems.jsonl", method="lori", output_dir="run")
    model, tokenizer, facts = red.lori.load("run/student")

Names are imported when first used, so that `red -h` is quick.
"""

import importlib

_home = {
    "LatentModel": "model", "LoRiConfig": "config", "LoRiResult": "distillation", "LoRiTrainer": "trainer", "PRESETS": "config", "Row": "data",
    "Subspace": "subspace", "Trajectories": "trajectories", "accuracy": "evaluate", "answer": "evaluate", "collect": "trajectories", "distill": "distillation",
    "fit_subspace": "subspace", "latency": "evaluate", "load": "files", "load_rows": "data",
}
__all__ = sorted(_home)


def __getattr__(name: str):
    if name not in _home:
        raise AttributeError(f"module 'red.lori' has no attribute {name!r}")
    return getattr(importlib.import_module(f"red.lori.{_home[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
