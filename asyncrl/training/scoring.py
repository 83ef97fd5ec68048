"""Log-probabilities of trained tokens under a model, in bounded memory.

rows [R, L] -> decoder (bfloat16 where the learner uses it) -> the n positions that predict a trained token
            -> head in float32, `head_chunk` positions at a time -> log-prob and entropy, float32[n]
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asyncrl.training.packing import MicroBatch


class Scorer(nn.Module):
    """A causal language model of Hugging Face's interface, seen as a function from packed rows to log-probs."""

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        head_chunk: int,
        bfloat16: bool = False,
        entropy: bool = False,
        varlen: bool = False,
    ) -> None:
        """`temperature`: of sampling. `head_chunk`: positions whose logits exist at a time. `entropy`: give the entropy
        a gradient. `varlen`: the model's attention takes segments instead of a mask, so prompts cannot be shared.
        """
        super().__init__()
        self.model = model
        self._temperature, self._head_chunk = temperature, head_chunk
        self._bfloat16, self._entropy, self._varlen = bfloat16, entropy, varlen

    def forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each trained token, float32[n] and float32[n].

        Logits [n, vocabulary] never exist as a whole: with more than one chunk each is made again in the backward pass.
        """
        with torch.autocast(micro_batch.input_ids.device.type, torch.bfloat16, enabled=self._bfloat16):
            hidden = self.model.base_model(  # type: ignore[operator]
                input_ids=micro_batch.input_ids,
                position_ids=micro_batch.positions,
                use_cache=False,
                **attention_inputs(micro_batch, varlen=self._varlen),
            ).last_hidden_state
        weight = self.model.get_output_embeddings().weight.float()  # type: ignore[operator]
        wanted = hidden[micro_batch.rows, micro_batch.columns].float().split(self._head_chunk)
        targets = micro_batch.targets.split(self._head_chunk)
        head = self._head if len(wanted) == 1 else partial(_again_in_backward, self._head)
        parts = [head(some, target, weight) for some, target in zip(wanted, targets, strict=True)]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _head(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(hidden, weight)
        if self._temperature != 1:
            logits = logits / self._temperature
        logprobs = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def attention_inputs(micro_batch: MicroBatch, *, varlen: bool) -> dict[str, Any]:
    """What keeps trajectories apart, as keyword arguments of a model: segments, or a mask."""
    if varlen:
        return {"cu_seq_lens_q": micro_batch.starts, "max_length_q": micro_batch.longest}
    return {"attention_mask": micro_batch.attention_mask()}


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Each layer keeps its input alone, and is computed again in the backward pass."""
    for layer in layers:
        # The library's own switch acts in training mode only, which the learner stays out of because of dropout.
        layer.forward = partial(_again_in_backward, layer.forward)


_again_in_backward = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
