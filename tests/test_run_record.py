"""run.json: what a run writes down is true, survives a kill and a resume without gap or repetition, and never costs a run."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from tiny_lori import number_tokenizer, table_rows
from tiny_lori import settings_of as lori_settings
from tiny_models import build_tiny_model, build_tiny_tokenizer
from tiny_training import NARROW, make_trainer, settings_of, tokenised
from transformers import TrainerCallback

import red
from red.planning import costs
from red.planning import memory_advice
from red.config import REDConfig
from red.erank import stream_eranks
from red.errors import REDError
from red.data.packing import collate
from red.planning.planner import plan
from red.report import measuring, recording
from red.report.drawing import plt
from red.report.report import render, write_page
from red.report.run import Run
from red.report.settings import settings_of as split
import itertools

STEPS, KILLED = 6, 5


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Drawing them takes seconds; tests/test_run_report.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("red.report.figures.svg", lambda figure, description: plt.close(figure) or f"<svg>{description}</svg>")
        yield


class Kill(TrainerCallback):
    """Ends the training as a power cut does, once step KILLED is done and logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == KILLED and "loss" in logs:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that was killed after step 5 with a checkpoint at 4, its page then, and the same run resumed to its end."""
    place = tmp_path_factory.mktemp("runs")
    teacher, tokenizer = build_tiny_model(), build_tiny_tokenizer()
    teacher.save_pretrained(place / "the teacher")
    settings = settings_of(place / "run", max_steps=STEPS, save_strategy="steps", save_steps=4, logging_steps=1)
    rows = tokenised(40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("red.sharing.export.run_preflight", lambda *_: {})
        teacher.name_or_path = str(place / "the teacher")
        with pytest.raises(KeyboardInterrupt):
            red.distill(teacher, rows, tokenizer=tokenizer, callbacks=[Kill()], **settings)
        killed = json.loads((place / "run" / "run.json").read_text())
        page = render(Run.load(place / "run"))
        teacher = build_tiny_model()
        teacher.name_or_path = str(place / "the teacher")
        result = red.distill(teacher, rows, tokenizer=tokenizer, resume=True, **settings)
    return place / "run", killed, page, result


def test_a_killed_run_has_a_record_and_a_page(folders):
    _, killed, page, _ = folders
    assert killed["state"] == "running" and killed["steps"] == {
        "done": KILLED - 1,
        "planned": STEPS,
    }  # the kill came before the record heard of its step
    assert [entry["step"] for entry in killed["history"] if "loss" in entry][:4] == [1, 2, 3, 4]
    assert "It was not finished, or still runs: the record ends at step 4 of 6." in page and "<svg" in page


def test_a_resume_leaves_no_gap_and_repeats_nothing(folders):
    folder, killed, _, result = folders
    facts, run = json.loads((folder / "run.json").read_text()), Run.load(folder)
    assert [step for step, _ in run.series("loss")] == list(range(1, STEPS + 1)) and len(
        [entry for entry in facts["history"] if "loss" in entry]
    ) == STEPS
    assert run.series("loss") == [(entry["step"], entry["loss"]) for entry in result.trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in killed["history"] if "loss" in entry][:4] == [value for _, value in run.series("loss")][:4]
    assert [(one["from_step"], one["to_step"]) for one in facts["sessions"]] == [(0, facts["sessions"][0]["to_step"]), (4, STEPS)]
    assert facts["state"] == "finished" and facts["began"] == killed["began"] and facts["erank"]["start"] == killed["erank"]["start"]


def test_tokens_are_counted_exactly_across_the_resume(folders):
    folder = folders[0]
    seen = dict(Run.load(folder).series("tokens"))
    steps = [value for _, value in sorted(seen.items())]
    assert all(late > early for early, late in itertools.pairwise(steps))
    counted = make_trainer(build_tiny_model(), folder.parent / "again", tokenised(40), max_steps=STEPS)
    counted.train()
    assert steps[-1] == sum(int(micro["token_mask"].sum()) for micro in counted.seen)
    assert all(value > 0 for _, value in Run.load(folder).series("tokens_per_second"))


def test_facts_are_those_of_the_models(folders):
    folder, _, _, result = folders
    facts, trainer = json.loads((folder / "run.json").read_text()), result.trainer
    teacher = build_tiny_model()
    assert facts["teacher"]["parameters"] == sum(p.numel() for p in teacher.parameters()) and facts["student"]["parameters"] == sum(
        p.numel() for p in result.student.parameters()
    )
    assert (
        facts["teacher"]["name"] == "the-teacher"
        and facts["teacher"]["teacher_hash"] == trainer.teacher_hash
        and facts["student"]["hidden_size"] == NARROW
    )
    flat = np.concatenate([np.array(example["input_ids"], dtype="<i4") for example in tokenised(40)])
    assert facts["data"]["tokens"] == len(flat) and facts["data"]["tokens_sha256"] == hashlib.sha256(flat.tobytes()).hexdigest()
    batch = collate(list(trainer.train_dataset))
    for which, model in (("teacher", teacher), ("end", result.student)):
        assert facts["erank"][which] == pytest.approx(stream_eranks(model, batch, max_tokens=1024), rel=1e-4)
    assert facts["erank"]["start"] != facts["erank"]["end"] and facts["erank"]["tokens"] == len(flat)
    channels = load_file(folder / "channels.safetensors")
    assert np.flatnonzero(channels["kept"]).tolist() == trainer.projections.channels.tolist() and set(channels["kept"]) == {0, 1}
    assert (
        channels["scores"].shape == (32,)
        and channels["mean_square"].shape == (5, 32)
        and facts["channels"] == {"start": "activation", "selected": True}
    )
    assert (
        facts["measured"]["start_seconds"] > 0
        and facts["export"]["parameters"] == facts["student"]["parameters"]
        and facts["metrics"]["train_loss"] > 0
    )


def test_page_and_card_lie_in_the_folder(folders):
    folder, _, _, result = folders
    assert (folder / "report.html").read_text() == render(Run.load(folder)) and "not finished" not in (folder / "report.html").read_text()
    card = (result.path / "README.md").read_text()
    assert ModelCard(card).data.base_model == "the-teacher" and str(folder.parent) not in card
    assert f"{STEPS} steps" in card and "canary\\_steps=100" in card  # not measured is said


def test_compress_and_a_start_that_mixes_channels(tmp_path, monkeypatch, tiny_teacher, tiny_tokenizer):
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    settings = settings_of(tmp_path / "small", start="pca")
    small = red.compress(tiny_teacher(), tokenised(), tokenizer=tiny_tokenizer, **settings)
    run = Run.load(tmp_path / "small")
    assert (
        run.method == "compress"
        and run.finished
        and run.channels["kept"].sum() == pytest.approx(NARROW, abs=1e-4)
        and 0 < run.channels["kept"].max() < 1
    )
    assert run.get("erank", "end") is None and run.ranks("start") != run.ranks("teacher") and run.number("forecast", "start", "seconds") > 0
    page = (tmp_path / "small" / "report.html").read_text()
    assert "without training" in page and "It selects no channels" in page and "without training" in (small.path / "README.md").read_text()


def test_latent_reasoning(tmp_path, tiny_teacher):
    done = red.distill(tiny_teacher(), table_rows(), tokenizer=number_tokenizer(), method="lori", **lori_settings(tmp_path / "run"))
    run = Run.load(tmp_path / "run")
    assert run.method == "lori" and [step for step, _ in run.series("task")] == [1, 2, 3, 4] and run.finished
    assert dict(run.series("task")) == {entry["step"]: entry["task"] for entry in done.trainer.state.log_history if "task" in entry}
    assert "latent reasoning" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "where",
    ["red.report.report.render", "red.report.measuring.peak_memory", "red.report.recording.provenance.write_json", "red.report.card.model_card"],
)
def test_nothing_that_fails_costs_the_run(where, tmp_path, monkeypatch, tiny_teacher, tiny_tokenizer):
    said = []
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    monkeypatch.setattr(recording.logger, "warning", said.append)

    def broken(*args, **kwargs):
        raise OSError("no room left")

    monkeypatch.setattr(where, broken)
    result = red.distill(tiny_teacher(), tokenised(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "run", max_steps=1))
    assert (result.path / "model.safetensors").is_file() and result.trainer.state.global_step == 1
    assert said and all("no room left" in text or "does not say what its student is" in text or "is no run of red" in text for text in said)


def test_a_run_without_a_checkpoint_may_begin_again_and_a_strangers_file_is_kept(tmp_path, monkeypatch, tiny_teacher, tiny_tokenizer):
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"mine": 1}')
    settings = settings_of(tmp_path / "run", max_steps=1)
    with pytest.raises(REDError, match="run.json"):
        red.distill(tiny_teacher(), tokenised(), tokenizer=tiny_tokenizer, **settings)
    assert (tmp_path / "run" / "run.json").read_text() == '{"mine": 1}'
    (tmp_path / "run" / "run.json").unlink()
    monkeypatch.setattr(recording, "INTERVAL", 0.0)
    monkeypatch.setattr(recording, "SHARE", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        red.distill(tiny_teacher(), tokenised(), tokenizer=tiny_tokenizer, callbacks=[Kill()], **{**settings, "max_steps": STEPS})
    assert [step for step, _ in Run.load(tmp_path / "run").series("loss")] == [1, 2, 3, 4], "written down between checkpoints, too"
    red.distill(tiny_teacher(), tokenised(), tokenizer=tiny_tokenizer, **settings)
    assert Run.load(tmp_path / "run").finished and [step for step, _ in Run.load(tmp_path / "run").series("loss")] == [1]


def test_settings_tell_the_chosen_from_the_default(tmp_path):
    found = split(
        REDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", hidden_size=16, learning_rate=2e-4, temperature=3.0, hub_token="secret")
    )
    assert set(found["changed"]) == {"output_dir", "use_cpu", "hidden_size", "learning_rate", "temperature"}
    assert found["changed"]["learning_rate"] == {"value": 2e-4, "default": 1e-4} and found["changed"]["temperature"] == {"value": 3.0, "default": 1.0}
    assert "secret" not in json.dumps(found) and found["default"]["tap_detach"] is True
    faithful = split(REDConfig(output_dir=str(tmp_path), use_cpu=True, lrc_faithful=True))
    assert "lrc_faithful" in faithful["changed"] and "temperature" not in faithful["changed"]


def test_the_forecast_is_reds_own(tmp_path, monkeypatch, tiny_teacher):
    trainer = make_trainer(tiny_teacher(), tmp_path / "run", gradient_accumulation_steps=2)
    monkeypatch.setattr(measuring, "measured_rate", lambda device: 1e9)
    found = measuring.forecast_training(trainer)
    assert found["parts"] == memory_advice.parts(trainer) and found["bytes"] == memory_advice.needed(found["parts"]) and found["step_tokens"] == 2 * 2 * 16
    counted = costs.flops(costs.Sizes.of(trainer.teacher.config), NARROW, context=16, sharing=64, tap_target="gather").total
    assert found["step_seconds"] == pytest.approx(counted * 64 / 1e9)
    padded = make_trainer(tiny_teacher(), tmp_path / "padded", [{"input_ids": [5] * 9}] * 4, packing=False)
    assert measuring.forecast_training(padded)["step_tokens"] == 2 * 9, "rows are as long as the longest document"
    monkeypatch.setattr(measuring, "_known_gpu", lambda device: "H100")
    there = plan(
        trainer.teacher.config,
        NARROW,
        gpu="H100",
        per_device_train_batch_size=2,
        max_length=16,
        gradient_accumulation_steps=2,
        tap_target="gather",
        student_dtype="float32",
    ).placements[-1]
    found = measuring.forecast_training(trainer)
    assert (found["step_seconds"], found["bytes"]) == (there.step_seconds, there.memory.peak) and "assumed" in found["how"]


def test_a_folder_of_an_older_run_has_a_page_too(tmp_path, folders):
    """Without run.json: the log of the last checkpoint, and the channels of the start."""
    folder, _, _, _ = folders
    place = tmp_path / "checkpoint-4"
    place.mkdir()
    (place / "trainer_state.json").write_bytes((folder / "checkpoint-4" / "trainer_state.json").read_bytes())
    run = Run.load(tmp_path)
    assert [step for step, _ in run.series("loss")] == [1, 2, 3, 4] and "those of checkpoint-4" in render(run)
    with pytest.raises(REDError, match="no run of red"):
        write_page(tmp_path / "checkpoint-4", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_long_log_is_written_for_no_more_than_its_share_of_the_time(tmp_path, monkeypatch):
    record, clock = recording.Record(REDConfig(output_dir=tmp_path / "run", use_cpu=True), "red"), itertools.count(0, 2)  # a write takes two seconds
    monkeypatch.setattr(recording.time, "monotonic", lambda: float(next(clock)))
    record.write()
    written, later = record._written, lambda seconds: monkeypatch.setattr(recording.time, "monotonic", lambda: record._written + seconds)
    assert written == 2.0
    later(2 / recording.SHARE - 1)
    assert not record.due()  # long after INTERVAL
    later(2 / recording.SHARE + 1)
    assert record.due()
