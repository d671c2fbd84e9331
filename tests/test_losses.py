"""Which tokens count in which term, and what divides: red.training.losses on hand-made batches, and the weighted sum in the trainer."""

from __future__ import annotations

import pytest
import torch
from reference_lrc import random_batch
from tiny_training import make_trainer, shake

from red.training import losses
from red.data.packing import flatten, for_attention


def test_next_labels():
    labels = torch.tensor([[-100, 5, 6, -100], [7, 8, 9, 10]])
    assert losses.next_labels(labels).tolist() == [[5, 6, -100, -100], [8, 9, 10, -100]]
    assert losses.next_labels(labels[:, :1]).tolist() == [[-100], [-100]]


def test_counts_by_hand():
    """The first token of a row is nobody's label; padding is a position and no token; micro-batches add up."""
    first = {"labels": torch.tensor([[4, 5, -100, 6], [-100, -100, 7, -100]]), "token_mask": torch.tensor([[True] * 4, [True] * 3 + [False]])}
    second = {"labels": torch.tensor([[4, 5]]), "token_mask": torch.tensor([[True, False]])}
    counts = losses.count([first, second], torch.device("cpu"))
    assert (counts.labels, counts.tokens, counts.positions, counts.rows) == (2 + 1 + 1, 4 + 3 + 1, 8 + 2, 2 + 1)
    assert counts.stacked().tolist() == [4.0, 8.0, 10.0, 3.0]
    assert all(value.dim() == 0 for value in vars(counts).values())


def test_counts_of_nothing():
    assert losses.count([], torch.device("cpu")).stacked().tolist() == [0.0] * 4


def loss_of(trainer, batch) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.fixture()
def trainer(tiny_teacher, tmp_path):
    made = make_trainer(tiny_teacher(dtype=torch.float64), tmp_path, start="activation")
    shake(made.projections)
    made.student.train()
    return made


def weigh(trainer, ce: float, kl: float, tap: float):
    trainer.args.ce_weight, trainer.args.kl_weight, trainer.args.tap_weight = ce, kl, tap
    return trainer


def test_weights_weigh(trainer):
    batch = random_batch()
    ce, kl, tap = (loss_of(weigh(trainer, *weights), batch) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert min(ce, kl, tap) > 0.01
    assert loss_of(weigh(trainer, 0.5, 3.0, 0.25), batch) == pytest.approx(0.5 * ce + 3.0 * kl + 0.25 * tap, rel=1e-12)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["ce", "kl", "tap"])
def test_padding_never_counts(trainer, weights):
    """Neither what stands at padding nor how much of it there is changes a term."""
    weigh(trainer, *weights)
    batch = random_batch(3, 12)
    reference = loss_of(trainer, batch)
    other = {**batch, "input_ids": torch.where(batch["token_mask"], batch["input_ids"], 63)}
    longer = {key: torch.cat([value, torch.full((3, 5), {"labels": -100}.get(key, 0)).to(value.dtype)], 1) for key, value in batch.items()}
    for changed in (other, longer):
        assert loss_of(trainer, changed) == pytest.approx(reference, rel=1e-6)  # transformers' float32 norms


@pytest.mark.parametrize(("weights", "moves"), [((1, 0, 0), False), ((0, 1, 0), False), ((0, 0, 1), True)], ids=["ce", "kl", "tap"])
def test_a_token_without_label_counts_in_the_taps_only(trainer, weights, moves):
    """A change of the last real token, which has no label and which nobody attends to, is seen by the taps alone."""
    weigh(trainer, *weights)
    batch = random_batch(1, 8)
    batch["labels"][0, -1] = -100
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] = (changed["input_ids"][0, -1] + 1) % 60 + 3
    difference = abs(loss_of(trainer, batch) - loss_of(trainer, changed))
    assert difference > 1e-3 if moves else difference < 1e-9


def test_global_counts_divide(trainer):
    """Two micro-batches with unequal numbers of labels: their losses, with the step's counts, add up to that of one big batch."""
    parts = [random_batch(1, 10, seed=1), random_batch(3, 10, seed=2)]
    parts[0]["labels"][0, 3:] = -100
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    for faithful in (False, True):
        trainer.args.lrc_faithful = faithful
        trainer._counts = None
        expected = loss_of(trainer, whole)
        assert trainer._get_num_items_in_batch(parts, torch.device("cpu")) == losses.count([whole], torch.device("cpu")).labels
        assert sum(loss_of(trainer, part) for part in parts) == pytest.approx(expected, rel=1e-9)


def test_evaluation_counts_its_own_batch(trainer):
    """In eval mode the counts of the last training step are not used."""
    batch = random_batch()
    trainer._counts = None
    expected = loss_of(trainer, batch)
    trainer._get_num_items_in_batch([batch] * 7, torch.device("cpu"))
    trainer.model.eval()
    assert loss_of(trainer, batch) == pytest.approx(expected, rel=1e-12)
    trainer.model.train()
    assert loss_of(trainer, batch) == pytest.approx(expected / 7, rel=1e-12)


def test_a_batch_without_labels_is_zero_not_nan(trainer):
    batch = random_batch()
    batch["labels"][:] = -100
    for counts in (lambda: setattr(trainer, "_counts", None), lambda: trainer._get_num_items_in_batch([batch], torch.device("cpu"))):
        counts()
        assert loss_of(weigh(trainer, 1, 1, 0), batch) == 0.0


def test_flattened_rows_give_the_same_loss(tiny_teacher, tmp_path, monkeypatch):
    """FlashAttention keeps documents apart in one row only, so such a model gets the batch as one row; the objective must not notice."""
    trainer = make_trainer(tiny_teacher(), tmp_path)
    batch = random_batch()
    trainer.student.eval()
    plain = trainer.compute_loss(trainer.student, batch)
    seen = []
    monkeypatch.setattr("red.training.trainer.for_attention", lambda inputs, config: seen.append(1) or flatten(inputs))
    torch.testing.assert_close(trainer.compute_loss(trainer.student, batch), plain, rtol=1e-5, atol=0)
    assert seen


@pytest.mark.parametrize("attention, rows", [("sdpa", 3), ("eager", 3), ("flash_attention_2", 1), ("kernels-community/flash-attn", 1)])
def test_only_flash_attention_gets_one_row(attention, rows):
    class Config:
        _attn_implementation = attention

    assert len(for_attention({"input_ids": torch.zeros(3, 4)}, Config)["input_ids"]) == rows
