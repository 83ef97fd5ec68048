"""A few trained trajectories of every step, with every column, as parquet files that pandas and `datasets` open.

runs/.../trajectories/step-000020.parquet     one row a trajectory; several steps a file
"""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asyncrl.algo.advantage import estimate
from asyncrl.config.schema import Config
from asyncrl.types import Group, Trajectory, Version
from asyncrl.utils.threads import in_thread

FOLDER = "trajectories"
_STEPS_A_FILE = 10

Row = dict[str, Any]


class Samples:
    """Draws and writes them. Up to `num_per_step` trajectories of one group a step, the group drawn at random."""

    def __init__(self, folder: Path, config: Config, decode: Callable[[list[int]], str]) -> None:
        self._folder = folder / FOLDER
        self._num_per_step, self._decode = config.metrics.sample_trajectories, decode
        self._loss, self._algorithm = config.loss, config.algorithm
        self._rows: dict[Version, list[Row]] = {}

    async def draw(self, version: Version, groups: Sequence[Group]) -> list[Row]:
        """Fetches the tokens of the batch that made `version` and keeps some of it; its rows, empty if none are wanted.

        Only the drawn group's columns travel to the driver, with those that were handed over in the same answer.
        """
        if not self._num_per_step:
            return []
        chosen = random.Random(version).randrange(len(groups))
        found = groups[chosen].trajectories
        trajectories: Sequence[Trajectory] = await found if inspect.isawaitable(found) else found
        # `algorithm.loss.advantage` is the user's code: the driver waits for nothing that it does.
        values = (await in_thread(partial(self._advantages, groups)))[chosen]
        rows = [
            self._row(version, groups[chosen], number, trajectory, values[number])
            for number, trajectory in enumerate(trajectories[: self._num_per_step])
        ]
        self._rows[version] = rows
        if len(self._rows) >= _STEPS_A_FILE:
            self.flush()
        return rows

    def flush(self) -> None:
        """Writes what was drawn since the last file. A file appears whole or not at all."""
        if not self._rows:
            return
        import pyarrow
        from pyarrow import parquet

        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step-{max(self._rows):06d}.parquet"
        rows = [row for version in sorted(self._rows) for row in self._rows[version]]
        unfinished = path.with_suffix(".unfinished")
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), unfinished)
        unfinished.replace(path)
        self._rows.clear()

    def _advantages(self, groups: Sequence[Group]) -> list[list[float]]:
        """Of every trajectory of the batch, as the learner computes them from rewards; nan where it takes a model, or
        the length of each reply, of which the driver knows the sum."""
        loss = self._loss
        rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float32)
        index = torch.tensor([number for number, group in enumerate(groups) for _ in group.rewards])
        lengths = torch.tensor([length for group in groups for length in group.lengths])
        values = estimate(rewards, index, lengths, loss)
        if loss.needs_critic or loss.reward_kl or self._algorithm.overlong_tail:
            values = torch.full_like(values, torch.nan)
        flat = iter(values.tolist())
        return [[next(flat) for _ in group.rewards] for group in groups]

    def _row(self, version: Version, group: Group, sample: int, trajectory: Trajectory, advantage: float) -> Row:
        token_ids = trajectory.token_ids.tolist()
        return {
            "version": version,
            "prompt_id": group.prompt.id,
            "sample": sample,
            "reward": None if math.isnan(trajectory.reward) else float(trajectory.reward),
            "advantage": 0.0 if self._algorithm.mask_truncated and trajectory.finish == "length" else advantage,
            "finish": trajectory.finish,
            "target": _whole(group.prompt.target),
            "text": _whole(self._decode(token_ids)),
            "tokens": [_whole(self._decode([token])) for token in token_ids],
            "token_ids": token_ids,
            "mask": trajectory.mask.tolist(),
            "logprobs": trajectory.logprobs.tolist(),
            "versions": trajectory.versions.tolist(),
            "metrics": [{"name": name, "value": float(value)} for name, value in trajectory.metrics.items()],
        }


def _whole(text: str) -> str:
    """The text without halves of characters, as JSON data may have them: no file of UTF-8 takes those."""
    return text.encode(errors="backslashreplace").decode()


def _schema() -> Any:
    """Column types, the same in every file, also where a list is empty."""
    import pyarrow as pa

    metric = pa.struct([("name", pa.string()), ("value", pa.float64())])
    return pa.schema(
        [
            ("version", pa.int32()),
            ("prompt_id", pa.int64()),
            ("sample", pa.int32()),
            ("reward", pa.float64()),
            ("advantage", pa.float32()),
            ("finish", pa.string()),
            ("target", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.list_(pa.string())),
            ("token_ids", pa.list_(pa.int32())),
            ("mask", pa.list_(pa.bool_())),
            ("logprobs", pa.list_(pa.float32())),
            ("versions", pa.list_(pa.int32())),
            ("metrics", pa.list_(metric)),
        ]
    )


def read(folder: Path) -> list[Row]:
    """The rows in a run folder, in order of version; a resumed run's later draw of a version replaces the earlier.

    Warns of a file that cannot be read, as a power cut may leave one; it is left out.
    """
    from pyarrow import ArrowException, parquet

    rows: dict[tuple[int, int], Row] = {}
    for path in sorted((folder / FOLDER).glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
        try:
            rows |= {(row["version"], row["sample"]): row for row in parquet.read_table(path).to_pylist()}
        except (ArrowException, OSError, KeyError) as error:
            warnings.warn(f"{path} cannot be read and is left out: {error}", stacklevel=2)
    return [rows[key] for key in sorted(rows)]
