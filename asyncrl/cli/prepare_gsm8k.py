"""Writes GSM8K as train, validation and test files for `asyncrl.envs.gsm8k:GSM8K`.

    python launch/prepare_gsm8k.py [--source DIR_OR_HUB_ID] [--folder data/gsm8k] [--num-validation 500]

DIR has train.jsonl (or .parquet) and test.jsonl with the columns question and answer; the default is the hub's
openai/gsm8k (MIT). Validation problems are taken out of train, by hash: the same ones on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

from asyncrl.envs.data import Row, check_columns, read_rows
from asyncrl.envs.gsm8k import prepare_row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="openai/gsm8k", metavar="DIR_OR_HUB_ID")
    parser.add_argument("--folder", type=Path, default=Path("data/gsm8k"))
    parser.add_argument("--num-validation", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        splits = make_splits(options.source, options.num_validation)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = options.folder / f"{split}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        print(f"wrote {path}: {len(rows)} problems")
    return 0


def make_splits(source: str, num_validation: int) -> dict[str, list[Row]]:
    """The rows of each split, checked. Raises `ValueError` for data that are not GSM8K's."""
    name = None if Path(source).exists() else "main"
    train, test = (_read(source, split, name) for split in ("train", "test"))
    if not 0 < num_validation < len(train):
        raise ValueError(f"--num-validation must be between 1 and {len(train) - 1}, got {num_validation}")
    order = sorted(train, key=lambda row: hashlib.blake2b(row["question"].encode()).digest())
    held = {row["question"] for row in order[:num_validation]}
    return {
        "train": [row for row in train if row["question"] not in held],
        "validation": [row for row in train if row["question"] in held],
        "test": test,
    }


def _read(source: str, split: str, name: str | None) -> list[Row]:
    rows = read_rows(source, split, name)
    check_columns(rows, ["question", "answer"], source)
    for number, row in enumerate(rows):
        try:
            prepare_row(row)
        except ValueError as error:
            raise ValueError(f"{source}, split {split!r}, row {number}: {error}") from error
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
