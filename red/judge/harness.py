"""Tasks in lm-evaluation-harness (EleutherAI): red's own from red/judge/tasks, a user's file of problems, or any of the harness's by name."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from red.errors import REDError
from red.files import nearest
from red.judge.problems import is_right, load_problems
from red.judge.statistics import Difference, paired_difference, unpaired_difference

FOLDER = Path(__file__).parent / "tasks"
LOCAL = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
REMEDY = 'Run: pip install "red-distill[eval]"'
ANSWER = 512  # tokens that a reply to a user's problem may have


@dataclass(frozen=True)
class Row:
    """One score of both models on one task."""

    task: str
    metric: str
    n: int
    teacher: float
    student: float
    teacher_stderr: float | None
    student_stderr: float | None
    difference: Difference
    higher_is_better: bool | None  # None where the task does not say
    by_steps: dict[str, tuple[float, float]] | None = None  # steps -> (teacher, student), where the problems name their steps


def is_installed() -> bool:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return False
    return True


class Harness:
    """Checks the tasks when made, before any model is loaded; `score` runs them on one model.

    Args:
        tasks: names, and paths that end in .jsonl (see `red.judge.problems.load_problems`).
        limit: the first so many problems of each task.
        num_fewshot: examples in front of each problem; None is each task's own number.
        chat: ask in the model's chat template.

    Raises:
        REDError: lm-evaluation-harness is missing, a task is unknown, or a file of problems is broken.
    """

    def __init__(self, tasks: Sequence[str], *, limit: int | None = None, num_fewshot: int | None = None, chat: bool = False, batch_size: int = 16):
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise REDError(f"Tasks need lm-evaluation-harness, which is not installed ({error}). {REMEDY}; or leave the tasks out with --tasks none.") from error
        self.version = lm_eval.__version__
        self.settings = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
        self.batch_size = batch_size
        names = [name for name in tasks if not name.endswith(".jsonl")]
        self.files = [_task_of_file(path) for path in tasks if path.endswith(".jsonl")]
        for name in names:
            if Path(name).exists():
                raise REDError(f"{name!r} is a file that is no .jsonl. Problems are read from .jsonl, one {{\"question\": …, \"answer\": …}} a line; text belongs to --data.")
        # the harness's own thousands of tasks are read only when one of them is asked for
        with _quiet():
            self.manager = TaskManager(include_path=str(FOLDER), include_defaults=not set(names) <= set(LOCAL))
        for name in names:
            if name not in self.manager.all_tasks:
                like = nearest(name, self.manager.all_tasks)
                raise REDError(f"There is no task {name!r}{f'; did you mean {like!r}?' if like else '.'} Offline there are {', '.join(LOCAL)}, and files of problems "
                               "(.jsonl); `lm_eval ls tasks` lists those that need a network.")
        twice = [task["task"] for task in self.files if [*names, *(other["task"] for other in self.files)].count(task["task"]) > 1]
        if twice or len(set(names)) < len(names):
            raise REDError(f"The task {(twice or [name for name in names if names.count(name) > 1])[0]!r} is named twice. Name each task once.")
        self.names = names

    def score(self, model, tokenizer) -> dict:
        """What `lm_eval.simple_evaluate` returns, the items' own scores included."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            # a blank line ends a reply only where the examples in front show it to
            ending = {"until": ["\n\n"] if self.settings["num_fewshot"] else [], "max_gen_toks": min(ANSWER, wrapped.max_length // 2), "do_sample": False}
            files = [{**task, "generation_kwargs": ending} for task in self.files]
            try:
                # 1000 resamples, where a task's own error is a bootstrap
                found = simple_evaluate(model=wrapped, tasks=[*self.names, *files], task_manager=self.manager, bootstrap_iters=1000, **self.settings)
            except OSError as error:  # no network, no such data set
                raise REDError(f"The tasks' data could not be read: {error}. Offline there are {', '.join(LOCAL)}, and files of problems (.jsonl).") from error
        return found


def compare(teacher: dict, student: dict) -> list[Row]:
    """The scores of two runs of the same harness, side by side."""
    rows = []
    for task, scores in teacher["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            other = student["results"][task].get(key)
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)) or not isinstance(other, (int, float)):
                continue
            errors = [_number(run["results"][task].get(f"{metric}_stderr,{kind}")) for run in (teacher, student)]
            items = [_items(run, task, metric, kind) for run in (teacher, student)]
            difference = _paired(items, (value, other)) or unpaired_difference(value, other, (errors[0], errors[1]))
            count = student.get("n-samples", {}).get(task, {}).get("effective") or len(items[1])
            better = student.get("higher_is_better", {}).get(task, {}).get(metric)
            name = metric if kind == "none" else f"{metric} ({kind})"
            rows.append(Row(task, name, count, float(value), float(other), errors[0], errors[1], difference, better, _by_steps(items)))
    return rows


def _task_of_file(path: str) -> dict:
    """A task of the harness that asks the problems of a file, each once, greedily."""
    problems = load_problems(path)

    def dataset(**_):
        from datasets import Dataset

        return {"test": Dataset.from_list([vars(problem) for problem in problems])}

    def score(doc: dict, results: list[str]) -> dict[str, float]:
        return {"exact_match": float(is_right(results[0], doc["answer"]))}

    return {"task": Path(path).stem, "custom_dataset": dataset, "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}", "process_results": score,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1}}


def _items(run: dict, task: str, metric: str, kind: str) -> list[dict]:
    """Each item's problem, hash and own score, in the order of the problems."""
    samples = [sample for sample in run.get("samples", {}).get(task, []) if metric in sample and sample.get("filter", "none") == kind]
    return [{"doc": sample["doc"], "hash": sample["doc_hash"], "score": sample[metric]} for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


# How a task may sum up its items: what it reports must be what one of these gives, else the items are not used.
STATISTICS = {
    "mean": (1, None),
    "perplexity": (2, lambda mean: np.exp(-mean)),
    "bits": (2, lambda mean: -mean / np.log(2)),
}


def _paired(items: list[list[dict]], reported: tuple[float, float]) -> Difference | None:
    if not items[0] or [item["hash"] for item in items[0]] != [item["hash"] for item in items[1]]:
        return None
    try:
        values = [np.array([item["score"] for item in side], dtype=float) for side in items]
    except (TypeError, ValueError):
        return None
    for dimensions, statistic in STATISTICS.values():
        if all(side.ndim == dimensions and (dimensions == 1 or side.shape[1] == 2) for side in values):
            means = [side.mean() if dimensions == 1 else side[:, 0].sum() / side[:, 1].sum() for side in values]
            given = [statistic(mean) if statistic else mean for mean in means]
            if np.allclose(given, reported, rtol=1e-6, atol=1e-9):
                return paired_difference(values[0], values[1], statistic)
    return None


def _by_steps(items: list[list[dict]]) -> dict[str, tuple[float, float]] | None:
    sides = []
    for side in items:
        found = defaultdict(list)
        for item in side:
            if not isinstance(item["doc"].get("steps"), int) or not isinstance(item["score"], (int, float)):
                return None
            found[item["doc"]["steps"]].append(item["score"])
        sides.append({steps: sum(scores) / len(scores) for steps, scores in found.items()})
    return {str(steps): (sides[0][steps], sides[1][steps]) for steps in sorted(sides[0])} if sides[0].keys() == sides[1].keys() and sides[0] else None


def _number(value) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None  # the harness writes "N/A"


@contextmanager
def _quiet() -> Iterator[None]:
    """Its warnings about our settings stay unsaid, and what it prints goes to stderr, as progress does."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
