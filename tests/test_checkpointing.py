"""Activation checkpointing: the same losses and gradients, which operators run again, and the bytes that are alive between forward and backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reference_lrc import random_batch
from tiny_training import make_trainer, settings_of, shake
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from red.config import REDConfig
from red.errors import REDError

STARTS = {"gather": dict(start="activation"), "projected": dict(start="random"), "faithful": dict(start="random", lrc_faithful=True)}


class Watch(TorchDispatchMode):
    """Counts operators, and the bytes of their outputs that are still alive."""

    def __init__(self, *models):
        super().__init__()
        self.calls, self.storages = Counter(), {}
        self.weights = {weight.untyped_storage()._cdata for model in models for weight in model.parameters()}  # views of them are not new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls[function.name()] += 1
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.weights:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return found

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def step(teacher, folder, batch, **settings):
    """Loss, gradients, operator counts of the forward and of the backward, and the bytes alive between them."""
    trainer = make_trainer(teacher, folder, **settings)
    shake(trainer.projections, 0.05)
    trainer.student.train()
    if trainer.args.gradient_checkpointing:  # as Trainer does before it trains
        trainer.student.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    with Watch(teacher, trainer.student) as forward:
        loss = trainer.compute_loss(trainer.student, batch)
    alive = forward.alive()
    with Watch() as backward:
        loss.backward()
    assert not trainer.taps._losses, "a layer that runs again must not count its taps again"
    grads = {name: weight.grad for name, weight in trainer.student.named_parameters() if weight.grad is not None}
    grads |= {f"master of {factor.name}": factor.master.grad for factor in trainer.projections if factor.master.grad is not None}
    parts = trainer.guard.parts
    trainer.taps.release()
    return loss.detach(), parts, grads, forward.calls, backward.calls, alive


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", sorted(STARTS))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_kind_has_the_same_gradients(tiny_teacher, tmp_path, family, case):
    teacher, batch = tiny_teacher(family), random_batch(3, 14)
    found = {kind: step(teacher, tmp_path / kind, batch, checkpointing=kind, **STARTS[case]) for kind in ("none", "cheap", "full")}
    loss, parts, grads, _, backward, _ = found["none"]
    assert any(name.startswith("master") for name in grads) == (case == "faithful")
    for kind in ("cheap", "full"):
        assert torch.equal(found[kind][0], loss) and torch.equal(found[kind][1], parts), kind
        assert found[kind][2].keys() == grads.keys()
        for name, grad in found[kind][2].items():
            torch.testing.assert_close(grad, grads[name], rtol=0, atol=1e-6 * float(grads[name].abs().max()), msg=f"{kind} {name}")
    again = {kind: found[kind][4] for kind in found}
    heavy = ("aten::mm", "aten::addmm", "red::tap_mse", "aten::_scaled_dot_product_flash_attention_for_cpu")
    for name in heavy:  # cheap runs none of these again, full runs all of them
        assert again["cheap"][name] == again["none"][name] <= again["full"][name], name
    assert again["cheap"]["aten::silu"] == again["full"]["aten::silu"] == 2 > again["none"]["aten::silu"] == 0
    assert again["full"]["red::tap_mse"] == 14 and again["full"]["aten::mm"] >= again["none"]["aten::mm"] + 14


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bytes_between_forward_and_backward(tiny_teacher, tmp_path, capsys):
    """Per token and layer, of a wider model: what two more layers add, so that loss and embedding do not count."""
    batch, rows = random_batch(4, 16), 64
    alive = {}
    for kind in ("none", "cheap", "full"):
        for layers in (2, 4):
            teacher = tiny_teacher(hidden_size=64, intermediate_size=256, num_hidden_layers=layers)
            alive[kind, layers] = step(teacher, tmp_path / f"{kind}{layers}", batch, hidden_size=32, checkpointing=kind)[-1]
    per_layer = {kind: (alive[kind, 4] - alive[kind, 2]) / 2 / rows for kind in ("none", "cheap", "full")}
    with capsys.disabled():
        print("\nbytes per token and layer:", {kind: round(value) for kind, value in per_layer.items()})
    assert per_layer["cheap"] < 0.7 * per_layer["none"]


def test_refused(tmp_path):
    with pytest.raises(REDError, match="checkpointing='some': use none, cheap or full"):
        REDConfig(**settings_of(tmp_path, checkpointing="some"))
    with pytest.raises(REDError, match="recomputes whole layers"):
        REDConfig(**settings_of(tmp_path, checkpointing="cheap", gradient_checkpointing=True))
    assert REDConfig(**settings_of(tmp_path, gradient_checkpointing=True)).checkpointing == "full"
    assert REDConfig(**settings_of(tmp_path, checkpointing="full")).gradient_checkpointing_kwargs["use_reentrant"] is False
