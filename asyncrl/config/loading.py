"""A configuration from a file, from words of a command line, or from Python: read, completed, checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.config import rules
from asyncrl.config.schema import TOY, TOY_TOKENS, Config
from asyncrl.utils import settings_text as tables
from asyncrl.utils.importing import check_run


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the file (TOML, or the JSON of a run folder), then `section.key=value` words.

    Raises `ValueError` that names the rule, the values and the remedy.
    """
    tree = {} if path is None else stored(path) if Path(path).suffix == ".json" else tables.read(path)
    for word in overrides or []:
        tables.assign(tree, word)
    return from_tree(tree)


def from_words(
    words: Sequence[str], default: Path, *, num_actors: int | None = None, resume: Path | None = None
) -> Config:
    """The configuration that a command line asks for: of the file among its words, of the run folder `resume`, or else
    of `default`, with its other words on top. `num_actors` as in `tables.split`.

    Raises `ValueError` as `load` does, and for a file beside `resume` or a folder that is none of a run.
    """
    file, overrides = tables.split(words, num_actors)
    if resume is None:
        return load(file or default, overrides)
    if file is not None:
        raise ValueError("--resume takes its configuration from the run folder; give section.key=value words only")
    check_run(resume)
    return load(resume / "config.json", overrides)


def from_tree(tree: dict[str, Any]) -> Config:
    """A checked `Config` from nested tables."""
    upgrade(tree)
    tables.check(tree, Config)
    if tree.get("env", {}).get("path", TOY) == TOY:
        tree = {**tree, "rollout": {"max_new_tokens": TOY_TOKENS, **tree.get("rollout", {})}}
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ValueError(f"configuration: {error}") from error
    rules.check(config)
    return config


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """Plain tables of every value, with today's defaults for settings that an earlier version did not have."""
    tree = copy.deepcopy(tree)
    upgrade(tree)
    plain: dict[str, Any] = json.loads(json.dumps(to_tree(msgspec.convert(tree, Config))))
    return plain


def upgrade(tree: dict[str, Any]) -> None:
    """Rewrites settings of earlier versions in place, as run folders have them. Raises `ValueError` for one whose
    feature is gone."""
    buffer = tree.get("buffer")
    if not isinstance(buffer, dict):
        return
    order = buffer.pop("order", "window")
    if order == "fifo":
        buffer["window"] = 1
    elif order != "window":
        raise ValueError(f"buffer.order={order} was removed in 0.2: set buffer.window=1 for strict order")
    buffer.pop("staleness_bounds", None)
    if buffer.get("max_staleness") == "auto":
        raise ValueError("buffer.max_staleness=auto was removed in 0.2: set a number, such as buffer.max_staleness=2")


def checked(config: Config) -> Config:
    """A `Config` that was made in Python, after the checks of one from a file. Raises `ValueError` as those do."""
    try:
        tree = to_tree(config)
    except TypeError as error:
        raise ValueError(
            f"a configuration is written to the run folder, and {error}: write numbers, texts, lists and tables, and "
            "name a function by its import path, 'package.module:function'"
        ) from error
    return from_tree(tree)


def stored(path: str | Path) -> dict[str, Any]:
    """The tables of a run folder's configuration, with what its run did where its version had no such setting."""
    tree = tables.read(path)
    if Path(path).name.startswith("config.") and isinstance(loss := tree.get("algorithm", {}).get("loss"), dict):
        loss.setdefault("std_correction", 0)  # `to_store` writes it; runs of 0.1 divided by n
    return tree


def to_store(config: Config) -> dict[str, Any]:
    """Plain tables as written to the run folder: every value, and what a resume has to keep of the preset."""
    tree = to_tree(config)
    tree["algorithm"]["loss"] = {**tree["algorithm"]["loss"], "std_correction": config.loss.std_correction}
    return tree


def to_tree(config: Config) -> dict[str, Any]:
    """Plain tables of every value."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    return tree
