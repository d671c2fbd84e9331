"""What somebody gets wrong on the first day is refused before a weight is read, and the message knows what was meant."""

import pytest

from red.cli import main


@pytest.fixture
def shape(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    """The name of a folder with a config and a tokenizer, and no weights; in the current one."""
    monkeypatch.chdir(tmp_path)
    tiny_teacher().config.save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    (tmp_path / "text.txt").write_text("w5 w6 w7\n" * 50)
    return "teacher"


def refused(capsys, *command):
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_compress_looks_at_width_and_dtype_first(shape, capsys):
    run = ["compress", "--teacher_model_name_or_path", shape, "--train_file", "text.txt", "--output_dir", "small", "--use_cpu"]
    assert "is not below the teacher's" in refused(capsys, *run, "--hidden_size", "4096")
    assert "dtype='foo' cannot be exported; use one of float32" in refused(capsys, *run, "--hidden_size", "16", "--dtype", "foo")


def test_a_runs_folder_is_no_model(tmp_path, shape, capsys):
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "config.json").write_text("{}")
    assert "did you mean 'run/student'?" in refused(capsys, "erank", "run", "--data", "text.txt")
    assert "did you mean 'run/student'?" in refused(capsys, "eval", "run", "--against", shape, "--data", "text.txt", "--tasks", "none")


def test_a_missing_tokenizer_is_said_in_one_line(tmp_path, shape, capsys):
    for file in (tmp_path / shape).glob("token*"):
        file.unlink()
    said = refused(capsys, "eval", shape, "--against", shape, "--data", "text.txt", "--tasks", "none")
    assert "There is no tokenizer that can be read beside the model 'teacher': the folder has no tokenizer.json. Save" in said and said.count("\n") == 1 and ".." not in said


def test_text_is_no_task(shape, capsys):
    pytest.importorskip("lm_eval")
    assert "'text.txt' is a file that is no .jsonl" in refused(capsys, "eval", shape, "--against", shape, "--tasks", "text.txt")


def test_a_report_is_of_a_folder(shape, capsys):
    assert "'text.txt' is a file; a run is a folder" in refused(capsys, "report", "text.txt")


def test_a_link_that_leads_nowhere(tmp_path, shape, capsys):
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert "'gone.txt' is a link to 'nowhere', which does not exist" in refused(capsys, "erank", shape, "--data", "gone.txt")


def test_doctor_says_what_to_do_about_an_empty_file(tmp_path, tiny_teacher, tiny_tokenizer, capsys):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "empty.txt").touch()
    assert main(["doctor", "--teacher", str(tmp_path / "teacher"), "--data", str(tmp_path / "empty.txt"), "--use_cpu"]) == 1
    said = capsys.readouterr().out
    assert "The data set is empty: 0 examples, 0 tokens\n" in said and "-> Give text, or check the file" in said


def test_lori_wants_the_teachers_tokenizer(tiny_teacher, tiny_tokenizer, tmp_path, capsys):
    tiny_teacher(vocab_size=32).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text('{"question": "w5", "steps": ["w6"], "answer": "w7"}\n' * 4)
    said = refused(capsys, "lori", "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--train_file", str(tmp_path / "rows.jsonl"),
                   "--output_dir", str(tmp_path / "run"), "--use_cpu", "--report_to", "none")
    assert "The tokenizer has 64 entries but the teacher's embedding has 32" in said
