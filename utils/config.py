"""YAML files into frozen dataclasses: every key known, every value of its type, every error one sentence.

The annotations of a config dataclass are its schema; a field without a default is a required key. pydantic checks types
and simple bounds (`PositiveInt`). Checks across fields belong in `__post_init__`, which raises `ValueError("key ...")`.
"""

import dataclasses
import difflib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from utils.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]  # dotted key -> a `Setting`, or a value from `--set`


class Config:
    """Base of the config dataclasses: no unknown keys, no conversion of types but int -> float, no NaN or infinity."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


AnyConfig = TypeVar("AnyConfig", bound=Config)


class Setting(NamedTuple):
    """A value, and the file or flag that it comes from: `trainer/train_config.yaml`, `--config FILE`, `--epochs`."""

    value: Any
    origin: str


class YAMLLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads 5e-4 as a number (YAML 1.2) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        repeated = [key for number, key in enumerate(keys) if key in keys[:number]]
        if repeated:
            raise yaml.YAMLError(f"the key {repeated[0]!r} appears twice")
        return super().construct_mapping(node, deep)


YAMLLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)


def load_config(cls: type[AnyConfig], path: Path, overrides: Overrides = ()) -> AnyConfig:
    """Build a `cls` from the YAML file `path` and the overrides. Raises UserError."""
    return build_config(cls, read_yaml(path), short_name(path), overrides)


def build_config(cls: type[AnyConfig], values: Mapping[str, Any], origin: str, overrides: Overrides = ()) -> AnyConfig:
    """Build a `cls` from nested `values`, which come from `origin`, and the overrides.

    Raises UserError that names the file or flag, the key, and what the value should be.
    """
    settings = flatten(values, origin)
    for key, value in dict(overrides).items():
        setting = value if isinstance(value, Setting) else Setting(value, "--set")
        settings |= flatten(setting.value, setting.origin, key)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(_nest(settings), default=str))  # in JSON a list is a tuple
    except ValidationError as error:
        raise UserError(_explain(error, cls, settings, origin)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the YAML mapping in `path`. Raises UserError if it is missing, malformed or not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=YAMLLoader)
    except OSError as error:
        raise UserError(f"{short_name(path)}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        reason = " ".join(str(error).split())
        raise UserError(f"{short_name(path)}: is not valid YAML ({reason}); correct that line") from None
    if not isinstance(values, dict):
        raise UserError(f"{short_name(path)}: should contain 'key: value' lines, found {reprlib.repr(values)}")
    return values


def flatten(values: Any, origin: str, key: str = "") -> dict[str, Setting]:
    """Return the leaves of nested mappings by their dotted keys, each with its origin."""
    if not isinstance(values, Mapping) or not values:
        return {key: Setting(values, origin)} if key else {}
    leaves: dict[str, Setting] = {}
    for name, value in values.items():
        leaves |= flatten(value, origin, f"{key}.{name}" if key else str(name))
    return leaves


def to_plain(configs: tuple) -> dict[str, dict[str, Any]]:
    """Return a named tuple of configs as nested dicts of plain values, which a checkpoint may store."""
    return {name: dataclasses.asdict(config) for name, config in configs._asdict().items()}


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value` into its dotted key and its YAML value. Raises UserError if it is neither."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: should read section.key=value, e.g. trainer.optimizer.params.lr=1e-3")
    try:
        return key.strip(), yaml.load(value, Loader=YAMLLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {text}: the value {value!r} is not valid YAML; put it in quotes") from None


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean X?" for the most similar choice, or the list of choices."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the choices are {', '.join(choices)}"


def short_name(path: Path) -> str:
    """Return a file's name with its folder's, as messages name it: trainer/train_config.yaml."""
    return "/".join(path.parts[-2:])


def _nest(settings: Mapping[str, Setting]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted_key, setting in settings.items():
        *parents, leaf = dotted_key.split(".")
        node = nested
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[leaf] = setting.value
    return nested


def _explain(error: ValidationError, cls: type, settings: Mapping[str, Setting], source: str) -> str:
    """Return the first problem as a sentence; an unknown key, most often a misspelling, comes before all others."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    place, message = [str(part) for part in problem["loc"]], problem["msg"]
    if problem["type"] == "json_invalid":  # JSON has all of YAML's values but bytes that are not UTF-8
        key, setting = next((key, setting) for key, setting in settings.items() if "\\ud" in repr(setting.value))
        return f"{setting.origin}: {key} is not valid UTF-8 text"
    if problem["type"] == "value_error":  # raised by __post_init__, its first word a key
        name, _, message = str(problem["ctx"]["error"]).partition(" ")
        place += name.split(".")
    keys = [".".join(place[:length]) for length in range(len(place), 0, -1)]  # a union adds its part's name
    key = next((key for key in keys if key in settings), keys[0])
    below = next((other for other in settings if other.startswith(f"{keys[0]}.")), None)  # a key under a value
    value, origin = settings.get(below or key, Setting(None, source))
    if below or problem["type"] == "unexpected_keyword_argument":
        return f"{origin}: {below or key} is not a known key; {nearest(key, _keys(cls))}"
    if problem["type"] == "missing" and key not in settings:
        return f"{origin}: {key} is missing; add it"
    if problem["type"] == "value_error":
        return f"{origin}: {key} {message}"
    same_key = [other["msg"] for other in error.errors() if other["loc"][: key.count(".") + 1] == tuple(key.split("."))]
    options = " or ".join(message.removeprefix("Input ") for message in dict.fromkeys(same_key))  # a union has several
    return f"{origin}: {key} {options}, found {reprlib.repr(value)}"


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted keys of a config dataclass."""
    hints = {f"{prefix}{name}": hint for name, hint in get_type_hints(cls).items()}
    nested = [key for name, hint in hints.items() if dataclasses.is_dataclass(hint) for key in _keys(hint, f"{name}.")]
    return [*hints, *nested]
