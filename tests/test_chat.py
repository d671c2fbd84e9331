"""Conversations: what the template writes is what is trained on, and where asked for only the assistant's words have labels."""

from __future__ import annotations

import pytest
from tiny_training import settings_of

from red.config import REDConfig
from red.data.loading import IGNORE, load_examples
from red.errors import REDError
from red.prepare import pack_rows
from red.data.streaming import PackedStream

USER, ASSISTANT, END = 10, 11, 12  # w10 w11 w12 stand for the template's markers
PLAIN = "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} w12 {% endfor %}"
MARKED = ("{% for m in messages %}{% if m.role == 'user' %}w10 {{ m.content }} w12 {% else %}w11 {% generation %}{{ m.content }} w12{% endgeneration %} "
          "{% endif %}{% endfor %}")
TALK = [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": "w30"}, {"role": "user", "content": "w22"}, {"role": "assistant", "content": "w31 w32"}]
IDS = [USER, 20, 21, END, ASSISTANT, 30, END, USER, 22, END, ASSISTANT, 31, 32, END]
LEARNT = [IGNORE] * 5 + [30, END] + [IGNORE] * 4 + [31, 32, END]


@pytest.fixture()
def talker(tiny_tokenizer):
    tiny_tokenizer.chat_template = MARKED
    return tiny_tokenizer


def test_the_template_writes_conversations(talker):
    """As it is: no bos, no eos, nothing between the turns but what the template says; beside rows of other kinds."""
    chat, text, pair = load_examples([{"messages": TALK}, {"text": "w5"}, {"prompt": "w6", "completion": "w7"}], talker)
    assert chat["input_ids"].tolist() == IDS and "labels" not in chat and chat["number"] == 0
    assert text["input_ids"].tolist() == [5, 2] and pair["labels"].tolist() == [IGNORE, 7, 2]
    talker.chat_template = PLAIN
    assert load_examples([{"messages": TALK, "text": "w5"}], talker)[0]["input_ids"].tolist() == IDS


def test_only_the_assistant_is_learnt(talker):
    (chat,) = load_examples([{"messages": TALK}], talker, assistant_only_loss=True)
    assert chat["input_ids"].tolist() == IDS and chat["labels"].tolist() == LEARNT
    (given,) = load_examples([{"input_ids": [5, 6], "labels": [IGNORE, 6]}], talker, assistant_only_loss=True)
    assert given["labels"].tolist() == [IGNORE, 6], "who tokenised it has said what is learnt"


def test_pieces_of_a_long_conversation_keep_their_labels(talker):
    pieces = load_examples([{"messages": TALK}], talker, assistant_only_loss=True, max_length=6)
    assert [piece["labels"].tolist() for piece in pieces] == [LEARNT[:6], LEARNT[6:12], LEARNT[12:]]


def test_training_rows_of_conversations(tiny_teacher, talker, tmp_path):
    """The setting reaches what the trainer packs, all at once and as a stream."""
    config = REDConfig(**settings_of(tmp_path, assistant_only_loss=True))
    rows = pack_rows([{"messages": TALK}] * 3, talker, tiny_teacher(), config)
    stream = PackedStream([{"messages": TALK}] * 3, talker, vocab_size=64, max_length=16, assistant_only_loss=True)
    for row in (rows[0], stream.first(1)[0]):
        assert row["input_ids"].tolist() == IDS + [0, 0] and row["labels"].tolist() == LEARNT + [IGNORE] * 2


@pytest.mark.parametrize("template, row, settings, message", [
    (None, {"messages": TALK}, {}, "Example 0 has messages, and the tokenizer has no chat template"),
    (PLAIN, {"messages": TALK}, {"assistant_only_loss": True}, "marks the assistant's turns with {% generation %}"),
    (MARKED, {"text": "w5"}, {"assistant_only_loss": True}, "Example 0 has no messages, and assistant_only_loss"),
    (MARKED, "w5", {"assistant_only_loss": True}, "Example 0 has no messages, and assistant_only_loss"),
    (MARKED, {"messages": "w5"}, {}, "Example 0: messages must be a list"),
    (MARKED, {"messages": ["w5"]}, {}, "Example 0: messages must be a list"),
    ("{{ raise_exception('roles must take turns') }}", {"messages": TALK}, {}, "Example 0: the chat template refuses its messages: roles must take turns"),
])
def test_what_cannot_be_rendered(tiny_tokenizer, template, row, settings, message):
    tiny_tokenizer.chat_template = template
    with pytest.raises(REDError, match=message):
        load_examples([row], tiny_tokenizer, **settings)
    with pytest.raises(REDError, match="the tokenizer has no chat template"):
        load_examples([{"messages": TALK}], None)
