"""Optimiser-side projections against backpropagation through the products, written out in reference_lrc.py; all in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from reference_lrc import Chained, default_objective, lrc_objective, random_batch, tap_squares, use_exact_norms
from tiny_training import NARROW, VARIANTS, make_trainer, masters, shake

from red import starts
from red.errors import REDError
from red.training.projections import Projections
from red.student import build_student

# name: settings of the trainer, and the reference's objective for it
MODES = {
    "gather": (dict(start="activation"), lambda trainer: partial(default_objective, channels=trainer.projections.channels, squares=squares_of(trainer))),
    "projected": (dict(start="random"), lambda trainer: partial(default_objective, squares=squares_of(trainer))),
    "plain": (dict(start="activation", tap_target="projected", tap_normalize=False), lambda trainer: default_objective),
    "lrc": (dict(start="random", lrc_faithful=True), lambda trainer: lrc_objective),
}
TERMS = {"ce": "ce_weight", "kl": "kl_weight", "tap": "tap_weight"}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    use_exact_norms(monkeypatch)


def teacher_of(tiny_teacher, variant: str, dtype=torch.float64):
    family, settings = VARIANTS[variant]
    return tiny_teacher(family, dtype=dtype, **settings)


def squares_of(trainer):
    """The mean squares of the teacher's outputs on the calibration rows: the first of the training data."""
    rows = [trainer.train_dataset[index] for index in range(trainer.args.calibration_samples)]
    return tap_squares(trainer.teacher, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def only(trainer, term: str | None) -> None:
    """Weigh one term with 1 and the others with 0; None: all as in the public code."""
    for name, attribute in TERMS.items():
        setattr(trainer.args, attribute, {"tap": 0.2}.get(name, 1.0) if term is None else float(name == term))


def close(found: torch.Tensor | None, expected: torch.Tensor | None, name: str, tolerance: float = 1e-9) -> None:
    found = torch.zeros_like(expected) if found is None else found
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_losses_and_gradients(tiny_teacher, tmp_path, variant, mode):
    """Each term by itself and their sum, through the real compute_loss, and its gradient in every map and gain."""
    teacher = teacher_of(tiny_teacher, variant)
    settings, objective = MODES[mode]
    trainer = make_trainer(teacher, tmp_path, **settings)
    shake(trainer.projections)
    trainer.student.train()
    chained, batch = Chained(teacher, masters(trainer)), random_batch(3, 12)
    for term in (*TERMS, None):
        parts = objective(trainer)(chained, batch)
        expected = parts["ce"] + parts["kl"] + 0.2 * parts["tap"] if term is None else parts[term]
        gradients = dict(zip(chained.maps, torch.autograd.grad(expected, chained.maps.values(), allow_unused=True), strict=True))

        only(trainer, term)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        trainer.projections.pull_back()
        close(loss.detach(), expected.detach(), f"{term}: loss")
        for factor in trainer.projections:
            gradient = gradients[factor.name]
            if gradient is None:  # the taps know nothing of the head and of the last norm
                assert term == "tap" and factor.name in ("lm_head.weight", "model.norm.weight")
                gradient = torch.zeros_like(factor.master)
            close(factor.master.grad, gradient, f"{term}: {factor.name}")
            if term is None:
                assert gradient.abs().max() > 1e-6, f"{factor.name}: a zero gradient would prove nothing"
        trainer.projections.push_forward()


def test_undetached_target_trains_the_ffn_projection(tiny_teacher, tmp_path):
    """The two modes differ: only the faithful one sends the FFN tap's gradient through its target into B."""
    teacher, gradients = teacher_of(tiny_teacher, "llama"), {}
    for faithful in (False, True):
        trainer = make_trainer(teacher, tmp_path / str(faithful), start="random", tap_target="lrc", tap_normalize=False, lrc_faithful=faithful)
        shake(trainer.projections)
        only(trainer, "tap")
        trainer.student.train()
        batch = random_batch(2, 8, seed=1)
        trainer.compute_loss(trainer.model, {**batch, "token_mask": torch.ones(2, 8, dtype=torch.bool)}).backward()
        trainer.projections.pull_back()
        gradients[faithful] = {factor.name: factor.master.grad for factor in trainer.projections}
    for name in gradients[True]:
        same = gradients[True][name] is None or torch.allclose(gradients[True][name], gradients[False][name], atol=1e-12)
        assert same != name.endswith("down_proj.weight"), name


@pytest.mark.parametrize("settings", [dict(divergence="reverse"), dict(divergence="jsd", jsd_beta=0.3), dict(temperature=3.0),
                                      dict(temperature=2.0, loss_chunk_size=5)], ids=lambda settings: "-".join(map(str, settings.values())))
def test_divergences_and_temperature(tiny_teacher, tmp_path, settings):
    teacher = teacher_of(tiny_teacher, "qwen2-tied")
    trainer = make_trainer(teacher, tmp_path, start="activation", **settings)
    shake(trainer.projections)
    trainer.student.train()
    chained, batch = Chained(teacher, masters(trainer)), random_batch(3, 12)
    parts = default_objective(chained, batch, channels=trainer.projections.channels, squares=squares_of(trainer), temperature=settings.get("temperature", 1.0),
                              divergence=settings.get("divergence", "forward"), beta=settings.get("jsd_beta", 0.5))
    expected = parts["ce"] + parts["kl"] + 0.2 * parts["tap"]
    gradients = torch.autograd.grad(expected, chained.maps.values())
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.projections.pull_back()
    close(loss.detach(), expected.detach(), "loss")
    for name, gradient in zip(chained.maps, gradients, strict=True):
        close(trainer.projections[name].master.grad, gradient, name)


@pytest.mark.parametrize(("variant", "mode"), [("llama", "plain"), *((variant, mode) for variant in sorted(VARIANTS) for mode in ("gather", "lrc")),
                                               ("llama-biases", "projected"), ("qwen2-tied", "projected")])
def test_ten_adamw_steps(tiny_teacher, tmp_path, variant, mode):
    """Trainer.train with clipping, weight decay and 2 micro-batches a step, against AdamW on the leaves of the products."""
    teacher = teacher_of(tiny_teacher, variant)
    settings, objective = MODES[mode]
    trainer = make_trainer(teacher, tmp_path, **settings, max_steps=10, gradient_accumulation_steps=2, max_grad_norm=0.5, weight_decay=0.1)
    shake(trainer.projections)
    frozen = {name: value.detach().clone() for name, value in trainer.student.named_parameters() if not value.requires_grad}
    chained = Chained(teacher, masters(trainer))
    trainer.train()

    gains = [value for value in chained.maps.values() if value.dim() == 1]
    adam = torch.optim.AdamW([{"params": [value for value in chained.maps.values() if value.dim() == 2], "weight_decay": 0.1},
                              {"params": gains, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    norms = []
    for step in range(10):
        micro = trainer.seen[2 * step: 2 * step + 2]
        batch = {key: torch.cat([part[key] for part in micro]) for key in micro[0]}  # one big batch: the counts are global
        parts = objective(trainer)(chained, batch)
        adam.zero_grad()
        (parts["ce"] + parts["kl"] + 0.2 * parts["tap"]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(chained.maps.values(), 0.5)))
        adam.step()
    assert min(norms) > 0.5, "clipping must bite in this test"
    assert len(trainer.seen) == 20
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-8)
    weights, found = chained.weights(), dict(trainer.student.named_parameters())
    moved = 0.0
    for name, value in masters(trainer).items():
        close(value, chained.maps[name].detach(), name)
        close(found[name].detach(), weights[name].detach(), f"weight {name}")
        moved = max(moved, float((value - frozen.get(name, 0)).abs().max()))
    assert moved > 0.05
    for name, value in frozen.items():
        assert torch.equal(found[name], value) and torch.equal(value, dict(teacher.named_parameters())[name]), name


def started(teacher, name: str = "orthogonal", seed: int = 0):
    student = build_student(teacher, NARROW)
    return student, Projections(teacher, student, starts.get(name)(starts.StartContext(teacher, NARROW, seed=seed)))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_weights_are_the_products(tiny_teacher, variant):
    """After the start, and for every parameter of the student, the biases of writers included."""
    teacher = teacher_of(tiny_teacher, variant)
    student, projections = started(teacher)
    expected = Chained(teacher, masters(projections)).weights()
    found = dict(student.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), expected[name].detach(), atol=1e-12, rtol=0, msg=name)
    trainable = {name for name, value in found.items() if value.requires_grad}
    assert trainable == {factor.name for factor in projections} | {name for name in found if name.endswith(("o_proj.bias", "down_proj.bias"))}


def test_masters_have_storage_of_their_own(tiny_teacher):
    """A selection start hands one matrix to all modules; their masters must not move together."""
    teacher = tiny_teacher()
    student = build_student(teacher, NARROW)
    start = starts.base.selection(starts.StartContext(teacher, NARROW), torch.arange(NARROW))
    projections = Projections(teacher, student, start)
    pointers = [tensor.data_ptr() for tensor in projections.parameters()]
    assert len(set(pointers)) == len(pointers) == 21 and all(tensor.is_contiguous() for tensor in projections.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(tiny_teacher, dtype):
    """Masters are fp32 for fp32 and bf16 students; the student's weight is the rounded fp32 product."""
    teacher = tiny_teacher(dtype=dtype)
    student, projections = started(teacher)
    for factor in projections:
        assert factor.master.dtype == torch.float32 and factor.weight.dtype == dtype
    factor = projections["model.layers.0.mlp.down_proj.weight"]
    product = factor.master.double() @ teacher.model.layers[0].mlp.down_proj.weight.double()
    assert (factor.weight.double() - product).abs().max() <= 2 * torch.finfo(dtype).eps * product.abs().max()


def test_pull_back_once_per_step(tiny_teacher):
    """A second pull does nothing until the push; a master's own gradient is added to; the push forgets both sides."""
    student, projections = started(teacher_of(tiny_teacher, "llama-biases"))
    student(torch.randint(3, 64, (2, 5)), labels=torch.randint(3, 64, (2, 5))).loss.backward()
    factor = projections["model.layers.0.mlp.down_proj.weight"]
    own = torch.randn_like(factor.master)
    factor.master.grad = own.clone()
    projections.pull_back()
    once = {f.name: f.master.grad.clone() for f in projections}
    projections.pull_back()
    assert all(torch.equal(once[f.name], f.master.grad) for f in projections)
    teacher_down = factor.teacher
    expected = own + factor.weight.grad @ teacher_down.T + torch.outer(factor.bias.grad, factor.teacher_bias)
    torch.testing.assert_close(once[factor.name], expected)
    projections.push_forward()
    assert all(f.master.grad is None for f in projections) and all(value.grad is None for value in student.parameters())
    student(torch.randint(3, 64, (2, 5)), labels=torch.randint(3, 64, (2, 5))).loss.backward()
    projections.pull_back()
    assert not torch.equal(factor.master.grad, once[factor.name])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_state_round_trip_rebuilds_exactly(tiny_teacher, variant):
    teacher = teacher_of(tiny_teacher, variant, torch.float32)
    student, projections = started(teacher)
    shake(projections)
    state = {name: value.clone() for name, value in projections.state_dict().items()}
    other, rebuilt = started(teacher, seed=1)
    assert not torch.equal(other.model.embed_tokens.weight, student.model.embed_tokens.weight)
    rebuilt.load_state_dict(copy.deepcopy(state))
    for (name, value), expected in zip(other.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert all(torch.equal(value, state[name]) for name, value in rebuilt.state_dict().items())
    assert rebuilt.state_dict().keys() == state.keys()


def test_state_of_a_selection_keeps_its_channels(tiny_teacher):
    teacher = tiny_teacher()
    make = partial(starts.base.selection, starts.StartContext(teacher, NARROW))
    first, second = (Projections(teacher, build_student(teacher, NARROW), make(torch.arange(begin, begin + NARROW))) for begin in (0, 9))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.channels, torch.arange(NARROW))


def test_foreign_state_is_refused_and_changes_nothing(tiny_teacher):
    teacher = tiny_teacher()
    _, projections = started(teacher)
    before = masters(projections)
    name = "model.layers.1.mlp.up_proj.weight"
    state = {key: value + 1 for key, value in before.items()}
    narrower = {**state, name: torch.zeros(32, 12)}
    missing = {key: value for key, value in state.items() if key != name}
    for bad, message in ((narrower, f"{name} has shape \\[32, 12\\], this student needs \\[32, 16\\].*hidden_size"),
                         (missing, f"another student: missing \\['{name}'\\]"), ({**state, "extra": before[name]}, "unknown \\['extra'\\]")):
        with pytest.raises(REDError, match=message):
            projections.load_state_dict(bad)
        assert all(torch.equal(value, before[key]) for key, value in masters(projections).items())
