"""Nested tables of settings: words of a command line put into them, and keys that nobody knows refused."""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

import msgspec


def assign(tree: dict[str, Any], word: str) -> None:
    """Puts the value of `section.key=value` into nested tables. Raises `ValueError` for a word that is none."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"cannot read {word!r}: write section.key=value, for example rollout.group_size=16")
    *tables, key = name.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ValueError(f"cannot set {name!r}: {table!r} is a value, not a table")
    tree[key] = _parse(text)


def _parse(text: str) -> Any:
    """A TOML value, or the text itself where it is none (a path or a name without quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def refuse_unknown(tree: dict[str, Any], section: type[msgspec.Struct], prefix: str) -> None:
    """Raises `ValueError`, with a suggestion, for a key that `section` does not have; `prefix` names the table."""
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(sorted(fields))}"
            raise ValueError(f"unknown key {prefix + key!r} in the configuration; {hint}")
        kind = fields[key]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix + key!r} is a table, got {value!r}; set one of its keys")
            refuse_unknown(value, kind, f"{prefix}{key}.")
