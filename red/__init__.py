"""red: distil a big Llama- or Qwen-like language model into a narrower one without losing multi-step reasoning.

    import red
    result = red.distill("path/to/teacher", "corpus.txt", hidden_size=1536, output_dir="student")

Names are imported when first used, so that `import red` and `red -h` are quick.
"""

import importlib

_home = {
    "CanaryCallback": "training.canary", "Calibration": "calibration", "calibrate": "prepare",
    "CompressResult": "compression", "compress": "compression",
    "DistillResult": "distillation", "distill": "distillation",
    "ERankCallback": "training.erank_callback", "Projections": "training.projections", "REDConfig": "config", "REDError": "errors", "REDTrainer": "training.trainer",
    "plan": "planning.planner",
    "build_student": "student", "export": "sharing.export", "hidden_erank": "erank", "load_teacher": "prepare", "start_projections": "prepare",
    "principal_basis": "rotation", "random_basis": "rotation", "rotate": "rotation",
}
__all__ = sorted(_home)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _home:
        raise AttributeError(f"module 'red' has no attribute {name!r}")
    return getattr(importlib.import_module(f"red.{_home[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
