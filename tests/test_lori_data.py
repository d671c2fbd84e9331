"""Rows of question, steps and answer from every kind of source, and answers compared as numbers."""

from __future__ import annotations

import json

import pytest
from tiny_lori import PREFIX, number_tokenizer

from red.errors import REDError
from red.lori.batch import batch_of, prompt_and_target
from red.lori.data import Row, encode_rows, load_rows, number, same_answer, split_steps

GSM = {"question": "Ann has 3 bags.", "steps": ["<<3*4=12>>", "<<12-2=10>>"], "answer": "10"}
ROW = Row("Ann has 3 bags.", ("<<3*4=12>>", "<<12-2=10>>"), "10")


def test_sources_agree(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(GSM) + "\n\n" + json.dumps({**GSM, "steps": "<<3*4=12>> then <<12-2=10>>", "answer": 10}) + "\n")
    assert load_rows(tmp_path / "rows.jsonl") == [ROW, ROW] == load_rows([GSM, ROW])
    renamed = {"q": GSM["question"], "cot": "<<3*4=12>>\n<<12-2=10>>", "a": "10"}
    assert load_rows(iter([renamed]), question_column="q", steps_column="cot", answer_column="a") == [ROW]


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_list([GSM, GSM])
    found.save_to_disk(tmp_path / "set")
    assert load_rows(found) == [ROW, ROW] == load_rows(tmp_path / "set")
    datasets.DatasetDict({"test": found}).save_to_disk(tmp_path / "splits")
    with pytest.raises(REDError, match="splits test and no 'train'"):
        load_rows(tmp_path / "splits")


@pytest.mark.parametrize(("steps", "expected"), [
    (None, ()), ("", ()), ([" a ", "", "b"], ("a", "b")), ("a = 1\nb = 2\n", ("a = 1", "b = 2")), ("x <<1+1=2>>2<<2*3=6>>6", ("<<1+1=2>>", "<<2*3=6>>"))])
def test_steps(steps, expected):
    assert split_steps(steps) == expected


@pytest.mark.parametrize(("item", "message"), [({"question": "q"}, "Row 0 has no 'answer'; it has 'question'"), ({"query": "q", "answer": 1}, "no 'question'"),
                                               (["q", "a"], "Row 0 is a list"), ({"question": " ", "answer": 1}, "an empty 'question'"),
                                               ({"question": None, "answer": 1}, "Row 0 has an empty 'question'"),
                                               ({"question": ["q"], "answer": 1}, r"Row 0 has \['q'\] as question"), ({"question": "q", "answer": 1, "steps": 3}, "and 3 as steps; expected"),
                                               ({"question": "q \ud83d", "answer": 1}, r"Row 0 has half a surrogate pair, \\ud83d, at character 2")])
def test_bad_rows_are_refused(item, message):
    with pytest.raises(REDError, match=message):
        load_rows([item])


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": \n')
    with pytest.raises(REDError, match="line 1 is not JSON"):
        load_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(REDError, match="no .jsonl file"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(REDError, match="no rows"):
        load_rows([])
    with pytest.raises(REDError, match="The data"):
        load_rows(tmp_path / "rows.json")


@pytest.mark.parametrize(("said", "right", "expected"), [
    ("The answer is: 1,234.50", "1234.5", True), ("The answer is: 12", "21", False), ("3 * 4 = 12 The answer is: -7.0", "-7", True), ("7 The answer is:", "7", False),
    ("about 12 apples", "12", True), ("nothing", "12", False), ("The answer is: yes it is", "yes it is", True), ("12", "yes", False), ("0", "-0", True),
    ("1e3", "1000", False)])
def test_answers_are_compared_as_numbers(said, right, expected):
    assert same_answer(said, right, "The answer is:") is expected


def test_the_last_number():
    assert (number("a 3 and 4.25."), number("none"), number("$1,000,000")) == (4.25, None, 1e6)
    assert (number(".5"), number("10-5"), number("1, 2"), number("3,4"), number("x = −3"), number("-.25"), number("1234,5678")) == (0.5, 5, 2, 4, -3, -0.25, 5678)


def test_what_a_model_reads_and_says():
    tokenizer = number_tokenizer()
    (row,) = encode_rows([Row("table 3 9", ("9", "5"), "5")], tokenizer, answer_prefix=PREFIX)
    table, answer, colon, (three, nine, five) = 7, 4, 5, (11, 17, 13)
    assert prompt_and_target(row, "explicit") == ([table, three], [nine, nine, five, answer, colon, five, 2])
    assert prompt_and_target(row, "none") == ([table, three], [nine, answer, colon, five, 2])
    assert prompt_and_target(row, "latent", 64, 65) == ([table, three, nine, 64], [65, answer, colon, five, 2])
    assert prompt_and_target(row, "explicit", 64, 65) == ([table, three, nine], [64, nine, five, 65, answer, colon, five, 2])
    assert prompt_and_target(row, "latent", 64, 65, hidden_steps=1) == ([table, three, nine, 64], [65, five, answer, colon, five, 2])
    for settings in (dict(target="explicit"), dict(target="explicit", bot=64, eot=65), dict(target="none"),
                     dict(target="latent", bot=64, eot=65, hidden_steps=1)):
        batch = batch_of([row], pad=0, **settings)
        assert batch["target_ids"][0, batch["anchor"][0]] == colon
    (shorter,) = encode_rows([Row("table 3 9", ("9", "5"), "5")], tokenizer, answer_prefix=PREFIX, drop_last_step=True)
    assert shorter.steps == [[nine]]
    batch = batch_of([row, shorter], "explicit", pad=0)
    assert batch["labels"].tolist() == [[-100, nine, five, answer, colon, five, 2], [-100, nine, answer, colon, five, 2, -100]]
