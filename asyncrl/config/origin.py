"""What a run depends on beside its settings, fixed when it begins, so that a resume does not depend on the clock, the
current folder or what stands under a name by then."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from asyncrl.config.loading import stored
from asyncrl.config.schema import BUILT_IN, Config

_DATA = (".jsonl", ".parquet")
_PATHS = ("data", "source")
"""Arguments of environments that name data; others are taken for paths where they look like one."""
_DIRECTIVES = "aAbBcdeFHIjmMpSuUVwWxXyY"
_WEIGHTS = (".safetensors", ".bin")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fixed(config: Config, folder: Path | None = None) -> Config:
    """The configuration with today's date, or that of the run in `folder`; with absolute paths; and with the text of a
    chat template that is a file. Raises `ValueError` for such a file that is not there."""
    begun = date.today().isoformat() if folder is None else _date_of(folder)
    model = replace(
        config.model,
        path=_absolute_model(config.model.path),
        date=config.model.date or begun,
        chat_template=template_text(config.model.chat_template),
    )
    critic = replace(config.critic, path=_absolute_model(config.critic.path))
    env = replace(config.env, args=absolute(config.env.args))
    return replace(config, model=model, critic=critic, env=env)


def located(tree: dict[str, Any]) -> dict[str, Any]:
    """Stored tables with absolute paths: earlier versions kept them as they were typed."""
    models = {name: tree[name] | {"path": _absolute_model(tree[name]["path"])} for name in ("model", "critic")}
    return tree | models | {"env": tree["env"] | {"args": absolute(tree["env"]["args"])}}


def template_text(template: str) -> str:
    """The chat template that `model.chat_template` stands for: a text has braces, all else is a file."""
    if not template or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"model.chat_template {template!r} is no template, as it has no braces, and no file that can be read, seen "
            f"from {Path.cwd()}: {error}"
        ) from error


def dated_template(template: str, day: str) -> str:
    """A chat template whose `strftime_now` tells midnight of `day`. It is a macro in front, as the library takes plain
    values alone for arguments."""
    midnight = datetime.fromisoformat(day)
    signs = {f"%{flag}{letter}": midnight.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in _DIRECTIVES}
    signs["%%"] = "%"
    return (
        "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}"
        f"{{%- for sign, value in {json.dumps(signs)}.items() -%}}"
        "{%- set told.text = told.text | replace(sign, value) -%}{%- endfor -%}{{ told.text }}{%- endmacro +%}"
    ) + template


def absolute(value: Any, name: str = "") -> Any:
    """Arguments of an environment, with the paths of files and folders that are here made absolute."""
    if isinstance(value, dict):
        return {key: absolute(one, key) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [absolute(one, name) for one in value]
    if not isinstance(value, str):
        return value
    looks = name in _PATHS or "/" in value or value.endswith(_DATA)
    return os.path.abspath(value) if value and looks and os.path.exists(value) else value


def base_of(config: Config) -> dict[str, str]:
    """Digests of the files that the first weights come from: "model", empty for one that is no folder here, and "data",
    empty without a warm-up."""
    folder = Path(config.model.path)
    local = config.model.path not in BUILT_IN and folder.is_dir()
    data = data_digest(config.env.args) if config.warmup.num_steps else ""
    return {"model": weights_digest(folder) if local else "", "data": data}


def check_base(before: dict[str, str], config: Config, folder: Path) -> None:
    """Raises `ValueError` if files that the first weights of the run in `folder` came from are others now. `before` is
    what `base_of` said then; of an earlier version that did not keep it nothing is known."""
    now = base_of(config)
    named = {"model": f"the weights in {config.model.path}", "data": "the data files that env.args names"}
    for kind, what in named.items():
        if before.get(kind) and now[kind] and before[kind] != now[kind]:
            raise ValueError(
                f"{what} have changed since the run in {folder} began, which goes on using the weights that were made "
                "of them: put the old files back (model.path and env.args may name a copy elsewhere), or start a new "
                "run"
            )


def weights_digest(folder: Path) -> str:
    """Of the weights of a model: sizes of the files, and samples all over each of them, as to read gigabytes may take
    longer than the steps."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def data_digest(args: Any) -> str:
    """Of the contents of all data files that arguments of an environment name; empty if there are none."""
    digests = [hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in _data_files(args)]
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest() if digests else ""


def _data_files(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        for one in value.values():
            yield from _data_files(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _data_files(one)
    elif isinstance(value, str) and value and os.path.exists(value):
        path = Path(value)
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (file for file in found if file.is_file() and (file == path or file.suffix in _DATA))


def _absolute_model(path: str) -> str:
    return os.path.abspath(path) if path and path not in BUILT_IN and os.path.exists(path) else path


def _date_of(folder: Path) -> str:
    """Empty for a run of an earlier version, whose templates look at the clock."""
    found: str = stored(folder / "config.json").get("model", {}).get("date", "")
    return found
