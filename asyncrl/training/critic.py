"""The critic of PPO: a value head on a backbone, and its own optimizer.

    packed rows -> backbone -> the n positions before a trained token -> linear head -> value, float32[n]

The backbone is a model of the critic's own, which learns with the head, or the policy's, of which the critic takes the
hidden states and gives no gradient back: what goes out to the rollout actors is then made by the policy loss alone, and
the two learning rates do not interfere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asyncrl.algo.gae import value_losses
from asyncrl.config.schema import CriticConfig
from asyncrl.training.packing import MicroBatch
from asyncrl.training.scoring import attention_inputs

METRICS = {
    "critic/loss": "value loss before the first update on the batch, half a mean squared error over tokens",
    "critic/value_mean": "mean value of the tokens before the update: the reward that the critic expects",
    "critic/explained_variance": "1 - variance of (return - value) / variance of the returns, over tokens; nan if the "
    "returns are all equal",
    "critic/clipped": "share of tokens whose value the clip held at the last update on the batch",
    "critic/gradient_norm": "gradient norm of the critic before clipping, at the last update on the batch",
}
"""Logged by runs with a critic."""


class Critic:
    """Values of trained tokens, and the updates that fit them to returns. On one learner rank."""

    def __init__(self, model: nn.Module, settings: CriticConfig, *, bfloat16: bool, varlen: bool = False) -> None:
        """`model`: the causal language model whose backbone this is, the policy itself for `backbone = "policy"`;
        `varlen` as in `Scorer`."""
        self._settings, self._bfloat16, self._varlen = settings, bfloat16, varlen
        self._backbone: nn.Module = model.base_model  # type: ignore[assignment]
        output: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
        self._head = nn.Linear(output.shape[1], 1, device=output.device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._named = {f"head.{name}": parameter for name, parameter in self._head.named_parameters()}
        if settings.backbone == "own":
            self._named |= {f"backbone.{name}": parameter for name, parameter in self._backbone.named_parameters()}
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=settings.learning_rate, weight_decay=0.0)

    def values(self, micro_batch: MicroBatch) -> Tensor:
        """Of the context before each trained token; float32[n]."""
        trains = torch.is_grad_enabled() and self._settings.backbone == "own"
        device = micro_batch.input_ids.device.type
        with torch.set_grad_enabled(trains), torch.autocast(device, torch.bfloat16, enabled=self._bfloat16):
            hidden = self._backbone(
                input_ids=micro_batch.input_ids,
                position_ids=micro_batch.positions,
                use_cache=False,
                **attention_inputs(micro_batch, varlen=self._varlen),
            ).last_hidden_state
        values: Tensor = self._head(hidden[micro_batch.rows, micro_batch.columns].float()).squeeze(-1)
        return values

    def update(
        self, parts: Sequence[MicroBatch], old_values: Sequence[Tensor], returns: Sequence[Tensor]
    ) -> dict[str, float]:
        """`num_updates` steps towards `returns`, float32[n] for each micro-batch of the step like `old_values`.

        A step whose gradient is not finite is not taken. Returns `METRICS`.
        """
        settings = self._settings
        before, wanted = torch.cat(list(old_values)), torch.cat(list(returns))
        clipped, norm = 0.0, 0.0
        for _ in range(settings.num_updates):
            self._optimizer.zero_grad(set_to_none=True)
            clipped = 0.0
            for part, old, goal in zip(parts, old_values, returns, strict=True):
                losses, held = value_losses(self.values(part), old, goal, settings.clip)
                (losses.sum() / len(wanted)).backward()
                clipped += float(held.sum()) / len(wanted)
            norm = float(nn.utils.clip_grad_norm_(self._named.values(), settings.max_grad_norm))
            if math.isfinite(norm):
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        spread, left = float(wanted.var(correction=0)), float((wanted - before).var(correction=0))
        return {
            "critic/loss": float((before - wanted).square().mean() / 2),
            "critic/value_mean": float(before.mean()),
            "critic/explained_variance": 1 - left / spread if spread else math.nan,
            "critic/clipped": clipped,
            "critic/gradient_norm": norm,
        }

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer state as named tensors, for a checkpoint."""
        tensors = {f"{name}.weight": parameter.detach() for name, parameter in self._named.items()}
        moments = self._optimizer.state_dict()["state"]
        for index, name in enumerate(self._named):
            tensors |= {f"{name}.{key}": value for key, value in moments.get(index, {}).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises `ValueError` if the tensors are those of another critic."""
        wanted = {f"{name}.weight": tuple(parameter.shape) for name, parameter in self._named.items()}
        found = {name: tuple(tensors[name].shape) for name in tensors if name.endswith(".weight")}
        if apart := sorted(set(wanted.items()) ^ set(found.items())):
            name, shape = apart[0]
            raise ValueError(
                "the critic of the checkpoint is another one than the configured: only one of them has "
                f"{name.removesuffix('.weight')} of shape {shape}; resume with the critic settings that the run began "
                "with"
            )
        state = {}
        for index, (name, parameter) in enumerate(self._named.items()):
            with torch.no_grad():
                parameter.copy_(tensors[f"{name}.weight"])
            if f"{name}.step" in tensors:  # else it never had a gradient, as before the first step
                state[index] = {key: tensors[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
