"""YAML files into frozen dataclasses: every key known, every value of its type, every error one sentence.

A config dataclass's annotations are its schema. A field without a default is a required key. Bounds are
checked in the dataclass's own `__post_init__`, which raises `ValueError("key ...")`.
"""

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from utils.errors import UserError

Config = TypeVar("Config")


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key written twice, of which PyYAML keeps the last, and aliases.

    A file of a few lines with aliases of aliases can stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"an alias (*name) is not allowed, found on line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} is written twice, the second time on line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(cls: type[Config], path: Path, overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Read a `cls` from the YAML file `path`, each (dotted key, value) override applied. Raises UserError."""
    return build_config(cls, read_yaml(path), short_name(path), overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the YAML mapping in `path`. Raises UserError if it is missing, malformed or not a mapping."""
    name = short_name(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); restore it from the repository") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or an impossible date
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: is not valid YAML ({reason}); mend that line") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: should hold 'key: value' lines, found {_describe(values)}")
    return values


def short_name(path: Path) -> str:
    """Return a config file's name with its package's, as messages call it: trainer/train_config.yaml."""
    return "/".join(path.parts[-2:])


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value` into its dotted key and its YAML value. Raises UserError if it is neither."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: should read section.key=value, e.g. trainer.optimizer.params.lr=1e-3")
    try:
        return key.strip(), yaml.load(value, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {text}: the value {value!r} is not valid YAML; put it in quotes") from None


def build_config(cls: type[Config], values: Mapping, source: str, overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Turn `values` (from the file named `source`) into a `cls`, after setting each (dotted key, value) override.

    Raises UserError naming the file (or `--set`), the key, and what it should have been.
    """
    merged, origins = _copy(values), {}
    for dotted_key, value in overrides:
        *parents, leaf = dotted_key.split(".")
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {dotted_key}: {parent!r} in {source} is a value, not a group of keys")
        node[leaf] = value
        origins[dotted_key] = "--set"
    return _build(cls, merged, source, origins, prefix="")


def to_plain(config: Any) -> Any:
    """Return a config, or a named tuple of them, as nested dicts, lists and scalars: what a checkpoint may hold."""
    if hasattr(config, "_asdict"):
        return {name: to_plain(value) for name, value in config._asdict().items()}
    if dataclasses.is_dataclass(config):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_plain(item) for item in config]
    return config


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean X?" for the most similar choice, else the list of choices."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the choices are {', '.join(choices)}"


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _build(cls: type[Config], values: Mapping, source: str, origins: Mapping[str, str], prefix: str) -> Config:
    hints = get_type_hints(cls)

    def where(key: object) -> str:
        dotted_key = f"{prefix}{key}"
        return f"{origins.get(dotted_key, source)}: {dotted_key}"

    for key in values:
        if key not in hints:
            raise UserError(f"{where(key)} is not a known key; {nearest(str(key), hints)}")
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{where(field.name)} is missing; add it")
            continue
        value, hint = values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            arguments[field.name] = _build(hint, value, source, origins, f"{prefix}{field.name}.")
            continue
        try:
            arguments[field.name] = _convert(value, hint)
        except TypeError:
            raise UserError(f"{where(field.name)} should be {_name(hint)}, found {_describe(value)}") from None
    try:
        return cls(**arguments)
    except ValueError as error:
        key = str(error).split(maxsplit=1)[0]
        raise UserError(f"{origins.get(prefix + key, source)}: {prefix}{error}") from None


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type, without guessing: only int -> float and '5e-4' -> float are loose."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _convert(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(_convert(item, args[0]) for item in value)
        if len(args) == len(value):
            return tuple(_convert(item, option) for item, option in zip(value, args, strict=True))
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # PyYAML reads 5e-4, which has no dot, as a string
        except (ValueError, OverflowError):
            pass
    elif hint in (int, bool, str, type(None)) and type(value) is hint:
        return value
    raise TypeError


def _name(hint: Any) -> str:
    """Return an annotation in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_name(args[0])}s" if args[-1] is Ellipsis else f"a list of {len(args)} {_name(args[0])}s"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, "a group of keys")


def _describe(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)
