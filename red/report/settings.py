"""A config's fields, those that somebody chose apart from those that are as red or transformers has them."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path

# set by the machine or by transformers itself, whatever the user says
AUTOMATIC = ("accelerator_config", "disable_tqdm", "dataloader_pin_memory", "ddp_find_unused_parameters")
NONE = (None, "", "none", [], {})


def settings_of(config) -> dict[str, dict]:
    """`{"changed": {name: {"value", "default"}}, "default": {name: value}}`; tokens are left out (`TrainingArguments.to_dict` hides them)."""
    values, derived = config.to_dict(), _derived(config)
    changed, kept = {}, {}
    for field in (field for field in dataclasses.fields(config) if not field.name.endswith("_token")):
        value, default = _plain(values.get(field.name)), _default(field)
        automatic = field.name in AUTOMATIC or (default is None and (value is False or value == derived.get(field.name)))
        if automatic or value == default or (value in NONE and default in NONE):
            kept[field.name] = value
        else:
            changed[field.name] = {"value": value, "default": derived.get(field.name, default) if default is None else default}
    return {"changed": changed, "default": kept}


def _derived(config) -> dict:
    """What red puts in the place of a default of None."""
    from red.lori.config import PRESETS

    if hasattr(config, "preset"):
        return PRESETS[config.preset]
    faithful = getattr(config, "lrc_faithful", False)
    return {
        "temperature": 40.0 if faithful else 1.0,
        "kl_reduction": "sequence" if faithful else "token",
        "tap_detach": not faithful,
        "tap_normalize": not faithful,
    }


def _default(field):
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    return _plain(field.default_factory()) if field.default_factory is not dataclasses.MISSING else None


def _plain(value):
    """What JSON holds."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
