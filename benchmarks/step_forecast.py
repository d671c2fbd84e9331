"""What each rung of the ladder should take on an H100, by arithmetic: FLOPs and bytes over stated rates. A prediction to hold a measurement against.

The rates of a large copy and a large bf16 product are those that the benchmarks measure; how much of them the parts of a step reach is assumed here. Bytes
are of tensors that eager PyTorch reads and writes, op by op, counted per token from transformers' Llama; dispatch, launches and gaps are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from benchmarks.ladder import Setup, Size
from red.planning import costs

COPY, PRODUCT = 3.0e12, 798e12  # bytes and bf16 FLOPs a second of an H100: a large copy, read and written, and a large product
IN_A_MODEL = 0.75  # of PRODUCT: products of a model's shapes
FLOAT32 = 50e12  # FLOPs a second of float32 products, three quarters of the data sheet's
FLASH, MASKED = 350e12, 150e12  # FLOPs a second of attention: by documents or causal, and with a mask, which skips nothing
DOCUMENTS = 0.4  # of a causal row's scores lie inside its documents: the expectation for four of random lengths, 2 / (4 + 1)

# Bytes an entry, forward and backward where there is one
NORM, NORM_BACKWARD, NORM_FUSED = 36, 72, 22  # six eager passes, float32 inside; one pass each way, residual addition included
ROPE, ROPE_FUSED = 24, 8  # each way
GATE, GATE_BACKWARD, GATE_FUSED, GATE_FUSED_BACKWARD = 10, 18, 6, 10  # silu and its product
RESIDUAL = 6
TAP, TAP_EAGER = 16, 61  # difference, its gradient and the addition to the other gradient; with float32 copies between
LOGIT, LOGIT_CHUNKED, LOGIT_DENSE = 10, 270, 125  # five bf16 passes; the PyTorch reference; cross-entropy, two softmaxes and kl_div under autocast
GRADIENT = 18  # of a student's weight: bf16 to float32, added
CAST = 6  # of a float32 weight to bf16
ADAM = 40  # of a projection: gradient's norm and clipping, both moments, the parameter


@dataclass(frozen=True)
class Forecast:
    """Seconds, and GiB on the GPU at the peak (None for the peer)."""

    products: float  # of a micro-step, as the next five
    attention: float
    loss: float
    taps: float
    layers: float  # norms, rotary embedding, activation, residual additions
    weights: float  # casts and sums of gradients
    update: float  # once a step
    tokens_per_second: float
    peak_gib: float | None

    @property
    def micro(self) -> float:
        return self.products + self.attention + self.loss + self.taps + self.layers + self.weights


def forecast(setup: Setup, size: Size) -> Forecast:
    teacher = costs.Sizes.of(AutoConfig.for_model(**size.teacher))
    student, width = teacher.narrowed(size.width), size.width
    rung, settings = setup.rung, setup.settings
    tokens = (rung.rows or size.rows) * size.length
    micro_steps = size.tokens // tokens
    flops = costs.flops(teacher, width, context=size.length, sharing=size.tokens, tap_target=settings.get("tap_target", "gather"))
    fused, compiled = setup.environment.get("RED_BACKEND") == "auto", bool(settings.get("compile_layers"))
    bf16, varlen = settings.get("student_dtype") == "bfloat16", settings.get("packed_attention") == "varlen"
    checkpointing = settings.get("checkpointing", "none")

    per_token = peer_flops(teacher, student, tokens) if rung.peer else flops.floor + flops.targets
    if varlen:
        attention = DOCUMENTS * flops.attention / FLASH
    else:
        attention = flops.attention / FLASH if not rung.documents else 2 * flops.attention / MASKED
    logit = LOGIT_DENSE if rung.peer else LOGIT if fused else LOGIT_CHUNKED
    taps = (TAP if fused else TAP_EAGER) * teacher.layers * (teacher.readers + 2 * width)
    layers = layer_bytes(teacher, compiled, backward=False) + layer_bytes(student, compiled, backward=True, float32=not bf16)
    if checkpointing != "none":  # once more; "full" with the products and attention
        layers += layer_bytes(student, compiled, backward=False, float32=not bf16)
    if checkpointing == "full":
        per_token += 2 * student.layers * student.layer
        attention *= 1 + student.attention(size.length) / flops.attention
    weights = (GRADIENT + (0 if bf16 else CAST)) * student.matrices
    trained = costs.trainable(teacher, width)
    product = 0.0 if rung.peer else flops.projections * size.tokens * (2 / (PRODUCT * IN_A_MODEL) if setup.split_products else 1 / FLOAT32)
    seconds = dict(products=tokens * per_token / (PRODUCT * IN_A_MODEL), attention=tokens * attention, loss=tokens * logit * teacher.vocabulary / COPY,
                   taps=tokens * taps / COPY, layers=tokens * layers / COPY, weights=weights / COPY, update=product + ADAM * trained / COPY)  # fmt: skip
    step = micro_steps * sum(seconds[part] for part in ("products", "attention", "loss", "taps", "layers", "weights")) + seconds["update"]
    memory = costs.memory(teacher, width, tokens, checkpointing="cheap" if compiled else checkpointing, student_bytes=costs.BF16 if bf16 else costs.FP32)
    return Forecast(**seconds, tokens_per_second=size.tokens / step, peak_gib=None if rung.peer else memory.peak / 2**30)


def layer_bytes(model: costs.Sizes, fused: bool, backward: bool, float32: bool = False) -> float:
    """Of all layers, a token. A float32 stream under autocast makes norms and additions half as heavy again."""
    stream = 1.5 if float32 and backward else 1.0
    if fused:
        norms, rope, gate, residual = (NORM_FUSED if backward else 8), ROPE_FUSED * (1 + backward), GATE_FUSED + GATE_FUSED_BACKWARD * backward, 0
    else:
        norms, rope, gate, residual = NORM + NORM_BACKWARD * backward, ROPE * (1 + backward), GATE + GATE_BACKWARD * backward, RESIDUAL * (1 + backward)
    return model.layers * (2 * stream * (norms + residual) * model.width + rope * (model.query + model.key) + gate * model.ffn)


def peer_flops(teacher: costs.Sizes, student: costs.Sizes, tokens: int) -> float:
    """FLOPs a token of the eager LRC step (lrc_step.py): what is merged is merged in each micro-step, forward, and backward for A or B."""
    d, width = teacher.width, student.width
    chained = teacher.query + 2 * teacher.key
    attention = 2 * (3 * d * width + d * chained) + 2 * (d * chained + 6 * d * width) + 2 * (d * teacher.query + d * width) + 2 * (d * teacher.query + 2 * d * width)
    merged = 6 * 3 * teacher.ffn * width + 2 * 2 * 3 * teacher.ffn * d * width / tokens
    target = 2 * 2 * d * width  # B times the teacher's output, and its gradient for B
    head = 6 * student.head + 2 * 2 * teacher.vocabulary * d * width / tokens
    return 2 * teacher.multiplied + teacher.layers * (attention + merged + target) + head + 2 * 2 * d * width
