"""`judge`: load both models, one after the other, and measure them in the same way."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

import red
from red.data.loading import check_examples, load_examples, tokenizer_hash
from red.distillation import _tokenizer_beside
from red.errors import REDError
from red.files import require_existing
from red.judge.divergence import kl_to_teacher
from red.judge.harness import LOCAL, REMEDY, Harness, compare, is_installed
from red.judge.judgement import Judgement
from red.judge.speed import measure_speed, memory_now

DTYPES = ("auto", "float32", "bfloat16", "float16")


def judge(student: str | Path, teacher: str | Path, *, tasks: Sequence[str] | None = None, data: str | Path | None = None, text_column: str = "text",
          max_length: int = 2048, limit: int | None = None, num_fewshot: int | None = None, chat: bool = False, batch_size: int = 16, device: str = "auto",
          dtype: str = "auto", speed: bool = True) -> Judgement:
    """Measure a student beside its teacher. Needs no network unless a model, or a task of lm-evaluation-harness, has to be fetched.

    Args:
        student, teacher: folders or names on the hub of causal language models, each with its tokenizer; no remote code is run.
        tasks: names of red's own tasks (`red.judge.harness.LOCAL`) or of lm-evaluation-harness's, and .jsonl files of problems (`load_problems`).
            None: red's own, where the harness is installed. Empty: none.
        data: held-out text for the divergence, as `red.data.loading.load_examples` reads it; both models must share the tokenizer. None: no divergence.
        max_length: documents longer than this are read in pieces of so many tokens, or of what the models read at most.
        limit: the first so many problems of each task, and documents of `data`.
        num_fewshot, chat: see `red.judge.harness.Harness`.
        batch_size: problems or documents that are read together.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", …
        dtype: of both models; "auto" is bfloat16 on a GPU and float32 on a CPU.
        speed: also measure generation.

    Raises:
        REDError: bad input; what can be found without the weights is found before they are read.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise REDError(f"{name}={value} is not a positive number.")
    place = _device(device)
    kind = _dtype(dtype, place)
    notes, harness = [], None
    if tasks is None and not is_installed():
        notes.append(f"No task was run: lm-evaluation-harness is not installed. {REMEDY}")
    elif tasks is None or tasks:
        harness = Harness(LOCAL if tasks is None else tasks, limit=limit, num_fewshot=num_fewshot, chat=chat, batch_size=batch_size)
    names = {"teacher": str(teacher), "student": str(student)}
    for role, name in names.items():
        if Path(name).is_absolute() or name.startswith("."):  # no name on the hub
            require_existing(name, f"The {role}'s folder")
    tokenizers = {role: _tokenizer_beside(name) for role, name in names.items()}
    if data is not None and len({tokenizer_hash(tokenizer) for tokenizer in tokenizers.values()}) > 1:
        raise REDError(f"{names['student']!r} and {names['teacher']!r} have different tokenizers, and a divergence between them has no meaning. "
                       "Name the teacher that the student was made from, or leave the data out.")

    without = [names[role] for role, tokenizer in tokenizers.items() if chat and not tokenizer.chat_template]
    if without:
        raise REDError(f"chat=True: the tokenizer of {without[0]!r} has no chat template. Leave chat out.")

    models, facts, scores = {}, {}, {}
    for role, name in names.items():
        before = memory_now(place)
        models[role] = model = _load(name, kind).to(place).eval()
        facts[role] = {"name": name, "model_type": model.config.model_type, "hidden_size": model.config.hidden_size, "parameters": model.num_parameters(),
                       "non_embedding_parameters": _without_embeddings(model), "dtype": str(model.dtype).removeprefix("torch."),
                       "generation": measure_speed(model, before) if speed else None}
    examples = _examples(data, tokenizers["teacher"], models, text_column, max_length, limit) if data is not None else None
    divergence = kl_to_teacher(models["teacher"], models["student"], examples, batch_size=batch_size) if examples else None
    if harness:
        scores = {role: harness.score(model, tokenizers[role]) for role, model in models.items()}
    settings = {"tasks": [*harness.names, *(task["task"] for task in harness.files)] if harness else [], "data": None if data is None else str(data),
                "max_length": max_length, "limit": limit, "num_fewshot": num_fewshot, "chat": chat, "batch_size": batch_size, "device": str(place),
                "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(), "dtype": str(kind).removeprefix("torch.")}
    versions = {"red": red.__version__, "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                **({"lm_eval": harness.version} if harness else {})}
    return Judgement(facts["teacher"], facts["student"], compare(scores["teacher"], scores["student"]) if harness else [], divergence, settings, versions, notes)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise REDError(f"device={name!r} is no device. Use auto, cpu, cuda, or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise REDError(f"device={name!r}: there are {torch.cuda.device_count()} GPUs here. Use another, or cpu.")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in DTYPES:
        raise REDError(f"dtype={name!r} is not one of {', '.join(DTYPES)}.")
    return getattr(torch, name if name != "auto" else "float32" if device.type == "cpu" else "bfloat16")


def _load(name: str, dtype: torch.dtype):
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise REDError(f"Cannot load the model {name!r}: {error}") from error


def _without_embeddings(model) -> int:
    tables = {id(module.weight): module.weight.numel() for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    return model.num_parameters() - sum(tables.values())


def _examples(data, tokenizer, models: dict, text_column: str, max_length: int, limit: int | None) -> list[dict]:
    limits = [getattr(model.config, "max_position_embeddings", None) or max_length for model in models.values()]
    examples = load_examples(data, tokenizer, text_column=text_column, max_length=min(max_length, *limits))
    check_examples(examples, tokenizer, min(model.config.vocab_size for model in models.values()))
    return [example for example in examples if limit is None or example["number"] < limit]
