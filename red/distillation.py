"""red.distill: from a teacher and text to a plain, narrower Hugging Face checkpoint in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from red.calibration import Calibration
from red.training.checkpoint_folders import students_place
from red.config import REDConfig
from red.data.loading import tokenizer_hash
from red.data.sources import named_dataset
from red.errors import REDError
from red.families import run_folder, teacher_config
from red.files import STARTS
from red.prepare import check_shape, load_teacher, require_packing
from red.report.recording import Record, leftovers
from red.settings import build_config
from red.data.streaming import require_max_steps
from red.training.rehearsal import rehearse
from red.training.run_lock import only_run
from red.training.trainer import REDTrainer

if TYPE_CHECKING:
    from red.lori.distillation import LoRiResult


@dataclass
class DistillResult:
    """What `distill` returns."""

    student: PreTrainedModel  # the trained student, a plain Hugging Face model
    path: Path  # its exported checkpoint, reloaded and compared
    metrics: dict[str, float]  # of the training run, and of eval_data where it was given
    trainer: REDTrainer


def distill(teacher: str | Path | PreTrainedModel | None = None, train_data=None, *, tokenizer: PreTrainedTokenizerBase | None = None,
            eval_data=None, calibration: Calibration | str | Path | None = None, config: REDConfig | None = None, callbacks=None,
            resume: bool | str | Path = False, method: str = "red", **settings) -> DistillResult | LoRiResult:
    """Distil `teacher` into a student of width `hidden_size` and export it to `output_dir/student`.

    Args:
        teacher: a name on the hub, a folder, or a model; None takes `teacher_model_name_or_path`.
        train_data: a path (.txt, .jsonl, a saved data set), a `datasets.Dataset`, or an iterable of texts or tokenised examples;
            None takes `train_file` or `dataset_name`.
        tokenizer: the teacher's; loaded beside it if None.
        calibration: a Calibration or its file; None calibrates on the first training rows.
        config: a REDConfig; or give its fields as keyword `settings`, never both.
        resume: True goes on from the last checkpoint in `output_dir` that is whole; a path from that checkpoint.
        method: "red", or "lori": latent reasoning, see `red.lori.distill`, which takes the same arguments but the calibration, and returns its own result.

    Raises:
        REDError: bad input, before any training and before anything is written; or a training that cannot go on, see `REDTrainer.train`.
        Terminated: SIGTERM during the training; the checkpoint is saved and nothing exported. It is a SystemExit with code 143.

    Example:
        red.distill("teacher", "corpus.txt", hidden_size=1536, output_dir="run", start="activation", max_steps=1000)
    """
    if method != "red":
        if method != "lori" or calibration is not None:
            raise REDError(f"method={method!r}{' takes no calibration' if method == 'lori' else ' is no method; use red or lori'}.")
        from red.lori.distillation import distill as lori

        return lori(teacher, train_data, tokenizer=tokenizer, eval_data=eval_data, config=config, callbacks=callbacks, resume=resume, **settings)
    if config is not None and settings:
        raise REDError(f"Give config or settings, not both; settings were {sorted(settings)}. Put them into the REDConfig.")
    config = config or build_config(settings)
    if not isinstance(config, REDConfig):
        raise REDError(f"config is a {type(config).__name__}; distill takes a REDConfig, and with method='lori' a red.lori.LoRiConfig.")
    teacher, path = check_run(teacher, train_data, config, resume, held_out=eval_data is not None)
    train_data = training_source(train_data, config)
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)  # before minutes go into the teacher
    with only_run(config, lambda: _students_place(config, resume)):
        record = Record(config, "red", resumed=bool(resume))
        teacher, tokenizer = with_tokenizer(teacher, tokenizer, config)
        trainer = REDTrainer(teacher, config, train_dataset=train_data, eval_dataset=eval_data, processing_class=tokenizer,
                             calibration=calibration, callbacks=callbacks)
        record.training(trainer, train_data)
        metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
        if eval_data is not None:
            metrics |= trainer.evaluate()
        report = trainer.export(path)
        record.finish(trainer.student, metrics, report)
        trainer.accelerator.wait_for_everyone()
    return DistillResult(trainer.student, path, metrics, trainer)


def check_run(teacher: str | Path | PreTrainedModel | None, train_data, config: REDConfig, resume: bool | str | Path = False, *, held_out: bool | None = None) -> tuple:
    """(teacher, folder of the student) of a run, once nothing speaks against it that can be known before a weight is read.

    Raises:
        REDError: no teacher or no text; a family, width or start that cannot be; settings that contradict each other; output that is in the way.
    """
    teacher = teacher if teacher is not None else config.teacher_model_name_or_path
    if teacher is None or (train_data is None and not (config.train_file or config.dataset_name)):
        raise REDError("distill needs a teacher and training data. Give teacher (or teacher_model_name_or_path) and train_data "
                       "(or train_file, or dataset_name).")
    if config.resume_from_checkpoint is not None:
        raise REDError(f"resume_from_checkpoint={config.resume_from_checkpoint!r} is read by Trainer scripts alone. Give resume, or red distill --resume.")
    if config.streaming:
        require_packing(config)
        require_max_steps(config.max_steps)
    shape = teacher.config if isinstance(teacher, PreTrainedModel) else teacher_config(teacher)
    check_shape(shape, config)
    rehearse(config, held_out=held_out)
    return teacher, _students_place(config, resume)


def _students_place(config: REDConfig, resume: bool | str | Path) -> Path:
    return students_place(config.output_dir, resume, ignoring=(*STARTS, *leftovers(config.output_dir)))  # an interrupted fit goes on


def training_source(given, config: REDConfig):
    """The text that was given, or what the settings name; None where they name none."""
    return given if given is not None else config.train_file or named_dataset(config.dataset_name, config.dataset_split, streaming=config.streaming)


def with_tokenizer(teacher: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None,
                   config: REDConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher, loaded where it is a name or a folder, and its tokenizer."""
    if not isinstance(teacher, PreTrainedModel):
        source, teacher = teacher, load_teacher(teacher, config.teacher_dtype, config.device)
        tokenizer = _checked_tokenizer(tokenizer, source)
    if tokenizer is None:
        raise REDError("A teacher given as a module needs its tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(...).")
    return teacher, tokenizer


def _checked_tokenizer(given: PreTrainedTokenizerBase | None, teacher: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the teacher, or the given one if it means the same; one whose teacher has none cannot be checked."""
    if given is None:
        return _tokenizer_beside(teacher)
    try:
        own = _tokenizer_beside(teacher)
    except REDError:
        return given
    if tokenizer_hash(own) != tokenizer_hash(given):
        raise REDError(f"The given tokenizer is not the teacher's: hash {tokenizer_hash(given)[:12]}, that beside {str(teacher)!r} has {tokenizer_hash(own)[:12]}. "
                       "Leave tokenizer out to use the teacher's own.")
    return given


def _tokenizer_beside(teacher: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)  # pyrefly: ignore[bad-return] - it raises rather than return None
    except Exception as error:  # tokenizers raises bare ones
        why = str(error).strip().splitlines()[0].rstrip(" :.") if str(error).strip() else type(error).__name__  # transformers lists all that it tried
        if Path(teacher).is_dir() and not any(Path(teacher).glob("token*")):
            why = "the folder has no tokenizer.json"
        raise REDError(f"There is no tokenizer that can be read beside the model {str(teacher)!r}: {why}. Save the tokenizer in that folder (tokenizer.save_pretrained)."
                       f"{run_folder(teacher)}") from error
