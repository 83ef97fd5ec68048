"""Rows of a data set: a local JSONL or Parquet file, a folder of them, or a data set of the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from asyncrl.utils.importing import check_folder
from asyncrl.utils.quote import cut, quote

Row: TypeAlias = dict[str, Any]
"""One example: column name -> value."""

_ENDINGS = (".jsonl", ".parquet")
_LARGE = 20_000_000
"""Bytes of a file that takes seconds to read, which are told of."""
_NOT_READ = (".csv", ".tsv", ".json", ".txt", ".arrow", ".gz", ".zip", ".xlsx")
"""Endings of files that people have data in: one that is not there is no id of the hub, either."""


def read_rows(source: str, split: str, name: str | None = None) -> list[Row]:
    """Every row of `split`, in the order stored.

    `source` is a .jsonl or .parquet file (which is all splits at once), a folder that holds `split`.jsonl or
    `split`.parquet, or a hub id, with `name` its configuration. Raises `ValueError` for a source that cannot be read, a
    row that is no object, and a data set without rows.
    """
    path = Path(source)
    if path.suffix in _ENDINGS:
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_file(_file_of(path, split))
    else:
        _check_kind(path)
        check_folder(source, "launch/prepare_gsm8k.py", "env.args")
        rows = _read_hub(source, split, name)
    if not rows:
        raise ValueError(f"the data set {source!r} has no rows in split {split!r}: name a split that has some")
    return rows


def check_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> list[str]:
    """The columns that there are. Raises `ValueError` for one of `columns` that no row has, naming them."""
    known = sorted({column for row in rows for column in row})
    for column in columns:
        if column not in known:
            raise ValueError(
                f"{where} has no column {column!r}: name one that it has, which are {cut(', '.join(known), 1000)}"
            )
    return known


def _check_kind(path: Path) -> None:
    """Raises `ValueError` for a file of another kind, before the hub is asked for a data set of that name."""
    if not path.is_file():
        if path.suffix.lower() in _NOT_READ:
            raise ValueError(f"there is no file {str(path)!r}, seen from {Path.cwd()}; .jsonl and .parquet are read")
        return
    example = ""
    if (kind := path.suffix.lower()[1:]) in ("csv", "json"):
        made = str(path.with_suffix(".jsonl"))
        example = f", for example with datasets.Dataset.from_{kind}({str(path)!r}).to_json({made!r})"
    raise ValueError(
        f"data are read from .jsonl (a JSON object a line, whose keys are the columns) and .parquet files, got "
        f"{str(path)!r}: convert it{example}"
    )


def _file_of(folder: Path, split: str) -> Path:
    for ending in _ENDINGS:
        if (folder / f"{split}{ending}").is_file():
            return folder / f"{split}{ending}"
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ValueError(f"no {split}.jsonl or {split}.parquet in the folder {str(folder)!r}, which holds {found}")


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"there is no data file {str(path)!r}: paths are relative to the folder a run is started in")
    if (size := path.stat().st_size) >= _LARGE:
        print(f"reading {path}, {size / 1e6:,.0f} MB ...", file=sys.stderr, flush=True)
    return list(_parse_lines(path)) if path.suffix == ".jsonl" else _read_parquet(path)


def _parse_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {cut(str(error))}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row is an object with columns, got {quote(line.strip())}")
        yield row


def _lines(path: Path) -> Iterator[str]:
    """Other characters that end lines may stand within a JSON text."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from file


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:  # in parts: the table and its rows are never there twice
            rows = [row for part in file.iter_batches() for row in part.to_pylist()]
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {cut(str(error))}") from error
    return rows


def _read_hub(source: str, split: str, name: str | None) -> list[Row]:
    import datasets

    try:
        return list(datasets.load_dataset(source, name, split=split))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no file or folder {source!r} exists, and the hub gave no such data set (split {split!r}, configuration "
            f"{name!r}): {error}"
        ) from error
