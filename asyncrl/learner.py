"""The learner: model, optimizer, one optimizer step per batch, and the weights that go out.

step(groups): pack -> per micro-batch: forward, loss, backward -> clip -> AdamW -> version + 1 -> metrics
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asyncrl.algo.diagnostics import diagnose
from asyncrl.algo.loss import Columns, Outcome, policy_loss
from asyncrl.config import Config
from asyncrl.packing import Batch, MicroBatch, pack
from asyncrl.transport import BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.types import Trajectory, Version
from asyncrl.weights import Bucket, Outgoing, make_buckets

_NUM_WATCHED = 100_000


class Learner:
    """Owns the training copy of the model, float32. Not thread-safe: one call at a time."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        row_tokens: int,
        *,
        reference: nn.Module | None = None,
        address: str = "127.0.0.1",
        backend: str = "gloo",
    ) -> None:
        """`row_tokens`: length of a packed row, at least that of the longest trajectory that can occur. `reference`:
        the frozen model that a KL term is taken against; `address` and `backend`: this node's own, for the broadcast
        group, and what that group runs on.
        """
        self.version: Version = 0
        self.model = model
        self.loss = config.loss
        self._config = config
        self._row_tokens = row_tokens
        self._address, self._backend = address, backend
        self._device = next(model.parameters()).device
        bfloat16 = config.learner.dtype == "bfloat16" or (
            config.learner.dtype == "auto" and self._device.type == "cuda"
        )
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16)
        if self.loss.needs_reference and reference is None:
            raise RuntimeError("the loss has a KL term against a reference model, and none was given")
        self._reference = reference
        settings = config.learner
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.buckets: list[Bucket] = make_buckets(
            model.named_parameters(), config.rollout.dtype, int(config.weights.bucket_mb * 2**20)
        )
        self._group: BroadcastGroup | None = None
        self._outgoing: Outgoing | None = None
        self._watch = _GradientWatch(model)

    def step(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """One optimizer step on whole groups. Returns the metrics of the step; the version goes up by one,
        unless the gradient is not finite."""
        settings = self._config.learner
        batch = pack(
            groups,
            self.loss,
            row_tokens=self._row_tokens,
            micro_batch_tokens=settings.micro_batch_tokens,
            max_new_tokens=self._config.rollout.max_new_tokens,
            mask_truncated=self._config.algorithm.mask_truncated,
        )
        warm = min(1.0, (self.version + 1) / max(settings.warmup_steps, 1))
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = settings.learning_rate * warm
        self.optimizer.zero_grad(set_to_none=True)
        ledger = _Ledger()
        for micro_batch in batch.micro_batches:
            self._backward(micro_batch.to(self._device), ledger)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
        if math.isfinite(norm):  # else the step is not taken: one such number would be in every weight for ever after
            self.optimizer.step()
            self.version += 1
        metrics = ledger.metrics(batch) | {
            "gradient/norm": norm,
            "gradient/cosine": self._watch.cosine(),
            "gradient/learning_rate": settings.learning_rate * warm,
        }
        if self._config.rollout.release_memory:
            self._make_room()
        return metrics

    def score(self, micro_batch: MicroBatch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each trained token, float32[n] and float32[n], at the sampling temperature.

        The head sees only the positions that predict a trained token, and works in float32.
        """
        model = model or self.model
        with self._autocast:
            hidden = model.base_model(  # type: ignore[operator]
                input_ids=micro_batch.input_ids,
                position_ids=micro_batch.positions,
                attention_mask=micro_batch.attention_mask(),
                use_cache=False,
            ).last_hidden_state
        head = model.get_output_embeddings()  # type: ignore[operator]
        wanted = hidden[micro_batch.rows, micro_batch.columns].float()
        logits = nn.functional.linear(wanted, head.weight.float()) / self._config.rollout.temperature
        logprobs = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.loss.entropy_bonus > 0):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, micro_batch.targets[:, None]).squeeze(-1), entropy

    def rendezvous(self, world_size: int) -> Rendezvous:
        """Opens the meeting point of a new broadcast group, on this node; `join` then enters it as rank 0."""
        timeout_s = self._config.weights.timeout_s
        self._where, self._store = open_rendezvous(self._address, world_size, timeout_s, self._backend)
        return self._where

    def join(self) -> None:
        """Blocks until every engine has joined."""
        if self._group is not None:
            self._group.leave()
        self._group = BroadcastGroup(self._where, 0, self._address, self._store)

    def prepare(self) -> None:
        """Gets the current weights ready to leave, while engines still generate."""
        if self._group is None:
            raise RuntimeError("prepare() before join()")
        self._outgoing = Outgoing(self.buckets, dict(self.model.named_parameters()), self._group.device)

    def broadcast(self) -> str:
        """Sends the prepared weights to every engine; returns their digest."""
        if self._group is None or self._outgoing is None:
            raise RuntimeError("broadcast() before join() and prepare()")
        outgoing, self._outgoing = self._outgoing, None
        return outgoing.send(self._group)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as named tensors, for a checkpoint; the weights are the model's own."""
        names = [name for name, _ in self.model.named_parameters()]
        states = self.optimizer.state_dict()["state"]
        return {f"{names[index]}.{key}": value for index, values in states.items() for key, value in values.items()}

    def load_state(self, tensors: dict[str, Tensor], version: Version) -> None:
        """The inverse of `state`."""
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self.model.named_parameters()):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state.setdefault(index, {})[key] = tensors[f"{name}.{key}"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.version = version

    def _make_room(self) -> None:
        """The engines take back the memory that the step needed."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def _backward(self, micro_batch: MicroBatch, ledger: _Ledger) -> None:
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self.score(micro_batch, self._reference)[0]
        logprobs, entropy = self.score(micro_batch)
        columns = Columns(
            logprobs=logprobs,
            behavior_logprobs=micro_batch.behavior_logprobs,
            # One optimizer step a batch: the policy at the start of the update is the policy being updated.
            proximal_logprobs=logprobs.detach() if self.loss.needs_proximal else None,
            reference_logprobs=reference,
            advantages=micro_batch.advantages,
            normalizers=micro_batch.normalizers,
            sequence=micro_batch.sequence,
            lag=self.version - micro_batch.versions,
            num_sequences=micro_batch.num_sequences,
        )
        loss, outcome = policy_loss(columns, self.loss)
        if self.loss.entropy_bonus > 0:
            loss = loss - self.loss.entropy_bonus * (micro_batch.normalizers * entropy).sum()
        loss.backward()
        ledger.add(columns, outcome, entropy)


@dataclass(slots=True)
class _Ledger:
    """Detached columns of a step's micro-batches, put together for the diagnostics."""

    columns: list[Columns] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)

    def add(self, columns: Columns, outcome: Outcome, entropy: Tensor) -> None:
        self.columns.append(columns)
        self.outcomes.append(outcome)
        self.entropies.append(entropy.detach())

    def metrics(self, batch: Batch) -> dict[str, float]:
        entropy = float(torch.cat(self.entropies).mean())
        return diagnose(self.columns, self.outcomes, entropy) | {
            "learner/num_tokens": float(batch.num_tokens),
            "learner/row_fill": batch.fill,
        }


class _GradientWatch:
    """Cosine of successive gradients on a fixed random slice of coordinates: staleness shows as values near 1."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(parameter.numel() for parameter in model.parameters())
        share = min(1.0, _NUM_WATCHED / total)
        self._slices = [
            (parameter, torch.randint(parameter.numel(), (math.ceil(parameter.numel() * share),), generator=generator))
            for parameter in model.parameters()
        ]
        self._before: Tensor | None = None

    def cosine(self) -> float:
        """Against the step before; nan on the first."""
        now = torch.cat(list(self._values()))
        before, self._before = self._before, now
        return math.nan if before is None else float(nn.functional.cosine_similarity(now, before, dim=0))

    def _values(self) -> Iterator[Tensor]:
        for parameter, index in self._slices:
            if parameter.grad is not None:
                yield parameter.grad.flatten()[index.to(parameter.device)].float()


def row_length(config: Config, max_prompt_tokens: int) -> int:
    """Tokens of a packed row: the configured length, or the longest trajectory that can occur."""
    return max(config.learner.row_tokens, max_prompt_tokens + config.rollout.max_new_tokens)
