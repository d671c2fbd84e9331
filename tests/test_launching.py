"""What asks for sharding, how red reads it, and what is refused by name. (Sharded training: test_sharding.py.)"""

from __future__ import annotations

import json
import os

import pytest
from test_sharding import launch_environment
from tiny_training import settings_of

from red.config import REDConfig
from red.errors import REDError
from red.training.launching import Sharding, requested_sharding, unheard_by_accelerate


@pytest.fixture()
def processes(monkeypatch):
    """REDConfig in a run of two processes."""
    monkeypatch.setattr(REDConfig, "world_size", property(lambda self: 2))


@pytest.mark.parametrize(
    ("fsdp", "fsdp_config", "expected"),
    (
        (None, None, None),
        ("", {"version": 2}, None),
        ("full_shard", None, Sharding(True)),
        ("full_shard auto_wrap", {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}, Sharding(True)),
        (True, {"fsdp_version": 2, "reshard_after_forward": "false"}, Sharding(False)),
        ("true", '{"reshard_after_forward": false}', Sharding(False)),
        (["shard_grad_op"], None, Sharding(False)),
    ),
)
def test_what_is_asked_for(fsdp, fsdp_config, expected):
    assert requested_sharding(fsdp, fsdp_config) == expected


def test_a_file_of_options(tmp_path):
    (tmp_path / "fsdp.json").write_text(json.dumps({"reshard_after_forward": False}))
    assert requested_sharding("full_shard", str(tmp_path / "fsdp.json")) == Sharding(False)
    with pytest.raises(REDError, match="none.json' cannot be read"):
        requested_sharding("full_shard", str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("fsdp", "fsdp_config", "message"),
    (
        ("hybrid_shard", None, "fsdp='hybrid_shard': red knows .*full_shard"),
        ("full_shard offload", None, "fsdp='full_shard offload'"),
        (True, {"version": 1}, "fsdp_version=1: .*Set fsdp_version: 2"),
        (True, {"cpu_offload": True}, "fsdp_cpu_offload is on"),
        (True, {"activation_checkpointing": "true"}, "gradient_checkpointing: true"),
        (True, {"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading is on.*every rank reads it"),
        (True, {"min_num_params": 5}, "'min_num_params', which red does not know"),
    ),
)
def test_what_red_does_not_have_is_refused(fsdp, fsdp_config, message):
    with pytest.raises(REDError, match=message):
        requested_sharding(fsdp, fsdp_config)


def test_accelerate_launch_with_the_shipped_config(monkeypatch):
    """accelerate parses it, for eight GPUs; its processes are told of FSDP2, red understands them, and accelerate's own FSDP stays off."""
    told = launch_environment("fsdp2")
    assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2" and told["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert requested_sharding(None, None) == Sharding(True)
    assert requested_sharding(None, {"reshard_after_forward": False}) == Sharding(False), "the settings win over the launcher's"
    with unheard_by_accelerate():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(REDError, match="fsdp_offload_params is on"):
        requested_sharding(None, None)


def test_data_parallel_config():
    told = launch_environment("ddp")
    assert "ACCELERATE_USE_FSDP" not in told and told["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_one_process_is_refused(tmp_path, monkeypatch):
    """Where `accelerate launch` finds no GPU it starts processes that do not know of each other: they would all write to one folder."""
    with pytest.raises(REDError, match="(?s)fsdp shards over processes, and there is one.*torchrun"):
        REDConfig(**settings_of(tmp_path, fsdp="full_shard"))
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(REDError, match="there is one"):
        REDConfig(**settings_of(tmp_path))


def test_what_cannot_be_sharded(tmp_path, processes):
    assert REDConfig(**settings_of(tmp_path, fsdp="full_shard")).sharding == Sharding()
    assert REDConfig(**settings_of(tmp_path)).sharding is None
    with pytest.raises(REDError, match="erank_steps=5: one rank cannot run a sharded model"):
        REDConfig(**settings_of(tmp_path, fsdp="full_shard", erank_steps=5))


def test_deepspeed_is_refused(tmp_path):
    """Also where the package is missing."""
    with pytest.raises(REDError, match="deepspeed=.*DeepSpeed owns the optimiser.*fsdp=full_shard"):
        REDConfig(**settings_of(tmp_path, deepspeed={"zero_optimization": {"stage": 2}}))
