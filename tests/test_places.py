"""A file that cannot be written is refused before the minutes that make its content, with exit code 2: 1 says that red doctor found something red."""

from __future__ import annotations

import pytest

from red.cli import main
from red.errors import REDError
from red.example import teacher_path
from red.files import require_place_for


@pytest.mark.parametrize("arguments, option", [
    (["plan", "TEACHER", "--hidden_size", "32", "--json", "PLACE"], "--output"),
    (["doctor", "--teacher", "TEACHER", "--data", "TEXT", "--json", "PLACE"], "--output"),
    (["erank", "TEACHER", "--data", "TEXT", "--json", "PLACE"], "--output"),
    (["erank", "TEACHER", "--data", "TEXT", "--plot", "PLACE"], "--plot"),
    (["eval", "TEACHER", "--against", "TEACHER", "--json", "PLACE"], "--output"),
    (["report", "RUN", "--out", "PLACE"], "--out"),
])
def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys, arguments, option):
    (tmp_path / "file").write_text("the cat")
    for heavy in ("red.erank_report.measure", "red.doctor.examination.examine", "red.judge.judge", "red.planning.planner.plan", "red.report.report.render"):
        monkeypatch.setattr(heavy, lambda *args, **kwargs: pytest.fail("asked too late"))
    places = {"TEACHER": str(teacher_path()), "TEXT": str(tmp_path / "file"), "RUN": str(tmp_path), "PLACE": str(tmp_path / "file" / "inside.svg")}
    assert main([places.get(word, word) for word in arguments]) == 2
    assert f"{option}=" in (said := capsys.readouterr().err) and "is not a folder that this user may write to" in said


def test_a_folder_is_no_file_and_a_missing_folder_is_made(tmp_path):
    with pytest.raises(REDError, match="is a folder"):
        require_place_for(tmp_path, "--out")
    assert require_place_for(tmp_path / "new" / "a.html", "--out") == tmp_path / "new" / "a.html"


@pytest.mark.parametrize("extra", [[], ["--dry_run"]])
def test_statistics_that_are_none_are_refused_before_the_teacher_is_read(tmp_path, monkeypatch, capsys, extra):
    (tmp_path / "text.txt").write_text("\n".join(["the cat eats the cake ."] * 200))
    monkeypatch.setattr("red.distillation.load_teacher", lambda *args: pytest.fail("asked too late"))
    settings = ["--teacher_model_name_or_path", str(teacher_path()), "--train_file", str(tmp_path / "text.txt"), "--hidden_size", "32",
                "--max_length", "64", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(["distill", *settings, "--calibration", str(tmp_path / "text.txt"), *extra]) == 2
    assert "text.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
