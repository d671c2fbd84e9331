"""Out of memory: what takes it, in bytes, and what to lower."""

from __future__ import annotations

import contextlib

import torch

from red.planning import costs
from red.training.checkpoints import ADAM_MOMENTS
from red.errors import REDError
from red.files import in_gib

MOVING = ("taps", "student's activations", "autocast's copies", "loss")  # of a micro-batch
STEP_ONLY = "their gradients"  # of the projections: after the last micro-batch of a step
CHUNK = 1024  # linear_kd's, where Triton does not choose one


@contextlib.contextmanager
def explained(trainer):
    """Turn torch's out-of-memory error inside into a REDError with numbers and remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise REDError(advice(trainer, error)) from error


def parts(trainer) -> dict[str, int]:
    """Bytes by what takes them on this rank, from shapes alone: the standing parts exactly, of the tensors that are there; those of a micro-batch as
    `red.planning.costs` counts them."""
    args, teacher, student, projections = trainer.args, trainer.teacher, trainer.student, trainer.projections
    masters = _size(projections.parameters())
    trained = [p for p in student.parameters() if p.requires_grad]  # their gradients are summed in the projections' dtype
    summed = _size(trained) // student.dtype.itemsize * projections.parameters()[0].element_size()
    standing = {"teacher": _size(teacher.parameters()), "student": _size(student.parameters()), "student's gradients": summed, "projections": masters,
                STEP_ONLY: masters, "Adam's moments": ADAM_MOMENTS * masters}

    sizes, width, item = costs.Sizes.of(teacher.config), student.config.hidden_size, student.dtype.itemsize
    tokens, compute = args.per_device_train_batch_size * row_length(trainer), costs.BF16 if args.bf16 else item
    gathers = projections.channels is not None and args.tap_target in ("auto", "gather")
    chunk = args.loss_chunk_size or (None if args.device.type == "cuda" else CHUNK)
    taps = costs.tap_bytes(sizes, width, tokens, args.checkpointing, "gather" if gathers else "projected", compute) if args.tap_weight else 0
    activations = costs.activation_bytes(sizes.narrowed(width), tokens, args.checkpointing, item, compute)
    casts = 0 if args.sharding else costs.cast_bytes(sizes.narrowed(width), item, compute)
    return {**standing, **dict(zip(MOVING, (taps, activations, casts, costs.loss_bytes(sizes, width, tokens, compute, chunk)), strict=True))}


def needed(found: dict[str, int]) -> int:
    """Bytes at the fullest moment: the projections' gradients come when what a micro-batch holds has gone."""
    passing = sum(found[name] for name in MOVING)
    return sum(found.values()) - passing - found[STEP_ONLY] + max(passing, found[STEP_ONLY])


def row_length(trainer) -> int:
    """Tokens of a row: without packing as many as the longest document has."""
    return getattr(trainer.train_dataset, "length", trainer.args.max_length)


def advice(trainer, error: BaseException) -> str:
    """What was tried, where the memory goes, and what to lower, the strongest first."""
    args, config = trainer.args, trainer.teacher.config
    found = parts(trainer)
    listed = ", ".join(f"{name} {in_gib(size)}" for name, size in sorted(found.items(), key=lambda entry: -entry[1]) if size)
    remedies = []
    if args.per_device_train_batch_size > 1:
        half = args.per_device_train_batch_size // 2
        remedies.append(f"per_device_train_batch_size={half} with gradient_accumulation_steps={args.gradient_accumulation_steps * args.per_device_train_batch_size // half}")
    if args.checkpointing == "none":
        remedies.append("checkpointing=cheap, then checkpointing=full" + ", without compile_layers" * args.compile_layers)
    elif args.checkpointing == "cheap":
        remedies.append("checkpointing=full")
    if not args.bf16:
        remedies.append("bf16=True")
    remedies.append(f"a max_length below {row_length(trainer)}")
    remedies.append(f"a loss_chunk_size below {args.loss_chunk_size}" if args.loss_chunk_size else "loss_chunk_size=1024")
    memory = ""
    if args.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(args.device)
        memory = f" The device has {in_gib(total)}, {in_gib(free)} of it free, and torch held at most {in_gib(torch.cuda.max_memory_allocated(args.device))}."
    return (f"Out of memory at step {trainer.state.global_step + 1}: {args.per_device_train_batch_size} rows of {row_length(trainer)} tokens, teacher of {config.num_hidden_layers} layers of "
            f"width {config.hidden_size}, student of width {args.hidden_size}, vocabulary {config.vocab_size}.{memory} By shapes this rank needs about "
            f"{in_gib(needed(found))}: {listed}. Lower, one after another: {'; '.join(remedies)}. What torch said: {str(error).split('. ')[0]}.")


def _size(tensors) -> int:
    local = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)  # of a sharded tensor, this rank's rows
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
