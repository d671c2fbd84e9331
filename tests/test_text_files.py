"""Text files read the same at once and streamed, and text that is none."""

from __future__ import annotations

import pytest
from test_data import EOS, ids_of

from red.data.loading import load_examples, open_path
from red.data.sources import FileSource
from red.errors import REDError
from red.files import json_lines
from red.judge.problems import load_problems
from red.lori.data import load_rows


@pytest.mark.parametrize("content, expected", [
    (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),  # as Windows writes it: no mark, and no carriage return, is learnt
    ("a\u2028b\x85c\x0cd\ne\n".encode(), ["a\u2028b\x85c\x0cd", "e"]),  # a line ends with a line feed
    (b"\n \na\nb\n \n", ["a", "b"]),  # blank lines at the ends separate nothing
    (b"a\n\n\n b\r\nc\r\n\r\nd", ["a", " b\nc", "d"]),
])
def test_documents_of_a_text_file_are_the_same_streamed(tmp_path, content, expected):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert [document for document in open_path(file, None) if document.strip()] == expected
    assert [document for document in FileSource(file, None).documents(0) if document.strip()] == expected


def test_jsonl_with_a_mark_and_lines_within_a_text(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "w5"}\r\n{"text": "w6\xe2\x80\xa8w7\xc2\x85w8"}\r\n')  # JSON may hold U+2028 and U+0085 as they are
    assert [value["text"] for _, value in json_lines(file)] == ["w5", "w6\u2028w7\x85w8"]
    assert FileSource(file, None).documents(0) == [{"text": "w5"}, {"text": "w6\u2028w7\x85w8"}]
    assert ids_of(load_examples(file, tiny_tokenizer))[0] == [5, EOS]
    file.write_bytes(b'{"question": "1 + 1 =\xe2\x80\xa8", "answer": "2"}\n')
    assert load_problems(file)[0].question == "1 + 1 =" and load_rows(file)[0].answer == "2"
    file.write_bytes(b"\xff\n")
    for read in (load_problems, load_rows):
        with pytest.raises(REDError, match="line 1 is not JSON"):
            read(file)


def test_half_a_surrogate_pair_is_named(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w5"}\n{"text": "w6 \\ud83d"}\n')
    with pytest.raises(REDError, match=r"Example 1 has half a surrogate pair, \\ud83d, at character 3"):
        load_examples(file, tiny_tokenizer)
