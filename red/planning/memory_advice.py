"""Out of memory: what takes it, in bytes, and what to lower."""

from __future__ import annotations

import contextlib

import torch

from red.training.checkpoints import ADAM_MOMENTS
from red.errors import REDError
from red.files import in_gib


@contextlib.contextmanager
def explained(trainer):
    """Turn torch's out-of-memory error inside into a REDError with numbers and remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise REDError(advice(trainer, error)) from error


def parts(trainer) -> dict[str, int]:
    """Bytes by what takes them on this rank, from shapes alone: the standing parts exactly, those of a micro-batch as estimates."""
    args, teacher, student, projections = trainer.args, trainer.teacher, trainer.student, trainer.projections
    masters = _size(projections.parameters())
    trained = [p for p in student.parameters() if p.requires_grad]  # their gradients are summed in the projections' dtype
    summed = _size(trained) // student.dtype.itemsize * projections.parameters()[0].element_size()
    standing = {"teacher": _size(teacher.parameters()), "student": _size(student.parameters()), "student's gradients": summed, "projections": masters, "their gradients": masters, "Adam's moments": ADAM_MOMENTS * masters}

    config, narrow = teacher.config, student.config.hidden_size
    tokens, layers = args.per_device_train_batch_size * args.max_length, config.num_hidden_layers
    item = 2 if args.bf16 or student.dtype == torch.bfloat16 else student.dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, keys = config.num_attention_heads * head_dim, 2 * config.num_key_value_heads * head_dim
    tapped = query + keys + 2 * config.intermediate_size + 2 * config.hidden_size  # the teacher's outputs of q k v, gate up, o down
    # what backward reads of a layer: the inputs of the norms (residual stream, in the student's dtype) and of the products, attention's, the activation's
    stream = 2 * narrow * student.dtype.itemsize
    inner = (2 * narrow + 2 * query + keys + 4 * config.intermediate_size) * item
    entered = narrow * student.dtype.itemsize  # what a layer that runs again starts from; and of products and attention the results
    kept = {"none": stream + inner, "cheap": entered + (2 * narrow + 2 * query + keys + 2 * config.intermediate_size) * item, "full": entered}[args.checkpointing]
    saved = layers * kept + (stream + inner if args.checkpointing != "none" else 0)
    chunk = min(args.loss_chunk_size or max(2**30 // (4 * config.vocab_size), 1), tokens)
    moving = {"teacher's outputs at the taps": tokens * layers * tapped * item if args.tap_weight else 0, "student's activations": tokens * saved,
              f"logits of {chunk} tokens": 2 * chunk * config.vocab_size * 4}
    return {**standing, **moving}


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
    remedies.append(f"a max_length below {args.max_length}")
    remedies.append(f"a loss_chunk_size below {args.loss_chunk_size}" if args.loss_chunk_size else "loss_chunk_size=1024")
    memory = ""
    if args.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(args.device)
        memory = f" The device has {in_gib(total)}, {in_gib(free)} of it free, and torch held at most {in_gib(torch.cuda.max_memory_allocated(args.device))}."
    return (f"Out of memory at step {trainer.state.global_step + 1}: {args.per_device_train_batch_size} rows of {args.max_length} tokens, teacher of {config.num_hidden_layers} layers of "
            f"width {config.hidden_size}, student of width {args.hidden_size}, vocabulary {config.vocab_size}.{memory} By shapes this rank needs about "
            f"{in_gib(sum(found.values()))}: {listed}. Lower, one after another: {'; '.join(remedies)}. What torch said: {str(error).split('. ')[0]}.")


def _size(tensors) -> int:
    local = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)  # of a sharded tensor, this rank's rows
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
