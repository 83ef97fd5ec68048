"""Log-probabilities of trained tokens under a model, in bounded memory.

rows [R, L] -> decoder (bfloat16 where the learner uses it) -> the n positions that predict a trained token
            -> head, some positions at a time -> log-prob and entropy, float32[n]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asyncrl.models.loading import attention_of, rope_limit
from asyncrl.training.head import Head
from asyncrl.training.packing import MicroBatch
from asyncrl.types import Trajectory


class Scorer(nn.Module):
    """A causal language model of Hugging Face's interface, seen as a function from packed rows to log-probs."""

    def __init__(self, model: nn.Module, head: Head, *, bfloat16: bool = False, varlen: bool = False) -> None:
        """`bfloat16`: of the decoder. `varlen`: the model's attention takes segments instead of a mask, so prompts
        cannot be shared."""
        super().__init__()
        self.model = model
        self._head, self._bfloat16, self._varlen = head, bfloat16, varlen

    def forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each trained token, float32[n] and float32[n]."""
        with torch.autocast(micro_batch.input_ids.device.type, torch.bfloat16, enabled=self._bfloat16):
            hidden = self.model.base_model(  # type: ignore[operator]
                input_ids=micro_batch.input_ids,
                position_ids=micro_batch.positions,
                use_cache=False,
                **attention_inputs(micro_batch, varlen=self._varlen),
            ).last_hidden_state
        weight = self.model.get_output_embeddings().weight.float()  # type: ignore[operator]
        return self._head(hidden[micro_batch.rows, micro_batch.columns].float(), micro_batch.targets, weight)


_CLOSE = {False: 0.05, True: 0.5}  # log-probs of the same head in other arithmetic; another head is off by whole units


@torch.no_grad()
def check_packable(model: Any, *, bfloat16: bool, has_values: bool) -> int | None:
    """The longest trajectory that a dense mask is right for, None if any is: the model's sliding attention window.

    Raises `ValueError` for a model that `Scorer` would score wrongly: layers that carry a state from one trajectory of
    a row into the next, or logits that are more than hidden states times the output embeddings.
    """
    kinds, window = attention_of(model.config)
    if kinds:
        raise ValueError(
            f"the learner packs trajectories into rows, for attention layers only; {type(model).__name__} has "
            f"{', '.join(kinds)}: choose another model.path"
        )
    if has_values:  # not so at the learner ranks that get theirs from the first one
        weight = model.get_output_embeddings().weight
        ids = torch.arange(4, device=weight.device).unsqueeze(0)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model(input_ids=ids, use_cache=False).logits.float()
        seen = (hidden.float() @ weight.float().T).log_softmax(-1)
        difference = float((seen - logits.log_softmax(-1)).abs().max())
        if not difference < _CLOSE[bfloat16]:
            raise ValueError(
                f"the learner takes logits for hidden states times the output embeddings, and those of "
                f"{type(model).__name__} are not (log-probs differ by {difference:.2g}: a bias, a scale or a cap): "
                "choose another model.path"
            )
    return window


def check_lengths(window: int, groups: Sequence[Sequence[Trajectory]]) -> None:
    """Raises `ValueError` for a trajectory that a dense mask is wrong for; `window` as `check_packable` returned it."""
    longest = max(len(trajectory.token_ids) for group in groups for trajectory in group)
    if longest > window:
        raise ValueError(
            f"a trajectory has {longest} tokens and the model's sliding attention window is {window}, which "
            "learner.attention=sdpa does not apply: lower rollout.max_new_tokens, or train on a GPU with "
            "learner.attention=varlen"
        )


def check_rope(model: nn.Module, row_tokens: int) -> None:
    """Raises `ValueError` for a model whose log-probs would depend on what else is in the rows: see `rope_limit`.

    `row_tokens`: length of a row, and so of the longest trajectory that can occur.
    """
    limit = rope_limit(model)
    if limit is not None and row_tokens > limit:
        raise ValueError(
            f"a row has room for a trajectory of {row_tokens} tokens, and beyond {limit} the rotary frequencies of "
            f"{type(model).__name__} (dynamic or longrope) change with the longest trajectory that is computed beside: "
            f"lower rollout.max_new_tokens, the prompts of the environment and learner.row_tokens until it is {limit}"
        )


def attention_inputs(micro_batch: MicroBatch, *, varlen: bool) -> dict[str, Any]:
    """What keeps trajectories apart, as keyword arguments of a model: segments, or a mask."""
    if varlen:
        return {"cu_seq_lens_q": micro_batch.starts, "max_length_q": micro_batch.longest}
    return {"attention_mask": micro_batch.attention_mask()}


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Each layer keeps its input alone, and is computed again in the backward pass."""
    for layer in layers:
        # The library's own switch acts in training mode only, which the learner stays out of because of dropout.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
