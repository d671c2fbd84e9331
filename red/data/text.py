"""Where the documents of a .txt file end, the same whether it is read at once or streamed; and text that is none."""

from __future__ import annotations

import re

from red.errors import REDError

BLANK_LINES = re.compile(r"\n(?:[ \t\r\f\v]*\n)+")


def documents_of(text: str) -> list[str]:
    """What stands between blank lines, or each line where no blank one separates two texts. A line ends with a line feed, and a carriage return before that is part of its end."""
    text = text.replace("\r\n", "\n")
    documents = [document.strip("\n") for document in BLANK_LINES.split(text) if document.strip()]
    return documents if len(documents) > 1 else text.split("\n")


def check_surrogates(text: str, place: str) -> None:
    """REDError on half a surrogate pair, which JSON can write and UTF-8 and tokenizers cannot."""
    if half := re.search("[\ud800-\udfff]", text):
        raise REDError(f"{place} has half a surrogate pair, \\u{ord(half.group()):04x}, at character {half.start()}: a character was cut in two. Write it again, or leave the row out.")
