"""From what a user gives to what the trainer takes: the teacher, packed rows, and projections that have started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from red import families
from red.data import loading as data
from red.calibration import Calibration, calibrate_batches
from red.config import REDConfig
from red.errors import REDError
from red.sharing.export import check_width
from red.training.projections import Projections
from red.starting import needs_of, start_maps
from red.data.streaming import PackedStream
from red.student import build_student
from red.data.token_cache import cached

CALIBRATION_BATCH = 8


def load_teacher(name_or_path: str | Path, dtype: str = "auto", device: torch.device | None = None) -> PreTrainedModel:
    """A teacher from the hub or a folder, without remote code, on the CPU.

    Args:
        dtype: "auto" is bfloat16 for a GPU and float32 for a CPU.
        device: where it is going to run; None is a GPU if there is one.

    Raises:
        REDError: the folder is missing, or the architecture is not supported (found before any weight is read).
    """
    if dtype == "auto":
        on_gpu = torch.cuda.is_available() if device is None else device.type != "cpu"
        dtype = "bfloat16" if on_gpu else "float32"
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise REDError(f"teacher_dtype={dtype!r} is no dtype for a teacher; use auto, float32 or bfloat16.")
    families.teacher_config(name_or_path)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # damaged files come as errors of a dozen kinds
        raise REDError(f"The teacher {str(name_or_path)!r} cannot be loaded: {error}. Get its files again; weights should be safetensors.") from error
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:  # transformers fills them at random, and goes on
        raise REDError(f"The teacher {str(name_or_path)!r} lacks weights, or has them in another shape: {', '.join(absent[:3])}{f' and {len(absent) - 3} more' if absent[3:] else ''}. "
                       "Get its files again.")
    return model


def pack_rows(source, tokenizer: PreTrainedTokenizerBase | None, teacher: PreTrainedModel, config: REDConfig) -> data.PackedDataset:
    """Rows for the trainer; a source whose rows carry a `token_mask` is packed already and passes through."""
    if isinstance(source, data.PackedDataset):
        data.check_packed(source, teacher.config.vocab_size)
        return source
    reading = dict(text_column=config.text_column, max_length=config.max_length, assistant_only_loss=config.assistant_only_loss)
    vocab_size, pad = teacher.config.vocab_size, data.pad_id(tokenizer, teacher.config)

    def build() -> data.PackedDataset:
        examples = data.load_examples(source, tokenizer, **reading)
        data.check_examples(examples, tokenizer, vocab_size, max_length=config.max_length)
        return data.pack(examples, config.max_length, pad_token_id=pad, packing=config.packing)

    return cached(build, source, tokenizer, config.token_cache_dir, **reading, packing=config.packing, vocab_size=vocab_size, pad_token_id=pad)


def training_rows(source, tokenizer: PreTrainedTokenizerBase | None, teacher: PreTrainedModel, config: REDConfig) -> Sequence[dict] | data.PackedDataset | PackedStream:
    """`pack_rows`; or with `streaming`, and of an IterableDataset, rows that are packed while they are taken."""
    if isinstance(source, PackedStream):
        if (source.rank, source.world_size) != (config.process_index, config.world_size):
            raise REDError(f"A PackedStream of rank {source.rank} of {source.world_size} was given to process {config.process_index} of {config.world_size}, so rows "
                           "would be trained on twice, or never. Make it with rank=args.process_index, world_size=args.world_size; or give the text and streaming=True.")
        return source
    if isinstance(source, data.PackedDataset) or not (config.streaming or isinstance(source, IterableDataset)):
        return pack_rows(source, tokenizer, teacher, config)
    require_packing(config)
    # on a GPU always one process at least: tokenising in this one would keep the GPU waiting
    workers = config.dataloader_num_workers or int(config.device.type != "cpu")
    return PackedStream(source, tokenizer, vocab_size=teacher.config.vocab_size, max_length=config.max_length, pad_token_id=data.pad_id(tokenizer, teacher.config),
                        text_column=config.text_column, assistant_only_loss=config.assistant_only_loss, rank=config.process_index,
                        world_size=config.world_size, num_workers=workers)


def calibration_batches(rows: Sequence[dict] | PackedStream, samples: int) -> Iterable[dict[str, torch.Tensor]]:
    """The first `samples` rows in small batches, in order; training gets them too."""
    rows = rows.first(samples) if isinstance(rows, PackedStream) else rows
    subset = torch.utils.data.Subset(rows, range(min(samples, len(rows))))
    return DataLoader(subset, batch_size=CALIBRATION_BATCH, collate_fn=data.collate)


def require_packing(config: REDConfig) -> None:
    """REDError where a stream is asked to pad."""
    if not config.packing:
        raise REDError("packing=False pads to the longest document, which a stream does not know. Leave packing on, or set streaming=False.")


def check_shape(shape: PreTrainedConfig, config: REDConfig) -> None:
    """Refuse an unsupported family, a width that cannot be, or an unknown start, by the teacher's config alone."""
    families.check_family(shape)
    check_width(shape, config.hidden_size)
    needs_of(config)  # the start exists


def check_request(teacher: PreTrainedModel, config: REDConfig) -> None:
    """`check_shape`, and refuse weights that are not finite, before anything is computed."""
    check_shape(teacher.config, config)
    broken = [name for name, parameter in teacher.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise REDError(f"The teacher's {broken[0]} has NaN or infinite values{f', and so have {len(broken) - 1} more' if broken[1:] else ''}. "
                       "Load it in fp32 or bf16 (fp16 overflows), or get its files again.")


def calibrate(teacher: PreTrainedModel, source, tokenizer: PreTrainedTokenizerBase | None = None, *, samples: int = 64, max_length: int = 2048,
              text_column: str = "text", tap: str = "residual", covariance: bool = False, point_covariance: bool = False) -> Calibration:
    """Channel statistics of a teacher on any text, to save and to start from: `distill(..., calibration=...)`.

    Args:
        source: what `red.data.loading.load_examples` reads; the first `samples` packed rows of `max_length` tokens are used.
        tokenizer: the teacher's; may be missing where the examples are tokenised. Its hash is kept and checked when the calibration is used.
        tap: "residual" or "norm", where RED's score reads the activations.
        covariance: also the second moment that `pca`, `activation_lstsq` and `balanced` need, O(d²).
        point_covariance: also that of each read point, which `explained` and `fitted` need, O(L d²).

    Raises:
        REDError: bad input, see `red.data.loading.load_examples` and `red.calibration.calibrate_batches`.
    """
    examples = data.load_examples(source, tokenizer, text_column=text_column, max_length=max_length)
    data.check_examples(examples, tokenizer, teacher.config.vocab_size)
    rows = data.pack(examples, max_length, pad_token_id=data.pad_id(tokenizer, teacher.config))
    return calibrate_batches(teacher, calibration_batches(rows, samples), tap=tap, covariance=covariance, point_covariance=point_covariance,
                             tokenizer_hash=data.tokenizer_hash(tokenizer) if tokenizer is not None else "")


def ready_calibration(teacher: PreTrainedModel, config: REDConfig, *, rows: Sequence[dict] | PackedStream | None = None,
                      calibration: Calibration | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> Calibration:
    """The given calibration, checked to be this teacher's, or a new one of the first `config.calibration_samples` rows."""
    tokenizer_hash = data.tokenizer_hash(tokenizer) if tokenizer is not None else ""
    if calibration is not None:
        calibration.check(teacher, tokenizer_hash)
        return calibration
    if not rows:
        raise REDError("A calibration needs text. Pass train_dataset, or a calibration.")
    needs = needs_of(config)
    return calibrate_batches(teacher, calibration_batches(rows, config.calibration_samples), tap=config.calibration_tap, covariance="covariance" in needs,
                             point_covariance="point_covariance" in needs, tokenizer_hash=tokenizer_hash)


def start_projections(teacher: PreTrainedModel, config: REDConfig, calibration: Calibration | None = None,
                      batches: Iterable[dict[str, torch.Tensor]] | None = None, folder: str | Path | None = None) -> Projections:
    """Build the student and start its projections.

    Args:
        calibration: what the start needs of it; see `red.starts`.
        batches: the calibration text, which a fit runs through the student (`calibration_batches`); only read where something is fitted.
        folder: where a fit keeps what it has done, so that an interrupted one goes on; None keeps nothing.

    Raises:
        REDError: unsupported family, wrong width, unknown start, or a calibration or text that the start needs and that is not there.
    """
    check_request(teacher, config)
    maps = start_maps(teacher, config, calibration, batches, folder)
    return Projections(teacher, build_student(teacher, config.hidden_size, dtype=student_dtype(teacher, config)), maps)


def student_dtype(teacher: PreTrainedModel, config: REDConfig) -> torch.dtype:
    """What the student's parameters are stored in. The masters and the sum of the gradients are float32 (float64 for a float64 teacher) in every case.

    `auto` is bfloat16 where one GPU trains with bf16=True. DistributedDataParallel reduces gradients in the parameters' dtype, so several processes keep float32.
    """
    if config.student_dtype != "auto":
        return getattr(torch, config.student_dtype)
    if config.bf16 and config.device.type == "cuda" and config.world_size == 1:
        return torch.bfloat16
    return torch.promote_types(teacher.dtype, torch.float32)
