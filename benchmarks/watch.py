"""Watching a training loop from inside: times at the borders of micro-steps and updates, memory, waits of the host for the device, kernels.

Marks are CUDA events on a GPU, read when all is over, so that watching does not wait either; on a CPU the clock on the wall.
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import GPU, summary, synchronise

WARNS = "called a synchronizing"  # torch's warning of one wait; what it says of the debug mode itself speaks of synchronizing too
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default"}  # an op that on a GPU makes the host wait


class Watch:
    """Call `micro()` before each micro-step, `update()` before clipping, `ended()` after each optimiser step, `close()` at the end.

    The first `warmup` steps are not counted, the next `steps` are timed, the next one is searched for waits, and the last one is profiled.
    """

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.done = warmup, steps, 0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._waits: Waits | None = None
        self._profile: torch.profiler.profile | None = None

    @property
    def total(self) -> int:
        """Optimiser steps that the loop has to make."""
        return self.warmup + self.steps + 2

    def micro(self) -> None:
        self._mark("micro")

    def update(self) -> None:
        self._mark("update")

    def ended(self) -> None:
        self._mark("end")
        self.done += 1
        counted = self.done - self.warmup - self.steps
        if counted == 0:
            synchronise()
            self._waits = Waits().start()
        elif counted == 1:
            self._waits.stop()
            activity = torch.profiler.ProfilerActivity
            self._profile = torch.profiler.profile(activities=[activity.CUDA if GPU else activity.CPU])
            with suppress(RuntimeError):  # where the driver allows no profiler the times are there all the same
                self._profile.start()
        elif counted == 2:
            synchronise()
            with suppress(RuntimeError):
                self._profile.stop()

    def _mark(self, name: str) -> None:
        if GPU:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def _spans(self) -> dict[str, list[list[float]]]:
        """Seconds of each part, a list a step: `micro` to the next mark, `update` to the end, `between` from an end to the next micro-step."""
        synchronise()
        spans: dict[str, list[list[float]]] = {name: [[] for _ in range(self.done)] for name in ("micro", "update", "between", "step")}
        step, began = 0, None
        for (name, at), (following, then) in itertools.pairwise(self._marks):
            seconds = at.elapsed_time(then) / 1e3 if GPU else then - at
            if name == "end":
                step += 1
            if step < self.done:
                spans["between" if name == "end" else name][step].append(seconds)
            if following == "end" and began is not None:
                spans["step"][step].append(began.elapsed_time(then) / 1e3 if GPU else then - began)
            if following == "end":
                began = then
        return spans

    def times(self, micro_steps: int) -> dict:
        """Median seconds of the parts, of a whole step of `micro_steps` composed of them, and of the steps as they were."""
        spans = self._spans()
        counted = slice(self.warmup, self.warmup + self.steps)
        micro = summary([one for step in spans["micro"][counted] for one in step], "")
        update, between = (statistics.median(one for step in spans[name][counted] for one in step) for name in ("update", "between"))
        whole = [one for step in spans["step"][counted] for one in step]
        return {"micro_s": micro.median, "micro_spread": micro.spread, "update_s": update, "between_s": between,
                "step_s": micro_steps * micro.median + update + between, "measured_steps_s": whole, "measured_micro_steps": len(spans["micro"][self.warmup])}

    def waits(self) -> dict[str, int]:
        """Where the host waited for the device in one step: file and line, and how often."""
        return dict(self._waits.found.most_common())

    def kernels(self, most: int = 10) -> dict:
        """Of the profiled step: the share of its time in which the device was busy (GPU only), and where most time went; or why that is not known."""
        try:
            return self._kernels(most)
        except Exception as error:
            return {"busy": None, "top": [], "fault": f"{type(error).__name__}: {error}"}

    def _kernels(self, most: int) -> dict:
        spans = self._spans()  # from the step's first micro-step: before that the profiler starts, which can take seconds
        seconds = sum(sum(spans[name][self.warmup + self.steps + 1]) for name in ("micro", "update"))
        if GPU:
            events = [event for event in self._profile.events() if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
            spans = [(event.time_range.start, event.time_range.end) for event in events]
            times = defaultdict(lambda: [0.0, 0])
            for event, (start, end) in zip(events, spans, strict=True):
                times[event.name][0] += (end - start) / 1e6
                times[event.name][1] += 1
        else:
            spans, times = [], {event.key: [event.self_cpu_time_total / 1e6, event.count] for event in self._profile.key_averages()}
        top = sorted(times.items(), key=lambda item: -item[1][0])[:most]
        return {"profiled_step_s": seconds, "busy": covered(spans) / 1e6 / seconds if GPU else None,
                "top": [{"name": name[:120], "seconds": spent, "calls": calls} for name, (spent, calls) in top]}


class Waits:
    """Counts, by place, what makes the host wait: PyTorch's own warning on a GPU; on a CPU, where nothing waits, the ops that would."""

    def __init__(self):
        self.found: Counter[str] = Counter()

    def start(self) -> Waits:
        if GPU:
            self._caught = warnings.catch_warnings(record=True)
            self._list = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self._mode = _Ops(self.found)
            self._mode.__enter__()
        return self

    def stop(self) -> None:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.found.update(f"{os.path.basename(one.filename)}:{one.lineno}" for one in self._list if WARNS in str(one.message))
        else:
            self._mode.__exit__(None, None, None)


class _Ops(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in WAITS:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line outside torch that is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in name and name != __file__ and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def memory() -> dict[str, float]:
    """Peaks in GiB. On a GPU: of tensors, of what the allocator held, and of all with the context, as nvidia-smi counts; on a CPU the process's."""
    if not GPU:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"process_gib": peak * (1 if sys.platform == "darwin" else 1024) / 2**30}
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device_gib": (torch.cuda.max_memory_reserved() + outside) / 2**30}  # fmt: skip
