"""Files that settings and plans come from, broken: the config.json of `red plan`, fsdp_config, a stream's place in a checkpoint. A REDError comes out, or a result."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_fuzz import JSON, damaged, file, fuzz, only_red_errors
from tiny_models import build_tiny_model

from red.errors import REDError
from red.training.launching import Sharding, requested_sharding
from red.planning.planner import Plan, plan
from red.data.streaming import STREAM_FILE, PackedStream, StreamLoading

CONFIG = {**json.loads(build_tiny_model().config.to_json_string(use_diff=False)), "architectures": ["LlamaForCausalLM"]}
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "head_dim", "vocab_size", "model_type", "tie_word_embeddings",
         "attention_bias", "rope_parameters", "layer_types", "max_position_embeddings")
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz(120)
@given(content=st.builds(lambda name, value: json.dumps({**CONFIG, name: value}).encode(), st.sampled_from(SIZES), JSON | st.sampled_from([0, -1, 1, 10**30, 1e308, [8, 8]]))
       | damaged(json.dumps(CONFIG).encode()) | JSON.map(lambda value: json.dumps(value).encode()))
def test_the_config_of_a_plan(place, content):
    with file(place, "config.json", content) as path:
        found = only_red_errors(plan, str(path), 16)
        if isinstance(found, Plan):
            only_red_errors(str, found)


def test_the_whole_config_is_planned(place):
    with file(place, "config.json", json.dumps(CONFIG).encode()) as path:
        assert isinstance(only_red_errors(plan, str(path), 16), Plan)
    with file(place, "config.json", DEEP) as path:
        assert isinstance(only_red_errors(plan, str(path), 16), REDError)


@fuzz(120)
@given(content=st.dictionaries(st.sampled_from(["fsdp_version", "reshard_after_forward", "fsdp_offload_params", "fsdp_state_dict_type", "x"]), JSON).map(lambda value: json.dumps(value).encode())
       | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30) | st.just(DEEP), inline=st.booleans())
def test_fsdp_config(place, content, inline):
    with file(place, "fsdp.json", content) as path:
        given = content.decode("utf-8", "replace") if inline else str(path)
        assert isinstance(only_red_errors(requested_sharding, "full_shard", given), (Sharding, REDError))


@pytest.fixture(scope="module")
def lines(place):
    (place / "rows.jsonl").write_text("".join(json.dumps({"input_ids": [3 + (at * step) % 60 for at in range(9)]}) + "\n" for step in range(1, 40)))
    return place / "rows.jsonl"


@fuzz(80)
@given(layouts=JSON | st.lists(st.lists(st.lists(st.integers(-2, 40) | JSON, max_size=4), max_size=2), max_size=2), source=JSON, whole=JSON, how=st.integers(0, 3))
def test_the_place_in_a_stream(lines, layouts, source, whole, how):
    trainer = StreamLoading()
    trainer.train_dataset = PackedStream(str(lines), vocab_size=64, max_length=16)
    state = {"facts": trainer.train_dataset.facts, "layouts": layouts, "source": source}

    def go_on():
        trainer.load_stream(lines.parent)
        return list(islice(trainer.train_dataset.rows(), 3))

    with file(lines.parent, STREAM_FILE, json.dumps(state if how else whole).encode()):
        only_red_errors(go_on)
