"""What an optimizer step tells about itself: diagnostics over all ranks, speed, and how gradients turn.

Every rank calls everything here, in the same order; the results are the first rank's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from asyncrl.algo.diagnostics import diagnose
from asyncrl.algo.loss import Columns, Outcome, concatenate
from asyncrl.training.flops import FlopCounter, peak_flops
from asyncrl.training.packing import Batch
from asyncrl.training.sharding import Ranks, own, own_rows

_NUM_WATCHED = 100_000
"""Coordinates of the gradient that are compared from step to step."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the diagnostics need of one micro-batch."""

    columns: Columns
    outcome: Outcome
    entropy: Tensor


def measure(seen: Sequence[Seen], batch: Batch, ranks: Ranks) -> dict[str, float]:
    """The diagnostics of all ranks' micro-batches together, at the first rank; nothing elsewhere."""
    of_ranks = ranks.gather(_join(seen) if ranks.mesh is not None else seen)
    if not of_ranks:
        return {}
    everything = [part for parts in of_ranks for part in parts]
    entropy = float(torch.cat([part.entropy for part in everything]).mean())
    return diagnose([part.columns for part in everything], [part.outcome for part in everything], entropy) | {
        "learner/num_tokens": float(batch.num_tokens),
        "learner/num_inputs": float(batch.num_inputs),
        "learner/row_fill": batch.fill,
    }


def speed(batch: Batch, seconds: float, num_flops: FlopCounter, device: torch.device, ranks: Ranks) -> dict[str, float]:
    """How much was trained a second, the share of the GPUs' peak that it took, and the memory that it needed."""
    flops = float(ranks.sum(torch.tensor(num_flops(batch.micro_batches), dtype=torch.float64)))
    return {
        "learner/tokens_per_s": batch.num_held / seconds,
        "learner/mfu": flops / (seconds * ranks.num_ranks * peak_flops(device)),
        "learner/memory_gib": _peak_memory(device) / 2**30,
    }


def _peak_memory(device: torch.device) -> float:
    """Bytes of GPU memory in use at once since the last call; nan on a CPU."""
    if device.type != "cuda":
        return math.nan
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(peak)


def _join(seen: Sequence[Seen]) -> list[Seen]:
    """The micro-batches of a rank as one, in host memory, to go to the first rank; none if nothing was trained."""
    trained = [part for part in seen if part.columns.num_sequences]
    if not trained:
        return []
    columns, outcome = concatenate([part.columns for part in trained], [part.outcome for part in trained])
    return [Seen(_on_host(columns), _on_host(outcome), torch.cat([part.entropy for part in trained]).cpu())]


_Tensors = TypeVar("_Tensors", Columns, Outcome)


def _on_host(tensors: _Tensors) -> _Tensors:
    moved = {
        field.name: value.cpu()
        for field in fields(tensors)
        if isinstance(value := getattr(tensors, field.name), Tensor)
    }
    return replace(tensors, **moved)  # type: ignore[arg-type]


class GradientWatch:
    """Cosine of successive gradients on a fixed random slice of coordinates: staleness shows as values near 1."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        generator = torch.Generator().manual_seed(0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        total = sum(parameter.numel() for parameter in trained)
        share = min(1.0, _NUM_WATCHED / total)
        self._slices = []
        for parameter in trained:
            chosen = torch.randint(
                parameter.numel(), (math.ceil(parameter.numel() * share),), generator=generator
            )  # of the full tensor, so that the slice is the same for any number of ranks
            rows, size = own_rows(parameter), parameter[0].numel()
            mine = chosen[(chosen >= rows.start * size) & (chosen < rows.stop * size)] - rows.start * size
            self._slices.append((parameter, mine.to(parameter.device)))
        self._ranks = ranks
        self._before: Tensor | None = None

    def cosine(self) -> float:
        """Against the step before; nan on the first. Every rank."""
        now = torch.cat(list(self._values()))
        before, self._before = self._before, now
        if before is None:
            return math.nan
        products = torch.stack([now @ before, now @ now, before @ before])
        across, new, old = self._ranks.sum(products).tolist()
        return float(across / max(math.sqrt(new * old), 1e-30))

    def _values(self) -> Iterator[Tensor]:
        for parameter, index in self._slices:
            if parameter.grad is not None:
                yield own(parameter.grad).flatten()[index].double()
