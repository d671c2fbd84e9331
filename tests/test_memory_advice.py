"""Out of memory: the message has the shapes, where the bytes go, and what to lower; the bytes are those that are really there."""

from __future__ import annotations

import pytest
import torch
from tiny_training import RecordingTrainer, make_trainer
from torch.autograd.graph import saved_tensors_hooks

from red.doctor import checks as doctor_checks
from red.planning import costs, memory_advice
from red.files import in_gib
from red.errors import REDError

TEACHER = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=4, vocab_size=256)
SETTINGS = dict(hidden_size=64, max_length=64, per_device_train_batch_size=4, max_steps=1, loss_chunk_size=128)


class Full(RecordingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(("settings", "told", "untold"), [
    (dict(per_device_train_batch_size=4, gradient_accumulation_steps=3), ["per_device_train_batch_size=2 with gradient_accumulation_steps=6", "checkpointing=cheap, then checkpointing=full;", "bf16=True", "loss_chunk_size=1024"], []),
    (dict(checkpointing="cheap"), ["checkpointing=full;"], ["gradient_checkpointing", "checkpointing=cheap"]),
    (dict(per_device_train_batch_size=1, gradient_checkpointing=True, bf16=True, loss_chunk_size=256), ["max_length below 16", "loss_chunk_size below 256"],
     ["per_device_train_batch_size=", "checkpointing=", "bf16=True"])], ids=["everything to lower", "cheap is taken", "little left"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_message(tiny_teacher, tmp_path, settings, told, untold):
    trainer = make_trainer(tiny_teacher(), tmp_path, trainer_class=Full, save_strategy="steps", save_steps=1, **settings)
    with pytest.raises(REDError, match="Out of memory at step 3: .* rows of 16 tokens, teacher of 2 layers of width 32, student of width 16, vocabulary 64.*CUDA out of memory") as raised:
        trainer.train()
    message = str(raised.value)
    assert all(text in message for text in told) and not any(text in message.partition("Lower,")[2] for text in untold)
    for name, size in memory_advice.parts(trainer).items():
        assert not size or f"{name} {in_gib(size)}" in message
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()


def count(tensors) -> int:
    """Bytes of the storages, each once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_bytes_are_there(tiny_teacher, tmp_path, family):
    """Standing parts exactly; the taps' targets and what backward has saved, beyond parameters, within 3 %."""
    found = {}

    class Looking(RecordingTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            kept = []
            with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
                loss = super().compute_loss(model, inputs, **kwargs)
            parameters = {p.untyped_storage().data_ptr() for p in [*self.teacher.parameters(), *self.student.parameters()]}
            found["saved"] = count(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in parameters)
            found["tokens"] = inputs["input_ids"].numel()
            return loss

    data = [{"input_ids": torch.randint(3, 256, (64,)).tolist()} for _ in range(24)]
    trainer = make_trainer(tiny_teacher(family, **TEACHER), tmp_path, data, trainer_class=Looking, **SETTINGS)
    trainer.train()
    parts = memory_advice.parts(trainer)
    masters = sum(master.numel() * 4 for master in trainer.projections.parameters())
    moments = sum(value.numel() * 4 for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step")
    assert parts["teacher"] == sum(p.numel() * 4 for p in trainer.teacher.parameters()) and parts["student"] == sum(p.numel() * 4 for p in trainer.student.parameters())
    assert parts["projections"] == parts["their gradients"] == masters and parts["Adam's moments"] == moments
    assert parts["student's gradients"] == sum(p.numel() * 4 for p in trainer.student.parameters() if p.requires_grad)
    assert found["tokens"] == 4 * 64
    expected = parts["taps"] + parts["student's activations"]
    assert found["saved"] == pytest.approx(expected, rel=0.03), (found, parts)  # masks and angles are not counted


@pytest.mark.parametrize("kind", ["none", "cheap", "full"])
def test_a_bf16_student_and_what_is_computed_again(tiny_teacher, tmp_path, kind):
    """Its gradients are summed in float32; what a micro-batch holds is what `red plan` says."""
    trainer = make_trainer(tiny_teacher(**TEACHER), tmp_path, **{**SETTINGS, "max_length": 16}, student_dtype="bfloat16", checkpointing=kind)
    parts = memory_advice.parts(trainer)
    trainer.train()
    entries = sum(p.numel() for p in trainer.student.parameters())
    assert parts["student"] == 2 * entries and parts["student's gradients"] == 4 * entries == 4 * sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    shape = costs.Sizes.of(trainer.teacher.config)
    planned = costs.memory(shape, 64, 4 * 16, checkpointing=kind, teacher_bytes=4, student_bytes=2, compute_bytes=2, chunk=128)
    names = {"teacher": "teacher", "student": "student", "projections": "projections", "adam": "Adam's moments", "gradients": "student's gradients", "taps": "taps",
             "activations": "student's activations", "loss": "loss"}
    assert {name: getattr(planned, name) for name in names} == {name: parts[told] for name, told in names.items()}, "the plan and the advice are one"
    largest_product = planned.step_only - parts[memory_advice.STEP_ONLY]  # the plan counts it, the advice names what stays
    assert largest_product == 4 * shape.head // 2 and 0 <= planned.peak - planned.context - memory_advice.needed(parts) <= largest_product


@pytest.mark.parametrize("settings", [{}, dict(bf16=True), dict(student_dtype="bfloat16", loss_chunk_size=None)], ids=["float32", "autocast", "bfloat16"])
def test_the_doctor_asks_for_as_much(tiny_teacher, tmp_path, settings):
    """Between the advice and that with the step's largest product."""
    trainer = make_trainer(tiny_teacher(**TEACHER), tmp_path, **{**SETTINGS, "max_length": 16, **settings})
    sizes, bytes_needed = costs.Sizes.of(trainer.teacher.config), memory_advice.needed(memory_advice.parts(trainer))
    asks = [doctor_checks.memory(sizes, trainer.args, free).ok for free in (bytes_needed - 1, bytes_needed + 4 * sizes.narrowed(64).head)]
    assert asks == [False, True]
    assert not settings or memory_advice.parts(trainer)["autocast's copies"] == (2 * sizes.narrowed(64).matrices if "bf16" in settings else 0)


def test_rows_are_as_long_as_they_are(tiny_teacher, tmp_path):
    """Without packing the longest document decides, not max_length."""
    data = [{"input_ids": [3 + place for place in range(length)]} for length in (4, 9, 6)]
    found = [make_trainer(tiny_teacher(), tmp_path / str(length), data, max_length=length, packing=False) for length in (9, 16)]
    assert memory_advice.parts(found[0]) == memory_advice.parts(found[1]) and "2 rows of 9 tokens" in memory_advice.advice(found[1], RuntimeError("x"))
