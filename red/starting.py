"""From the settings to the maps that the projections start with: a registered start and what is fitted after it, or a start file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from red import starts
from red.calibration import Calibration, calibrate_batches, model_hash
from red.config import REDConfig
from red.errors import REDError
from red.sharing.export import check_width
from red.families import teacher_config
from red.files import require_existing
from red.fitting import fit_student, forecast
from red.fitting.forecast import Forecast, measured_rate
from red.fitting.resume import START_FILE, StartFolder, read_start
from red.fitting.shared_map import ITERATIONS
from red.fitting.sweeps import DocumentWeights
from red.map_files import check_maps

FEW = 20  # tokens of each channel: docs/starts.md, the table of calibration rows
METHOD = 1  # raised when the same settings come to mean other maps, so that files of before are not used

logger = logging.get_logger(__name__)


def from_file(config: REDConfig) -> bool:
    """Whether `start` names a file that red.compress or red.distill wrote."""
    return config.start.endswith(".safetensors")


def needs_of(config: REDConfig) -> tuple[str, ...]:
    """What the start needs, see `red.starts.base.NEEDS`; REDError if there is no such start."""
    if from_file(config):
        require_existing(config.start, "start")
        return ()
    return starts.get(config.start).needs


def fit_of(config: REDConfig) -> str:
    """What is fitted: "none", "readers" or "full"."""
    if from_file(config):
        if config.start_fit not in (None, "none"):
            raise REDError(f"start_fit={config.start_fit!r}: the start {config.start} is finished. Leave start_fit out.")
        return "none"
    return config.start_fit or starts.get(config.start).fit


def start_maps(teacher: PreTrainedModel, config: REDConfig, calibration: Calibration | None = None,
               batches: Iterable[dict[str, Tensor]] | None = None, folder: str | Path | None = None) -> starts.StartMaps:
    """The maps of the start, see `red.prepare.start_projections`."""
    if from_file(config):
        return _from_file(teacher, config)
    start, fit = starts.get(config.start), fit_of(config)
    if fit == "none":
        return start(_context(teacher, config, calibration, batches))
    if batches is None:
        raise REDError(f"start={config.start!r} with start_fit={fit!r} fits to the calibration text itself. Pass batches=... "
                       "(red.distill and red.compress do).")
    batches = list(batches)
    first = config.process_index == 0
    # every other process reads what the first has kept: it would wait for a fit that it has done before
    kept = StartFolder(folder if first else folder or config.output_dir, _key(teacher, config, calibration, batches), writes=first)
    found = kept.whole()
    if found is not None:
        return starts.StartMaps(found, found.pop("channels", None))
    counted = sum(int(batch["token_mask"].sum()) if "token_mask" in batch else batch["input_ids"].numel() for batch in batches)
    if first and counted < FEW * teacher.config.hidden_size:
        width = teacher.config.hidden_size
        logger.warning(f"start={config.start} is fitted to {counted:,} tokens, {counted / width:.1f} for each of the teacher's {width} channels; with less than {FEW} "
                       f"it fits the text and not the teacher (docs/starts.md). Raise calibration_samples ({config.calibration_samples}), or give more text.")
    quiet = config.disable_tqdm or not first
    if not quiet:
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        tqdm.write(f"start={config.start}, start_fit={fit}: {start_cost(config, teacher.config, tokens, teacher.dtype.itemsize)}")
    moments = {name: True for name in ("covariance", "point_covariance") if name in start.needs}
    weights, text, maps = DocumentWeights(), batches, {}
    for sweep in range(config.fit_sweeps):
        with tqdm(desc="shared map", total=ITERATIONS, disable=quiet, leave=False) as bar:
            context = _context(teacher, config, calibration, batches)

            def shared(share: float, bar=bar) -> None:
                bar.set_postfix_str(f"explained {share:.4f}", refresh=False)
                bar.update()

            context.on_step = shared
            found = start(context)
        with tqdm(desc=f"fitting the start{f', sweep {sweep + 1}' if sweep else ''}", disable=quiet, leave=False) as bar:
            def show(done: int, total: int, report: str, bar=bar) -> None:
                bar.total = total
                bar.set_postfix_str(report, refresh=False)
                bar.update(done - bar.n)

            fitted = fit_student(teacher, found.maps, text, writers=fit == "full", reader_ridge=config.fit_reader_ridge,
                                 writer_ridge=config.fit_writer_ridge, kept=kept.of_sweep(sweep), on_progress=show)
        maps = fitted.maps
        if sweep + 1 < config.fit_sweeps:  # the same text, and what the start is made of, with the weights that this student gives
            text = [{**batch, "token_weight": weight} for batch, weight in zip(batches, weights.update(fitted), strict=True)]
            calibration = calibrate_batches(teacher, text, tap=config.calibration_tap, **moments) if moments else calibration
        del fitted  # a student and both streams
    channels = found.channels if fit == "readers" else None
    kept.keep_whole(maps if channels is None else {**maps, "channels": channels}, model_hash(teacher))
    return starts.StartMaps(maps, channels)


def start_cost(config: REDConfig, teacher: PreTrainedConfig, tokens: int, teacher_bytes: int) -> Forecast:
    """What calibration, start and fit cost on `tokens` tokens, at this device's rate of multiplying; `teacher_bytes` an entry of its weights."""
    return forecast(teacher, config.hidden_size, tokens, explained="point_covariance" in needs_of(config), fit=fit_of(config), sweeps=config.fit_sweeps,
                    teacher_bytes=teacher_bytes, rate=measured_rate(config.device))


def forecast_of(config: REDConfig, tokens: int | None = None) -> str:
    """What the start will cost, in words: from the teacher's config and this device's rate of multiplying; no weight is read.

    `tokens` are of the calibration; None takes calibration_samples full rows, which is all that a larger text gives.

    Raises:
        REDError: no teacher, an unsupported family, a width that cannot be, or an unknown start.
    """
    if config.teacher_model_name_or_path is None:
        raise REDError("A forecast needs a teacher. Give teacher_model_name_or_path.")
    teacher = teacher_config(config.teacher_model_name_or_path)
    check_width(teacher, config.hidden_size)
    tokens, fit = config.calibration_samples * config.max_length if tokens is None else tokens, fit_of(config)
    cost = start_cost(config, teacher, tokens, 4 if config.device.type == "cpu" else 2)
    return (f"{config.teacher_model_name_or_path}: hidden_size {teacher.hidden_size} -> {config.hidden_size}, {teacher.num_hidden_layers} layers, "
            f"start={config.start}, start_fit={fit}, {tokens:,} tokens of calibration\n{cost}")


def _context(teacher, config: REDConfig, calibration, batches) -> starts.StartContext:
    return starts.StartContext(teacher, config.hidden_size, calibration, config.seed, config.start_std, config.norm_scale, batches)


def _key(teacher, config: REDConfig, calibration: Calibration | None, batches: list[dict[str, Tensor]]) -> str:
    """Everything that decides a fitted start, as one hash."""
    names = ("start", "hidden_size", "seed", "start_std", "norm_scale", "fit_reader_ridge", "fit_writer_ridge", "fit_sweeps", "calibration_tap")
    digest = hashlib.sha256(f"{METHOD} {model_hash(teacher)} {fit_of(config)} {[getattr(config, name) for name in names]}".encode())
    texts = [batch[name] for batch in batches for name in ("input_ids", "position_ids", "token_mask") if name in batch]  # with where documents begin
    for tensor in [*texts, *([] if calibration is None else [calibration.scores])]:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_file(teacher: PreTrainedModel, config: REDConfig) -> starts.StartMaps:
    fit_of(config)
    found = read_start(config.start, model_hash(teacher))
    embedding = found.get("model.embed_tokens.weight")
    width = embedding.shape[1] if embedding is not None and embedding.dim() == 2 else None
    if width is not None and width != config.hidden_size:
        raise REDError(f"hidden_size={config.hidden_size}, but start={config.start!r} is of width {width}. Give hidden_size={width}, or compress again. "
                       f"The {START_FILE} of a run has the width of its student.")
    check_maps(found, teacher.config, config.hidden_size, f"start={config.start!r}")
    return starts.StartMaps(found, found.pop("channels", None))
