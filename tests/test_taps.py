"""The seven taps of a layer against outputs that are captured by hand: values, targets, masks, counts, and recomputation."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from reference_lrc import MODULES, random_batch, watching
from tiny_training import NARROW, VARIANTS, make_trainer, masters, shake

from red import starts
from red.config import REDConfig
from red.errors import REDError
from red.training.projections import Projections
from red.student import build_student
from red.training.taps import Taps

TARGETS = {"gather": ("activation-like", "gather"), "projected": ("random", "projected"), "lrc": ("random", "lrc"),
           "auto of a selection": ("activation-like", "auto"), "auto of a dense start": ("random", "auto")}
MEANS = {"auto of a selection": "gather", "auto of a dense start": "projected"}


def pair(teacher, start: str = "random"):
    student = build_student(teacher, NARROW)
    context = starts.StartContext(teacher, NARROW)
    maps = starts.get("random")(context) if start == "random" else starts.base.selection(context, torch.arange(3, 3 + NARROW))
    projections = Projections(teacher, student, maps)
    shake(projections, 0.2)
    return student, projections


def run(taps: Taps, teacher, student, batch, mask=None, num_tokens=None) -> torch.Tensor:
    place = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad(), taps.recording():
        teacher(**place)
    with taps.comparing(mask, num_tokens):
        student(**place)
    return taps.loss()


def one_tap(layer: int, index: int) -> torch.Tensor:
    """Mean squares that leave one tap as it is and divide all others by infinity."""
    square = torch.full((2, 7), float("inf"), dtype=torch.float64)
    square[layer, index] = 1.0
    return square


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2-tied", "qwen3"])
def test_every_tap_equals_the_captured_outputs(tiny_teacher, variant, target):
    family, settings = VARIANTS[variant]
    teacher = tiny_teacher(family, dtype=torch.float64, **settings)
    start, option = TARGETS[target]
    student, projections = pair(teacher, start)
    kind, batch = MEANS.get(target, target), random_batch(3, 12)
    mask, total = batch["token_mask"], 0.0
    with watching(teacher) as of_teacher, watching(student) as of_student, torch.no_grad():
        for model in (teacher, student):
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for layer in range(2):
        for index, name in enumerate(MODULES):
            theirs, ours = of_teacher[layer, name][1][mask], of_student[layer, name][1][mask]
            path = f"model.layers.{layer}.{name}"
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                if kind == "gather":
                    theirs = theirs[:, 3:3 + NARROW]
                elif kind == "lrc" and name == "self_attn.o_proj":
                    module = teacher.get_submodule(path)
                    ours = of_student[layer, name][0][mask] @ module.weight.T + (0 if module.bias is None else module.bias)
                else:
                    theirs = theirs @ projections[f"{path}.weight"].master.T
            expected = (ours - theirs).square().mean()
            taps = Taps(teacher, student, projections, target=option, mean_square=one_tap(layer, index))
            found = run(taps, teacher, student, batch, mask)
            taps.release()
            torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=0, msg=f"{path}: {found} {expected}")
            assert expected > 1e-4
            total += float(expected.detach())
    taps = Taps(teacher, student, projections, target=option)
    assert float(run(taps, teacher, student, batch, mask).detach()) == pytest.approx(total, rel=1e-10)
    assert taps.target == kind


def test_mask_and_counts(tiny_teacher):
    """Masked positions do not count, `num_tokens` divides, and None means the tokens of this call."""
    teacher = tiny_teacher(dtype=torch.float64)
    student, projections = pair(teacher)
    taps, batch = Taps(teacher, student, projections), random_batch(3, 12)
    mask = batch["token_mask"]
    with torch.no_grad():
        own = run(taps, teacher, student, batch, mask)
        torch.testing.assert_close(run(taps, teacher, student, batch, mask, 10.0), own * int(mask.sum()) / 10)
        torch.testing.assert_close(run(taps, teacher, student, batch, mask, torch.tensor(10.0)), own * int(mask.sum()) / 10)
        everything = run(taps, teacher, student, batch)
        torch.testing.assert_close(run(taps, teacher, student, batch, torch.ones_like(mask)), everything)
        assert not torch.isclose(everything, own)
        changed = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 60)}
        torch.testing.assert_close(run(taps, teacher, student, changed, mask), own, rtol=1e-6, atol=0)


def test_detached_targets_train_no_projection(tiny_teacher):
    teacher = tiny_teacher(dtype=torch.float64)
    for target, detach in (("projected", True), ("lrc", True), ("lrc", False)):
        student, projections = pair(teacher)
        taps = Taps(teacher, student, projections, target=target, detach_target=detach)
        run(taps, teacher, student, random_batch()).backward()
        trained = {factor.name for factor in projections if factor.master.grad is not None}
        assert trained == (set() if detach else {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)})
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_hooks_sleep_outside_their_contexts(tiny_teacher):
    """Other forward passes (generation, evaluation by the user) neither fail nor leave anything behind; no hook is left."""
    teacher = tiny_teacher()
    student, projections = pair(teacher)
    clean = [sum(len(module._forward_hooks) for module in model.modules()) for model in (teacher, student)]
    taps, batch = Taps(teacher, student, projections), random_batch()
    first = run(taps, teacher, student, batch)
    student(torch.randint(3, 64, (5, 4)))
    teacher(torch.randint(3, 64, (5, 4)))
    student.generate(torch.randint(3, 64, (1, 4)), attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False)
    assert not taps._targets and not taps._losses, "targets and losses must not outlive their step"
    torch.testing.assert_close(run(taps, teacher, student, batch), first)
    taps.release()
    assert [sum(len(module._forward_hooks) for module in model.modules()) for model in (teacher, student)] == clean


def test_a_teacher_does_not_keep_its_students_alive(tiny_teacher, tmp_path):
    """Many students of one teacher in one process: each is freed with its trainer."""
    teacher = tiny_teacher()
    trainer = make_trainer(teacher, tmp_path, max_steps=1)
    trainer.train()
    student = weakref.ref(trainer.student)
    del trainer
    gc.collect()
    assert student() is None and not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("silent", [0.0, 1e-7])
def test_a_silent_tap_does_not_outweigh_the_others(tiny_teacher, tmp_path, silent):
    """One whose teacher says (next to) nothing is divided by a floor, a millionth of the mean over all taps, not by its own square."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.layers[0].self_attn.k_proj.weight.mul_(silent)
    trainer = make_trainer(teacher, tmp_path)
    square = trainer.taps.mean_square
    others = torch.ones(2, 7, dtype=torch.bool)
    others[0, 1] = False
    assert float(square[0, 1]) == pytest.approx(1e-6 * float(square[others].sum()) / 14, rel=1e-3) and square[others].min() > 1e-3


def test_unusable_targets_are_refused(tiny_teacher):
    teacher = tiny_teacher()
    student, projections = pair(teacher)
    with pytest.raises(REDError, match="tap_target='middle' is unknown.*'gather'"):
        Taps(teacher, student, projections, target="middle")
    with pytest.raises(REDError, match="'gather' needs a start that selects channels.*projected"):
        Taps(teacher, student, projections, target="gather")
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())


@pytest.mark.parametrize("settings", [dict(start="activation"), dict(start="random", lrc_faithful=True)], ids=["default", "faithful"])
def test_activation_checkpointing_changes_nothing(tiny_teacher, tmp_path, settings):
    """The recomputed forward must neither lose the taps' gradients nor count them twice."""
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_teacher(), tmp_path / str(checkpointing), max_steps=2, gradient_accumulation_steps=2,
                               gradient_checkpointing=checkpointing, **settings)
        trainer.train()
        assert not trainer.taps._targets
        found.append((masters(trainer), [entry.get("loss") for entry in trainer.state.log_history]))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=0, atol=1e-6, msg=name)


def test_reentrant_checkpointing_is_refused(tmp_path):
    """It runs the layers without a graph: the taps would silently train nothing."""
    with pytest.raises(REDError, match="gradient_checkpointing_kwargs=.*use_reentrant=False"):
        REDConfig(output_dir=str(tmp_path), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
