"""The checks of `red doctor`: each looks at one thing of a teacher, a text and a machine, and returns a Finding. `red.doctor.examination` gathers them.

The labels, the packing and the loss are held against something that red did not write: transformers' own loss of each document alone, and the plain
formulas in float64.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from red.planning import costs
from red.planning.memory_advice import CHUNK
from red.data import loading as data
from red.training import losses
from red.training.checkpoints import ADAM_MOMENTS
from red.config import REDConfig
from red.errors import REDError
from red.files import in_gib
from red_kernels import linear_kd

UNKNOWN = 0.05  # share of unknown words in a text that its own tokenizer does not reach
LOSS_TOKENS = 128  # their logits exist whole, in float64, next to red's
# Relative errors that rounding explains, by what the numbers are stored in: of two orders of summing, through all layers.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """What one check found. `ok` is None where it could not look."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def vocabulary(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict]) -> Finding:
    """Do the tokenizer's ids mean what the teacher's embedding means by them?"""
    size = teacher.config.vocab_size
    try:
        data.check_examples(examples, tokenizer, size)
    except REDError as error:
        what, _, remedy = str(error).partition(". ")
        return Finding("vocabulary", False, what, remedy)
    ends = _ids(teacher.config.eos_token_id) | _ids(getattr(teacher.generation_config, "eos_token_id", None))
    if tokenizer.eos_token_id is not None and ends and tokenizer.eos_token_id not in ends:
        return Finding("vocabulary", False, f"the tokenizer ends texts with id {tokenizer.eos_token_id}, the teacher's config with {sorted(ends)}",
                       "The student would not learn to stop. Set tokenizer.eos_token, or the config's eos_token_id.")
    ids = torch.cat([torch.as_tensor(example["input_ids"]).long() for example in examples])
    unknown = float((ids == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
    if unknown > UNKNOWN:
        return Finding("vocabulary", False, f"{unknown:.0%} of the text is unknown to the tokenizer", "Use the teacher's own tokenizer, and text of its language.")
    return Finding("vocabulary", True, f"{len(tokenizer):,} entries for {size:,} rows of the embedding; ids up to {int(ids.max()):,}; {unknown:.1%} unknown words")


def labels(batch: dict[str, Tensor]) -> Finding:
    """Does every label stand at its own token, and none at padding or at the beginning of a document? The shift by one comes later, in the loss."""
    ids, wanted, mask, positions = (batch[name] for name in ("input_ids", "labels", "token_mask", "position_ids"))
    labelled = wanted != data.IGNORE
    count = int(labelled.sum())
    if not count:
        return Finding("labels", False, "no token has a label", "Give text that is to be learnt; in prompt/completion data the completions have the labels.")
    if (labelled & ~mask).any():
        return Finding("labels", False, f"{int((labelled & ~mask).sum())} labels stand at padding", "Set labels to -100 wherever token_mask is False.")
    if (labelled & (positions == 0)).any():
        return Finding("labels", False, f"{int((labelled & (positions == 0)).sum())} labels stand at the first token of a document, which nothing before it predicts",
                       "Set them to -100; red.data.loading.pack does.")
    same = float((wanted == ids)[labelled].float().mean())
    if same < 1:
        ahead = float((wanted[:, :-1] == ids[:, 1:])[labelled[:, :-1]].float().mean())
        if ahead > same:
            return Finding("labels", False, f"{ahead:.0%} of the labels are the next token: they are shifted already, and red would shift them again",
                           "Give labels in the place of their own token, as transformers expects them.")
        return Finding("labels", False, f"only {same:.0%} of the labels are the token they stand at", "Give labels that are the token itself, or -100.")
    return Finding("labels", True, f"{count:,} of {int(mask.sum()):,} tokens are predicted, each its own; none at padding or at a document's beginning")


def shift(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Finding:
    """red's cross entropy of a packed row against transformers' own loss of each of its documents alone; and against chance."""
    row = {key: value[:1] for key, value in batch.items()}
    hidden, counts = _states(teacher, row)[0], losses.count([row], teacher.device)
    targets = losses.next_labels(row["labels"])[0]
    ours = linear_kd(hidden, _head(teacher), hidden, _head(teacher), targets, kl_weight=0.0, num_tokens=counts.labels).ce.item()
    total, number = 0.0, 0
    for start, end in documents(row):
        wanted = row["labels"][:, start:end]
        predicted = int((wanted[:, 1:] != data.IGNORE).sum())
        if predicted:
            with torch.no_grad():
                total += predicted * teacher(input_ids=row["input_ids"][:, start:end], labels=wanted, use_cache=False).loss.item()
            number += predicted
    if number == 0:
        return Finding("shift", None, "the first row predicts nothing")
    theirs, chance = total / number, math.log(teacher.config.vocab_size)
    found = f"cross entropy {ours:.4f} nats over {int(counts.labels)} tokens of a packed row; {theirs:.4f} over {number}, document by document by transformers"
    if int(counts.labels) != number or not abs(ours - theirs) <= ROUNDING[teacher.dtype] * max(abs(theirs), 1.0):
        return Finding("shift", False, found, "The loss does not predict the next token of each document. Check position_ids and labels of packed rows; else report this as a bug of red.")
    if theirs >= chance:
        return Finding("shift", False, f"{found}. Guessing has {chance:.2f}", "This teacher does not know such text: another tokenizer's ids, another language, or untrained weights.")
    return Finding("shift", True, f"{found}; guessing has {chance:.2f}")


def packing(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Finding:
    """A document alone against the same document among others in its row: the last hidden states."""
    inside = [documents({key: value[index:index + 1] for key, value in batch.items()}) for index in range(len(batch["input_ids"]))]
    chosen = max(range(len(inside)), key=lambda index: len(inside[index]))
    if len(inside[chosen]) < 2:
        return Finding("packing", None, "no row of the first batch holds two documents")
    row = {key: value[chosen:chosen + 1] for key, value in batch.items()}
    packed, worst = _states(teacher, row)[0], 0.0
    for start, end in inside[chosen]:
        alone = _states(teacher, {"input_ids": row["input_ids"][:, start:end], "position_ids": torch.arange(end - start, device=teacher.device)[None]})[0]
        worst = max(worst, _error(packed[start:end], alone))
    allowed, way = ROUNDING[teacher.dtype], getattr(teacher.config, "_attn_implementation", None)
    found = f"{len(inside[chosen])} documents of a row, each alone: hidden states differ by {worst:.1e} ({way} attention; rounding explains {allowed:.0e})"
    if not worst <= allowed:
        return Finding("packing", False, found, "Documents see each other, or their positions are wrong. Load the teacher with attn_implementation=sdpa, or set packing=False.")
    return Finding("packing", True, found)


def loss(teacher: PreTrainedModel, batch: dict[str, Tensor], width: int, config: REDConfig) -> Finding:
    """The fused loss and its gradients against the plain formulas: in the same dtype, and in float64.

    The student's states and head are the first `width` channels of the teacher's: a real size, without a start.
    """
    hidden, targets = _states(teacher, batch).flatten(0, 1), losses.next_labels(batch["labels"]).flatten()
    chosen = (targets != data.IGNORE).nonzero()[:LOSS_TOKENS, 0]
    if not len(chosen):
        return Finding("loss", None, "no token has a label")
    hidden, targets, head = hidden[chosen], targets[chosen], _head(teacher)
    settings = dict(temperature=config.temperature, divergence=config.divergence, beta=config.jsd_beta, ce_weight=config.ce_weight, kl_weight=config.kl_weight)

    def fused(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return linear_kd(student, student_head, teacher, teacher_head, targets, chunk_size=config.loss_chunk_size, **settings).loss

    def dense(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return plain_loss(student, student_head, teacher, teacher_head, targets, **settings)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        student = [tensor[:, :width].to(dtype).detach().clone().requires_grad_() for tensor in (hidden, head)]
        value = function(*student, hidden.to(dtype), head.to(dtype))
        return [value.detach(), *torch.autograd.grad(value, student)]

    truth = run(dense, torch.float64)
    found = {name: max(_error(one, other) for one, other in zip(run(function, teacher.dtype), truth, strict=True)) for name, function in (("fused", fused), ("dense", dense))}
    allowed = max(4 * found["dense"], ROUNDING[teacher.dtype])
    text = (f"{len(chosen)} tokens, {config.divergence} at temperature {config.temperature:g}: loss {truth[0].item():.4f} in float64; loss and gradients are off by at most "
            f"{found['fused']:.1e} fused, {found['dense']:.1e} dense ({str(teacher.dtype).removeprefix('torch.')})")
    if not found["fused"] <= allowed:
        return Finding("loss", False, text, "Run `python -m pytest tests/kernels` on this machine, set RED_BACKEND=torch if one fails, and report it.")
    return Finding("loss", True, text)


def plain_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, targets: Tensor, *, temperature: float, divergence: str, beta: float,
               ce_weight: float, kl_weight: float) -> Tensor:
    """CE + D of every row, by torch's own functions, softmax in float32 at least; see `red_kernels.linear_kd`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z, teacher = (hidden @ head.T).to(wide), (teacher_hidden @ teacher_head.T).to(wide)
    q, p = (x.div(temperature).log_softmax(-1) for x in (z, teacher))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="batchmean", log_target=True)

    if divergence == "jsd":
        m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
        distance = beta * kl(p, m) + (1 - beta) * kl(q, m)
    else:
        distance = kl(p, q) if divergence == "forward" else kl(q, p)
    return ce_weight * F.cross_entropy(z, targets) + kl_weight * distance


def weights(teacher: PreTrainedModel) -> Finding:
    """Is every weight finite?"""
    broken = [name for name, parameter in teacher.named_parameters() if not parameter.isfinite().all()]
    if broken:
        return Finding("weights", False, f"{len(broken)} of the teacher's tensors have NaN or infinite values: {', '.join(broken[:3])}",
                       "Load the teacher in float32 or bfloat16 (float16 overflows), or get its files again.")
    return Finding("weights", True, f"all {sum(parameter.numel() for parameter in teacher.parameters()):,} are finite ({str(teacher.dtype).removeprefix('torch.')})")


def states(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Finding:
    """Is every hidden state of the first batch finite?"""
    place = data.for_attention(batch, teacher.config)
    with torch.no_grad():
        found = teacher.model(input_ids=place["input_ids"], position_ids=place["position_ids"], use_cache=False, output_hidden_states=True).hidden_states
    real = place["token_mask"]
    for layer, state in enumerate(found):
        if not state[real].isfinite().all():
            where = "the embedding" if layer == 0 else f"layer {layer}"
            return Finding("states", False, f"NaN or infinite hidden states after {where}", "Load the teacher in bfloat16 or float32; float16 overflows where activations are massive.")
    return Finding("states", True, f"finite after the embedding and all {len(found) - 1} layers; the largest is {max(state[real].abs().max().item() for state in found):.3g}")


def disk(sizes: costs.Sizes, config: REDConfig, steps: int | None = None, done: int = 0) -> Finding:
    """Room for the checkpoints to come and the exported student, from shapes; `done` of the `steps` lie behind it. None: as many as max_steps says."""
    student = (costs.FP32 if config.device.type == "cpu" else costs.BF16) * sizes.narrowed(config.hidden_size).parameters
    masters = costs.FP32 * costs.trainable(sizes, config.hidden_size)
    each, number = student + (1 + ADAM_MOMENTS) * masters, _checkpoints(config, steps or config.max_steps, done)
    needed = number * each + student + masters  # the start is kept too
    folder = next(path for path in [Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents] if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{in_gib(free)} free at {folder}; {number} checkpoint{'s' * (number != 1)} of {in_gib(each)}, the start and the student take {in_gib(needed)}"
    if free < needed:
        return Finding("disk", False, found, "Choose another output_dir, lower save_total_limit, or raise save_steps.")
    return Finding("disk", True, found)


def memory(sizes: costs.Sizes, config: REDConfig, free: int, length: int | None = None) -> Finding:
    """Room for a training step, from shapes; `free` bytes were there before the teacher was read.
    `length` is of the rows; None: max_length, which rows that are not packed need not reach."""
    most = "at most " if length is None and not config.packing else ""
    length = config.max_length if length is None else length
    tokens = config.per_device_train_batch_size * length
    on_cpu, narrow = config.device.type == "cpu", config.student_dtype
    bf16_student = narrow == "bfloat16" or (narrow == "auto" and config.bf16 and not on_cpu and config.world_size == 1)
    student_bytes = costs.BF16 if bf16_student else costs.FP32
    teacher_bytes = {"auto": costs.FP32 if on_cpu else costs.BF16, "float32": costs.FP32, "float64": 8}.get(config.teacher_dtype, costs.BF16)
    forecast = costs.memory(sizes, config.hidden_size, tokens, checkpointing=config.checkpointing, tap_target="projected", student_bytes=student_bytes, teacher_bytes=teacher_bytes,
                            compute_bytes=costs.BF16 if config.bf16 else student_bytes, chunk=config.loss_chunk_size or (CHUNK if on_cpu else None))
    needed = forecast.peak - (forecast.context if on_cpu else 0)
    found = f"{in_gib(free)} free ({config.device.type}); a step of {config.per_device_train_batch_size} rows of {length} tokens takes {most}about {in_gib(needed)}"
    if config.sharding:
        return Finding("memory", None, f"{found} on one process; what sharding leaves of it, `red plan` says")
    if free < needed:
        return Finding("memory", False, found, "Lower per_device_train_batch_size (raise gradient_accumulation_steps) or max_length, or set checkpointing=cheap or full; see `red plan`.")
    return Finding("memory", True, found)


def documents(row: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Where the documents of one row `[1, T]` begin and end."""
    real = int(row["token_mask"].sum())
    starts = (row["position_ids"][0, :real] == 0).nonzero().flatten().tolist()
    return list(zip(starts, [*starts[1:], real], strict=True))


def _checkpoints(config: REDConfig, steps: int, done: int = 0) -> int:
    """How many are going to be added, as many as stay at once; 1 where the number of steps is not known (0 or less)."""
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    if strategy == "no":
        return 0
    every = math.ceil(config.save_steps * steps) if config.save_steps < 1 else config.save_steps
    coming = math.ceil(steps / every) - int(done // every) if strategy == "steps" and steps > 0 and every else 1
    if strategy == "epoch" and config.max_steps <= 0:
        coming = math.ceil(config.num_train_epochs)
    return min(coming, config.save_total_limit + 1) if config.save_total_limit else coming


@torch.no_grad()
def _states(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states `[B, T, d]`, as the trainer asks for them."""
    place = data.for_attention({key: batch[key] for key in ("input_ids", "position_ids")}, teacher.config)
    found = teacher.model(**place, use_cache=False).last_hidden_state
    return found.reshape(*batch["input_ids"].shape, -1)


def _head(teacher: PreTrainedModel) -> Tensor:
    return teacher.get_output_embeddings().weight.detach()


def _error(one: Tensor, truth: Tensor) -> float:
    """‖one - truth‖ / ‖truth‖."""
    truth = truth.double()
    return ((one.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def _ids(value) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
