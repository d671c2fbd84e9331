"""What generation costs: tokens per second, time of an answer, peak memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

PROMPT, ANSWER = 64, 64  # tokens; less where the model reads no more
BATCHES = (1, 8)
REPEATS = 5  # after one that warms up; the fastest counts, for whatever else the machine does can only slow it
LIBRARIES = 200_000_000  # what a process on a CPU may grow by without a model: a smaller growth says nothing of one


def measure_speed(model, memory_before: int | None = None) -> dict:
    """Greedy generation of `ANSWER` tokens after `PROMPT` random ones, with a key/value cache; the end token does not end it.

    Random ids cost what words cost, and are the same for every tokenizer.

    Args:
        model: a causal language model on its device.
        memory_before: `memory_now(device)` before the model was loaded.

    Returns:
        `{"prompt_tokens", "answer_tokens", "batches": {"1": {"tokens_per_second", "ms_per_answer"}, …}, "peak_memory_bytes"}`. `tokens_per_second`
        counts new tokens of the whole batch; `ms_per_answer` is the time until the whole batch has answered. `peak_memory_bytes` is what the model, its cache
        and generation added: of the allocator on a GPU, of the whole process on a CPU; None where the system does not tell, and for a model on a CPU
        so small that it is lost among what the libraries take.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or PROMPT + ANSWER
    prompt = min(PROMPT, limit // 2)
    answer = min(ANSWER, limit - prompt)
    generator = torch.Generator().manual_seed(0)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    _reset_peak(model.device)
    found = {}
    try:
        for batch in BATCHES:
            ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
            times = [_seconds(model, ids, answer) for _ in range(1 + REPEATS)][1:]
            found[str(batch)] = {"tokens_per_second": batch * answer / min(times), "ms_per_answer": 1000 * min(times),
                                 "ms_of_each_repeat": [1000 * value for value in times]}
    finally:
        for module, mode in modes:
            module.training = mode
    peak = _peak(model.device)
    grown = None if peak is None or memory_before is None else peak - memory_before
    if model.device.type == "cpu" and grown is not None and grown < LIBRARIES:
        grown = None
    return {"prompt_tokens": prompt, "answer_tokens": answer, "batches": found, "peak_memory_bytes": grown}


def memory_now(device: torch.device) -> int | None:
    """Bytes in use: the allocator's on a GPU, the process's resident set on Linux, else None."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


@torch.no_grad()
def _seconds(model, ids: torch.Tensor, answer: int) -> float:
    _wait(model.device)
    start = time.perf_counter()
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=answer, max_new_tokens=answer, do_sample=False, num_beams=1,
                          temperature=None, top_p=None, top_k=None, use_cache=True, pad_token_id=0)
    _wait(model.device)
    assert said.shape[1] == ids.shape[1] + answer
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak (proc(5)); else it is that of the process's life, an upper bound still
        except OSError:
            pass


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
