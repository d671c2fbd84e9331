"""REDTrainer: accumulation, clipping, logs, evaluation, and other uses of the student while it trains. (Files and resuming: test_trainer_files.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from reference_lrc import random_batch
from tiny_training import RecordingTrainer, make_trainer, masters, settings_of, tokenised
from transformers import AutoModelForCausalLM, TrainerCallback

from red.config import REDConfig
from red.errors import REDError
from red.training.trainer import REDTrainer


def trained(*args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(first, second, tolerance: float = 0.0) -> None:
    first, second = masters(first), masters(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("faithful", [False, True], ids=["default", "faithful"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_accumulation_equals_one_big_batch(tiny_teacher, tmp_path, dtype, tolerance, faithful):
    """4 micro-batches of 2 rows against 1 of 8, over two epochs whose last step has fewer rows; rows differ in their number of labels."""
    settings = dict(start="random", lrc_faithful=faithful, max_steps=-1, num_train_epochs=2,
                    adam_epsilon=1e-3)  # a usual epsilon turns the rounding of a zero gradient into a full step
    teacher = tiny_teacher(dtype=dtype)
    data = tokenised(29)
    many = trained(teacher, tmp_path / "many", data, gradient_accumulation_steps=4, **settings)
    one = trained(teacher, tmp_path / "one", data, per_device_train_batch_size=8, **settings)
    rows = len(one.train_dataset)
    assert rows % 8 and len(one.seen) == many.state.global_step == 2 * -(-rows // 8) and len(many.seen) == 2 * -(-rows // 2)
    assert len({int((batch["labels"] != -100).sum()) for batch in many.seen}) > 4, "equal counts would hide a wrong divisor"
    assert_same(many, one, tolerance)
    assert logged(many, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert float((masters(many)["model.embed_tokens.weight"] - masters(make_trainer(teacher, tmp_path / "x", data, **settings))["model.embed_tokens.weight"])
                 .abs().max()) > 1e-3


class Norms(TrainerCallback):
    """Just before each optimiser step: the norm of all gradients pulled back by hand, and of what the optimiser will see."""

    def __init__(self):
        self.pulled, self.seen, self.student = [], [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        projections = self.trainer.projections
        with torch.no_grad():
            self.pulled.append(float(torch.cat([factor.pull().flatten() for factor in projections]).norm()))
        self.seen.append(float(torch.cat([master.grad.flatten() for master in projections.parameters()]).norm()))
        self.student.append(float(torch.cat([weight.grad.flatten() for weight in self.trainer.student.parameters() if weight.grad is not None]).norm()))


@pytest.mark.parametrize("limit", [0.3, 1e9, 0.0])
def test_clipping_acts_on_the_projections(tiny_teacher, tmp_path, limit):
    """The logged norm is that of the pulled gradients before clipping; the optimiser sees the clipped ones. 0 clips nothing and still logs."""
    norms = Norms()
    trainer = norms.trainer = make_trainer(tiny_teacher(), tmp_path, callbacks=[norms], max_grad_norm=limit, gradient_accumulation_steps=2)
    trainer.train()
    assert logged(trainer, "grad_norm") == pytest.approx(norms.pulled, rel=1e-5)
    assert norms.seen == pytest.approx([limit] * 4 if limit == 0.3 else norms.pulled, rel=1e-4)
    assert all(abs(of_student / pulled - 1) > 0.05 for of_student, pulled in zip(norms.student, norms.pulled, strict=True))
    if limit == 0.0:
        assert_same(trainer, trained(tiny_teacher(), tmp_path / "free", max_grad_norm=1e9, gradient_accumulation_steps=2), 1e-7)


def test_the_optimizer_holds_the_masters_and_nothing_else(tiny_teacher, tmp_path):
    trainer = trained(tiny_teacher("qwen3"), tmp_path, weight_decay=0.1, max_steps=1)
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in trainer.projections.parameters()}
    assert {p.dim() for p in groups[0.1]} == {2} and {p.dim() for p in groups[0.0]} == {1}, "no weight decay on norm gains"
    assert all(p.grad is None for p in [*trainer.projections.parameters(), *trainer.student.parameters(), *trainer.teacher.parameters()])


@pytest.mark.parametrize("settings", [dict(), dict(lrc_faithful=True), dict(tap_weight=0.0), dict(kl_weight=0.0), dict(ce_weight=0.0, kl_weight=2.5)],
                         ids=str)
def test_logged_parts_add_up_to_the_loss(tiny_teacher, tmp_path, settings):
    """Over windows of several steps and micro-batches, the incomplete window at the end included."""
    trainer = trained(tiny_teacher(), tmp_path, logging_steps=3, max_steps=7, gradient_accumulation_steps=2, **settings)
    args, entries = trainer.args, [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        expected = args.ce_weight * entry["ce"] + args.kl_weight * entry["kl"] + args.tap_weight * entry["tap_mse"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        assert (entry["tap_mse"] > 0) == (args.tap_weight > 0) and entry["ce"] > 0.1 and entry["kl"] > 1e-3


def test_training_lowers_every_part(tiny_teacher, tmp_path):
    trainer = trained(tiny_teacher(), tmp_path, tokenised(6), max_steps=30, per_device_train_batch_size=8, logging_steps=6, ce_weight=0.0)
    for key in ("loss", "kl", "tap_mse"):  # no CE: the data are noise, which the teacher does not predict
        values = logged(trainer, key)
        assert values[-1] < 0.7 * values[0], key


def test_evaluate(tiny_teacher, tmp_path):
    """Same loss as compute_loss in eval mode, before and after training, twice the same."""
    data = tokenised(4, seed=3)
    trainer = make_trainer(tiny_teacher(), tmp_path, eval_data=data, per_device_eval_batch_size=8)
    rows = [trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset))]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def by_hand() -> float:
        trainer.student.eval()
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, batch))

    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(by_hand(), rel=1e-6)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(by_hand(), rel=1e-6) and after == trainer.evaluate()["eval_loss"] != before


class Visitor(TrainerCallback):
    """What people do with a model while it trains: copy, save, generate, look at its loss."""

    def __init__(self, folder):
        self.folder, self.copies = folder, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        copied = copy.deepcopy(model)
        assert copied.forward.__self__ is copied
        self.copies.append(copied)
        model.save_pretrained(self.folder / str(state.global_step))
        ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
            assert loss == copied(ids, labels=ids).loss
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, copied.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False))


def test_the_student_can_be_used_while_it_trains(tiny_teacher, tmp_path):
    visitor = Visitor(tmp_path / "saved")
    settings = dict(max_steps=3, gradient_accumulation_steps=2)
    visited = trained(tiny_teacher(tied=True), tmp_path / "visited", callbacks=[visitor], **settings)
    assert_same(visited, trained(tiny_teacher(tied=True), tmp_path / "alone", **settings))
    ids = random_batch()["input_ids"]
    for step, copied in enumerate(visitor.copies, 1):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / str(step))
        assert type(loaded) is type(visited.teacher) and loaded.config.hidden_size == 16 and loaded.config.head_dim == 8
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, copied.eval()(ids).logits, rtol=0, atol=1e-6)
    assert not torch.equal(visitor.copies[0].lm_head.weight, visitor.copies[1].lm_head.weight), "a copy stands still while the student trains on"


def test_evaluation_does_not_disturb_training(tiny_teacher, tmp_path):
    settings = dict(max_steps=3, gradient_accumulation_steps=2, logging_steps=2)
    alone = trained(tiny_teacher(), tmp_path / "alone", **settings)
    watched = trained(tiny_teacher(), tmp_path / "watched", eval_data=tokenised(5, seed=3), eval_strategy="steps", eval_steps=1, **settings)
    assert len(logged(watched, "eval_loss")) == 3
    assert_same(alone, watched)
    for key in ("loss", "ce", "kl", "tap_mse"):
        assert logged(alone, key) == logged(watched, key), key


def test_bf16_autocast_keeps_fp32_masters(tiny_teacher, tmp_path):
    trainer = trained(tiny_teacher(dtype=torch.bfloat16), tmp_path, bf16=True, max_steps=2)
    assert {p.dtype for p in [*trainer.projections.parameters(), *trainer.student.parameters()]} == {torch.float32}
    reference = trained(tiny_teacher(dtype=torch.bfloat16).float(), tmp_path / "fp32", max_steps=2)
    assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=2e-2)
    assert logged(trainer, "loss") != logged(reference, "loss"), "autocast did not happen"


@pytest.mark.parametrize("name, value", [("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0), ("loss_chunk_size", 0), ("dataloader_num_workers", -1)])
def test_numbers_that_cannot_be(tmp_path, name, value):
    with pytest.raises(REDError, match=f"{name}={value}: must"):
        REDConfig(**settings_of(tmp_path, **{name: value}))


def test_fp16_is_refused(tmp_path):
    with pytest.raises(REDError, match="fp16=True.*scaler.*bf16"):
        REDConfig(**settings_of(tmp_path, fp16=True))


def test_a_foreign_optimizer_is_refused(tiny_teacher, tmp_path):
    """It would train the student's weights, which the next push overwrites."""
    teacher = tiny_teacher()
    args = REDConfig(**settings_of(tmp_path, max_steps=1))
    with pytest.raises(REDError, match="optimizers=.*projections.*optimizer_cls_and_kwargs"):
        REDTrainer(teacher, args, train_dataset=tokenised(), optimizers=(torch.optim.SGD(teacher.parameters()), None))
    trainer = REDTrainer(teacher, args, train_dataset=tokenised(), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    before = masters(trainer)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
    assert any(not torch.equal(value, before[name]) for name, value in masters(trainer).items())


def test_without_shuffling_the_data_comes_in_order(tiny_teacher, tmp_path):
    trainer = trained(tiny_teacher(), tmp_path, max_steps=2, train_sampling_strategy="sequential", trainer_class=RecordingTrainer)
    rows = torch.cat([batch["input_ids"] for batch in trainer.seen])
    assert torch.equal(rows, torch.stack([trainer.train_dataset[index]["input_ids"] for index in range(4)]))
