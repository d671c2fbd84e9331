"""`red plan`: what a distillation will need, before any GPU is rented: parameters, memory by part, FLOPs, time, and the micro-batch that fits."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from red.planning import costs
from red.planning.costs import Flops, Memory, Sizes, Traffic
from red.errors import REDError
from red.files import nearest
from red.planning.gpus import GPU, find_gpu
from red.planning.shapes import SHAPES, known_shape

UTILISATION = 0.40  # of the data sheet's products; an assumption: no training step of this project has been timed on a GPU
STEP_TOKENS = 49152  # of the paper's first run (arXiv 2605.29327)
SPARE = 0.05  # of a GPU's memory, left to the allocator's gaps


@dataclass(frozen=True)
class Placement:
    """The run on one number of GPUs. Seconds are of an optimiser step."""

    gpus: int
    shards: int  # GPUs that share one copy of everything
    accumulation: int  # micro-batches a step
    memory: Memory
    largest_batch: int  # rows of the largest micro-batch that fits; 0 if none does
    flops: Flops
    traffic: Traffic
    compute: float
    step_tokens: int
    hours: float  # of the whole budget, with all communication hidden behind compute
    hours_apart: float  # with none hidden

    @property
    def step_seconds(self) -> float:
        return max(self.compute, self.traffic.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, with all communication hidden."""
        return self.step_tokens / self.gpus / self.step_seconds

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that computes: with no communication hidden, and with all of it."""
        return self.compute / (self.compute + self.traffic.seconds), self.compute / self.step_seconds


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `str` is its report."""

    name: str
    teacher: Sizes
    student: Sizes
    trainable: int
    gpu: GPU
    settings: dict  # what was asked for
    placements: list[Placement]

    @property
    def start_bytes(self) -> int:
        """On each GPU while a sharded run starts: it calibrates and starts its projections with whole weights."""
        return costs.start_bytes(self.teacher, self.student.width)

    def to_dict(self) -> dict:
        """Everything, in numbers that JSON holds: parameters, bytes, FLOPs a token, seconds, hours."""
        def placed(it: Placement) -> dict:
            return {**asdict(it), "memory": {**asdict(it.memory), "peak": it.memory.peak, "fits": fits(it.memory, self.gpu)},
                    "flops": {**asdict(it.flops), "floor": it.flops.floor, "useful": it.flops.useful, "total": it.flops.total},
                    "traffic": {**asdict(it.traffic), "bytes": it.traffic.bytes}, "tokens_per_second": it.tokens_per_second, "efficiency": it.efficiency}

        return {"teacher": self.name, "parameters": {"teacher": self.teacher.parameters, "student": self.student.parameters, "trainable": self.trainable},
                "start_bytes": self.start_bytes,
                "shape": {"teacher": asdict(self.teacher), "student": asdict(self.student)}, "gpu": asdict(self.gpu), "settings": self.settings,
                "placements": [placed(it) for it in self.placements]}

    def __str__(self) -> str:
        from red.planning.report import report

        return report(self)


def plan(teacher, hidden_size: int, *, gpu: str = "H100", gpus: int = 1, per_device_train_batch_size: int = 3, max_length: int = 2048,
         gradient_accumulation_steps: int | None = None, tokens: float = 10e9, sharding: str = "full", sync_each_batch: bool = False,
         checkpointing: str = "none", student_dtype: str = "bfloat16", tap_target: str = "projected", utilisation: float = UTILISATION) -> Plan:
    """Plan a distillation on 1 … `gpus` GPUs. Arithmetic alone: no weight is read, nothing is measured.

    Args:
        teacher: a name of `red.planning.shapes.SHAPES` (with or without organisation and -Instruct), a folder or config.json, a name on the hub, or a transformers config.
        hidden_size: the student's width d'.
        gpu: a name of `red.planning.gpus.GPUS`.
        per_device_train_batch_size, max_length: rows of a micro-batch on one GPU, and tokens of a row.
        gradient_accumulation_steps: micro-batches of a step; None comes nearest to steps of 49152 tokens over all GPUs.
        tokens: the budget that is to be trained on.
        sharding: "full" shares everything over all GPUs (FSDP2), "none" keeps a copy on each (data parallel).
        sync_each_batch: reduce sharded gradients after every micro-batch (accelerate's setting of that name) instead of holding their sum whole until the step.
        checkpointing: "none", "cheap" (norms, activations and rotary embeddings are computed again) or "full" (every layer is).
        student_dtype: of the student's weights on the GPU: "bfloat16", or "float32" under autocast; plain data parallel on several GPUs takes float32 always.
        tap_target: "gather" for starts that select channels, "projected" for the others.
        utilisation: share of the data sheet's bf16 products that the whole step reaches. The default is an assumption, not a measurement.

    Raises:
        REDError: an unknown teacher or GPU, a family or width that cannot be, or an option out of range.
    """
    from red.sharing.export import check_width

    config = config_of(teacher)
    for name in LARGEST:
        _require_size(name, getattr(config, name, None))
    check_width(config, hidden_size)
    for name, value, allowed in (("sharding", sharding, ("full", "none")), ("checkpointing", checkpointing, ("none", "cheap", "full")),
                                 ("student_dtype", student_dtype, ("bfloat16", "float32")), ("tap_target", tap_target, ("gather", "projected"))):
        if value not in allowed:
            raise REDError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}.")
    accumulation = 1 if gradient_accumulation_steps is None else gradient_accumulation_steps
    for name, value in (("gpus", gpus), ("per_device_train_batch_size", per_device_train_batch_size), ("max_length", max_length),
                        ("gradient_accumulation_steps", accumulation), ("tokens", tokens)):
        if not 1 <= value < math.inf:  # NaN is not either
            raise REDError(f"{name}={value!r} must be at least 1 and finite.")
    if not 0 < utilisation <= 1:
        raise REDError(f"utilisation={utilisation!r} must lie between 0 and 1: the share of the GPU's bf16 products that is reached, such as 0.4.")

    sizes, card = Sizes.of(config), find_gpu(gpu)
    options = dict(per_device_train_batch_size=per_device_train_batch_size, max_length=max_length, checkpointing=checkpointing, student_dtype=student_dtype,
                   tap_target=tap_target, tokens=tokens, utilisation=utilisation, sharding=sharding, sync_each_batch=sync_each_batch, gradient_accumulation_steps=gradient_accumulation_steps)
    counts = sorted({2**power for power in range(gpus.bit_length())} | {gpus})
    return Plan(teacher if isinstance(teacher, str) else config.model_type, sizes, sizes.narrowed(hidden_size), costs.trainable(sizes, hidden_size), card, options,
                [_placement(sizes, hidden_size, card, count, options) for count in counts])


LARGEST = {"num_hidden_layers": 10**4, "hidden_size": 10**6, "intermediate_size": 10**7, "num_attention_heads": 10**5, "num_key_value_heads": 10**5,
           "head_dim": 10**5, "vocab_size": 10**8}  # beyond these a config is damaged, and arithmetic on it need not end


def _require_size(name: str, value) -> None:
    if value is not None and not (type(value) is int and 1 <= value <= LARGEST[name]):
        raise REDError(f"{name}={value!r} in the teacher's config is no size; expected 1 to {LARGEST[name]}. Get its config.json again.")


def config_of(teacher):
    """The transformers config of what `plan` takes for a teacher; a shape of the table needs neither network nor files."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from red import families

    if not isinstance(teacher, (str, Path)):
        families.check_family(teacher)
        return teacher
    path, shape = Path(teacher), known_shape(str(teacher))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name in set(LARGEST) & set(found):  # before a list as long as the layers is made
                _require_size(name, found[name])
            config = AutoConfig.for_model(**found)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError, StrictDataclassError) as error:
            raise REDError(f"{teacher} is no model's config.json: {error}. Give the file that lies beside the teacher's weights.") from error
        return config_of(config)
    if shape is not None and not path.is_dir():
        return AutoConfig.for_model(**shape)
    if "/" not in str(teacher) and not path.is_dir():
        close = nearest(str(teacher), SHAPES)
        hint = f"did you mean {close}?" if close else f"known are {', '.join(SHAPES)}."
        raise REDError(f"The teacher {str(teacher)!r} is neither a known shape nor a folder; {hint}")
    return families.teacher_config(teacher)


def fits(memory: Memory, gpu: GPU) -> bool:
    return memory.peak <= (1 - SPARE) * gpu.memory


def _placement(teacher: Sizes, width: int, gpu: GPU, gpus: int, options: dict) -> Placement:
    shards = gpus if options["sharding"] == "full" else 1
    rows, length = options["per_device_train_batch_size"], options["max_length"]
    checkpointing, tap_target = options["checkpointing"], options["tap_target"]
    accumulation = options["gradient_accumulation_steps"] or max(round(STEP_TOKENS / (rows * length * gpus)), 1)

    copies = gpus > 1 and shards == 1  # plain data parallel reduces gradients in the weights' dtype, so red keeps them fp32 there
    student_bytes = costs.BF16 if options["student_dtype"] == "bfloat16" and not copies else costs.FP32

    def memory(rows: int) -> Memory:
        return costs.memory(teacher, width, rows * length, shards=shards, replicas=gpus // shards, whole_gradients=accumulation > 1 and not options["sync_each_batch"],
                            checkpointing=checkpointing, tap_target=tap_target, student_bytes=student_bytes)

    beyond = 1  # rows that do not fit; the bytes grow with the rows
    while fits(memory(beyond), gpu):
        beyond *= 2
    largest = bisect_left(range(beyond), True, 1, key=lambda rows: not fits(memory(rows), gpu)) - 1
    own = rows * length * accumulation  # tokens a GPU takes in a step
    flops = costs.flops(teacher, width, context=length, sharing=own * shards, checkpointing=checkpointing, tap_target=tap_target)
    traffic = costs.traffic(teacher, width, gpu, shards=shards, replicas=gpus // shards, micro_steps=accumulation,
                            reductions=accumulation if options["sync_each_batch"] else 1, tap_target=tap_target)
    compute = flops.total * own / (gpu.flops * options["utilisation"])
    steps = options["tokens"] / (own * gpus)
    return Placement(gpus, shards, accumulation, memory(rows), largest, flops, traffic, compute, own * gpus,
                     steps * max(compute, traffic.seconds) / 3600, steps * (compute + traffic.seconds) / 3600)
