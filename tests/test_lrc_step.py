"""The benchmark's peer, `benchmarks/lrc_step.py`: the same losses, gradients and steps as `lrc_faithful=True`, from the same start."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import use_exact_norms
from tiny_training import NARROW, VARIANTS, make_trainer, masters, shake, tokenised

from benchmarks.lrc_step import LRCStep

RATE = 1e-2


def pair(teacher, folder, **settings):
    """A trainer in the faithful mode off its start, and the peer from the same maps."""
    trainer = make_trainer(teacher, folder, tokenised(40), start="random", lrc_faithful=True, learning_rate=RATE, **settings)
    shake(trainer.projections)
    return trainer, LRCStep(teacher, NARROW, maps=masters(trainer), learning_rate=RATE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_the_faithful_mode(tiny_teacher, tmp_path, variant, monkeypatch):
    use_exact_norms(monkeypatch)
    family, options = VARIANTS[variant]
    trainer, peer = pair(tiny_teacher(family, dtype=torch.float64, **options), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    trainer.student.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.projections.pull_back()
    ours, *parts = peer.loss(batch)
    ours.backward()
    assert torch.stack(parts).tolist() == pytest.approx(trainer.guard.parts.tolist(), rel=1e-6) and min(parts) > 1e-3
    assert loss.item() == pytest.approx(ours.item(), rel=1e-9)
    assert len(peer.trainable) == len(trainer.projections.factors)
    for factor in trainer.projections:
        assert factor.master.grad.norm() > 0, factor.name
        torch.testing.assert_close(peer.parameter(factor.name).grad, factor.master.grad, rtol=1e-6, atol=1e-10, msg=factor.name)


def test_steps_are_those_of_the_faithful_mode(tiny_teacher, tmp_path, monkeypatch):
    """Three steps of AdamW with clipping, on the micro-batches that the trainer saw."""
    use_exact_norms(monkeypatch)
    trainer, peer = pair(tiny_teacher(dtype=torch.float64), tmp_path, max_steps=3, max_grad_norm=1.0, adam_epsilon=1e-8)
    before = masters(trainer)
    trainer.train()
    norms = []
    for batch in trainer.seen:
        peer.micro_step(batch)
        norms.append(float(peer.update()))
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry] == pytest.approx(norms, rel=1e-6)
    for name, value in masters(trainer).items():
        torch.testing.assert_close(peer.parameter(name).detach(), value, rtol=0, atol=1e-7, msg=name)
        assert float((value - before[name]).abs().max()) > RATE, name


def test_without_documents_rows_are_one_text(tiny_teacher, tmp_path):
    """The faster variant of the peer: no mask, so a packed row's documents see each other; a row of one document gives the same loss."""
    teacher = tiny_teacher(dtype=torch.float64)
    ids = torch.randint(3, 64, (2, 10))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(10).repeat(2, 1)}
    kept, free = (LRCStep(teacher, NARROW, documents=documents) for documents in (True, False))
    for name, value in kept.trainable.items():
        free.trainable[name].data.copy_(value)
    assert kept.loss(batch)[0].item() == pytest.approx(free.loss(batch)[0].item(), rel=1e-12)
    batch["position_ids"] = torch.arange(5).repeat(2, 2)
    assert abs(kept.loss(batch)[0].item() / free.loss(batch)[0].item() - 1) > 1e-6
