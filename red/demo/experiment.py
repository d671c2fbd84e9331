"""One student of the embedded example: trained at stated settings, measured at its start, on its way and at its end.

`StudentRun` is everything that decides a run's numbers; equal runs give equal numbers. Two runs that differ only in `start`, learning
rate or `options` see the same batches in the same order, which `data_digest` proves.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

import red
from red.erank import hidden_erank
from red.errors import REDError
from red.evaluate import exact_match, forced_exact_match, generate_answers, text_quality
from red.example import documents, easy_documents, problems, tokenized
from red.prepare import load_teacher

STEP_COUNTS = (2, 4, 6, 8)  # of the measured problems
FIRST_PHASE = 0.3  # the share of the training after which a collapse shows: the middle one of the three full measurements
SHOWN = 20  # answers that a run keeps, to be looked at
PACKING_SLACK = 1.3  # training text made per token needed: packing leaves gaps, and no document may come twice


@dataclass(frozen=True)
class StudentRun:
    """The settings of one student run; JSON-able by `dataclasses.asdict`."""

    start: str
    learning_rate: float
    seed: int = 0
    steps: int = 150
    hidden_size: int | None = None  # None: half the teacher's
    rows: int = 16  # a step's rows …
    length: int = 112  # … of so many tokens
    warmup_steps: int = 20
    reasoning_share: float = 0.5
    calibration_samples: int = 64
    problems: int = 50  # of each step count, on the way
    final_problems: int = 100  # of each step count, at the start, after FIRST_PHASE and at the end
    easy_texts: int = 100
    erank_tokens: int = 4000
    options: dict = field(default_factory=dict)  # further REDConfig fields, such as {"norm_scale": False}

    @property
    def positions_per_step(self) -> int:
        return self.rows * self.length  # tokens and padding

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps with a full measurement: start, 30 %, end."""
        return tuple(sorted({0, round(FIRST_PHASE * self.steps), self.steps}))


class Suite:
    """The held-out text of one split and the measurements on it; the same for a teacher and all its students."""

    def __init__(self, tokenizer, run: StudentRun, split: str):
        self.tokenizer, self.run = tokenizer, run
        self.problems = {n: problems(split, n, run.final_problems) for n in STEP_COUNTS}
        self.easy = easy_documents(split, run.easy_texts)
        # Reasoning text whose questions do not count: the eRank of the states in which the model works an answer out.
        self.reasoning = tokenized(documents(1, split, reasoning_share=1.0), tokenizer, 3 * run.erank_tokens)

    def full(self, model) -> dict:
        """Exact match by generation, easy text, eRank per layer."""
        return {
            **exact_match(model, self.tokenizer, self._problems(self.run.final_problems)),
            **text_quality(model, self.tokenizer, self.easy),
            "erank": hidden_erank(model, self.tokenizer, self.reasoning, max_tokens=self.run.erank_tokens),
        }

    def light(self, model) -> dict:
        """Exact match on the first problems of each kind, without generating, and easy text: a second's tenth, not seconds."""
        return {**forced_exact_match(model, self.tokenizer, self._problems(self.run.problems)),
                **text_quality(model, self.tokenizer, self.easy)}

    def answers(self, model) -> dict[str, str]:
        """What the model says to the first problems of four steps: {question: text}."""
        shown = self.problems[4][:SHOWN]
        return {problem.question: text for problem, text in zip(shown, generate_answers(model, self.tokenizer, shown))}

    def _problems(self, count: int) -> list:
        return [problem for found in self.problems.values() for problem in found[:count]]


def teacher_and_tokenizer(path: str, device: str = "auto"):
    """Teacher in fp32 (bf16 is five times slower on a CPU) and tokenizer, on the device that "auto" stands for."""
    return load_teacher(path, "float32").to(pick_device(device)).eval(), AutoTokenizer.from_pretrained(path)


def pick_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def run_student(run: StudentRun, *, teacher_path: str, evaluate_at: Iterable[int] = (), split: str = "test", device: str = "auto",
                export_to: str | None = None, on_evaluation: Callable[[dict], None] | None = None) -> dict:
    """Train one student and measure it.

    Args:
        run: the settings.
        teacher_path: Hugging Face folder of the teacher and its tokenizer.
        evaluate_at: steps after which it is measured lightly; fully at `run.full_steps` in any case.
        split: held-out split of the measurements, "validation" to choose by, "test" to report.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        export_to: folder for the plain Hugging Face checkpoint.
        on_evaluation: called with each entry of the history when it is there.

    Returns:
        `{"learning_rate", "history": [{"tokens" (read, without padding), "step", "exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity",
        "erank" (full ones), "seconds" (of training)}], "final": {…}, "answers", "data_digest", "train_seconds", "evaluate_seconds"}`.
    """
    teacher, tokenizer = teacher_and_tokenizer(teacher_path, device)
    watcher = _Watcher(run, Suite(tokenizer, run, split), set(evaluate_at), on_evaluation or (lambda entry: None))
    scratch = tempfile.mkdtemp(prefix="red-run-")  # TrainingArguments wants a folder; nothing is saved there
    try:
        trainer = red.REDTrainer(
            teacher=teacher, args=_config(run, teacher, scratch, device), train_dataset=training_text(run, tokenizer),
            processing_class=tokenizer, callbacks=[watcher],
        )
        watcher.student, watcher.reading = trainer.student, _Reading(trainer.student, tokenizer.pad_token_id)
        with watcher.reading:
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started - watcher.evaluate_seconds
        if (trainer.state.epoch or 0) > 1:
            raise REDError(f"The training text was read {trainer.state.epoch:.2f} times in {run.steps} steps: packing needs more than "
                           f"PACKING_SLACK={PACKING_SLACK} tokens per token. Raise it.")
        if export_to is not None:
            trainer.export(export_to)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    measured = ("exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "erank")
    return {
        "learning_rate": run.learning_rate,
        "history": watcher.history,
        "final": {key: watcher.history[-1][key] for key in measured},
        "answers": watcher.suite.answers(trainer.student),
        "data_digest": f"{watcher.reading.digest:08x}",
        "train_seconds": seconds,
        "evaluate_seconds": watcher.evaluate_seconds,
    }


def training_text(run: StudentRun, tokenizer) -> list[dict]:
    """Fresh documents of the train split for every step of the run, decided by `run.seed`."""
    tokens = int(PACKING_SLACK * run.positions_per_step * run.steps) + 4 * run.positions_per_step
    return tokenized(documents(run.seed, "train", reasoning_share=run.reasoning_share), tokenizer, tokens)


def _config(run: StudentRun, teacher, folder: str, device: str):
    """The recipe of every run, unless its options say otherwise: cross entropy + KL to the teacher (T = 1) + .2 × the taps, each divided by the
    teacher's mean square there; AdamW(.9, .98) without weight decay, gradients clipped to norm 1, a short warm-up, then a cosine to 0."""
    settings = dict(
        output_dir=folder, hidden_size=run.hidden_size or teacher.config.hidden_size // 2, start=run.start,
        learning_rate=run.learning_rate, max_steps=run.steps, per_device_train_batch_size=run.rows, max_length=run.length,
        warmup_steps=min(run.warmup_steps, run.steps // 2), lr_scheduler_type="cosine", adam_beta1=0.9, adam_beta2=0.98,
        weight_decay=0.0, max_grad_norm=1.0, seed=run.seed, calibration_samples=run.calibration_samples,
        use_cpu=pick_device(device) == "cpu", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )
    return red.REDConfig(**{**settings, **run.options})


class _Watcher(TrainerCallback):
    """Measures the student during the training and keeps the clock of the training alone."""

    def __init__(self, run: StudentRun, suite: Suite, light: set[int], report: Callable[[dict], None]):
        self.run, self.suite, self.light, self.report = run, suite, light, report
        self.student: PreTrainedModel | None = None  # and `reading`: set once the trainer has built the student
        self.reading: _Reading | None = None
        self.history: list[dict] = []
        self.evaluate_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()
        self._measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step not in self.light and step not in self.run.full_steps:
            return
        before = time.perf_counter()
        scores = self.suite.full(self.student) if step in self.run.full_steps else self.suite.light(self.student)
        spent = before - self.began - self.evaluate_seconds
        self.evaluate_seconds += time.perf_counter() - before
        self.history.append({"tokens": self.reading.tokens, "step": step, **scores, "seconds": spent})
        self.report(self.history[-1])


class _Reading:
    """While open, what the student is trained on: `tokens` without padding, and `digest`, the CRC-32 of all ids in their order."""

    def __init__(self, student: PreTrainedModel, pad_id: int):
        self.student, self.pad_id = student, pad_id
        self.tokens = self.digest = 0

    def __enter__(self) -> None:
        self.handle = self.student.get_input_embeddings().register_forward_pre_hook(self._read, with_kwargs=True)

    def __exit__(self, *exc) -> None:
        self.handle.remove()

    def _read(self, module, args, kwargs) -> None:
        if module.training:
            ids = args[0] if args else kwargs["input"]
            self.tokens += int((ids != self.pad_id).sum())
            self.digest = zlib.crc32(ids.cpu().numpy().tobytes(), self.digest)
