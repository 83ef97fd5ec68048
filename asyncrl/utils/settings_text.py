"""Nested tables of settings: from a file, and from the words of a command line."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import msgspec

from asyncrl.utils.quote import quote


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, or of the JSON of a run folder. Raises `ValueError` if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree: Any = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no table of settings, got {quote(tree)}: write an object, as a run does")
    return tree


class Parser(argparse.ArgumentParser):
    """Of a command line with `section.key=value` words: one that is written as a flag is told its form."""

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"unrecognized arguments: .*?--([a-z][\w.-]*)(?:=(\S*))?", message)
        if flag:
            near = difflib.get_close_matches(f"--{flag[1]}", self._option_string_actions, n=1, cutoff=0.8)
            setting = f"{flag[1].replace('-', '_')}={flag[2] or 'VALUE'}"
            message += f": did you mean {near[0]}?" if near else f": a setting is written without dashes, {setting}"
        super().error(message)


def split(words: Sequence[str], num_actors: int | None = None) -> tuple[str | None, list[str]]:
    """The configuration file of a command line, if it names one, and the `section.key=value` words.

    `num_actors` is what --num-rollout-actors says. Raises `ValueError` for two files, and where a word says otherwise.
    """
    files, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(files) > 1:
        raise ValueError(
            f"one configuration file at most, got {', '.join(files)}; a setting is one word, such as num_steps=10"
        )
    if num_actors is not None:
        overrides = agreed(overrides, f"--num-rollout-actors {num_actors}", f"rollout.num_actors={num_actors}")
    return files[0] if files else None, overrides


def agreed(overrides: Sequence[str], flag: str, same: str) -> list[str]:
    """The words and `same`, the one that `flag` is short for. Raises `ValueError` where a word says otherwise."""
    name, _, value = same.partition("=")
    for word in overrides:
        key, _, other = word.partition("=")
        if key == name and _parse(other) != _parse(value):
            raise ValueError(f"{flag} is short for {same}, and {word} is given: keep one")
    return [*overrides, same]


def assign(tree: dict[str, Any], word: str) -> None:
    """Puts the value of a `section.key=value` word into its table. Raises `ValueError` for a word that is none."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"cannot read {word!r}: write section.key=value, for example rollout.group_size=16")
    *tables, key = name.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ValueError(f"cannot set {name!r}: {table!r} is a value, not a table")
    tree[key] = _parse(text)
    if isinstance(tree[key], str) and text[:1] + text[-1:] in ("[]", "{}"):
        raise ValueError(
            f"cannot read {word!r}: texts in a list or a table have quotes, and so does a text that looks like one; "
            f'the shell leaves quotes alone within others, as in \'{name}=["first", "second"]\' or \'{name}="[one]"\''
        )


def _parse(text: str) -> Any:
    """A TOML value, or the text itself where it is none (a path or a name without quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check(tree: dict[str, Any], section: type[msgspec.Struct], prefix: str = "") -> None:
    """Raises `ValueError` for a key that `section` does not have, with the nearest one that it has, and for a value of
    another type, with those that can be."""
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in tree.items():
        if key not in fields:
            raise ValueError(f"unknown key {prefix + key!r} in the configuration; {_hint(key, fields, prefix)}")
        kind = fields[key]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix + key!r} is a table, got {quote(value)}; set one of its keys")
            check(value, kind, f"{prefix}{key}.")
            continue
        check_value(value, kind, prefix + key)


def check_value(value: Any, kind: Any, name: str) -> None:
    """Raises `ValueError` for a value of another type than `kind`, with those that it can have."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} must be {_name_of(kind)}, got {quote(value)}") from error


def is_plain(kind: Any) -> bool:
    """Whether a type is one of values as they stand in a configuration, or is made of such."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return True
    if origin in (dict, Mapping) and parts and parts[0] is not str:
        return False  # its keys are made of the texts that are written
    known = origin in (Union, UnionType, dict, Mapping, list, tuple, Sequence, bool, int, float, str, NoneType, Any)
    return known and all(part is Ellipsis or is_plain(part) for part in parts)


def _hint(key: str, fields: dict[str, Any], prefix: str) -> str:
    """The same key of one of the tables inside, or the nearest one here."""
    inside = [
        f"{prefix}{name}.{key}"
        for name, kind in fields.items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and key in kind.__struct_fields__
    ]
    near = inside or [prefix + name for name in difflib.get_close_matches(key, fields, n=1)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {', '.join(sorted(fields))}"


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a table",
    Mapping: "a table",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    Any: "anything",
}


def _name_of(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Annotated:
        meta = parts[1]
        return _name_of(parts[0]) + (f" above {meta.gt}" if meta.ge is None else f" of at least {meta.ge}")
    if origin in (Union, UnionType):
        return " or ".join(_name_of(part) for part in parts if part is not NoneType)
    if origin is tuple and Ellipsis not in parts:
        return f"a list of {len(parts)} ({', '.join(map(_name_of, parts))})"
    if origin in (list, tuple, Sequence) and parts:
        return f"a list (of {_name_of(parts[0])} each)"
    return _NAMES.get(origin or kind, str(kind))
