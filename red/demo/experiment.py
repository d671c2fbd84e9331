"""One student of the embedded example: trained at stated settings, measured at its start, on its way and at its end.

`StudentRun` is everything that decides a run's numbers; equal runs give equal numbers. Two runs that differ only in `start`, learning
rate or `options` see the same batches in the same order, which `data_digest` proves.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

import red
from red import starts
from red.data import loading as data
from red.demo.suite import CORPORA, Suite
from red.errors import REDError
from red.example import tokenized
from red.prepare import load_teacher

FIRST_PHASE = 0.3  # the share of the training after which a collapse shows: the middle one of the three full measurements
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
    corpus: str = "chains"  # a key of CORPORA: the text that it is trained, calibrated and measured on

    @property
    def positions_per_step(self) -> int:
        return self.rows * self.length  # tokens and padding

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps with a full measurement: start, 30 %, end."""
        return tuple(sorted({0, round(FIRST_PHASE * self.steps), self.steps}))


def teacher_and_tokenizer(path: str, device: str = "auto"):
    """Teacher in fp32 (bf16 is five times slower on a CPU) and tokenizer, on the device that "auto" stands for."""
    return load_teacher(path, "float32").to(pick_device(device)).eval(), AutoTokenizer.from_pretrained(path)


def pick_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def run_student(run: StudentRun, *, teacher_path: str, evaluate_at: Iterable[int] = (), split: str = "test", device: str = "auto",
                export_to: str | None = None, on_evaluation: Callable[[dict], None] | None = None,
                change: Callable[[red.REDTrainer], None] | None = None) -> dict:
    """Train one student and measure it.

    Args:
        run: the settings.
        teacher_path: Hugging Face folder of the teacher and its tokenizer.
        evaluate_at: steps after which it is measured lightly; fully at `run.full_steps` in any case.
        split: held-out split of the measurements, "validation" to choose by, "test" to report.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        export_to: folder for the plain Hugging Face checkpoint.
        on_evaluation: called with each entry of the history when it is there.
        change: called with the trainer before it trains, for what `run.options` cannot say.

    Returns:
        `{"learning_rate", "history": [{"tokens" (trained on, without padding), "step", "exact_match", "exact_match_by_steps", "easy_accuracy",
        "easy_perplexity", "kl_easy", "kl_reasoning", "erank" (full ones), "seconds" (of training)}], "final": {…}, "answers", "data_digest",
        "calibration_tokens", "train_seconds", "evaluate_seconds"}`.
    """
    teacher, tokenizer = teacher_and_tokenizer(teacher_path, device)
    watcher = _Watcher(run, Suite(tokenizer, run, split, teacher), set(evaluate_at), on_evaluation or (lambda entry: None))
    scratch = tempfile.mkdtemp(prefix="red-run-")  # TrainingArguments wants a folder; nothing is saved there
    try:
        trainer = red.REDTrainer(
            teacher=teacher, args=run_config(run, teacher, scratch, device), train_dataset=training_text(run, tokenizer),
            processing_class=tokenizer, callbacks=[watcher],
        )
        if change is not None:
            change(trainer)
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
    measured = ("exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "kl_easy", "kl_reasoning", "erank")
    return {
        "learning_rate": run.learning_rate,
        "history": watcher.history,
        "final": {key: watcher.history[-1][key] for key in measured},
        "answers": watcher.suite.answers(trainer.student),
        "data_digest": f"{watcher.reading.digest:08x}",
        "calibration_tokens": calibration_tokens(run, tokenizer),
        "train_seconds": seconds,
        "evaluate_seconds": watcher.evaluate_seconds,
    }


def training_text(run: StudentRun, tokenizer) -> list[dict]:
    """Fresh documents of the train split for every step of the run, decided by `run.seed`."""
    tokens = int(PACKING_SLACK * run.positions_per_step * run.steps) + 4 * run.positions_per_step
    return tokenized(CORPORA[run.corpus].documents(run.seed, "train", run.reasoning_share), tokenizer, tokens)


def calibration_rows(run: StudentRun, tokenizer) -> data.PackedDataset:
    """What a run is calibrated on, in its first `calibration_samples` rows: the beginning of its training text, as the trainer packs it."""
    enough = dataclasses.replace(run, steps=math.ceil(run.calibration_samples / run.rows))
    return data.pack(data.load_examples(training_text(enough, tokenizer)), run.length, pad_token_id=tokenizer.pad_token_id)


def calibration_tokens(run: StudentRun, tokenizer) -> int:
    """The tokens, without padding, that a run reads before it trains, for its start or for the scale of its taps; the training reads them again."""
    normalised = run.options.get("tap_normalize", not run.options.get("lrc_faithful", False))
    if not (starts.get(run.start).needs or run.options.get("start_fit") in ("readers", "full") or normalised):
        return 0
    rows = calibration_rows(run, tokenizer)
    return sum(int(rows[i]["token_mask"].sum()) for i in range(min(run.calibration_samples, len(rows))))


def run_config(run: StudentRun, teacher, folder: str, device: str):
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
