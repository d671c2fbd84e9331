"""erank_weight: the reward is what it says, it raises the student's effective rank, and at 0 there is nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_training import make_trainer, masters, tokenised

from red.data.loading import collate
from red.erank import stream_eranks
from red.errors import REDError
from red.training.rank_bonus import RankBonus


def ranks(trainer) -> torch.Tensor:
    rows = trainer.train_dataset
    return torch.tensor(stream_eranks(trainer.student, collate([rows[i] for i in range(len(rows))]), max_tokens=200))


def test_the_term(tiny_model):
    from red.data.loading import pack

    model = tiny_model()
    rows = pack(tokenised(12), 16, pad_token_id=0)
    batch = collate([rows[i] for i in range(len(rows))])
    bonus = RankBonus(model, 0.5)
    with bonus.watching():
        model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    found = bonus.loss(batch["token_mask"])
    truth = torch.tensor(stream_eranks(model, batch, max_tokens=256)).log().mean()
    torch.testing.assert_close(found, -0.5 * truth.float(), rtol=1e-5, atol=0)
    found.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.norm() > 0
    assert not model.model.layers[0]._forward_hooks and not model.model.layers[0]._forward_pre_hooks and not bonus._states
    with bonus.watching():
        model.model(input_ids=batch["input_ids"], use_cache=False)
    assert bonus.loss(torch.zeros_like(batch["token_mask"])) == 0


@pytest.mark.parametrize("checkpointing", (False, True))
def test_training_on_it_raises_the_rank(checkpointing, tiny_teacher, tmp_path):
    found = {}
    for weight in (0.0, 3.0):
        trainer = make_trainer(tiny_teacher(), tmp_path / str(weight), start="random", erank_weight=weight, max_steps=20, gradient_checkpointing=checkpointing)
        before = ranks(trainer)
        trainer.train()
        found[weight] = (ranks(trainer) / before).log().mean().item()
    assert found[3.0] > 0.1 and found[3.0] > found[0.0] + 0.1, found


def test_micro_batches_weigh_by_their_tokens(tiny_teacher, tmp_path):
    """The reward of a step does not grow with the number of micro-batches."""
    losses = {}
    for micro in (1, 4):
        logs = []
        for weight in (0.0, 1.0):
            trainer = make_trainer(tiny_teacher(), tmp_path / f"{micro}-{weight}", erank_weight=weight, max_steps=1, gradient_accumulation_steps=micro)
            trainer.train()
            logs.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        losses[micro] = logs[0] - logs[1]
    assert losses[1] == pytest.approx(losses[4], rel=0.2), losses  # ln eRank of about 10 either way, of other tokens


def test_off_is_off(tiny_teacher, tmp_path):
    trainer = make_trainer(tiny_teacher(), tmp_path)
    assert trainer.rank_bonus is None
    trainer.train()
    again = make_trainer(tiny_teacher(), tmp_path / "again", erank_weight=1.0)
    again.train()
    assert any(not torch.equal(value, masters(again)[name]) for name, value in masters(trainer).items())
    with pytest.raises(REDError, match="erank_weight=-1.0: must not be negative"):
        make_trainer(tiny_teacher(), tmp_path, erank_weight=-1.0)
