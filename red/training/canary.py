"""A reasoning canary: while a student trains, it answers the same few problems every so many steps, and the share of the teacher's score is logged.

Losses and effective ranks show what a student has of its teacher's text; whether it still carries several steps through, only a problem shows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from red.training.erank_callback import log_beside
from red.errors import REDError
from red.evaluate import generate_answers

EMBEDDED = "embedded"
STEPS = (2, 4, 6, 8)  # of the embedded problems
BATCH = 64

logger = logging.get_logger(__name__)


class CanaryCallback(TrainerCallback):
    """Logs how many problems a REDTrainer's student answers rightly, as a share of its teacher's.

    `REDConfig(canary_steps=N, canary_file=…)` adds one. At the start it logs `canary/teacher` (share of the problems that the teacher solves), then at the
    start and after every N steps `canary/student`, `canary/share` (student / teacher; not where the teacher solves none, which is warned of) and
    `canary/seconds`, what the check cost. Answers are greedy, and as long as the longest right one at most: a file's answers should be worked ones, as
    GSM8K's are. What counts as right says `red.judge.problems.is_right`. Other ranks than the first do nothing but wait.

    Args:
        trainer: whose student and teacher answer, and through whose `log` the numbers go to all trackers; its processing_class is the tokenizer.
        problems: objects with `question`, `answer` and `steps`; see `canary_problems`.
        steps: between checks.

    Raises:
        REDError: no problems, or a trainer without a tokenizer.
    """

    def __init__(self, trainer, problems: Sequence, *, steps: int):
        if trainer.processing_class is None:
            raise REDError("canary_steps needs the teacher's tokenizer, to ask and to read answers. Give processing_class (tokenizer).")
        if not problems:
            raise REDError("canary_steps needs problems, and there are none. Give canary_file.")
        self.trainer, self.problems, self.steps = trainer, problems, steps
        self.teacher: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            self.teacher = self._score(self.trainer.teacher)
            log_beside(self.trainer, control, {"canary/teacher": self.teacher})
            if not self.teacher:
                logger.warning(f"The teacher solves none of the {len(self.problems)} canary problems, so they say nothing of the student. Give a canary_file that suits it, "
                               "in the form of its training text, or set canary_steps=0.")
            self._check(control)

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 0 and state.global_step % self.steps == 0:
            self._check(control)

    def _check(self, control) -> None:
        began = time.perf_counter()
        score = self._score(self.trainer.student)
        share = {"canary/share": score / self.teacher} if self.teacher else {}
        log_beside(self.trainer, control, {"canary/student": score, **share, "canary/seconds": time.perf_counter() - began})

    def _score(self, model: PreTrainedModel) -> float:
        from red.judge.problems import is_right  # red.judge imports the trainer

        with self.trainer.accelerator.autocast():
            replies = generate_answers(model, self.trainer.processing_class, self.problems, batch_size=BATCH)
        return sum(is_right(reply, problem.answer) for reply, problem in zip(replies, self.problems, strict=True)) / len(self.problems)


def canary_problems(source: str | Path, samples: int) -> list:
    """The first `samples` problems of a .jsonl file of `{"question": …, "answer": …}` (`red.judge.problems.load_problems`), or as many of the embedded
    example's held-out ones, of 2 to 8 steps, for source="embedded".

    Raises:
        REDError: a missing file, or a broken line.
    """
    if str(source) != EMBEDDED:
        from red.judge.problems import load_problems

        return load_problems(source)[:samples]
    from red.example import problems

    found = [problems("validation", steps, -(-samples // len(STEPS))) for steps in STEPS]
    return [problem for group in zip(*found, strict=True) for problem in group][:samples]
