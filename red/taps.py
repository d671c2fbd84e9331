"""The seven taps of a layer: hooks that compare a linear module's output in the student with the same module's in the teacher.

Teacher first, without gradient: its outputs are kept until the student's hook has used them. q, k, v, gate and up have one width in both models. The
outputs of `o` and `down` do not; what they are compared with is `target`:

    "gather"     the teacher's output at the student's channels (selection starts only; no product)
    "projected"  the teacher's output times the module's current B, detached
    "lrc"        as published (arXiv 2505.12781): attention at the teacher's width, `attn_S W_oᵀ` against the teacher's; FFN against `B · teacher`
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from red import families
from red.config import TAP_TARGETS
from red.errors import REDError
from red.projections import Projections
from red_kernels import tap_mse


class Taps:
    """Hooks on all `7 L` tapped modules of a teacher and its student.

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
        self._mode, self._targets, self._losses = None, {}, {}
        self._handles = [student.get_submodule(tap.path).register_forward_hook(self._compare(tap)) for tap in families.taps(student.config)]

    def remove(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self):
        """The teacher's hooks live only here: lasting ones would keep every student alive that was ever trained with this teacher."""
        self._targets.clear()
        handles = [self.teacher.get_submodule(tap.path).register_forward_hook(self._record(tap)) for tap in families.taps(self.teacher.config)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def comparing(self, mask: Tensor | None, num_tokens: Tensor | float | None):
        """mask [B, T] bool of the tokens that count; `num_tokens` the global count that divides (None: the local one)."""
        self._losses.clear()
        self._mask, self._num_tokens = mask, num_tokens
        self._mode = "compare"
        try:
            yield
        finally:
            self._mode = None
        if torch.is_grad_enabled() and any(getattr(layer, "gradient_checkpointing", False) for layer in families.decoder_layers(self.student)):
            self._mode = "recompute"  # the backward pass runs each layer again, and must save what the hooks saved the first time
        else:
            self.release()

    def release(self) -> None:
        """Forget the targets that activation checkpointing kept for its backward pass."""
        self._mode = None
        self._targets.clear()

    def loss(self) -> Tensor:
        """The sum over layers and taps of the last comparison, fp32."""
        total = torch.stack([loss.float() if loss.dtype != torch.float64 else loss for loss in self._losses.values()]).sum()
        self._losses.clear()
        return total

    def _record(self, tap: families.Tap):
        def hook(_module, _args, output: Tensor) -> None:
            self._targets[tap] = output.detach()
        return hook

    def _compare(self, tap: families.Tap):
        name = f"{tap.path}.weight"

        def hook(_module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._mode == "compare":
                loss = self._tap_loss(tap, name, args[0], output, self._targets[tap])
                self._losses[tap] = loss / self._square(tap)
            elif self._mode == "recompute":
                self._tap_loss(tap, name, args[0], output, self._targets.pop(tap))
        return hook

    def _square(self, tap: families.Tap) -> float:
        """What a tap's error is divided by."""
        return 1.0 if self.mean_square is None else float(self.mean_square[tap.layer, families.TAPS.index(tap.name)])

    def _tap_loss(self, tap: families.Tap, name: str, module_input: Tensor, output: Tensor, target: Tensor) -> Tensor:
        index = None
        if tap.writes:
            factor = self.projections[name]
            if self.target == "gather":
                index = self.projections.channels.to(output.device)
            elif self.target == "lrc" and tap.name == "o":
                output = linear(module_input, factor.whole("teacher").to(output.dtype))
                if factor.teacher_bias is not None:
                    output = output + factor.whole("teacher_bias").to(output.dtype)
            else:
                master = factor.whole("master")
                master = master.detach() if self.detach_target else master
                target = linear(target.to(master.dtype), master)
        return tap_mse(output, target, self._mask, index=index, num_tokens=self._num_tokens)
