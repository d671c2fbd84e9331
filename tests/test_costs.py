"""The arithmetic of a step's costs, against real models: parameters and FLOPs exactly, bytes against what autograd and the taps really keep."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from tiny_models import build_tiny_model
from tiny_training import VARIANTS, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from red import starts
from red.training import activation_checkpointing as checkpointing
from red.planning import costs
from red.calibration import calibrate_batches
from red.planning.costs import Sizes
from red.training.projections import Projections
from red.planning.shapes import SHAPES
from red.starts.base import StartContext
from red.student import build_student
from red.training.taps import Taps
from red_kernels.triton import launch

ROWS, LENGTH, NARROW = 2, 128, 128
TOKENS = ROWS * LENGTH
LARGER = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_hidden_layers=4)
# of the models' cards, in billions
PUBLISHED = {"Llama-2-7B": 6.74, "Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21, "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.6, "Qwen2.5-0.5B": 0.49, "Qwen2.5-1.5B": 1.54,
             "Qwen2.5-3B": 3.09, "Qwen2.5-7B": 7.61, "Qwen2.5-72B": 72.7, "Qwen3-0.6B": 0.6, "Qwen3-4B": 4.0, "Qwen3-8B": 8.2, "Qwen3-32B": 32.8}


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def started(teacher, width: int, dtype=None, start: str = "random") -> Projections:
    calibration = calibrate_batches(teacher, [{"input_ids": torch.arange(3, 30)[None]}])
    return Projections(teacher, build_student(teacher, width, dtype=dtype), starts.get(start)(StartContext(teacher, width, calibration)))


# ---- parameters ----

@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_models(name):
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Sizes.of(config).parameters == count(model) == pytest.approx(PUBLISHED[name] * 1e9, rel=0.011)
    assert config.rope_parameters["rope_theta"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_built_models(variant):
    family, overrides = VARIANTS[variant]
    teacher = build_tiny_model(family, **overrides)
    sizes, projections = Sizes.of(teacher.config), started(teacher, 12)
    assert sizes.parameters == count(teacher)
    assert sizes.narrowed(12).parameters == count(projections.student)
    assert costs.trainable(sizes, 12) == sum(master.numel() for master in projections.parameters())


# ---- FLOPs ----

def step(teacher, tmp_path, **changes) -> int:
    """FLOPs of products in one training step of a row of 16 tokens, those inside linear_kd not included: the counter does not look into it."""
    examples = [{"input_ids": [3 + place % 60 for place in range(16)]}]
    trainer = make_trainer(teacher, tmp_path, examples, max_length=16, per_device_train_batch_size=1, max_steps=1, **changes)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops()


@pytest.mark.parametrize("family, tied, start, checkpointing", [("llama", False, "activation", "none"), ("qwen2", True, "activation", "full"), ("qwen3", True, "random", "none")])
def test_flops_of_a_training_step(family, tied, start, checkpointing, tmp_path):
    """Eager attention computes the whole square of scores, and its backward two products for each of the forward's."""
    teacher = build_tiny_model(family, tied=tied, attn_implementation="eager")
    sizes, width = Sizes.of(teacher.config), 16
    student = sizes.narrowed(width)
    found = costs.flops(sizes, width, context=16, sharing=16, checkpointing=checkpointing, tap_target="projected" if start == "random" else "gather")
    causal, backward = 2, 2
    attention = causal * (sizes.attention(16) + (1 + backward) * student.attention(16))
    again = found.recomputed + (student.attention(16) if checkpointing == "full" else 0)
    inside_loss = 2 * sizes.head + 6 * student.head
    expected = 16 * (found.floor - inside_loss + attention + found.projections + found.targets + again)
    assert step(teacher, tmp_path, start=start, gradient_checkpointing=checkpointing == "full") == expected


def test_the_published_target_of_a_step():
    """Llama-3.2-3B at half its width: 16.1 GFLOP a token on the floor, 18.05 with attention and the products of a step of 49152 tokens."""
    sizes = Sizes.of(AutoConfig.for_model(**SHAPES["Llama-3.2-3B"]))
    found = costs.flops(sizes, 1536, context=2048, sharing=49152)
    assert found.floor / 1e9 == pytest.approx(16.06, abs=0.005) and found.useful / 1e9 == pytest.approx(18.05, abs=0.005)
    assert costs.trainable(sizes, 1536) / 1e9 == pytest.approx(0.94, rel=0.015), "as published"


# ---- memory ----

def forward(dtype: torch.dtype, family: str, kind: str = "none", compute: torch.dtype = torch.bfloat16, watch=lambda parameters: nullcontext(), at_end=lambda alive: None):
    """A forward pass of a student with taps, under autocast as the trainer runs it, and the bytes that autograd saved, parameters aside.

    `at_end` is called where the trainer computes the loss.
    """
    teacher = build_tiny_model(family, dtype=compute, **LARGER)
    projections = started(teacher, NARROW, dtype, start="activation")
    student, taps = projections.student.train(), Taps(teacher, projections.student, projections, target="gather")
    checkpointing.enable(student, kind)
    if kind == "full":
        student.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    parameters, saved = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16), watch([*teacher.parameters(), *student.parameters(), *projections.parameters()]) as alive:
        with taps.recording(), torch.no_grad():
            teacher.model(input_ids=ids, use_cache=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), taps.comparing(None, None):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
            at_end(alive)
    return Sizes.of(teacher.config), taps, hidden, sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype, compute", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)], ids=["bfloat16", "autocast", "float32"])
def test_saved_bytes_of_taps_and_activations(dtype, compute, family):
    sizes, _, _, saved = forward(dtype, family, compute=compute)
    student, kinds = sizes.narrowed(NARROW), dict(compute_bytes=compute.itemsize)
    size, casts = dtype.itemsize, 0 if dtype == compute else costs.BF16 * student.layers * student.layer
    assert costs.cast_bytes(student, size, **kinds) == (0 if dtype == compute else costs.BF16 * student.matrices)  # the head's comes with the loss
    expected = costs.activation_bytes(student, TOKENS, student_bytes=size, **kinds) + costs.tap_bytes(sizes, NARROW, TOKENS, **kinds) + casts
    assert saved == pytest.approx(expected, rel=0.005)


class Alive(TorchDispatchMode):
    """Bytes of storages that operators made while this was on and that still exist."""

    def __init__(self, except_for):
        super().__init__()
        self.old, self.made = {tensor.untyped_storage().data_ptr() for tensor in except_for}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.old:
                self.made[storage._cdata] = storage._weak_ref(), storage.nbytes()
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not torch.UntypedStorage._expired(storage))


@pytest.mark.parametrize("kind", ["none", "cheap", "full"])
def test_what_is_alive_when_the_loss_is_computed(kind):
    found = []
    sizes, _, _, _ = forward(torch.bfloat16, "llama", kind, watch=Alive, at_end=lambda alive: found.append(alive.bytes()))
    student, last = sizes.narrowed(NARROW), TOKENS * (costs.FP32 + costs.BF16) * NARROW
    at_work = 0 if kind == "none" else (costs.activation_bytes(student, TOKENS) - last) // student.layers  # comes with the backward
    expected = costs.activation_bytes(student, TOKENS, kind) - at_work + costs.tap_bytes(sizes, NARROW, TOKENS, kind)
    assert found[0] == pytest.approx(expected, rel=0.03)


def test_memory_near_the_budget_of_the_step():
    """6144 tokens of Llama-3.2-3B at half its width, GiB a part; activations with what is cheap computed again."""
    sizes = Sizes.of(AutoConfig.for_model(**SHAPES["Llama-3.2-3B"]))
    found = costs.memory(sizes, 1536, 6144, checkpointing="cheap")
    for part, gib in dict(teacher=6.0, student=3.0, projections=3.5, adam=6.9, gradients=6.0, context=1.5).items():
        assert getattr(found, part) / 2**30 == pytest.approx(gib, abs=0.06), part
    assert 10 <= found.activations / 2**30 <= 12.5 and costs.tap_bytes(sizes, 1536, 6144) / 2**30 == pytest.approx(7.9, abs=0.06)
    assert found.peak / 2**30 <= 48


@pytest.mark.parametrize("vocabulary, tokens, width", [(128256, 6144, 1536), (151936, 4096, 1200), (32000, 300, 4096), (151936, 4096, 4096)])
def test_the_losses_chunk_is_the_kernels(vocabulary, tokens, width):
    held = costs.FP32 * vocabulary * width // 2
    assert costs.LOSS_BUDGET == launch.LINEAR_KD_BYTES
    assert costs.chunk_rows(tokens, 4 * vocabulary, held) == launch.linear_kd_rows(tokens, 4 * vocabulary, held)
