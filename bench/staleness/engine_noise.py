"""A sampler whose numerics differ from the learner's: Gaussian noise on its logits, and on nothing else.

The noise belongs to a version of the weights, a position and a token of the vocabulary, and is drawn from those alone.
The engine samples from the noisy distribution and reports its log-probs, so behavior log-probs are right and the
mismatch with the learner is real, as that of an inference engine is. How large it is, is measured: the KL at lag 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EngineNoise:
    """Noise of standard deviation `sigma` on the logits of `model`, which runs positions 0..length - 1."""

    def __init__(self, model: nn.Module, sigma: float, length: int, seed: int) -> None:
        self.active = True
        """False leaves the logits as they are: an evaluation is of the policy and not of the engine."""
        self._sigma, self._seed = sigma, seed
        self._shape = length, int(model.config.vocab_size)
        self._table: Tensor | None = None
        if sigma:
            model.register_forward_hook(self._add, with_kwargs=True)

    def draw(self, version: int) -> None:
        """From here on the noise is that of `version`."""
        if self._sigma:
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + version)
            self._table = self._sigma * torch.randn(self._shape, generator=generator)

    def _add(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.active and self._table is not None:
            self._table = self._table.to(output.logits.device)
            # Only the last position of a forward pass is sampled from, in a prefill (padded on the left) and after it.
            output.logits[:, -1] += self._table[kwargs["position_ids"][:, -1]].to(output.logits.dtype)
