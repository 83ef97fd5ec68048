"""The forward passes of a learner rank, ready for packed rows: the policy's, a frozen reference's and a critic's.

Rows are packed for the policy's attention, and every other model has to see them aright. In rows for segments each
trajectory has its prompt to itself, so a mask does as well; in rows for a mask, prompts may be shared, which segments
do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from asyncrl.config.schema import Config
from asyncrl.models.loading import decoder_layers, use_attention
from asyncrl.training.critic import Critic
from asyncrl.training.head import Head
from asyncrl.training.lora import Adapters
from asyncrl.training.packing import MicroBatch
from asyncrl.training.scoring import Scorer, check_packable, check_rope, recompute_activations
from asyncrl.training.sharding import Ranks, held_bytes, shard

Score: TypeAlias = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Log-probability and entropy of each trained token, float32[n] and float32[n]."""


def device_type(model: nn.Module, ranks: Ranks) -> str:
    """Where a model is, or where its part will be."""
    return ranks.mesh.device_type if ranks.mesh else next(model.parameters()).device.type


def uses_bfloat16(config: Config, model: nn.Module, ranks: Ranks) -> bool:
    """Whether the learner computes in bfloat16."""
    wanted = config.learner.dtype
    return wanted == "bfloat16" or (wanted == "auto" and device_type(model, ranks) == "cuda")


class Forward:
    """Readies the models of a rank. Of several ranks, each keeps its part of policy and reference from here on.

    `policy`, `reference` and `critic` are the passes, the last two None where the loss needs none. `attention` is the
    policy's, "sdpa" or "varlen"; `longest` the longest trajectory that every model is right for, None if any is;
    `holds` whether the policy is one that `before_pass` is for.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        row_tokens: int,
        ranks: Ranks,
        *,
        adapters: Adapters | None,
        reference: nn.Module | None,
        critic: nn.Module | None,
    ) -> None:
        """The arguments are those of `Learner`, and the `adapters` in `model`.

        Raises `ValueError` for a model that packed rows are wrong for, `RuntimeError` without one that the loss needs.
        """
        self._config, self._row_tokens, self._ranks = config, row_tokens, ranks
        self._device, self._bfloat16 = device_type(model, ranks), uses_bfloat16(config, model, ranks)
        self.longest: int | None = None
        self.attention = self._ready(model, config.learner.attention, has_values=ranks.is_first)
        self.holds = self._may_hold(model)
        self.policy = self._make_scorer(model, hold=self.holds)
        self.reference = self._make_reference(reference, adapters) if config.loss.needs_reference else None
        self.critic = self._make_critic(model, critic) if config.loss.needs_critic else None

    def _ready(self, model: nn.Module, wanted: str, *, has_values: bool) -> str:
        """Checks a model, lowers `longest` to what it bears, and gives it an attention for packed rows, which it
        returns. `wanted` as in `use_attention`, `has_values` as in `check_packable`."""
        window = check_packable(model, bfloat16=self._bfloat16, has_values=has_values)
        check_rope(model, self._row_tokens)
        attention = use_attention(model, wanted, self._device, bfloat16=self._bfloat16)
        if window is not None and attention == "sdpa":
            self.longest = min(window, self.longest or window)
        return attention

    def _may_hold(self, model: nn.Module) -> bool:
        """As learner.reshard says, and on all ranks alike: the first one's GPU stands for all."""
        wanted = self._config.learner.reshard
        if self._ranks.mesh is None or wanted == "layer":
            return False
        if wanted == "step" or self._device != "cuda":
            return True
        room = torch.cuda.get_device_properties(0).total_memory // 4
        return bool(self._ranks.share(float(held_bytes(model) <= room)))

    def _make_scorer(self, model: nn.Module, *, hold: bool = False) -> Scorer:
        settings, bfloat16 = self._config.learner, self._bfloat16
        if bfloat16 and self._device == "cuda":
            # What is left in float32, such as a head that was asked for, then runs on tensor cores (TF32).
            torch.set_float32_matmul_precision("high")
        head = Head(
            temperature=self._config.rollout.temperature,
            chunk=settings.head_chunk,
            bfloat16=bfloat16 if settings.head_dtype == "auto" else settings.head_dtype == "bfloat16",
            entropy=self._config.loss.entropy_bonus > 0,
            compiled=settings.compile,
        )
        scorer = Scorer(model, head, bfloat16=bfloat16, varlen=self.attention == "varlen")
        if settings.compile:
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)  # lengths and numbers of segments change: else some of them compile anew
        if settings.activation_checkpointing:
            recompute_activations(decoder_layers(model))
        if self._ranks.mesh is not None:
            shard(scorer, decoder_layers(model), self._ranks, bfloat16=bfloat16, hold=hold)
        return scorer

    def _make_reference(self, model: nn.Module | None, adapters: Adapters | None) -> Score:
        if adapters is not None:
            return adapters.without(self.policy)
        if model is None:
            raise RuntimeError("the loss has a KL term against a reference model, and none was given")
        self._ready(model, self.attention, has_values=self._ranks.is_first)  # it is what the policy was
        return self._make_scorer(model)

    def _make_critic(self, policy: nn.Module, model: nn.Module | None) -> Critic:
        settings = self._config.critic
        if settings.backbone == "policy":
            return Critic(policy, settings, bfloat16=self._bfloat16, varlen=self.attention == "varlen")
        if model is None:
            raise RuntimeError("the critic has a backbone of its own, and none was given")
        # It may be of another kind than the policy, and unable to do what that does. Nobody takes logits from it.
        wanted = self._config.learner.attention if self.attention == "varlen" else "sdpa"
        attention = self._ready(model, wanted, has_values=False)
        if self._config.learner.activation_checkpointing:
            recompute_activations(decoder_layers(model))
        return Critic(model, settings, bfloat16=self._bfloat16, varlen=attention == "varlen")
