"""What a run was and how it went, written down while it runs: run.json and channels.safetensors in its folder, then report.html and the student's card.

run.json, from which `red report` makes the page again, also of a run that was killed:

    format, method, state       1; red, compress or lori; running or finished
    began                       time of the first session, UTC
    settings                    {"changed", "default"}: every field of the config, by whether it is its default
    versions, commit, device, processes
    teacher, student            name, shape, parameters, SHA-256 of the configuration; teacher_hash of a sample of its weights, as in red's other files
    data                        name, rows, tokens, and the SHA-256 of the tokens where they lie in memory
    channels                    whether the start selected channels, and by what
    forecast, measured          seconds and bytes: of the start, of a step; peaks
    erank                       teacher, start, end: effective rank at the embedding and after each layer; tokens, seconds that it took
    steps                       {"done", "planned"}
    sessions                    one for each time it was started: began, from_step, to_step, seconds and tokens of training
    history                     Trainer's log, with tokens and tokens_per_second beside each loss
    metrics, export             of the end

It is written by the first process alone, whole or not at all, at the start, with every checkpoint, at the end, and in between not more often than every
INTERVAL seconds, nor for more than a SHARE of the time. A resumed run takes the log of its checkpoint and goes on from there, so nothing is there twice. What fails here is a warning: a run
is never lost for its record.
"""

from __future__ import annotations

import functools
import json
import time
from datetime import datetime, timezone
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

import red
from red.calibration import model_hash
from red.files import CHANNELS_FILE, HALF_LAYERS, PAGE, RUN_FILE, START_FILE, atomic_write_safetensors
from red.report import measuring, provenance
from red.report.settings import settings_of
from red.training.canary import CanaryCallback

FORMAT = 1
INTERVAL = 30.0  # seconds
SHARE = 1 / 300  # of the training's time, at most, that goes into writing between checkpoints
KEPT = ("began", "erank", "forecast", "measured", "channels", "sessions")  # of an earlier session

logger = logging.get_logger(__name__)


def quietly(method):
    """A failure becomes a warning, one for each method of each object: some are called at every step."""
    @functools.wraps(method)
    def attempt(self, *args, **kwargs):
        if not self.writes:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a full disk, a model that is odd in some way: nothing of it may end a run
            said = self.__dict__.setdefault("_said", set())
            if method.__name__ not in said:
                logger.warning(f"The run's record ({method.__name__.strip('_')}) could not be made: {type(error).__name__}: {error}. "
                               "The run itself is not touched by this.")
            said.add(method.__name__)
            return None

    return attempt


def leftovers(folder: str | Path) -> tuple[str, ...]:
    """Names, in the folder of a run that ended before it had a checkpoint, that another run may write over: none if run.json is not red's."""
    try:
        ours = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    return (RUN_FILE, CHANNELS_FILE, PAGE) if ours else ()


class Record:
    """The record of one run.

    Args:
        config: the run's settings; its output_dir gets the files, and only the first process writes.
        method: "red", "compress" or "lori".
        resumed: whether the run goes on from a checkpoint, and its record from run.json.
    """

    def __init__(self, config, method: str, *, resumed: bool = False):
        self.folder, self.config, self.writes = Path(config.output_dir), config, config.process_index == 0
        self.before = self._peak()
        self.fresh = not any((self.folder / name).exists() for name in (START_FILE, HALF_LAYERS))  # nothing of the start has been computed yet
        self.facts: dict = {"format": FORMAT, "method": method, "state": "running", "began": _now()}
        self.ranks: measuring.Ranks | None = None
        self.named = ""  # the teacher's folder or name
        self._written = self._took = 0.0  # of the last writing: when it ended, seconds
        self._describe(resumed)

    @quietly
    def _peak(self) -> dict:
        return measuring.peak_memory(self.config.device)

    @quietly
    def _describe(self, resumed: bool) -> None:
        earlier = {}
        if resumed:
            try:
                earlier = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):  # a run of an earlier red
                earlier = {}
        self.facts |= {name: earlier[name] for name in KEPT if name in earlier} if isinstance(earlier, dict) else {}
        self.facts |= {"settings": settings_of(self.config), "versions": {"red": red.__version__, **provenance.versions()},
                       "commit": provenance.commit(), "device": provenance.device(self.config.device.type), "processes": self.config.world_size}
        for name in ("measured", "forecast"):
            self.facts.setdefault(name, {})
        self.facts.setdefault("sessions", [])

    def training(self, trainer, data) -> None:
        """Everything that is known of a REDTrainer before its first step; from then on it is followed."""
        self._models(trainer.teacher, trainer.student, trainer.teacher_hash, data, trainer.train_dataset)
        self._start(trainer.teacher, trainer.projections, trainer.importance, trainer.start_seconds, trainer.train_dataset)
        if not trainer.args.sharding:
            held_out = trainer.eval_dataset is not None
            self._rank(trainer.eval_dataset if held_out else trainer.train_dataset, trainer.teacher, trainer.student, trainer.accelerator, held_out)
        self._forecast(trainer)
        self._canary(trainer)
        trainer.add_callback(Follow(self, trainer))

    def compressed(self, teacher, projections, calibration, seconds: float, data, rows) -> None:
        """Everything that is known of a start that nothing is trained after."""
        self._models(teacher, projections.student, calibration.model_hash, data, rows)
        self._start(teacher, projections, {"scores": calibration.scores, "mean_square": calibration.mean_square}, seconds, rows)
        self._rank(rows, teacher, projections.student)

    @quietly
    def teacher(self, teacher) -> None:
        """Of a run that does not keep its teacher until the end."""
        self.facts |= {"teacher": {**measuring.model_facts(teacher), "teacher_hash": model_hash(teacher)}}
        self.named = teacher.name_or_path

    def latent(self, trainer, data) -> None:
        """A LoRiTrainer: no narrower student, no projections."""
        self._student(trainer.latent_model.model, data, trainer.train_dataset)
        trainer.add_callback(Follow(self, trainer))

    @quietly
    def _models(self, teacher, student, teacher_hash: str, data, rows) -> None:
        self.facts |= {"teacher": {**measuring.model_facts(teacher), "teacher_hash": teacher_hash}}
        self.named = teacher.name_or_path
        self._student(student, data, rows)

    @quietly
    def _student(self, student, data, rows) -> None:
        named = data if data is not None else self.config.train_file or self.config.dataset_name
        self.facts |= {"student": measuring.model_facts(student), "data": measuring.data_facts(named, rows)}

    @quietly
    def _canary(self, trainer) -> None:
        self.facts["measured"]["canary_problems"] = next((len(one.problems) for one in trainer.callback_handler.callbacks if isinstance(one, CanaryCallback)), None)

    @quietly
    def _start(self, teacher, projections, importance, seconds: float, rows) -> None:
        if "channels" not in self.facts:
            self.facts["channels"] = {"start": Path(self.config.start).name, "selected": projections.channels is not None}
            atomic_write_safetensors(self.folder / CHANNELS_FILE, measuring.channel_maps(projections, importance, sharded=bool(self.config.sharding)))
        if self.fresh and "start_seconds" not in self.facts["measured"]:
            count = min(self.config.calibration_samples, len(rows) if hasattr(rows, "__len__") else self.config.calibration_samples)
            self.facts["measured"]["start_seconds"] = seconds
            self.facts["forecast"]["start"] = measuring.forecast_start(self.config, teacher, count * self.config.max_length)

    @quietly
    def _rank(self, rows, teacher, student, accelerator=None, held_out: bool = False) -> None:
        self.ranks = measuring.Ranks(rows, self.config.device, accelerator, held_out)
        if "start" not in self.facts.get("erank", {}):
            self.facts["erank"] = {"teacher": self.ranks.of(teacher), "start": self.ranks.of(student), **self.ranks.facts}

    @quietly
    def _forecast(self, trainer) -> None:
        self.facts["forecast"]["training"] = measuring.forecast_training(trainer)

    @quietly
    def write(self) -> None:
        """run.json as things stand now."""
        peak = measuring.peak_memory(self.config.device)
        if peak["bytes"] is not None:
            before = self.before["bytes"] if self.before and self.config.device.type != "cuda" else 0
            highest = max(peak["bytes"] - before, self.facts["measured"].get("peak_bytes") or 0)
            self.facts["measured"] |= {"peak_bytes": highest or None, "peak_of": peak["of"] if highest else "no more than this process had held before the run"}
        began = time.monotonic()
        provenance.write_json(self.folder / RUN_FILE, self.facts)
        self._written = time.monotonic()
        self._took = self._written - began

    def due(self) -> bool:
        """Whether the file has not been written for a while."""
        return self.writes and time.monotonic() - self._written > max(INTERVAL, self._took / SHARE)  # a long log is written seldom

    def finish(self, student=None, metrics: dict | None = None, exported=None) -> None:
        """The end: what came out, run.json, report.html, and the README.md of the exported student."""
        self._end(student, metrics or {}, exported)
        self.write()
        self._page()
        if exported is not None:
            self._card(Path(exported if isinstance(exported, (str, Path)) else exported.path))

    @quietly
    def _end(self, student, metrics: dict, exported) -> None:
        if self.ranks is not None and student is not None and "erank" in self.facts:
            before = self.ranks.seconds
            self.facts["erank"]["end"] = self.ranks.of(student)
            self.facts["erank"]["seconds"] += self.ranks.seconds - before
        names = ("model_type", "dtype", "tied", "parameters", "bytes", "max_abs_logit_difference")
        facts = {name: getattr(exported, name) for name in names if hasattr(exported, name)}  # of an ExportReport; a path has none
        self.facts |= {"state": "finished", "metrics": metrics, "export": facts}

    @quietly
    def _page(self) -> None:
        from red.report.report import write_page

        write_page(self.folder, self.folder / PAGE)

    @quietly
    def _card(self, student: Path) -> None:
        from red.sharing.licences import carry, terms_of
        from red.report.card import write_card

        if self.named and not (student / "README.md").exists():  # red.sharing.export does it for students that it writes
            carry(terms_of(self.named), student, hidden_size=self.facts["student"]["hidden_size"])
        write_card(self.folder, student)


class Follow(TrainerCallback):
    """Keeps a record up with its trainer. Tokens stay on the device and are read with the losses, which waits for the device anyway."""

    def __init__(self, record: Record, trainer):
        self.record, self.trainer, self.counts = record, trainer, record.facts["method"] == "red"
        self.writes = record.writes
        self.tokens = self.counted = self.first = 0  # trained in all; of these, known here as a number; before this session
        self.began = self.since = time.perf_counter()
        self.session: dict = {}

    @quietly
    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens = self.counted = self.first = state.num_input_tokens_seen
        self.began = self.since = time.perf_counter()
        self.session = {"began": _now(), "from_step": state.global_step, "to_step": state.global_step, "seconds": 0.0, "tokens": 0}
        self.record.facts.setdefault("sessions", []).append(self.session)
        self._write(state)

    @quietly
    def on_step_end(self, args, state, control, **kwargs):
        if self.counts:
            self.tokens = self.tokens + self.trainer._counts.tokens * args.world_size
            if control.should_save or control.should_evaluate:  # a checkpoint may be written before the next step
                self._keep_tokens(args, state)

    @quietly
    def on_epoch_end(self, args, state, control, **kwargs):
        self._keep_tokens(args, state)

    @quietly
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and self.counts:
            now, total = time.perf_counter(), round(float(self.tokens))
            state.log_history[-1] |= {"tokens": total, "tokens_per_second": (total - self.counted) / max(now - self.since, 1e-9)}
            self.counted, self.since = total, now
        if self.session and self.record.due():  # other callbacks may log before this one has begun
            self._write(state)

    @quietly
    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    @quietly
    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)

    def _keep_tokens(self, args, state) -> None:
        if self.counts and args.include_num_input_tokens_seen in (False, "no"):  # else Trainer counts them itself
            state.num_input_tokens_seen = round(float(self.tokens))  # which the checkpoint keeps

    def _write(self, state) -> None:
        self.session |= {"to_step": state.global_step, "seconds": time.perf_counter() - self.began, "tokens": self.counted - self.first}
        self.record.facts |= {"steps": {"done": state.global_step, "planned": state.max_steps}, "history": state.log_history}
        self.record.write()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
