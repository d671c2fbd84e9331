"""red.compress: a narrower checkpoint without any training, and the start that red.distill goes on from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from red.calibration import Calibration
from red.config import REDConfig
from red.distillation import training_source, with_tokenizer
from red.errors import REDError
from red.families import teacher_config
from red.sharing.export import ExportReport, export, export_dtype
from red.files import START_FILE, STARTS, require_empty_output
from red.prepare import calibration_batches, check_request, check_shape, ready_calibration, start_projections, training_rows
from red.report.recording import Record, leftovers
from red.settings import build_config
from red.starting import fit_of
from red.training.run_lock import LOCK, only_run


@dataclass
class CompressResult:
    """What `compress` returns."""

    student: PreTrainedModel  # a plain Hugging Face model, untrained but for the fit
    path: Path  # its exported checkpoint, reloaded and compared
    start: Path | None  # for red.distill(start=...); None where nothing was fitted
    report: ExportReport


def compress(teacher: str | Path | PreTrainedModel | None = None, data=None, *, tokenizer: PreTrainedTokenizerBase | None = None,
             calibration: Calibration | str | Path | None = None, dtype: torch.dtype | str | None = None, config: REDConfig | None = None,
             **settings) -> CompressResult:
    """Narrow `teacher` to `hidden_size` without training, and export the student to `output_dir/student`.

    The student is the start that training would begin with: `fitted`, unless `start` says otherwise. It needs forward passes over the
    calibration text and linear algebra, no gradients of the teacher; an interrupted fit goes on when called again.

    Args:
        teacher, data, tokenizer, calibration: as in `red.distill`; the first `calibration_samples` rows of `data` are fitted to.
        dtype: of the exported weights; None is the teacher's.
        config: a REDConfig; or give its fields as keyword `settings`, never both. hidden_size and output_dir are needed.

    Raises:
        REDError: bad input, before anything is computed.

    Example:
        small = red.compress("teacher", "corpus.txt", hidden_size=1536, output_dir="small")
        red.distill("teacher", "corpus.txt", hidden_size=1536, output_dir="run", start=small.start)
    """
    if config is not None and settings:
        raise REDError(f"Give config or settings, not both; settings were {sorted(settings)}. Put them into the REDConfig.")
    config = config or build_config(settings)
    data = training_source(data, config)
    if (teacher := teacher if teacher is not None else config.teacher_model_name_or_path) is None or data is None:
        raise REDError("compress needs a teacher and text to calibrate on. Give teacher (or teacher_model_name_or_path) and data "
                       "(or train_file, or dataset_name).")
    if config.world_size > 1:
        raise REDError(f"compress is the work of one process, and {config.world_size} were started. Start it without torchrun or accelerate launch.")
    folder = Path(config.output_dir)

    def check() -> Path:
        return require_empty_output(folder, ignoring=(*STARTS, *leftovers(folder), LOCK))

    check()
    shape = teacher.config if isinstance(teacher, PreTrainedModel) else teacher_config(teacher)
    check_shape(shape, config)
    export_dtype(dtype)
    with only_run(config, check):
        return _compress(teacher, data, tokenizer, calibration, dtype, config, folder)


def _compress(teacher, data, tokenizer, calibration, dtype, config: REDConfig, folder: Path) -> CompressResult:
    record = Record(config, "compress")
    teacher, tokenizer = with_tokenizer(teacher, tokenizer, config)
    teacher = teacher.eval().to(config.device)
    check_request(teacher, config)
    rows = training_rows(data, tokenizer, teacher, config)
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)
    began = time.perf_counter()
    calibration = ready_calibration(teacher, config, rows=rows, calibration=calibration, tokenizer=tokenizer)
    projections = start_projections(teacher, config, calibration, calibration_batches(rows, config.calibration_samples), folder)
    student = projections.student.eval()
    record.compressed(teacher, projections, calibration, time.perf_counter() - began, data, rows)
    report = export(student, tokenizer, folder / "student", dtype=dtype or teacher.dtype, teacher=teacher.name_or_path)
    record.finish(exported=report)
    return CompressResult(student, report.path, folder / START_FILE if fit_of(config) != "none" else None, report)
