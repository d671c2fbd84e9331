"""No host synchronisation in a training step, proved without a GPU: the step runs on torch's meta device, whose tensors have no values.

Whatever would read a value (`item`, a branch on a tensor, `nonzero`, a copy to the CPU) raises there. Copies from the host to the device, which wait for
pageable memory, are counted beside.
"""

from __future__ import annotations

import pytest
import torch
from tiny_training import REDTrainer, make_trainer, settings_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from red.training import attention
from red.config import REDConfig

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Operators that take a tensor of one device and return one of another."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = function.name() in ("aten::_to_copy", "aten::copy_")  # elsewhere a number of the host is an argument of the kernel
        given = {value.device.type for value in args if isinstance(value, Tensor) and (value.dim() or copies)}
        if isinstance(result, Tensor) and given and given != {result.device.type}:
            self.found.append(function.name())
        return result


class Literals(TorchFunctionMode):
    """Tensors made of Python numbers, which are copied too, below what the other mode sees."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device == META:
            self.found.append(function.__name__)
        return result


def on_meta(trainer: REDTrainer) -> None:
    """Everything the step touches, without values."""
    trainer.teacher.to(META)
    trainer.student.to(META)
    teacher, student = dict(trainer.teacher.named_parameters()), dict(trainer.student.named_parameters())
    for factor in trainer.projections:
        factor.master, factor.weight = nn.Parameter(factor.master.to(META)), student[factor.name]
        if factor.side != "gain":
            factor.teacher = teacher[factor.name].detach()
        if factor.bias is not None:
            bias = factor.name.removesuffix("weight") + "bias"
            factor.bias, factor.teacher_bias = student[bias], teacher[bias].detach()
    trainer.args.__dict__["_setup_devices"] = META


def kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, **options):
    return q + k.mean() + v.mean()


@pytest.mark.parametrize("settings", [dict(), dict(start="random", checkpointing="cheap"), dict(start="random", lrc_faithful=True, checkpointing="full"),
                                      dict(student_dtype="bfloat16", max_grad_norm=0.0)], ids=["default", "cheap", "faithful-full", "bf16"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_reads_no_value(tiny_teacher, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(attention, "kernel", kernel)
    monkeypatch.setattr(attention, "obstacle", lambda config, model: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast
    trainer = make_trainer(tiny_teacher("llama", attention_bias=True, mlp_bias=True), tmp_path, trainer_class=REDTrainer, optim="adamw_torch", **settings)
    if trainer.args.gradient_checkpointing:
        trainer.student.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    on_meta(trainer)
    trainer.create_optimizer()
    batches = [{key: value.to(META) for key, value in trainer.data_collator([trainer.train_dataset[first + row] for row in range(2)]).items()} for first in (0, 2, 4, 6)]
    one_step(trainer, batches[:2])  # what is brought to the device once is there then
    with Crossings() as crossings, Literals() as literals:
        one_step(trainer, batches[2:])
    assert crossings.found == literals.found == []
    for reading in (lambda: torch.empty((), device=META).item(), lambda: bool(torch.ones(2, device=META).all()), lambda: torch.ones(2, device=META).cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()


def one_step(trainer: REDTrainer, batches: list[dict]) -> None:
    """What Trainer does with the micro-batches of one optimiser step."""
    num_items = trainer._get_num_items_in_batch(batches, META)
    total = torch.zeros((), device=META)
    for batch in batches:
        total += trainer.training_step(trainer.student, batch, num_items)
    grad_norm = trainer._clip_grad_norm(trainer.student) if trainer.args.max_grad_norm else None
    assert trainer._get_grad_norm(trainer.student, grad_norm=grad_norm).device == META
    assert all(master.grad is not None for master in trainer.projections.parameters())
    trainer.optimizer.step()
    trainer.student.zero_grad()


def test_trainer_does_not_look_at_every_loss(tiny_teacher, tmp_path):
    """transformers' filter of NaN losses waits for the GPU in every micro-step; it is off unless asked for."""
    assert make_trainer(tiny_teacher(), tmp_path).args.logging_nan_inf_filter is False


def test_batches_go_to_a_gpu_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(REDConfig, "device", property(lambda self: torch.device("cuda")))
    settings = {**settings_of(tmp_path), "use_cpu": False}
    assert REDConfig(**settings).accelerator_config.non_blocking is True
    assert REDConfig(**settings, dataloader_pin_memory=False).accelerator_config.non_blocking is False
    assert REDConfig(**settings, accelerator_config={"non_blocking": False}).accelerator_config.non_blocking is False
