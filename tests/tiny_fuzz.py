"""What fuzz tests share: bounded, repeatable searches, and files that are nearly right. RED_FUZZ=N takes N times as many examples."""

from __future__ import annotations

import contextlib
import json
import os

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from red.errors import REDError

TIMES = int(os.environ.get("RED_FUZZ", "1"))
SCALARS = st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=12) | st.sampled_from(["none", "true", "1e-4", "inf", "nan", "../..", "a,b", "{}", "\x00"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


def fuzz(examples: int):
    return settings(max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, database=None, suppress_health_check=list(HealthCheck),
                    phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes; the report names the example


def only_red_errors(function, *arguments, **named):
    """The result, or the REDError; any other exception fails the test."""
    try:
        return function(*arguments, **named)
    except REDError as error:
        assert str(error)
        return error


@contextlib.contextmanager
def file(tmp_path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    yield path


def damaged(content: bytes):
    """Bytes like these: some replaced, a part cut out, cut short, or noise after them; of a safetensors file mostly the header."""
    def change(where, what, how):
        place = where % max(len(content), 1) if how % 2 else where % max(min(len(content), 400), 1)
        kinds = (content[:place] + what + content[place + len(what):], content[:place], content[:place] + content[place + len(what):], content + what, what)
        return kinds[how % 5]
    return st.builds(change, st.integers(0, 10**6), st.binary(min_size=1, max_size=12), st.integers(0, 9))


def variants(tensors: dict, metadata: dict):
    """Well-formed safetensors of the same names whose tensors or metadata are not what they should be."""
    def change(name, how, key, text):
        changed, facts = {key: value.clone() for key, value in tensors.items()}, dict(metadata)
        value = changed[name]
        if how == 0:
            del changed[name]
        elif how == 1:
            changed[name] = torch.full_like(value, -1 if value.dtype == torch.int64 else float("nan"))
        elif how == 2:
            changed[name] = torch.cat([value.flatten(), value.flatten()])
        elif how == 3:
            changed[name] = value[:0].contiguous()
        elif how == 4:
            changed[name] = value.to(torch.int32)
        elif how == 5:
            changed[name] = torch.zeros((), dtype=value.dtype)
        elif how == 6:
            changed["extra"] = torch.zeros(3)
        elif how == 7:
            changed[name] = torch.full_like(value, 10**6)
        elif how == 8:
            facts.pop(key)
        else:
            facts[key] = text
        return changed, facts
    texts = st.text(max_size=20) | JSON.map(json.dumps) | st.dictionaries(st.sampled_from(["tap", "sequences", "tokens", "model_hash", "scores"]), JSON).map(json.dumps)
    return st.builds(change, st.sampled_from(sorted(tensors)), st.integers(0, 9), st.sampled_from(sorted(metadata) or ["x"]), texts)
