"""How long a training step takes on this device, before there is anything to train.

A CPU is timed: one large product says little of small ones, of norms and of activations, so a forecast by its rate alone is far too low for small models
(tests/test_pace.py). One decoder layer of each model is run at its real widths, with random weights.
"""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import torch
from transformers import AutoModel, PreTrainedConfig

from red.config import REDConfig
from red.fitting.forecast import measured_rate
from red.planning import costs
from red.planning.costs import Sizes
from red.planning.planner import UTILISATION
from red.student import student_config

LARGEST = 1 << 23  # weights of a layer that is timed: a larger one takes seconds, and its products are large enough to keep their rate
TOKENS, TIMES = 512, 3  # of the rows that a layer is timed on, and how often after a first pass


class Pace(NamedTuple):
    """Of an optimiser step of one process, communication left out."""

    seconds: float
    floor: bool  # it takes at least that long
    how: str  # they were found, in words


def step_seconds(shape: PreTrainedConfig, config: REDConfig, length: int) -> Pace:
    """Of a teacher of this `shape` on rows of `length` tokens."""
    sizes, rows = Sizes.of(shape), config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = rows * length
    counted = costs.flops(sizes, config.hidden_size, context=length, sharing=tokens, checkpointing=config.checkpointing, tap_target="projected")
    cpu = config.device.type == "cpu"
    rate = measured_rate(config.device, dtype=torch.bfloat16 if config.bf16 and not cpu else torch.float32)
    if not cpu:
        return Pace(counted.total * tokens / (rate * UTILISATION), False, f"at {UTILISATION:.0%} (assumed) of this device's measured rate of products")
    if sizes.layer > LARGEST:
        return Pace(counted.total * tokens / rate, True, "products alone, at this device's measured rate")
    at_once = max(min(config.per_device_train_batch_size, TOKENS // length), 1)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it is
        layer = _layer_seconds(shape, at_once, length, grad=False, bf16=config.bf16)
        narrow = _layer_seconds(student_config(shape, config.hidden_size), at_once, length, grad=True, bf16=config.bf16)
    again = narrow / 3 if config.checkpointing == "full" else 0.0  # a forward pass, of three
    student = sizes.narrowed(config.hidden_size)
    beside = 2 * sizes.head + 6 * student.head + counted.projections + counted.targets  # FLOPs a token outside the layers
    seconds = (layer + narrow + again) * sizes.layers * rows / at_once + beside * tokens / rate
    return Pace(seconds, False, "from a layer of each model, timed on this device just now")


def _layer_seconds(config: PreTrainedConfig, rows: int, length: int, *, grad: bool, bf16: bool) -> float:
    """Seconds of a decoder layer on `rows` rows, forward, and backward with `grad`; under autocast with `bf16`."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:1])
    model = AutoModel.from_config(config, dtype=torch.float32)
    ids, positions = torch.zeros(rows, length, dtype=torch.long), torch.arange(length).expand(rows, length)

    def run() -> None:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            if grad:
                hidden.sum().backward()

    run()  # the first pass is slower
    began = time.perf_counter()
    for _ in range(TIMES):
        run()
    return (time.perf_counter() - began) / TIMES  # a mean: what a machine gives that has other work too
