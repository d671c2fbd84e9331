"""Settings from a YAML file and the command line to a REDConfig: every key and type is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from red.errors import REDError
from red.files import nearest, require_existing

LARGEST, BRACKETS = 2**20, 200  # of a YAML file
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "~")


class Settings(dict):
    """`{field: value}`, and where those of a file stand: `places[field]` is such as "run.yaml, line 3"."""

    def __init__(self, *given, places: Mapping[str, str] = types.MappingProxyType({})):
        super().__init__(*given)
        self.places = dict(places)


def gather(file: str | Path | None, arguments: Sequence[str], options: Mapping[str, object] = types.MappingProxyType({})) -> Settings:
    """The settings of a YAML file, if there is one, of a command line, and of its options: the later wins."""
    given = read_yaml(file) if file else Settings()
    said = {**parse_command_line(arguments), **options}
    return Settings({**given, **said}, places={name: place for name, place in given.places.items() if name not in said})


def build_config(settings: Mapping[str, object], config_class=None, *, options: Iterable[str] = ()):
    """A REDConfig (or another `config_class` of TrainingArguments) from `{field: value}`; text is converted to the field's type, so that YAML's `1e-4` (a string to it) is a number.

    Args:
        options: what else the caller's command line knows, for the nearest known name.

    Raises:
        REDError: an unknown field, with the nearest known one; a value of the wrong type; a value that REDConfig refuses. It names the file's line where there is one.
    """
    if config_class is None:
        from red.config import REDConfig as config_class

    types_of = field_types(config_class)
    try:
        check_keys(settings, types_of, options)
        return config_class(**{name: convert(name, value, types_of[name]) for name, value in settings.items()})
    except REDError as error:
        named = re.match(r"(?:Unknown setting ')?([^'=]+)", str(error))  # a refusal begins with the setting
        place = getattr(settings, "places", {}).get(named and named.group(1))
        if place is None:
            raise
        raise REDError(f"{place}: {error}") from error
    except (ValueError, TypeError, ImportError, OSError, AttributeError, KeyError, RuntimeError) as error:  # TrainingArguments checks itself
        raise REDError(f"These settings do not go together: {error}") from error


def check_keys(settings: Mapping[str, object], known, options: Iterable[str] = ()) -> None:
    """REDError on the first key that no field has."""
    for name, value in settings.items():
        if name not in known:
            like = nearest(str(name), [*known, *options])
            hint = (f"settings are flat: write {', '.join(map(str, value))} without indentation, one `field: value` a line." if isinstance(value, dict) and value else
                    f"did you mean {like!r}?" if like else "see `red distill -h`; every field of transformers' TrainingArguments works too.")
            raise REDError(f"Unknown setting {name!r}; {hint}")


def read_yaml(path: str | Path) -> Settings:
    """The settings of a YAML file: one mapping of fields to values.

    Raises:
        REDError: no such file; what is not YAML, or not one mapping of fields; a field that is there twice, with both lines.
    """
    import yaml

    path = require_existing(path, "The config file")
    try:
        text = path.read_text(encoding="utf-8")
        brackets = text.count("{") + text.count("[")
        if len(text) > LARGEST or brackets > BRACKETS:  # nested ones take the parser quadratic time
            raise yaml.YAMLError(f"{len(text):,} characters and {brackets:,} brackets; the settings of a run have {LARGEST:,} and {BRACKETS} at most")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        keys = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []  # before construction: of two equal ones it keeps the last
        loaded = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        hint = " Indent with spaces: YAML takes no tabs." if "\\t" in str(error) else ""
        raise REDError(f"{path} is not YAML that red reads: {error}{hint}") from error
    if not isinstance(loaded, (dict, types.NoneType)):
        raise REDError(f"{path} must hold `field: value` lines, such as `hidden_size: 1536`; it holds a {type(loaded).__name__}.")
    lines: dict[str, int] = {}
    for key in keys:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if key.tag == MERGE:
            continue
        if key.tag != TEXT:
            raise REDError(f"{path}, line {line}: {key.value!r} is no field's name. A config holds `field: value` lines, such as `hidden_size: 1536`.")
        if name in lines:
            raise REDError(f"{path}, line {line}: {name} was given in line {lines[name]} already. Keep one of them.")
        lines[name] = line
    return Settings({str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}, places={name: f"{path}, line {line}" for name, line in lines.items()})


def parse_command_line(arguments: Sequence[str]) -> dict[str, object]:
    """`--key value`, `--key=value`, `--key a b` (a list) and a bare `--flag` (true) -> `{key: text}`; hyphens are underscores, the last wins."""
    settings: dict[str, object] = {}
    place = 0
    while place < len(arguments):
        argument = arguments[place]
        place += 1
        if not argument.startswith("--") or argument == "--":
            raise REDError(f"{argument!r} belongs to no setting. Write --key value or --key=value.")
        key, equals, text = argument[2:].partition("=")
        values = [text] if equals else []
        while not equals and place < len(arguments) and not arguments[place].startswith("--"):
            values.append(arguments[place])
            place += 1
        settings[key.replace("-", "_")] = "true" if not values else values[0] if len(values) == 1 else values
    return settings


def convert(name: str, value: object, hint: object) -> object:
    """`value` as the field's type.

    Raises:
        REDError: naming field, value and the type that was expected.
    """
    for option in _options(hint, value):
        try:
            return _as(value, option)
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue
    raise REDError(f"{name}={value!r} is {'text' if isinstance(value, str) else f'a {type(value).__name__}'}; expected {describe(hint)}.{_remedy(value, hint)}")


def field_types(config_class) -> dict[str, object]:
    """{field: type} of all fields that can be given; a base class's annotations are resolved where it was written."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def _options(hint: object, value: object) -> list:
    """The alternatives of a union, in the order to try. Text stays text where that is allowed and nothing plainer fits: TrainingArguments
    reads JSON itself, and `report_to: none` is a word to it."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    options = [option for option in typing.get_args(hint) if not (option is type(None) and isinstance(value, str) and str in typing.get_args(hint))]
    rank = {type(None): 0, bool: 1, int: 2, float: 3, str: 5}
    return sorted(options, key=lambda option: 4 if isinstance(option, type) and issubclass(option, enum.Enum) else rank.get(option, 6))


def _as(value: object, kind: object) -> object:
    """`value` as one plain type, or ValueError."""
    text = value.strip() if isinstance(value, str) else None
    origin = typing.get_origin(kind) or kind
    if kind in (typing.Any, object):
        return value
    if kind is type(None):
        return _check(value is None or (text is not None and text.lower() in NONE), None)
    if origin is bool:
        _check(isinstance(value, bool) or (text is not None and text.lower() in TRUE + FALSE), None)
        return value if text is None else text.lower() in TRUE
    if origin in (int, float):
        _check(isinstance(value, (int, float, str)) and not isinstance(value, bool), None)
        if origin is int and (isinstance(value, int) or (text is not None and text.lstrip("+-").isdigit())):
            return int(value)  # not by way of float, which would round a big one
        number = float(value)
        return _check(number.is_integer(), int(number)) if origin is int else _check(number == number, number)
    if origin is str:
        return _check(isinstance(value, (str, Path)), str(value))
    if origin is list:
        values = value if isinstance(value, (list, tuple)) else text.split(",")
        element = (typing.get_args(kind) or (typing.Any,))[0]
        return [_as(part, element) for part in values]
    if origin is dict:
        return _check(isinstance(loaded := json.loads(value) if text is not None else value, dict), loaded)
    if origin is typing.Literal:
        return _check(value in typing.get_args(kind), value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind("no" if value is False else value)  # what YAML makes of `save_strategy: no`
    if isinstance(kind, type):
        return _check(isinstance(value, kind), value)
    return value  # a type that this page does not know: its owner checks


def _check(ok: bool, value: object) -> object:
    if not ok:
        raise ValueError
    return value


def _remedy(value: object, hint: object) -> str:
    """What YAML's own reading of a word or a gap asks for."""
    if value is None:
        return " Nothing stands after its colon: give a value, or leave the line out."
    if str in (typing.get_args(hint) or (hint,)) and not isinstance(value, (str, list, dict)):
        return f" Put it in quotes{': YAML reads yes, no, on and off as true and false' if isinstance(value, bool) else ''}."
    return ""


def describe(hint: object, most: int = 1000) -> str:
    """A field's type in words; of a choice, the `most` first."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none", list: "a list", dict: "a mapping (JSON)"}
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    described = []
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            values = [str(member.value) for member in option]
            described.append(f"one of {', '.join(values[:most])}{', …' * (len(values) > most)}")
        else:
            described.append(names.get(typing.get_origin(option) or option, getattr(option, "__name__", str(option))))
    return " or ".join(described)
