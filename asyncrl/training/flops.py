"""How much of the hardware a learner step uses: model FLOPs, and the share of the GPUs' peak that they are (MFU).

Model FLOPs are those of one forward and one backward pass over what was packed (PaLM 2204.02311, appendix B): 6 for
each weight and input token, of the head 6 for each weight and trained token, and 12 for each layer, attention
dimension and pair of tokens that see each other. A frozen weight has no gradient of its own to compute: 4 in place of
6. What is computed again in the backward pass does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asyncrl.training.packing import MicroBatch

_PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""


class FlopCounter:
    """Model FLOPs of micro-batches. Made before the model is split between ranks."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        heads = config.num_attention_heads  # type: ignore[union-attr]
        size = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr, operator]
        self._pair = 12.0 * float(config.num_hidden_layers * heads * size)  # type: ignore[union-attr, operator]
        self._head = _of_weight(model.get_output_embeddings().weight)  # type: ignore[operator]
        tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[operator]
        self._token = sum(_of_weight(weight) for weight in model.parameters() if id(weight) not in tables)

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Model FLOPs of one forward and one backward pass over all of them."""
        total = 0.0
        for part in micro_batches:
            held = part.groups >= 0
            pairs = int((part.positions[held] + 1).sum())  # a token sees itself and all before it
            total += self._token * int(held.sum()) + self._pair * pairs + self._head * len(part.targets)
        return total


def _of_weight(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 FLOP/s of a GPU; nan of a CPU and of a GPU that is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAK.items() if part in name), math.nan)
