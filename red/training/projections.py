"""The trainable projections, on the optimiser's side of a plain student.

Every student weight is a frozen teacher weight times a projection (LRC, arXiv 2505.12781; row-vector convention, `weight` is `[out, in]`):

    reader  (q k v gate up head)   W_S = W_T A      A [d, d']      dA = W_T^T dW_S
    writer  (o down)               W_S = B W_T      B [d', d]      dB = dW_S W_T^T   (a bias is one more column of W_T)
    embedding                      W_S = W_T A      A [d, d']      dA = W_T^T dW_S
    norm gain                      g_S = g          g [d']         dg = dg_S

The student trains as any Hugging Face model does. Before the inner optimiser steps, `pull_back` turns the gradients of its weights into those
of the projections; after it, `push_forward` writes the weights anew. So the product is paid once per optimiser step, whatever the number of
micro-batches, and clipping and Adam's moments see the projections, exactly as if one had backpropagated through the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from red import families
from red.errors import REDError
from red.training.precision import product
from red.starts import StartMaps
from red_kernels import gather_many


@dataclass
class Factor:
    """One trainable master tensor and the student parameter it produces."""

    name: str  # the student parameter's name, the key in every file
    side: str  # "input" (W_T A), "output" (B W_T) or "gain" (itself)
    master: nn.Parameter  # A [d, d'], B [d', d] or g [d']; fp32, or fp64 for a fp64 student
    weight: nn.Parameter  # the student's
    teacher: Tensor | None = None  # W_T [out, in], frozen
    bias: nn.Parameter | None = None  # a writer's bias [d'] ...
    teacher_bias: Tensor | None = None  # ... and its teacher's [d]

    def whole(self, name: str) -> Tensor | None:
        """`master`, `teacher` or `teacher_bias`, all of it; what is sharded is gathered (`red.training.sharding`)."""
        return getattr(self, name)

    def saved(self, keep: bool = True) -> Tensor | None:
        """The whole master, detached; what is sharded is gathered to the CPU where `keep`."""
        return self.master.detach()

    def load(self, value: Tensor) -> None:
        """Overwrite the master with a whole tensor of its shape."""
        self.master.copy_(value)

    def push(self) -> None:
        """Write the student's weight (and a writer's bias) from the master."""
        master = self.master.detach()
        if self.side == "gain":
            self.weight.copy_(master)
        elif self.side == "input":
            self.weight.copy_(product(self.teacher, master))
        else:
            self.weight.copy_(product(master, self.teacher))
            if self.bias is not None:
                self.bias.copy_(master @ self.teacher_bias.to(master.dtype))

    def selects(self, channels: Tensor) -> bool:
        """Whether the master is the selection matrix of `channels [d']`."""
        if self.side == "gain":
            return False
        select = self.master.detach() if self.side == "input" else self.master.detach().T  # [d, d']
        channels = channels.to(select.device)
        ones = select[channels, torch.arange(len(channels), device=select.device)]
        return bool((ones == 1).all()) and int(select.count_nonzero()) == len(channels)

    def pull(self) -> Tensor | None:
        """The master's gradient from the student's; None where the student's parameter got none."""
        if self.weight.grad is None:
            return None
        dtype = self.master.dtype
        grad = self.weight.grad.to(dtype)
        if self.side == "gain":
            return grad.clone()
        if self.side == "input":
            return product(self.teacher.T, grad).to(dtype)
        pulled = product(grad, self.teacher.T).to(dtype)
        if self.bias is not None and self.bias.grad is not None:
            pulled += torch.outer(self.bias.grad.to(dtype), self.teacher_bias.to(dtype))
        return pulled


class Projections:
    """All factors of one student. Iterating yields them in the student's parameter order.

    Args:
        teacher: frozen source of every `W_T`; its weights are referenced, not copied.
        student: from `build_student`; its weights are overwritten at once.
        start: the initial maps, from a start of `red.starts`.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, start: StartMaps):
        self.student = student
        self.channels = start.channels  # [d'] int64 for selection starts, else None
        self.pulled = False
        self.use(_factors(teacher, student, start))
        for factor in self.factors:  # a narrower student's gradients are summed over the micro-batches in the masters' dtype all the same
            for parameter in (factor.weight, factor.bias):
                if parameter is not None and parameter.dtype != factor.master.dtype:
                    parameter.grad_dtype = factor.master.dtype
        self._write_first_weights()

    def use(self, factors: list[Factor]) -> None:
        """Take these factors, of the same student, in place of the present ones."""
        self.factors = factors
        self._by_name = {factor.name: factor for factor in factors}

    @torch.no_grad()
    def _write_first_weights(self) -> None:
        """A map that selects channels is a gather, one launch for all of a layer; every other is a product."""
        chosen: dict[str, list[Factor]] = {}
        for factor in self.factors:
            if self.channels is not None and factor.selects(self.channels):
                chosen.setdefault(".".join(factor.name.split(".")[:3]), []).append(factor)
            else:
                factor.push()
        for factors in chosen.values():
            channels = self.channels.to(factors[0].teacher.device)
            dims = [1 if factor.side == "input" else 0 for factor in factors]
            for factor, weight in zip(factors, gather_many([factor.teacher for factor in factors], [channels] * len(factors), dims), strict=True):
                factor.weight.copy_(weight)
                if factor.bias is not None:
                    factor.bias.copy_(factor.teacher_bias[channels])

    def __iter__(self) -> Iterator[Factor]:
        return iter(self.factors)

    def __getitem__(self, name: str) -> Factor:
        """The factor that produces the student parameter `name`."""
        return self._by_name[name]

    def parameters(self) -> list[nn.Parameter]:
        """The master tensors: what the optimiser trains and the clipping sees."""
        return [factor.master for factor in self.factors]

    @torch.no_grad()
    def pull_back(self) -> None:
        """Turn the student's accumulated gradients into the masters'; once per step, further calls do nothing until `push_forward`.

        A master's own gradient (the undetached target of LRC's FFN tap) is added to, not replaced.
        """
        if self.pulled:
            return
        for factor in self.factors:
            grad = factor.pull()
            if grad is not None:
                factor.master.grad = grad if factor.master.grad is None else factor.master.grad.add_(grad)
        self.pulled = True

    @torch.no_grad()
    def push_forward(self) -> None:
        """Write every student weight anew and forget the gradients on both sides."""
        for factor in self.factors:
            factor.push()
            factor.master.grad = factor.weight.grad = None
            if factor.bias is not None:
                factor.bias.grad = None
        self.pulled = False

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor | None]:
        """Masters by the student parameter's name, plus `channels` for selection starts; contiguous, detached, not copied.

        Sharded ones are gathered one by one, to the CPU, so every rank calls it; `keep=False`, where another rank wants them, gives None.
        """
        state = {factor.name: factor.saved(keep) for factor in self.factors}
        return state if self.channels is None else {**state, "channels": self.channels}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the masters and rebuild the student's weights from them; REDError where names or shapes differ."""
        state = dict(state)
        channels = state.pop("channels", None)
        missing, unknown = self._by_name.keys() - state.keys(), state.keys() - self._by_name.keys()
        if missing or unknown:
            raise REDError(f"These projections are of another student: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}. "
                           "Build the student from the same teacher, then load.")
        for factor in self.factors:
            if state[factor.name].shape != factor.master.shape:
                raise REDError(f"Projection {factor.name} has shape {list(state[factor.name].shape)}, this student needs "
                               f"{list(factor.master.shape)}. Use the hidden_size that the projections were trained with.")
        for factor in self.factors:
            factor.load(state[factor.name])
        self.channels = channels
        self.push_forward()


def _factors(teacher: PreTrainedModel, student: PreTrainedModel, start: StartMaps) -> list[Factor]:
    source, target = dict(teacher.named_parameters()), dict(student.named_parameters())
    dtype = torch.promote_types(torch.float32, student.dtype)
    writers = {f"{tap.path}.weight" for tap in families.taps(teacher.config) if tap.writes}
    factors = []
    for name, weight in target.items():
        if name not in start.maps:
            continue  # frozen, the teacher's own
        # a master gets storage of its own: a start may hand one tensor to many modules
        master = nn.Parameter(start.maps[name].to(device=weight.device, dtype=dtype).clone(memory_format=torch.contiguous_format))
        if weight.dim() == 1:
            factors.append(Factor(name, "gain", master, weight))
        elif name in writers:
            bias = name.removesuffix("weight") + "bias"
            factors.append(Factor(name, "output", master, weight, source[name].detach(), target.get(bias),
                                  source[bias].detach() if bias in source else None))
        else:
            factors.append(Factor(name, "input", master, weight, source[name].detach()))
    unmapped = {name for name, weight in target.items() if weight.requires_grad and name not in start.maps} - {
        factor.name.removesuffix("weight") + "bias" for factor in factors if factor.bias is not None}
    if unmapped:
        raise REDError(f"The start gave no map for {sorted(unmapped)[:3]}; a start maps every weight and norm gain of the student.")
    return factors
