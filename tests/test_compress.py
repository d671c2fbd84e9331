"""red.compress and the files of a start: interrupted fits go on, foreign files are refused, red.distill trains on from them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import build_tiny_model, build_tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_distill import quick, texts
from test_fitting import EMBEDDING, start_of, text
from tiny_training import make_trainer, masters, settings_of, tokenised
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import red
from red.calibration import calibrate_batches
from red.cli import main
from red.config import REDConfig
from red.errors import REDError
from red.files import CHANNELS_FILE, PAGE, RUN_FILE
from red.fitting.fit import Fit, fit_maps
from red.fitting.resume import HALF_LAYERS, START_FILE, StartFolder
from red.fitting.shared_map import most_explained
from red.prepare import calibration_batches, pack_rows
from red.starting import start_maps

RECORD = (RUN_FILE, CHANNELS_FILE, PAGE)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The preflight's fresh process takes seconds, and test_export.py has it; the climb is test_shared_map.py's."""
    monkeypatch.setattr("red.sharing.export.run_preflight", lambda *_: {})
    monkeypatch.setattr("red.starts.explained.most_explained", partial(most_explained, iterations=10))


@pytest.fixture()
def fitted_points(monkeypatch):
    """The read points whose readers were really fitted, in order; the head is the last."""
    points, plain, head = [], Fit.readers, Fit.head
    monkeypatch.setattr(Fit, "readers", lambda self, half: points.append(half.point) or plain(self, half))
    monkeypatch.setattr(Fit, "head", lambda self: points.append("head") or head(self))
    return points


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def interrupt_after(count: int):
    def on_progress(done: int, total: int, report: str) -> None:
        assert total == 5 and report.startswith(("explained 0.", "resumed"))
        if done == count:
            raise KeyboardInterrupt
    return on_progress


# ---- interrupted fits ----

@pytest.mark.parametrize("family, done", [("llama", 1), ("qwen2", 2), ("qwen3", 4)])
def test_an_interrupted_fit_goes_on(tiny_teacher, family, tmp_path, fitted_points, done):
    teacher = tiny_teacher(family)
    start = start_of(teacher, "pca").maps
    whole = fit_maps(teacher, start, text())
    assert fitted_points == [0, 1, 2, 3, "head"]
    with pytest.raises(KeyboardInterrupt):
        fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key"), on_progress=interrupt_after(done))
    fitted_points.clear()
    assert sorted(path.name for path in (tmp_path / HALF_LAYERS).iterdir()) == [f"0_{point:03d}.safetensors" for point in range(done)]
    reports = []
    found = fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key"), on_progress=lambda *facts: reports.append(facts))
    assert equal(found, whole) and fitted_points == [*range(done, 4), "head"]
    assert [facts[:2] for facts in reports] == [(number, 5) for number in range(1, 6)] and [facts[2] for facts in reports[:done]] == ["resumed"] * done


def test_half_layers_of_another_map_are_fitted_again(tiny_teacher, tmp_path, fitted_points):
    """As where another machine finds another basis for the same key; a folder that is only read stays as it is."""
    teacher = tiny_teacher()
    start, other = start_of(teacher, "pca").maps, start_of(teacher, "orthogonal_shared").maps
    first = fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key"))
    before = {path.name: path.read_bytes() for path in (tmp_path / HALF_LAYERS).iterdir()}
    reader = StartFolder(tmp_path, "key", writes=False)
    fitted_points.clear()
    assert equal(fit_maps(teacher, other, text(), kept=reader), fit_maps(teacher, other, text()))
    assert fitted_points == [0, 1, 2, 3, "head"] * 2
    assert equal(fit_maps(teacher, start, text(), kept=reader), first) and fitted_points[10:] == ["head"]
    reader.keep_whole(first, "hash")
    assert {path.name: path.read_bytes() for path in (tmp_path / HALF_LAYERS).iterdir()} == before and not (tmp_path / START_FILE).exists()


@pytest.mark.parametrize("damage", ["cut short", "empty", "no safetensors", "of another key"])
def test_a_half_layer_that_cannot_be_used_is_fitted_again(tiny_teacher, tmp_path, fitted_points, damage):
    teacher = tiny_teacher()
    start = start_of(teacher, "pca").maps
    whole = fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key"))
    path = tmp_path / HALF_LAYERS / "0_002.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-100], "empty": b"", "no safetensors": b"x" * 500, "of another key": content}[damage])
    if damage == "of another key":
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path, metadata={"key": "other"})
    fitted_points.clear()
    assert equal(fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key")), whole)
    assert fitted_points == [2, "head"]


def test_a_fit_is_kept_until_something_that_decides_it_changes(tiny_teacher, tmp_path, fitted_points):
    teacher, batches = tiny_teacher(), text(2)

    def run(folder=tmp_path, model=teacher, batches=batches, **changes):
        fitted_points.clear()
        config = REDConfig(**settings_of(tmp_path, **{"start": "pca", "start_fit": "full", **changes}))
        return start_maps(model, config, calibrate_batches(model, text(2), covariance=True), batches, folder).maps

    first = run()
    assert fitted_points and (tmp_path / START_FILE).is_file() and not (tmp_path / HALF_LAYERS).exists()
    assert equal(run(), first) and not fitted_points, "a finished start is read, not fitted"
    assert equal(run(folder=None), first) and fitted_points
    assert equal(run(learning_rate=3e-3, batches=iter(batches)), first) and not fitted_points, "training has nothing to do with it"
    rows = [{key: value.flatten()[None] for key, value in batch.items()} for batch in batches]  # the same tokens in rows of another length
    apart = [{**batch, "position_ids": torch.zeros_like(batch["position_ids"])} for batch in batches]
    other = [{**batch, "input_ids": batch["input_ids"].flip(1)} for batch in batches]
    unmasked = [{**batch, "token_mask": torch.ones_like(batch["token_mask"])} for batch in batches]
    whole = (tmp_path / START_FILE).read_bytes()
    for changes in (dict(fit_writer_ridge=1e-2), dict(fit_reader_ridge=1e-2), dict(start_fit="readers"), dict(start="orthogonal"), dict(hidden_size=12),
                    dict(batches=other), dict(batches=apart), dict(batches=unmasked), dict(batches=rows), dict(model=tiny_teacher(seed=1))):
        (tmp_path / START_FILE).write_bytes(whole)
        changed = run(**changes)
        assert fitted_points, f"{changes.keys()} decides"
        assert not equal(changed, first) or changes.get("batches") is rows
        assert equal(run(**changes), changed) and not fitted_points, "what is kept is of the last run"
    with pytest.raises(REDError, match="start='pca' with start_fit='full' fits to the calibration text.*batches"):
        run(batches=None)


# ---- compress ----

@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_compress_writes_a_checkpoint_and_a_start_to_train_from(tiny_teacher, tiny_tokenizer, tmp_path, family, tied, fitted_points):
    teacher = tiny_teacher(family, tied=tied)
    result = red.compress(teacher, texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "small", start="fitted"))
    assert isinstance(result, red.CompressResult) and fitted_points == [0, 1, 2, 3, "head"]
    assert result.path == tmp_path / "small" / "student" == result.report.path and result.start == tmp_path / "small" / START_FILE
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted([START_FILE, "student", *RECORD])
    loaded, ids = AutoModelForCausalLM.from_pretrained(result.path), torch.randint(3, 64, (2, 7))
    assert (loaded.config.hidden_size, loaded.config.model_type, loaded.config.tie_word_embeddings) == (16, family, tied)
    assert PreTrainedTokenizerFast.from_pretrained(result.path)("w4 w5")["input_ids"] == [4, 5]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.student(ids).logits, rtol=0, atol=1e-6)
    begun = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begun.update({name: value.clone() for name, value in model.state_dict().items()})

    fitted_points.clear()
    trained = red.distill(teacher, texts(), tokenizer=tiny_tokenizer, callbacks=[Begin()], **quick(tmp_path / "run", start=result.start))
    assert not fitted_points and equal(begun, dict(result.student.state_dict())), "training begins with the very weights"
    assert not torch.equal(trained.student.model.embed_tokens.weight, begun[EMBEDDING])
    with pytest.raises(REDError, match="output_dir=.*small' is not empty.*student"):
        red.compress(teacher, texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "small", start="fitted"))


def test_compress_goes_on_where_it_was_interrupted(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch, fitted_points):
    def run(folder):
        return red.compress(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / folder, start="fitted"))

    whole = run("whole")
    keep = StartFolder.keep_half_layer

    def interrupted(self, point, maps):
        keep(self, point, maps)
        if point == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StartFolder, "keep_half_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("halved")
    assert [path.name for path in (tmp_path / "halved").iterdir()] == [HALF_LAYERS]
    fitted_points.clear()
    second = run("halved")
    assert fitted_points == [2, 3, "head"] and equal(load_file(second.start), load_file(whole.start))
    assert equal(dict(second.student.state_dict()), dict(whole.student.state_dict())) and not (tmp_path / "halved" / HALF_LAYERS).exists()


def test_what_is_not_fitted_leaves_no_start(tiny_teacher, tiny_tokenizer, tmp_path):
    plain = red.compress(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, dtype="bfloat16", **settings_of(tmp_path / "plain", start="activation"))
    assert plain.start is None and sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(["student", *RECORD]) and plain.report.dtype == "bfloat16"
    readers = red.compress(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "readers", start_fit="readers"))
    trainer = make_trainer(tiny_teacher(), tmp_path / "run", start=readers.start)
    assert equal(dict(trainer.student.state_dict()), dict(readers.student.state_dict()))
    assert len(trainer.projections.channels) == 16 and trainer.taps.target == "gather", "a selection is one from its file too"


def start_file(tmp_path):
    teacher = build_tiny_model()
    maps = start_of(teacher, "pca").maps
    StartFolder(tmp_path, "key").keep_whole(maps, red.calibration.model_hash(teacher))
    return tmp_path / START_FILE


BAD_STARTS = {
    "missing": (lambda tmp: (tmp / "strat.safetensors", {}), "start '.*strat.safetensors' does not exist; did you mean '.*start.safetensors'"),
    "wrong width": (lambda tmp: (tmp / START_FILE, {"hidden_size": 12}), "hidden_size=12, but start=.* is of width 16. Give hidden_size=16, or compress again"),
    "a fit on top": (lambda tmp: (tmp / START_FILE, {"start_fit": "full"}), "start_fit='full': the start .* is finished. Leave start_fit out"),
    "another teacher": (lambda tmp: (tmp / START_FILE, {"teacher": build_tiny_model(seed=1)}), "fitted for another teacher.*compress this one"),
    "no start": (lambda tmp: (save_file({"a": torch.ones(2)}, tmp / "a.safetensors") or tmp / "a.safetensors", {}), "is a safetensors file but not a start. Give the start.safetensors"),
    "no safetensors": (lambda tmp: ((tmp / "b.safetensors").write_text("x" * 99) and tmp / "b.safetensors", {}), "cannot be read as a start.*Give the start.safetensors"),
}


@pytest.mark.parametrize("case", sorted(BAD_STARTS))
def test_a_start_file_that_does_not_fit_is_refused(tiny_tokenizer, tmp_path, case):
    start_file(tmp_path)
    path, changes = BAD_STARTS[case][0](tmp_path)
    teacher = changes.pop("teacher", None) or build_tiny_model()
    for run in (red.distill, red.compress):
        with pytest.raises(REDError, match=f"(?s){BAD_STARTS[case][1]}"):
            run(teacher, texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "run", start=path, **changes))
        assert not (tmp_path / "run").exists()


def test_bad_calls_are_refused_before_anything_is_written(tiny_teacher, tiny_tokenizer, tmp_path):
    call = dict(teacher=tiny_teacher(), data=texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "run", start="fitted"))
    for changes, message in ((dict(config=REDConfig(**settings_of(tmp_path))), "config or settings, not both"), (dict(data=None), "needs a teacher and text"),
                             (dict(teacher=None), "needs a teacher and text"), (dict(hidden_size=32), "not below the teacher's 32"), (dict(start="fited"), "Did you mean 'fitted'"),
                             (dict(start_fit="half"), "start_fit='half': use none, readers or full"), (dict(fit_reader_ridge=0), "fit_reader_ridge=0.*above 0"),
                             (dict(hiden_size=8), "Unknown setting 'hiden_size'; did you mean 'hidden_size'"), (dict(data=[]), "data set is empty")):
        with pytest.raises(REDError, match=message):
            red.compress(**{**call, **changes})
        assert not (tmp_path / "run").exists()


# ---- distill and the command line ----

def test_distill_fits_once_and_resumes(tiny_teacher, tmp_path, fitted_points):
    """The start of a run is in its folder: resumed training reads it, and an interrupted fit is no full output folder."""
    settings = dict(start="fitted", save_strategy="steps", save_steps=1)
    first = make_trainer(tiny_teacher(), tmp_path / "run", **settings, max_steps=3)
    rows = pack_rows(tokenised(), None, first.teacher, first.args)
    assert fitted_points == [0, 1, 2, 3, "head"] and len(list(calibration_batches(rows, 4))) == 1
    start = masters(first)
    first.train()
    fitted_points.clear()
    second = make_trainer(tiny_teacher(), tmp_path / "run", **settings, max_steps=3)
    assert not fitted_points and equal(masters(second), start)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not fitted_points and equal(masters(second), masters(first))


def test_distill_takes_a_folder_with_an_interrupted_fit(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch, fitted_points):
    settings = quick(tmp_path / "run", start="fitted", save_strategy="steps", save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(StartFolder, "keep_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings)
    fitted_points.clear()
    assert red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings).trainer.state.global_step == 2
    assert fitted_points == ["head"]
    (tmp_path / "run" / "student").rename(tmp_path / "elsewhere")
    again = red.distill(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, resume=True, **{**settings, "max_steps": 3})
    assert again.trainer.state.global_step == 3 and fitted_points == ["head"]


def test_command_line(tiny_teacher, tmp_path, monkeypatch, capsys):
    teacher = tiny_teacher("qwen3")
    teacher.save_pretrained(tmp_path / "teacher")
    build_tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts()))
    (tmp_path / "run.yaml").write_text(f"teacher_model_name_or_path: {tmp_path}/teacher\ntrain_file: {tmp_path}/corpus.txt\nhidden_size: 16\nmax_length: 16\n"
                                       f"use_cpu: true\ndisable_tqdm: false\ncalibration_samples: 4\noutput_dir: {tmp_path}/small\n")
    given = ["compress", "--config", str(tmp_path / "run.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "head", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main(given) == 130
    assert f"Kept: what was fitted so far, in {tmp_path}/small. The same command goes on" in capsys.readouterr().err
    assert main(given) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path}/small/student: qwen3, " in shown.out and "start=fitted, start_fit=full: " in shown.out + shown.err and "TFLOP" in shown.out + shown.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "student").config.hidden_size == 16
    for extra, message in ((["--hidden_siz", "12"], "Unknown setting 'hidden_siz'; did you mean 'hidden_size'?"), ([], "is not empty"),
                           (["--train_file", "corpis.txt"], "train_file 'corpis.txt' does not exist"), (["--start_fit", "half"], "start_fit='half': use none")):
        assert main([*given, *extra]) == 2
        assert message in capsys.readouterr().err
