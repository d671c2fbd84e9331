"""What a benchmark is: a case (an op at a shape), its rivals for the same objective, its goals; and the row that comes of measuring it.

A rival must first agree with the op on the same inputs. One that is not installed, cannot run or disagrees gets a note instead of a time; only if
eager PyTorch, the truth, cannot run or disagrees does the benchmark fail.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import timing
from benchmarks.roofline import Work
from benchmarks.timing import DEVICE, GPU

DTYPE = torch.bfloat16 if GPU else torch.float32  # bf16 products are several times slower on a CPU
SIZE = DTYPE.itemsize
TRUTHS = ("eager", "index_select", "svdvals")  # rivals that are plain eager PyTorch
AGREEMENT = {torch.bfloat16: 2e-2, torch.float32: 2e-4}  # relative L2 error of a result against a rival's
_generator = torch.Generator(DEVICE).manual_seed(0)  # not the default one, which a capture that fails may leave unusable


def normal(*shape: int, grad: bool = False, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=_generator).mul_(scale).requires_grad_(grad)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, device=DEVICE, generator=_generator)


def selection(width: int, kept: int) -> Tensor:
    """A channel selection: `kept` of `width`, ascending."""
    return torch.randperm(width, device=DEVICE, generator=_generator)[:kept].sort().values


def packed_segments(batch: int, length: int, segments: int, padded: int) -> Tensor:
    """Ids [batch, length] of packed rows: equal runs in order, the last `padded` tokens of a row are padding."""
    ids = torch.arange(batch * length, device=DEVICE).view(batch, length) * segments // (batch * length)
    ids[:, length - padded :] = -1
    return ids


class Rival(NamedTuple):
    """`run(*prepare(*inputs))` must give what `like(ours)` gives."""

    run: Callable | None
    prepare: Callable = lambda *inputs: inputs
    like: Callable = lambda ours: ours
    why_not: str = ""  # why it cannot be had, where run is None
    capture: bool = True  # False where it waits for the device
    within: float = 0.0  # relative error that is allowed beyond rounding, where the op is an estimate
    times: float = 1.0  # a loop that takes minutes gets the first of so many matrices, and its time is multiplied


class Goal(NamedTuple):
    name: str
    relation: str  # ">=" or "<="
    bound: float
    value: Callable[[dict], float | None]  # of a row; None = not measured

    def judge(self, row: dict) -> dict:
        value = self.value(row) if GPU else None
        met = None if value is None else value >= self.bound if self.relation == ">=" else value <= self.bound
        return {"name": self.name, "goal": f"{self.relation} {self.bound:g}", "value": value, "met": met}


def percent_of_ceiling(bound: float) -> Goal:
    return Goal("percent of ceiling", ">=", bound, lambda row: row["percent_of_ceiling"])


def faster_than(rival: str, bound: float) -> Goal:
    """Than the fastest rival whose name starts with `rival`."""
    return Goal(f"times faster than {rival}", ">=", bound, lambda row: _best(row, rival))


def _best(row: dict, rival: str) -> float | None:
    return min((ratio for name, ratio in row["ratios"].items() if name.startswith(rival)), default=None)


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    shape: dict[str, int]
    work: Work
    draw: Callable[[], tuple]
    run: Callable  # of the inputs; returns what counts as a result: values, gradients
    rivals: dict[str, Rival] = field(default_factory=dict)
    target: str | None = None
    goals: tuple[Goal, ...] = ()
    seconds: float = 0.3
    repeats: int = 7
    capture: bool = True  # False where the op waits for the device
    interleave: bool = False  # on a CPU: the rivals' calls in turn with ours

    def __str__(self) -> str:
        return self.variant


def compiled(function: Callable) -> Callable | None:
    """Not on a CPU, where it would need a C++ compiler and is nobody's alternative."""
    return torch.compile(function) if GPU else None


def with_compiled(eager: Callable, step: Callable = lambda forward: forward, **options) -> dict[str, Rival]:
    """`eager`, and the same through torch.compile; `step` makes of a forward the function that is timed."""
    quick = compiled(eager)
    return {
        "eager": Rival(step(eager), **options),
        "torch.compile": Rival(quick and step(quick), why_not="on a GPU only", **options),
    }


def liger(build: Callable[[], Callable], **options) -> Rival:
    """A rival of Liger-Kernel, which is optional; `build` imports it."""
    if importlib.util.find_spec("liger_kernel") is None:
        return Rival(None, why_not="liger-kernel is not installed")
    if not GPU:
        return Rival(None, why_not="on a GPU only")

    def run(*inputs, made=[]):  # noqa: B006 - built at the first call, once
        made or made.append(build())
        return made[0](*inputs)

    return Rival(run, **options)


def disagreement(ours: object, theirs: object, within: float = 0.0) -> str | None:
    """What differs between two nests of tensors, or None."""
    left, right = ([leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)] for nest in (ours, theirs))
    if len(left) != len(right):
        return f"{len(left)} tensors against {len(right)}"
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape:
            return f"result {number} has shape {list(a.shape)} against {list(b.shape)}"
        limit = max(AGREEMENT.get(x.dtype, 0.0) for x in (a, b))
        a, b = a.detach().float(), b.detach().float()
        error, size = ((a - b).norm() / b.norm()).item(), b.norm().item()
        if not (size > 0 and error <= max(limit, AGREEMENT[DTYPE], within)):
            return f"result {number} differs by {error:.1e} relative to a norm of {size:.1e}"
    return None


def row_of(case: Case, ceilings: dict, notes: list[str]) -> dict:
    """Measure a case and its rivals. Adds to `notes` what could not be compared."""
    bytes_per_second, flops_per_second = ceilings["copy_gbps"] * 1e9, ceilings["product_tflops"] * 1e12
    copies = timing.rotation(case.draw)
    rivals = dict(_agreeing(case, copies[0], notes))
    together = {}
    if case.interleave and not GPU:
        turns = {name: (rival.run, [rival.prepare(*inputs) for inputs in copies]) for name, rival in rivals.items()}
        together = timing.in_turn({"": (case.run, copies)} | turns, case.repeats)
    ours = together.get("") or timing.measure(case.run, copies, case.seconds, case.repeats, case.capture)
    peak = timing.peak_mib(case.run, copies[0])
    row = {
        "target": case.target, "op": case.op, "variant": case.variant, "shape": case.shape, "dtype": str(DTYPE).removeprefix("torch."),
        "median_ms": ours.median * 1e3, "spread": ours.spread, "how": ours.how, "repeats": ours.repeats,
        "bytes": case.work.bytes, "flops": case.work.flops,
    }  # fmt: skip
    if case.work.memory_bound(bytes_per_second, flops_per_second):
        row["gbps"] = case.work.bytes / ours.median / 1e9
    else:
        row["tflops"] = case.work.flops / ours.median / 1e12
    row["percent_of_ceiling"] = 100 * case.work.seconds(bytes_per_second, flops_per_second) / ours.median
    row |= {"ratios": {}, "rivals": {}, "peak_mib": peak}
    for name, rival in rivals.items():
        try:
            prepared = [rival.prepare(*inputs) for inputs in copies]
            time = together.get(name) or timing.measure(rival.run, prepared, case.seconds, case.repeats, rival.capture)
            median, how = time.median * rival.times, time.how if rival.times == 1 else f"{time.how}, one of {rival.times:g}"
            peak = timing.peak_mib(rival.run, prepared[0]) if rival.times == 1 else None  # of a share it says nothing, and may take seconds
            row["rivals"][name] = {"median_ms": median * 1e3, "spread": time.spread, "how": how, "peak_mib": peak}
            row["ratios"][name] = median / ours.median
        except Exception as error:
            notes.append(f"{name} cannot be timed: {_first_line(error)}")
        finally:
            prepared = None
            timing.forget()
    row["goals"] = [goal.judge(row) for goal in case.goals]
    row["met"] = verdict([goal["met"] for goal in row["goals"]])
    row["notes"] = list(notes)
    return row


def verdict(met: list[bool | None]) -> bool | None:
    """All goals met; None if there are none, or if some could not be judged and none failed."""
    if False in met:
        return False
    return None if None in met or not met else True


def _agreeing(case: Case, inputs: tuple, notes: list[str]) -> Iterator[tuple[str, Rival]]:
    ours = case.run(*inputs)
    for name, rival in case.rivals.items():
        if rival.run is None:
            notes.append(f"{name} skipped: {rival.why_not}")
            continue
        try:
            found = disagreement(rival.like(ours), rival.run(*rival.prepare(*inputs)), rival.within)
        except Exception as error:
            if name in TRUTHS:
                raise
            found = f"cannot run: {_first_line(error)}"
        finally:
            timing.forget()
        if found and name in TRUTHS:
            raise AssertionError(f"{case.op} {case.variant} and {name} disagree: {found}")
        if found:
            notes.append(f"{name}: {found}")
        else:
            yield name, rival


def check(case: Case) -> list[str]:
    """Run a case and its rivals once, without a clock; what could not be compared."""
    notes: list[str] = []
    for _ in _agreeing(case, case.draw(), notes):
        pass
    return notes


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"

