"""How good is a student beside its teacher: tasks, divergence on held-out text, speed and memory, side by side.

    from red.judge import judge
    print(judge("run/student", "path/to/teacher", data="held_out.txt"))

Tasks run in lm-evaluation-harness (`pip install "red-distill[eval]"`), imported when a task is run; everything else needs only red.
"""

import importlib

_home = {"Judgement": "judgement", "judge": "judging", "kl_to_teacher": "divergence", "load_problems": "problems", "paired_difference": "statistics"}
__all__ = sorted(_home)


def __getattr__(name: str):
    if name not in _home:
        raise AttributeError(f"module 'red.judge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"red.judge.{_home[name]}"), name)
