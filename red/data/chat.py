"""Conversations: rows with `messages`, a list of {"role": …, "content": …}, as the tokenizer's own chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from jinja2 import TemplateError

from red.errors import REDError
from red.data.packing import IGNORE

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(messages, tokenizer, number: int, *, assistant_only_loss: bool = False, tools: list | None = None) -> dict:
    """One conversation as an example: `input_ids`, and `labels` where only the assistant's turns are learnt. The template ends it; no eos is added.

    Args:
        messages: the turns.
        tokenizer: with a chat template.
        number: of the example, for messages.
        assistant_only_loss: labels are -100 outside of what the template marks with {% generation %}.
        tools: descriptions for the template, where the row has some.

    Raises:
        REDError: no template; one that marks no assistant turns where they are asked for; messages that it refuses.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise REDError(f"Example {number}: messages must be a list of {{'role': …, 'content': …}}.")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise REDError(f"Example {number} has messages, and the tokenizer has no chat template. Set tokenizer.chat_template, or render the text yourself.")
    if assistant_only_loss and not GENERATION.search(tokenizer.get_chat_template(tools=tools)):
        raise REDError("assistant_only_loss needs a chat template that marks the assistant's turns with {% generation %} … {% endgeneration %}, and this "
                       "tokenizer's does not. Put the marks into tokenizer.chat_template, or set assistant_only_loss=False.")
    try:
        found = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only_loss)
    except (TemplateError, ValueError, TypeError) as error:
        raise REDError(f"Example {number}: the chat template refuses its messages: {error}. Give what the template expects.") from error
    ids = np.asarray(found["input_ids"], np.int32)
    if not assistant_only_loss:
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": np.where(np.asarray(found["assistant_masks"]) == 1, ids, IGNORE).astype(np.int32)}
