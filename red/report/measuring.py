"""Facts to be taken while the models are there: shapes and hashes, effective rank, channels, memory, and what red forecast for this very run."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from red.planning import costs
from red.training.erank_callback import first_rows
from red.data.loading import PackedDataset, for_attention
from red.erank import stream_eranks
from red.fitting.forecast import measured_rate
from red.planning.gpus import GPUS
from red.sharing.licences import name_of
from red.planning.memory_advice import needed, parts, row_length
from red.planning.planner import UTILISATION, plan
from red.starting import from_file, start_cost
from red.data.streaming import PackedStream

ERANK_TOKENS = 1024  # whose states are counted
STREAMED = 64  # rows of a stream that are looked at for that
HASHED = 2**28  # bytes of tokens; more are not hashed, which would take seconds
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def model_facts(model: PreTrainedModel) -> dict:
    """Name, shape, parameters and the SHA-256 of the configuration (without names and versions, which say nothing of the model)."""
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "name": name_of(model.name_or_path) if model.name_or_path else None,
        "parameters": model.num_parameters(),
        "config_sha256": digest,
        **{key: getattr(model.config, key, None) for key in SHAPE},
    }


def data_facts(source, rows) -> dict:
    """What was trained on: a name, never a path; rows, tokens and their hash where they lie in memory."""
    facts: dict = {"name": Path(source).name if isinstance(source, (str, Path)) else f"a {type(source).__name__}"}
    if isinstance(rows, PackedDataset):
        facts |= {"rows": len(rows), "tokens": rows.num_tokens, "fill": rows.fill}
        if rows.tokens.nbytes <= HASHED:
            facts["tokens_sha256"] = hashlib.sha256(rows.tokens.astype("<i4").tobytes()).hexdigest()
    elif hasattr(rows, "__len__"):
        facts["rows"] = len(rows)
    return facts


class Ranks:
    """The effective rank of models on one batch: the first rows that hold ERANK_TOKENS tokens."""

    def __init__(self, rows: Iterable[dict], device: torch.device, accelerator=None, held_out: bool = False):
        rows = rows.first(STREAMED) if isinstance(rows, PackedStream) else rows  # without its workers, and from its beginning
        self.batch, self.device, self.accelerator = first_rows(rows, ERANK_TOKENS), device, accelerator
        self.seconds, self.held_out = 0.0, held_out

    def of(self, model: PreTrainedModel) -> list[float | None]:
        """At the embedding and after each layer; None where the states have no spectrum."""
        began = time.perf_counter()
        batch = {key: value.to(self.device) for key, value in for_attention(self.batch, model.config).items()}
        if self.accelerator is None:
            values = stream_eranks(model, batch, max_tokens=ERANK_TOKENS)
        else:
            with self.accelerator.autocast():
                values = stream_eranks(model, batch, max_tokens=ERANK_TOKENS)
        self.seconds += time.perf_counter() - began
        return [value if math.isfinite(value) else None for value in values]

    @property
    def facts(self) -> dict:
        return {"tokens": min(int(self.batch["token_mask"].sum()), ERANK_TOKENS), "held_out": self.held_out, "seconds": self.seconds}


@torch.no_grad()
def channel_maps(projections, importance: dict | None, *, sharded: bool = False) -> dict[str, torch.Tensor]:
    """`kept [d]`: the share of each teacher channel that the student's stream has at its start: 1 or 0 of a selection, else the diagonal of the orthogonal
    projector onto the embedding's map (all of them together are d'); left out where that is `sharded`. With a calibration also its `scores [d]` and
    `mean_square [2L+1, d]`. All float32."""
    found = dict(importance or {})
    embedding = projections["model.embed_tokens.weight"].master  # [d, d']
    if projections.channels is not None:
        found["kept"] = torch.zeros(len(embedding)).index_fill(0, projections.channels.cpu(), 1.0)
    elif not sharded:
        found["kept"] = torch.linalg.qr(embedding.detach().double().cpu()).Q.square().sum(1)
    return {name: value.detach().float().cpu().contiguous().clone() for name, value in found.items()}


def peak_memory(device: torch.device) -> dict:
    """The most bytes held so far: by torch on a GPU, else by the whole process, which includes Python and its libraries; None where nobody counts."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "torch's allocator on this rank's GPU"}
    try:
        import resource
    except ImportError:  # Windows
        return {"bytes": None, "of": "not measured on this system"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "the whole process, beyond what it held before the run"}


def forecast_start(config, teacher, tokens: int) -> dict | None:
    """Seconds and bytes of calibration, start and fit, see `red.starting`; None where the start comes out of a file."""
    if from_file(config):
        return None
    cost = start_cost(config, teacher.config, tokens, teacher.dtype.itemsize)
    return {
        "seconds": cost.seconds,
        "host_bytes": cost.host_bytes,
        "device_bytes": cost.device_bytes,
        "flops": cost.flops,
        "how": "counted operations at the rate this device reaches in one large float32 product, a floor",
    }


def forecast_training(trainer) -> dict:
    """Seconds of a step and bytes at its peak on this rank: `red plan` for a GPU it knows, else counted operations and shapes."""
    args, config = trainer.args, trainer.teacher.config
    rows, length, micro = args.per_device_train_batch_size, row_length(trainer), args.gradient_accumulation_steps
    gathers = trainer.projections.channels is not None and args.tap_target in ("auto", "gather")
    common = dict(checkpointing=args.checkpointing, tap_target="gather" if gathers else "projected")
    gpu = _known_gpu(args.device)
    if gpu:
        found = plan(
            config,
            args.hidden_size,
            gpu=gpu,
            gpus=args.world_size,
            per_device_train_batch_size=rows,
            max_length=length,
            gradient_accumulation_steps=micro,
            sharding="full" if args.sharding else "none",
            student_dtype="bfloat16" if trainer.student.dtype == torch.bfloat16 else "float32",
            **common,
        ).placements[-1]
        held = {name: value for name, value in asdict(found.memory).items() if value}
        return {
            "step_seconds": found.step_seconds,
            "step_tokens": found.step_tokens,
            "bytes": found.memory.peak,
            "parts": held,
            "how": f"red plan for {args.world_size} {gpu} at {UTILISATION:.0%} of the data sheet's products, which is assumed",
        }
    held = parts(trainer)
    own = rows * length * micro
    seconds = None
    if args.device.type == "cpu":
        flops = costs.flops(costs.Sizes.of(config), args.hidden_size, context=length, sharing=own, **common).total
        seconds = flops * own / measured_rate(args.device)
    return {
        "step_seconds": seconds,
        "step_tokens": own * args.world_size,
        "bytes": needed(held),
        "parts": held,
        "how": "counted operations at the rate this device reaches in one large float32 product, a floor; bytes by shapes",
    }


def _known_gpu(device: torch.device) -> str | None:
    """The name in red's table of this rank's GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace(" ", "")
    return next((known for known in GPUS if known in name), None)
