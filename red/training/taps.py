"""The seven taps of a layer: hooks that compare a linear module's output in the student with the same module's in the teacher.

Teacher first, without gradient: its outputs are kept until the student's hook has used them. q, k, v, gate and up have one width in both models. The
outputs of `o` and `down` do not; what they are compared with is `target`:

    "gather"     the teacher's output at the student's channels (selection starts only; no product)
    "projected"  the teacher's output times the module's current B, detached
    "lrc"        as published (arXiv 2505.12781): attention at the teacher's width, `attn_S W_oᵀ` against the teacher's; FFN against `B · teacher`
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from red import families
from red.training import activation_checkpointing as checkpointing
from red.config import TAP_TARGETS
from red.errors import REDError
from red.training.projections import Projections
from red_kernels import tap_mse

if TYPE_CHECKING:
    from red.training.compiled import CompiledLayers


class Taps:
    """Hooks on all `7 L` tapped modules of a teacher and its student, on them only while they are used.

    Args:
        target: one of TAP_TARGETS; "auto" is "gather" for selection starts and "projected" else.
        detach_target: False lets the FFN tap train `B` through its target too, as the public LRC code does.
        mean_square: [L, 7] of the teacher's outputs at full width, from a calibration. Each tap's error is divided by it: without this the taps with
            the largest outputs, often one FFN, are all that trains. For a projected target it is the teacher's scale all the same,
            not the target's, which moves with `B`. None: plain errors.

    Use, per forward:
        with taps.recording(): teacher(...)
        with taps.comparing(mask, num_tokens): student(...)
        loss = taps.loss()
        loss.backward(); taps.release()
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, projections: Projections, *, target: str = "auto",
                 detach_target: bool = True, mean_square: Tensor | None = None):
        if target not in TAP_TARGETS:
            raise REDError(f"tap_target={target!r} is unknown; use one of {', '.join(map(repr, TAP_TARGETS))}.")
        if target == "auto":
            target = "projected" if projections.channels is None else "gather"
        if target == "gather" and projections.channels is None:
            raise REDError("tap_target='gather' needs a start that selects channels, as 'activation' does. Use tap_target='projected'.")
        self.teacher, self.student, self.projections, self.target, self.detach_target = teacher, student, projections, target, detach_target
        self.mean_square = mean_square
        self.compiled: CompiledLayers | None = None  # whose layers then report their taps themselves
        self._targets, self._losses, self._handles = {}, {}, []
        self._mode: str | None = None
        self._copied: tuple[Tensor | None, Tensor | None] = None, None

    @contextmanager
    def recording(self):
        """The hooks live only here: lasting ones would keep every student alive that was ever trained with this teacher."""
        self._targets.clear()
        handles = self._watch(self.teacher, self._record)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def comparing(self, mask: Tensor | None, num_tokens: Tensor | float | None):
        """mask [B, T] bool of the tokens that count; `num_tokens` the global count that divides (None: the local one)."""
        self.release(targets=False)
        self._losses.clear()
        self._mask, self._num_tokens = mask, num_tokens
        again = torch.is_grad_enabled() and checkpointing.recomputes(self.student)
        self._mode = "compare and keep" if again else "compare"
        self._shape_only = again and checkpointing.keeps_taps(self.student)  # ... from results that are there: only the targets' shapes are looked at again
        self._handles = self._watch(self.student, self._compare)
        try:
            yield
        finally:
            self._mode = None
        if again:
            self._mode = "recompute"  # the backward pass runs each layer again, and must save what the hooks saved the first time
        else:
            self.release()

    def release(self, targets: bool = True) -> None:
        """Take the hooks off the student, and forget the targets that activation checkpointing kept for its backward pass."""
        self._mode = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if targets:
            self._targets.clear()

    def loss(self) -> Tensor:
        """The sum over layers and taps of the last comparison, fp32."""
        total = torch.stack([loss.float() if loss.dtype != torch.float64 else loss for loss in self._losses.values()]).sum()
        self._losses.clear()
        return total

    def _watch(self, model: PreTrainedModel, handler: Callable[[families.Tap, Tensor, Tensor], None]) -> list:
        """Call `handler(tap, input, output)` for every tapped module; handles that end it."""
        if self.compiled:
            return [self.compiled.watch(model, handler)]

        def hook(tap: families.Tap):
            return lambda _module, args, output: handler(tap, args[0], output)

        return [model.get_submodule(tap.path).register_forward_hook(hook(tap)) for tap in families.taps(model.config)]

    def _record(self, tap: families.Tap, _input: Tensor, output: Tensor) -> None:
        target = output.detach()
        if self._is_projected(tap) and not self._trains_target(tap):  # at once: it is narrower
            target = self._projected(tap, target)
        self._targets[tap] = target

    def _compare(self, tap: families.Tap, module_input: Tensor, output: Tensor) -> None:
        if self._mode is None:
            return
        target = self._targets[tap] if self._mode == "compare and keep" else self._targets.pop(tap)
        loss = self._tap_loss(tap, module_input, output, target)
        if self._mode == "compare and keep" and self._shape_only and not self._trains_target(tap):
            self._targets[tap] = target.new_empty(()).expand(target.shape)  # beside its difference it would double the taps until the loss is done
        if self._mode != "recompute":
            self._losses[tap] = loss / self._square(tap)

    def _square(self, tap: families.Tap) -> float:
        """What a tap's error is divided by."""
        return 1.0 if self.mean_square is None else float(self.mean_square[tap.layer, families.TAPS.index(tap.name)])

    def _is_projected(self, tap: families.Tap) -> bool:
        return tap.writes and self.target != "gather" and not (self.target == "lrc" and tap.name == "o")

    def _trains_target(self, tap: families.Tap) -> bool:
        return self._is_projected(tap) and not self.detach_target

    def _projected(self, tap: families.Tap, target: Tensor) -> Tensor:
        master = self.projections[f"{tap.path}.weight"].whole("master")
        return linear(target.to(master.dtype), master.detach() if self.detach_target else master)

    def _tap_loss(self, tap: families.Tap, module_input: Tensor, output: Tensor, target: Tensor) -> Tensor:
        index = None
        if tap.writes and self.target == "gather":
            index = self._channels(output.device)
        elif tap.writes and self.target == "lrc" and tap.name == "o":
            factor = self.projections[f"{tap.path}.weight"]
            output = linear(module_input, factor.whole("teacher").to(output.dtype))
            if factor.teacher_bias is not None:
                output = output + factor.whole("teacher_bias").to(output.dtype)
        elif self._trains_target(tap):
            target = self._projected(tap, target)
        return tap_mse(output, target, self._mask, index=index, num_tokens=self._num_tokens)

    def _channels(self, device: torch.device) -> Tensor:
        """The student's channels, brought to the device once: a copy from the host would wait in every tap."""
        channels, (source, copy) = self.projections.channels, self._copied
        if copy is None or source is not channels or copy.device != device:
            copy = channels.to(device)
            self._copied = channels, copy
        return copy
