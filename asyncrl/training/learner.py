"""The learner: model, optimizer, one optimizer step per batch, and the weights that go out.

gradient(groups): pack -> per micro-batch: forward, loss, backward -> clip -> diagnostics
apply():          AdamW -> version + 1 -> metrics

The weights change in `apply` alone, so those of one version can leave while the gradient of the next one is computed.

A learner of several ranks is this on each of them, with the model split between them (`sharding.py`). Every rank takes
the same groups and trains its share; calls that say "every rank" wait for the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asyncrl.algo.diagnostics import learning_rate_factor
from asyncrl.algo.loss import Columns, policy_loss, second_moment_bound
from asyncrl.config import out_of_memory as memory
from asyncrl.config.schema import Config
from asyncrl.training.flops import FlopCounter
from asyncrl.training.forward import Forward, uses_bfloat16
from asyncrl.training.lora import Adapters
from asyncrl.training.model_advantages import shape
from asyncrl.training.packing import Batch, MicroBatch, pack
from asyncrl.training.scoring import check_lengths
from asyncrl.training.sharding import Ranks, before_pass, collect, split_like
from asyncrl.training.step_metrics import GradientWatch, Seen, measure, speed
from asyncrl.types import Trajectory, Version
from asyncrl.weights.broadcast import Audience, Rendezvous
from asyncrl.weights.buckets import Bucket, make_buckets
from asyncrl.weights.dtensor import whole
from asyncrl.weights.sender import Sender


@dataclass(frozen=True, slots=True)
class _Gradient:
    """A gradient that was computed and not yet applied: what it was made of, its norm, and what it tells."""

    batch: Batch
    norm: float
    metrics: dict[str, float]
    seconds: float


class Learner:
    """Owns the training copy of the model, float32. One call at a time, but for what `prepare` says."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        row_tokens: int,
        *,
        reference: nn.Module | None = None,
        critic: nn.Module | None = None,
        address: str = "127.0.0.1",
        backend: str = "gloo",
        ranks: Ranks | None = None,
    ) -> None:
        """`row_tokens`: length of a packed row, at least that of the longest trajectory that can occur. `reference`:
        the frozen model that a KL term is taken against; `critic`: the model of a critic of its own; `address` and
        `backend`: this node's own, for the broadcast group, and what that group runs on. `ranks`: this rank among the
        learner's; of several, the first gives the whole models and the others at least empty ones, and each keeps its
        part on the ranks' device.
        """
        self.version: Version = 0
        self.model = model
        self.loss = config.loss
        self._config = config
        self._row_tokens = row_tokens
        self.ranks = ranks = ranks or Ranks()
        bfloat16 = uses_bfloat16(config, model, ranks)
        self.adapters = Adapters(model, config.lora, bfloat16=bfloat16) if config.lora.rank else None
        self._num_flops = FlopCounter(model)
        forward = Forward(config, model, row_tokens, ranks, adapters=self.adapters, reference=reference, critic=critic)
        self.attention, self._longest, self._holds = forward.attention, forward.longest, forward.holds
        self._scorer, self._reference, self._critic = forward.policy, forward.reference, forward.critic
        self._device = next(model.parameters()).device
        settings = config.learner
        self.optimizer = torch.optim.AdamW(
            self._trained().values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=self._device.type == "cuda",
        )
        self.buckets: list[Bucket] = make_buckets(
            self.published().items(), config.rollout.dtype, int(config.weights.bucket_mb * 2**20)
        )
        self._sender = Sender(address, backend, config.weights.timeout_s, is_first=ranks.is_first)
        self._gradient: _Gradient | None = None
        self._watch = GradientWatch(model, ranks)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def step(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """`gradient` and `apply` in one."""
        self.gradient(groups)
        return self.apply()

    def gradient(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """The gradient of one optimizer step on whole groups, on every rank; the weights stay what they are.

        Raises `OutOfMemory` with the settings to change where memory does not suffice."""
        with memory.told("the learner's gradient", memory.learner_remedies(self._config), "the learner"):
            self._make_gradient(groups)

    def _make_gradient(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        began, varlen = time.perf_counter(), self.attention == "varlen"
        settings = self._config.learner
        if self._longest is not None:
            check_lengths(self._longest, groups)
        batch = pack(
            groups,
            self.loss,
            # Without a mask a row may be as long as the micro-batch, and hardly any place is left empty.
            row_tokens=max(self._row_tokens, settings.micro_batch_tokens) if varlen else self._row_tokens,
            share_prompts=not varlen,
            micro_batch_tokens=settings.micro_batch_tokens,
            max_new_tokens=self._config.rollout.max_new_tokens,
            mask_truncated=self._config.algorithm.mask_truncated,
            rank=self.ranks.rank,
            num_ranks=self.ranks.num_ranks,
            overlong_tail=self._config.algorithm.overlong_tail,
        )
        parts, shaped = shape(
            batch,
            [micro_batch.to(self._device) for micro_batch in batch.micro_batches],
            self.loss,
            self._config.critic,
            reference=self._reference,
            critic=self._critic,
            ranks=self.ranks,
        )
        bound = self._m2_bound(parts) if self.loss.trust == "m2" else None
        self.optimizer.zero_grad(set_to_none=True)
        seen = []
        for number, part in enumerate(parts, 1):
            if self._holds:
                before_pass(self._scorer, last=number == len(parts))
            seen.append(self._backward(part, bound))
        cosine = self._watch.cosine()  # before the norm is waited for: its many small kernels are issued in that time
        norm = float(whole(nn.utils.clip_grad_norm_(self._trained().values(), settings.max_grad_norm)))
        told = {"gradient/norm": norm, "gradient/cosine": cosine}
        metrics = measure(seen, batch, self.ranks) | shaped | told
        self._gradient = _Gradient(batch, norm, metrics, time.perf_counter() - began)

    def apply(self) -> dict[str, float]:
        """The optimizer step of the gradient that was computed. The version goes up by one if it is finite.

        Returns the metrics of the step over all ranks, at the first one; nothing elsewhere. Every rank.
        """
        if self._gradient is None:
            raise RuntimeError("apply() before gradient()")
        began = time.perf_counter()
        made, self._gradient = self._gradient, None
        factor = self.ranks.share(learning_rate_factor(self.loss, made.metrics) if self.ranks.is_first else 0.0)
        learning_rate = self._config.learner.learning_rate * self._warm() * factor
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        if math.isfinite(made.norm):  # else one such number would be in every weight for ever after
            with memory.told("the optimizer's step", memory.learner_remedies(self._config), "the learner"):
                self.optimizer.step()
            self.version += 1
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # from here on any stream may read the weights
        seconds = made.seconds + time.perf_counter() - began
        rates = speed(made.batch, seconds, self._num_flops, self._device, self.ranks)
        if self._config.rollout.release_memory:
            self._make_room()
        return made.metrics | rates | {"gradient/learning_rate": learning_rate} if self.ranks.is_first else {}

    def _warm(self) -> float:
        """Share of the learning rate: 0 while a critic learns alone, then rising in a line to 1."""
        before = self._config.critic.warmup_steps if self._critic else 0
        return min(1.0, max(0, self.version + 1 - before) / max(self._config.learner.warmup_steps, 1))

    def score(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each trained token, float32[n] and float32[n], at the sampling temperature.

        Of several ranks that hold their weights (learner.reshard) only within a step, whose last pass lets go of them.
        """
        logprobs, entropy = self._scorer(micro_batch)
        return logprobs, entropy

    def rendezvous(self, world_size: int, audience: Audience = "rollouts") -> Rendezvous:
        """Opens the meeting point of a new broadcast group, on this node; `join` then enters it as rank 0."""
        return self._sender.rendezvous(world_size, audience)

    def join(self, audience: Audience = "rollouts") -> None:
        """Blocks until every engine has joined."""
        self._sender.join(audience)

    def prepare(self, audience: Audience = "rollouts") -> None:
        """Gets the current weights ready to leave, while engines still generate. Every rank.

        With one rank, this and `broadcast` may run in a thread of their own beside `gradient`.
        """
        bucket = f"lower weights.bucket_mb ({self._config.weights.bucket_mb:g}, of which two exist)"
        with memory.told("a weight update", [bucket, *memory.learner_remedies(self._config)], "the learner"):
            self._sender.prepare(audience, self.buckets, self.published())

    def broadcast(self, audience: Audience = "rollouts") -> str:
        """Sends the prepared weights to every engine, from the first rank; returns their digest there. Every rank."""
        return self._sender.broadcast(audience)

    def published(self) -> Mapping[str, Tensor]:
        """What an update sends, as named tensors; split ones where there are several ranks."""
        return self.adapters.published() if self.adapters else dict(self.model.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """Full weights and buffers as named tensors at the first rank, for a checkpoint; tied ones once. Every rank."""
        once: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            once.setdefault(id(tensor), (name, tensor))
        named = dict(once.values())
        tensors = self.adapters.merged(named) if self.adapters else named
        return collect(tensors.items(), self.ranks, to_host=tensors is not named)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state and critic as named tensors, for a checkpoint, at the first rank. Every rank."""
        names = list(self._trained())
        states = self.optimizer.state_dict()["state"]
        named = [(f"{names[index]}.{key}", value) for index, values in states.items() for key, value in values.items()]
        critic = self._critic.state() if self._critic else {}
        return collect(named, self.ranks) | {f"critic.{name}": tensor for name, tensor in critic.items()}

    def load_state(self, tensors: dict[str, Tensor], version: Version) -> None:
        """The inverse of `state`, from the full tensors, whatever number of ranks saved them."""
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self._trained().items()):
            if f"{name}.step" not in tensors:  # it never had a gradient, as before the first step
                continue
            moments = {key: split_like(tensors[f"{name}.{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
            state[index] = moments | {"step": tensors[f"{name}.step"]}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if self._critic:
            start = "critic."
            self._critic.load_state({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        self.version = version

    def _make_room(self) -> None:
        """The engines take back the memory that the step needed."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    @torch.no_grad()
    def _m2_bound(self, parts: Sequence[MicroBatch]) -> float | None:
        """The bound of trust "m2" over the whole step and every rank, for one more forward pass; None where the loss
        sees the whole step anyhow."""
        if self.loss.needs_proximal or len(parts) == self.ranks.num_ranks == 1:
            return None
        moved = [((self.score(part)[0] - part.behavior_logprobs).cpu(), part.advantages.cpu()) for part in parts]
        of_ranks = [pair for pairs in self.ranks.gather(moved) for pair in pairs]
        if not self.ranks.is_first:
            return self.ranks.share(0.0)
        log_ratio, advantages = (torch.cat(columns) for columns in zip(*of_ranks, strict=True))
        return self.ranks.share(second_moment_bound(log_ratio, advantages, self.loss))

    def _backward(self, micro_batch: MicroBatch, m2_bound: float | None) -> Seen:
        reference = micro_batch.reference_logprobs
        if reference is None and self._reference is not None:
            with torch.no_grad():
                reference = self._reference(micro_batch)[0]
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
        loss, outcome = policy_loss(columns, self.loss, m2_bound)
        if self.loss.entropy_bonus > 0:
            loss = loss - self.loss.entropy_bonus * (micro_batch.normalizers * entropy).sum()
        loss.backward()
        return Seen(columns, outcome, entropy.detach())


def row_length(config: Config, max_prompt_tokens: int) -> int:
    """Tokens of a packed row: the configured length, or the longest trajectory that can occur."""
    return max(config.learner.row_tokens, max_prompt_tokens + config.rollout.max_new_tokens)
