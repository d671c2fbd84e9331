"""What the command line, or `accelerate launch`, asks about sharding.

red shards by itself (`red.training.sharding`), so accelerate and transformers must not hear of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from red.errors import REDError

LAUNCHED = "ACCELERATE_USE_FSDP"  # accelerate launch says by it that its config file has distributed_type: FSDP
WORDS = {"true": None, "full_shard": True, "shard_grad_op": False, "auto_wrap": None}  # of `fsdp`: whether to reshard after the forward
REFUSED = {"cpu_offload": "take more GPUs", "offload_params": "take more GPUs",
           "activation_checkpointing": "set gradient_checkpointing: true in red's own settings",
           "cpu_ram_efficient_loading": "every rank starts from the teacher, so every rank reads it"}
ANYWAY = ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "state_dict_type")  # they ask for what red does without being asked
OPTIONS = ("version", "reshard_after_forward", *REFUSED, *ANYWAY)  # of `fsdp_config`


@dataclass(frozen=True)
class Sharding:
    """How parameters are sharded over the ranks."""

    reshard_after_forward: bool = True  # False keeps a layer's gathered weights until its backward: less communication, more memory


def requested_sharding(fsdp, fsdp_config: str | dict | None) -> Sharding | None:
    """What `fsdp` and `fsdp_config`, or the environment that accelerate launch made, ask for; None where neither does.

    Args:
        fsdp: TrainingArguments' field: True, or words such as "full_shard", "shard_grad_op".
        fsdp_config: a mapping, JSON text, or the path of a JSON file. It wins over the environment.

    Raises:
        REDError: an option that red does not have.
    """
    launched = os.environ.get(LAUNCHED, "false").lower() == "true"
    words = [] if not fsdp else str(fsdp).lower().split() if isinstance(fsdp, (str, bool)) else [str(getattr(word, "value", word)) for word in fsdp]
    if not words and not launched:
        return None
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise REDError(f"fsdp={fsdp!r}: red knows {', '.join(WORDS)} (FSDP2; nothing is kept on the host, no replicas of shards). Give one of these.")
    options = {name: os.environ[f"FSDP_{name.upper()}"] for name in OPTIONS if launched and f"FSDP_{name.upper()}" in os.environ}
    for word in words:
        if WORDS[word] is not None:
            options["reshard_after_forward"] = WORDS[word]
    options |= {name.removeprefix("fsdp_"): value for name, value in _read(fsdp_config).items()}
    for name in options.keys() - set(OPTIONS):
        raise REDError(f"fsdp_config has {name!r}, which red does not know; it reads {', '.join(OPTIONS[:2])}. Leave it out.")
    if str(options.get("version", 2)) != "2":
        raise REDError(f"fsdp_version={options['version']}: red shards with FSDP2. Set fsdp_version: 2.")
    for name, remedy in REFUSED.items():
        if _true(options.get(name, False)):
            raise REDError(f"fsdp_{name} is on, and red does not have it. Turn it off; {remedy}.")
    return Sharding(_true(options.get("reshard_after_forward", True)))


@contextmanager
def unheard_by_accelerate() -> Iterator[None]:
    """While it is open, accelerate finds an ordinary data-parallel run: its FSDP wants an optimizer over the model's own parameters."""
    said = os.environ.pop(LAUNCHED, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[LAUNCHED] = said


def _read(fsdp_config: str | dict | None) -> dict:
    if not isinstance(fsdp_config, str):
        return dict(fsdp_config or {})
    try:
        found = json.loads(fsdp_config if fsdp_config.lstrip().startswith("{") else Path(fsdp_config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise REDError(f"fsdp_config={fsdp_config[:200]!r} cannot be read: {error}. Give a JSON file.") from error
    if not isinstance(found, dict):
        raise REDError(f"fsdp_config={fsdp_config[:200]!r} holds a {type(found).__name__}, not an object. Give a JSON file with names and values.")
    return found


def _true(value) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1", "full_shard")
