"""How the benchmarks measure: median and spread of repeats, ceilings of the device, peak memory.

On a GPU the calls are captured in a CUDA graph, because several ops take less time than their dispatch does, over enough copies of the inputs
to push one another out of the L2 cache; each call in a graph keeps its own results. A call that cannot be captured (it waits for the
device, say) is timed between events instead, dispatch included, and says so. On a CPU the clock on the wall.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CACHES = 4  # a rotation of inputs is this many times the L2 cache
SAMPLE_SECONDS = 5e-3  # a sample is at least this long, so that its start does not matter
LONG = 1.0  # seconds of a call that needs no warm-up: its first time counts


class Timing(NamedTuple):
    median: float  # seconds
    spread: float  # interquartile range over the median
    how: str  # "graph", "events" or "wall"
    repeats: int


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def forget() -> None:
    """Give memory of what is no longer used, captured graphs too, back to the device."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def storages(values: object) -> dict[int, int]:
    """Address -> bytes of every storage behind a nest of lists, tuples and dicts of tensors."""
    return {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def rotation(draw: Callable[[], tuple], most: int = 16) -> list[tuple]:
    """Inputs drawn anew until they hold `CACHES` times the L2 cache; one set on a CPU."""
    copies = [draw()]
    if GPU:
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        copies += [draw() for _ in range(min(most, math.ceil(CACHES * cache / max(sum(storages(copies[0]).values()), 1))) - 1)]
    return copies


def summary(samples: list[float], how: str) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
    return Timing(median, (high - low) / median, how, len(samples))


def measure(run: Callable, copies: list[tuple], seconds: float = 0.3, repeats: int = 7, capture: bool = True) -> Timing:
    """Time of one call of `run`. Takes `seconds` or `repeats` samples, whichever comes later, and at most 50 samples."""
    if not GPU:
        return _on_the_wall(run, copies, seconds, repeats)
    replay = _captured(run, copies) if capture else None
    how = "graph" if replay else "events"

    def one_by_one() -> None:
        for inputs in copies:
            run(*inputs)

    replay = replay or one_by_one
    took = _between_events(replay, 1)
    times = max(1, min(200, math.ceil(SAMPLE_SECONDS / took)))
    if took < 0.05:
        _between_events(replay, math.ceil(0.05 / took))  # clocks up
    samples, began = [took / len(copies)] if took > LONG else [], time.perf_counter()
    while len(samples) < repeats or (time.perf_counter() - began < seconds and len(samples) < 50):
        samples.append(_between_events(replay, times) / len(copies))
    return summary(samples, how)


def _on_the_wall(run: Callable, copies: list[tuple], seconds: float, repeats: int) -> Timing:
    samples, began = [], time.perf_counter()
    run(*copies[0])
    while len(samples) < repeats or (time.perf_counter() - began < seconds and len(samples) < 50):
        start = time.perf_counter()
        run(*copies[len(samples) % len(copies)])
        samples.append(time.perf_counter() - start)
    return summary(samples, "wall")


def in_turn(runs: dict[str, tuple[Callable, list[tuple]]], repeats: int) -> dict[str, Timing]:
    """Times of calls that take turns, on the wall: what else runs on the machine then meets all of them. Of long calls that wait for no device."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, repeats):  # the first turn is a warm-up
        for name, (run, copies) in runs.items():
            start = time.perf_counter()
            run(*copies[number % len(copies)])
            if number >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: summary(found, "wall, in turn") for name, found in samples.items()}


def _captured(run: Callable, copies: list[tuple]) -> Callable[[], None] | None:
    """Replays one graph that calls `run` on every copy, or None where that cannot be captured.

    Results live to the end of the capture, so that no call writes where another did.
    """
    usual, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(usual)
    with torch.cuda.stream(aside):  # compiles, loads and reserves before the capture
        for _ in range(2):
            run(*copies[0])
    usual.wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = [run(*inputs) for inputs in copies]
    except RuntimeError:
        torch.cuda.set_stream(usual)  # a capture that fails at its end does not
        torch.cuda.synchronize()
        return None
    del results
    return graph.replay


def _between_events(replay: Callable[[], object], times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def peak_mib(run: Callable, inputs: tuple) -> float | None:
    """Memory that a call takes at its peak, beyond its inputs and what it returns. None on a CPU, where nothing counts it."""
    if not GPU:
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(*inputs)
    torch.cuda.synchronize()
    returned = sum(size for place, size in storages(result).items() if place not in storages(inputs))
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def ceilings() -> dict[str, float]:
    """What this device reaches now: a large copy, bytes read and written, and a large matrix product on random numbers, bf16 on a GPU and fp32 on a CPU."""
    elements, side, dtype = (2**29, 8192, torch.bfloat16) if GPU else (2**25, 1024, torch.float32)
    source, target = torch.randn(elements, device=DEVICE, dtype=dtype), torch.empty(elements, device=DEVICE, dtype=dtype)
    copy = measure(lambda: target.copy_(source), [()])
    left, right = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    product = measure(lambda: left @ right, [()])
    return {"copy_gbps": 2 * source.nbytes / copy.median / 1e9, "product_tflops": 2 * side**3 / product.median / 1e12, "product_dtype": str(dtype)}
